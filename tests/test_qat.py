"""lib/qat.py and quantize.py --method qat: from a quantized network to a better one of its kind."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import quantize
import train
from lib import checkpoint, engine, pruning, ptq, qat, quantizers
from lib.config import UserError
from lib.evaluation import evaluate
from lib.logs import Log
from lib.metrics import weight_layers
from lib.nnz import coder
from lib.quantizers import Quantizer, per_row

MIXED = ptq.make_scheme(3, 4, method="qat", last_act_bits=8,
                   layer_bits={"features.0.0": 8, "features.4.conv.2": 32})  # fmt: skip


@pytest.fixture(scope="module")
def quantized(small, pixels):
    """(scheme, network, latent weights) of ptq; the network a copy each time."""
    made = {}

    def make(scheme: dict):
        key = json.dumps(scheme)
        if key not in made:
            made[key] = ptq.quantize(small(0), pixels, scheme)
        return scheme, copy.deepcopy(made[key][0]), made[key][1]

    return make


def begun(quantized, scheme=MIXED):
    scheme, model, latent = quantized(scheme)
    qat.begin(model, scheme, latent)
    return model


def steps(model, images, count: int, lr: float, after=lambda: None) -> list[float]:
    """Losses of so many steps on ten classes that follow from the images."""
    labels = images.mean((2, 3)).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(count):
        loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    model.eval()
    return losses


def trained_layers(model) -> list:
    return [m for m in weight_layers(model).values() if hasattr(m, "log_scale")]


# ---- begin and finish ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("weight_bits", [2, 4, 8])
def test_training_begins_with_the_network_that_ptq_made(quantized, pixels, weight_bits):
    scheme, model, latent = quantized(ptq.make_scheme(weight_bits, 32))
    weights = {n: layer.weight.clone() for n, layer in weight_layers(model).items()}
    before = model(pixels)
    qat.begin(model, scheme, latent)
    assert (model(pixels) - before).abs().max() <= 1e-6 * before.abs().max()
    moved = 0
    for name, layer in weight_layers(model).items():
        step = per_row(layer.log_scale.exp(), layer.weight)
        levels = quantizers.to_levels(layer.weight, step, weight_bits)
        torch.testing.assert_close(levels * step, weights[name], rtol=1e-6, atol=0)
        assert torch.equal(layer.weight == 0, latent[name] == 0)  # so that masks know the pruned
        # No farther from where it was before rounding than its level is.
        now, then = (layer.weight - latent[name]).abs(), (weights[name] - latent[name]).abs()
        assert (now <= then + 1e-6 * step).all()
        moved += int((now < then).sum())
    assert moved > 100


@torch.no_grad()
def test_steps_are_kept_and_learned_but_for_the_images(quantized, monkeypatch):
    monkeypatch.setattr(qat, "UNROUNDED", 99)
    scheme, model, latent = quantized(MIXED)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    qat.begin(model, scheme, latent)
    after = model.state_dict()
    learned = {n for n in after if n.endswith("log_scale")}
    assert {n for n, _ in model.named_parameters()} >= learned and "image.step" in after
    for name in learned:
        owner = name.removesuffix("log_scale")
        old = before.get(f"{owner}step", before.get(f"{owner}weight_scale"))
        torch.testing.assert_close(after[name].exp(), old, rtol=2e-6, atol=0)
    places = sum(isinstance(m, Quantizer) for m in model.modules()) - 1
    assert len(learned) == places + len(weight_layers(model)) - 1  # one layer is at 32 bits


def test_finished_is_what_a_file_makes_of_its_state(quantized, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(qat, "UNROUNDED", 99)
    model = begun(quantized)
    mask = pruning.Mask(model)
    steps(model, pixels, 5, 1e-2, mask.apply)
    with torch.no_grad():
        expected = model(pixels)
        qat.finish(model)
        assert torch.equal(model(pixels), expected)
    saved = checkpoint.save(
        tmp_path / "x.pth", "quantized", model, quantize.Settings(), None, metrics={}, data={},
        quantization=MIXED,
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(saved.build()(pixels), expected)
    levels = quantizers.integer_state(model.state_dict(), MIXED)
    assert levels["features.4.conv.2.weight"].dtype == torch.float32
    kept = [levels[f"{n}.weight"] for n in weight_layers(model)]
    assert all(not w[m == 0].any() for w, m in zip(kept, mask.masks, strict=True))
    assert not any(torch.signbit(w[w == 0]).any() for w in kept if w.is_floating_point())


@torch.no_grad()
def test_wide_activations_are_not_rounded_until_it_is_finished(quantized, pixels):
    model = begun(quantized, ptq.make_scheme(8, 8))
    target = quantized(ptq.make_scheme(8, 32))[1]
    rounded = qat.finished(model)
    assert not any(hasattr(m, "log_scale") for m in rounded.modules())
    wrong = (rounded(pixels) - model(pixels)).abs().max()
    assert 0 < wrong < 0.3 * target(pixels).std()  # rounding is all that differs, and is small
    signed, unsigned = (
        next(m for m in model.modules() if isinstance(m, Quantizer) and m.signed == sign
             and m is not model.image)
        for sign in (True, False)
    )  # fmt: skip
    x = torch.linspace(-2, 2, 101) * unsigned.high * unsigned.step
    assert torch.equal(signed(x), x)
    torch.testing.assert_close(unsigned(x), x.clamp(0, float(unsigned.high * unsigned.step)))
    qat.finish(model)
    assert torch.equal(model(pixels), rounded(pixels))
    assert all(type(m) is Quantizer for m in model.modules() if isinstance(m, Quantizer))


def test_a_copy_can_be_trained_and_finished(quantized, pixels, monkeypatch):
    """As the averaged weights (--ema) are."""
    monkeypatch.setattr(qat, "UNROUNDED", 99)
    model = begun(quantized)
    other = copy.deepcopy(model)
    steps(model, pixels, 2, 1e-2)
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        expected = model(pixels)
        assert torch.equal(other(pixels), expected)
        qat.finish(other)
        assert torch.equal(other(pixels), expected)


# ---- training ------------------------------------------------------------------------------------


def test_every_weight_and_step_learns(quantized, pixels):
    model = begun(quantized)
    F.cross_entropy(model(pixels), torch.arange(64) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("log_scale") and not (parameter.ndim and not owner.weight.any()):
            assert parameter.grad.any(), name


def test_training_lowers_the_loss_and_holds_the_zeros(quantized, pixels):
    model = begun(quantized, ptq.make_scheme(2, 4, method="qat"))
    zeros = [layer.weight == 0 for layer in weight_layers(model).values()]
    assert sum(int(z.sum()) for z in zeros) > 500
    losses = steps(model, pixels, 25, 1e-2, pruning.Mask(model).apply)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for layer, zero in zip(weight_layers(model).values(), zeros, strict=True):
        assert not layer.weight[zero].any()


# ---- quantize.py ---------------------------------------------------------------------------------

FLAGS = ["--method=qat", "--epochs=2", "--batch-size=32", "--calibration=32", "--weight-bits=3",
         "--act-bits=4", "--lr=1e-2", "--ema=0.9", "--val-size=50"]  # fmt: skip


@pytest.fixture(scope="module")
def parent(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("parent") / "pruned.pth"
    source = {"source": "cifar10", "val_size": 50}
    checkpoint.save(
        path, "pruned", small(0), quantize.Settings(), None, metrics={}, data=source
    )
    return path


def run(tiny, parent, folder, *flags):
    quantize.main([*FLAGS, f"--data={tiny}", f"--parent={parent}", f"--run-dir={folder}", *flags])
    lines = [json.loads(x) for x in (folder / "logs/quantize.jsonl").read_text().splitlines()]
    return checkpoint.load(folder / "checkpoints/quantized.pth"), lines


@pytest.fixture(scope="module")
def whole(tiny, parent, tmp_path_factory):
    return run(tiny, parent, tmp_path_factory.mktemp("whole"))


def test_stage_trains_and_saves_a_network_on_its_grid(tiny, whole, parent):
    saved, lines = whole
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert saved.quantization == ptq.make_scheme(3, 4, method="qat")
    assert saved.settings["folded"] and saved.ancestors[-1]["stage"] == "pruned"
    quantizers.integer_state(saved.state, saved.quantization)
    assert set(saved.metrics) == {"val_correct", "val_total", "gained", "lost"}
    # An epoch is judged as the file that it would become.
    best = max(lines, key=lambda line: line["val_accuracy"])
    assert saved.metrics["val_correct"] == round(best["val_accuracy"] * best["val_total"])
    loaded = evaluate(saved.build(), saved.images(tiny, 50, torch.device("cpu")).val)
    assert loaded.correct == saved.metrics["val_correct"]
    folder = saved.file.parent.parent
    assert (folder / "plots/quantize.png").is_file()
    assert [p.name for p in saved.file.parent.iterdir()] == ["quantized.pth"]


def test_another_network_may_be_the_teacher(tiny, parent, whole, tmp_path):
    start = checkpoint.load(parent)
    other = start.build()
    with torch.no_grad():
        other.classifier[1].weight.neg_()  # it teaches something else
    file = tmp_path / "other.pth"
    checkpoint.save(file, "pruned", other, train.Settings(), None, metrics={}, data=start.data)
    taught, lines = run(tiny, parent, tmp_path, f"--teacher={file}")
    assert "--teacher other.pth" in taught.command
    assert taught.metrics["teacher_sha256"] == checkpoint.load(file).sha256
    assert [a["sha256"] for a in taught.ancestors][-1] == start.sha256  # not the teacher's
    assert lines[1]["train_loss"] > whole[1][1]["train_loss"]
    for flags in (["--distill=0"], ["--method=ptq"]):
        with pytest.raises(SystemExit):
            run(tiny, parent, tmp_path / "bad", f"--teacher={file}", *flags)
    with pytest.raises(UserError, match="quantized.pth is quantized: give an fp32 network"):
        run(tiny, parent, tmp_path / "bad", f"--teacher={whole[0].file}")


def test_a_teacher_of_wide_logits_teaches_what_one_of_the_parents_does(
    tiny, parent, whole, tmp_path
):
    start = checkpoint.load(parent)
    other = start.build()
    with torch.no_grad():
        for parameter in other.classifier.parameters():
            parameter.mul_(3)
    file = tmp_path / "wide.pth"
    checkpoint.save(file, "pruned", other, train.Settings(), None, metrics={}, data=start.data)
    _, lines = run(tiny, parent, tmp_path, f"--teacher={file}")
    for line, expected in zip(lines[1:], whole[1][1:], strict=True):
        assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)


@pytest.mark.parametrize("dies_in", ["the second epoch", "the end"])
def test_resumed_equals_uninterrupted(tiny, parent, whole, tmp_path, monkeypatch, dies_in):
    expected, lines = whole

    def dying(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if dies_in == "the end":
            patch.setattr(checkpoint, "save", dying)
        else:
            patch.setattr(Log, "__call__", dying)  # the state of epoch 1 is written
        with pytest.raises(KeyboardInterrupt):
            run(tiny, parent, tmp_path)
    out = tmp_path / "checkpoints/quantized.pth"
    state_file = out.with_name("quantized.pth.resume")
    assert not out.exists() and state_file.exists()
    resumed, again = run(tiny, parent, tmp_path)
    assert list(resumed.state) == list(expected.state)
    assert all(torch.equal(expected.state[k], resumed.state[k]) for k in expected.state)
    timeless = [
        [{k: v for k, v in x.items() if k not in ("seconds", "images_per_second")} for x in y]
        for y in (again, lines)
    ]
    assert timeless[0] == timeless[1]
    assert not out.with_name("quantized.pth.resume").exists()


def test_the_teacher_is_not_asked_again_and_resuming_changes_nothing(
    tiny, parent, tmp_path, monkeypatch
):
    asked, fold = [], engine.fold

    def count(*_):
        if not torch.is_grad_enabled():  # the network in training is a copy of a folded one, too
            asked.append(1)

    def watched(model):
        folded = fold(model)
        folded.register_forward_hook(count)
        return folded

    monkeypatch.setattr(engine, "fold", watched)
    flags, train_epoch = ("--epochs=3", "--views=1", "--augment=cutout"), engine.train_epoch
    counts = []

    def counting(*args, **kwargs):
        before = len(asked)
        totals = train_epoch(*args, **kwargs)
        counts.append(len(asked) - before)
        return totals

    monkeypatch.setattr(engine, "train_epoch", counting)
    expected, _ = run(tiny, parent, tmp_path / "whole", *flags)
    assert counts[0] > 0 and counts[1:] == [0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(Log, "__call__", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, parent, tmp_path / "broken", *flags)
    counts.clear()
    resumed, _ = run(tiny, parent, tmp_path / "broken", *flags)
    assert counts == [0, 0]  # the state holds them
    assert all(torch.equal(expected.state[k], resumed.state[k]) for k in expected.state)


def test_the_last_epoch_is_kept_if_asked_for(tiny, parent, tmp_path, monkeypatch):
    """Here every epoch is worse than the one before, and than ptq's network."""
    measure, sizes = quantize.Job.measure, iter(range(10_000, 100_000, 10_000))

    def growing(job, *args):
        return dataclasses.replace(measure(job, *args), bytes=next(sizes))

    flags = ("--epochs=2", "--rd-lambda=1", "--distill=0")
    with monkeypatch.context() as patch:
        patch.setattr(quantize.Job, "measure", growing)
        kept, _ = run(tiny, parent, tmp_path / "best", *flags)
        assert kept.quantization["method"] == "ptq"
        sizes = iter(range(10_000, 100_000, 10_000))
        kept, lines = run(tiny, parent, tmp_path / "last", *flags, "--keep=last")
    assert kept.quantization["method"] == "qat" and [x["score"] for x in lines] == [1, 2]
    assert kept.metrics["val_correct"] == round(lines[1]["val_accuracy"] * lines[1]["val_total"])


def test_what_cannot_be_trained_is_refused_before_ptq(tiny, parent, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Log, "__call__", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, parent, tmp_path)
    monkeypatch.setattr(ptq, "quantize", None)
    with pytest.raises(UserError, match="--batch-size 5000 is over the .* training images"):
        run(tiny, parent, tmp_path / "other", "--batch-size=5000")
    with pytest.raises(UserError, match="another run .epochs was 2, is 3.: give its flags"):
        run(tiny, parent, tmp_path, "--epochs=3")


def test_training_is_continued_from_the_same_beginning(
    tiny, parent, whole, tmp_path, monkeypatch
):
    """On another processor, ptq's sums may be rounded otherwise: so it is not run again."""
    with monkeypatch.context() as patch:
        patch.setattr(Log, "__call__", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, parent, tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == [
        "quantized.pth.ptq.resume", "quantized.pth.resume"
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(ptq, "quantize", None)
        resumed, _ = run(tiny, parent, tmp_path)
    assert all(torch.equal(resumed.state[k], tensor) for k, tensor in whole[0].state.items())
    assert [file.name for file in folder.iterdir()] == ["quantized.pth"]


def test_epochs_without_their_beginning_are_refused(tiny, parent, tmp_path, monkeypatch):
    """Whether it is deleted or damaged, --no-resume begins again."""
    with monkeypatch.context() as patch:
        patch.setattr(Log, "__call__", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, parent, tmp_path)
    beginning = tmp_path / "checkpoints/quantized.pth.ptq.resume"
    whole = beginning.read_bytes()
    beginning.unlink()
    with pytest.raises(UserError, match="has no quantized.pth.ptq.resume beside it .*--no-resume"):
        run(tiny, parent, tmp_path)
    beginning.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="quantized.pth.ptq.resume"):
        run(tiny, parent, tmp_path)
    run(tiny, parent, tmp_path, "--no-resume")


def test_ptq_is_not_run_again_for_other_epochs(tiny, parent, tmp_path, monkeypatch):
    """As after a loss that is no longer finite, or no epoch within a budget."""
    with monkeypatch.context() as patch:
        patch.setattr(Log, "__call__", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, parent, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ptq, "quantize", None)
        _, lines = run(tiny, parent, tmp_path, "--epochs=1", "--no-resume")
    assert len(lines) == 1


def in_two_processes(tiny, parent, folder, before: str = "") -> subprocess.CompletedProcess:
    """Run quantize.py as torchrun does. before: code that each process runs first."""
    root = Path(__file__).parent.parent
    script = folder / "quantize.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(root)!r})
import quantize
from lib import config, ptq
{before}
config.run(quantize.main)
""")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
         "--rdzv-endpoint=localhost:0", script, *FLAGS, "--device=cpu", f"--data={tiny}",
         f"--parent={parent}", f"--run-dir={folder}"],
        cwd=root, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_train_one_network(tiny, parent, whole, tmp_path):
    # ptq runs in the main process alone: another one might round otherwise.
    only_main = "if os.environ['RANK'] != '0': ptq.quantize = None"
    run = in_two_processes(tiny, parent, tmp_path, only_main)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("quantized.pth: ") == 1  # one of them writes and says so
    lines = [json.loads(x) for x in (tmp_path / "logs/quantize.jsonl").read_text().splitlines()]
    # The same images in the same global batches as in one process: only their sums are rounded
    # otherwise, from which other levels may follow.
    for line, expected in zip(lines, whole[1], strict=True):
        assert line["epoch"] == expected["epoch"]
        assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)
    saved = checkpoint.load(tmp_path / "checkpoints/quantized.pth")
    quantizers.integer_state(saved.state, saved.quantization)
    best = evaluate(saved.build(), saved.images(tiny, 50, torch.device("cpu")).val)
    assert best.correct == max(round(50 * line["val_accuracy"]) for line in lines)
    assert [p.name for p in saved.file.parent.iterdir()] == ["quantized.pth"]


def test_other_bits_of_a_layer_are_another_run(tiny, parent, tmp_path, monkeypatch):
    """Though the file that says so has the same name."""
    bits = tmp_path / "bits.json"
    bits.write_text('{"features.3.conv.1.0": 8}')
    with monkeypatch.context() as patch:
        patch.setattr(Log, "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny, parent, tmp_path, f"--layer-bits={bits}")
    bits.write_text('{"features.3.conv.1.0": 2}')
    with pytest.raises(checkpoint.UserError, match="is the state of another run"):
        run(tiny, parent, tmp_path, f"--layer-bits={bits}")


# ---- for a small file ----------------------------------------------------------------------------


def test_short_side_values_stay_short(quantized, pixels, monkeypatch):
    monkeypatch.setattr(qat, "UNROUNDED", 99)
    model = begun(quantized, ptq.make_scheme(3, 8))
    grids = {n: layer.bias_scale for n, layer in weight_layers(model).items() if n[0] == "f"}
    before = copy.deepcopy(model.state_dict())
    steps(model, pixels, 5, 1e-2, pruning.Mask(model).apply)
    with torch.no_grad():
        for name, grid in grids.items():
            model.get_submodule(name).bias[0] = -0.1 * grid
        expected = model(pixels)
        qat.finish(model)
        assert torch.equal(model(pixels), expected)
    for name, layer in weight_layers(model).items():
        live = layer.weight.flatten(1).any(1)
        assert torch.equal(quantizers.round_mantissa(layer.weight_scale, 3), layer.weight_scale)
        assert (layer.weight_scale[~live] == 1).all()
        if name in grids:
            assert torch.equal(torch.round(layer.bias / grids[name]) * grids[name], layer.bias)
        assert not torch.signbit(layer.bias[layer.bias == 0]).any()  # -0.0 is on no integer grid
        assert not torch.equal(layer.bias, before[f"{name}.bias"])


@pytest.mark.parametrize(("distill", "temperature"), [(0.0, 1.0), (1.0, 2.0), (0.4, 3.0)])
def test_what_an_error_of_the_logits_costs_in_loss(distill, temperature):
    """Beside the loss itself, with labels as the network's probabilities have them."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 10, generator=generator, dtype=torch.float64)
    error = 0.1 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    error -= error.mean(1, keepdim=True)  # what all logits share changes nothing
    error /= error.square().sum(1).mean().sqrt() * 10
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    recipe = engine.Recipe(1, distill=distill, temperature=temperature)
    rise = [
        float(engine._loss(logits + sign * error, labels, logits, recipe)) for sign in (1, 0, -1)
    ]
    measured = (rise[0] - 2 * rise[1] + rise[2]) / 2 * 100
    found = qat.loss_per_squared_error(logits, distill, temperature)
    assert found == pytest.approx(measured, rel=0.05)


def test_the_rate_term_makes_levels_cheaper(quantized, pixels):
    """Beside the same training without it; and its estimate falls with the coder's bytes."""
    sizes, estimates = [], []
    for loss_per_bit in (0.0, 3e-4):
        model = begun(quantized, ptq.make_scheme(4, 8))
        mask = pruning.Mask(model)
        labels = pixels.mean((2, 3)).argmax(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(20):
            loss = F.cross_entropy(model(pixels), labels) + loss_per_bit * qat.network_bits(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mask.apply()
        with torch.no_grad():
            estimates.append(float(qat.network_bits(model)))
            qat.finish(model)
        levels = quantizers.integer_state(model.state_dict(), ptq.make_scheme(4, 8))
        matrices = [levels[f"{n}.weight"].flatten(1).numpy() for n in weight_layers(model)]
        sizes.append(len(coder.encode(matrices, [coder.EXPAND] * len(matrices))))
    assert sizes[1] < 0.9 * sizes[0] and estimates[1] < 0.9 * estimates[0]


def test_stage_spends_fewer_bytes_at_a_lambda(tiny, parent, whole, tmp_path):
    saved, lines = run(tiny, parent, tmp_path, "--rd-lambda=100")
    counts = [sum(int(t.count_nonzero()) for n, t in x.state.items() if n.endswith(".weight"))
              for x in (saved, whole[0])]  # fmt: skip
    assert counts[0] < 0.9 * counts[1] and len(lines) == 2
