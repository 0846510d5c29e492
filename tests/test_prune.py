"""prune.py and lib/pruning.py: what goes, what stays, and what an interruption may not lose."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prune
import train
from autoaugment import augmentation
from lib import checkpoint, data, engine, pruning, ptq
from lib.compaction import compact, take
from lib.config import UserError
from lib.evaluation import BrokenNetworkError, Evaluation, evaluate
from lib.folding import fold
from lib.metrics import weight_layers
from models.mobilenetv2 import MobileNetV2, standard

ROOT = Path(__file__).parent.parent
FLAGS = ["--epochs=2", "--batch-size=32", "--max-drop=100", "--rounds=3", "--target=0.8"]


@pytest.fixture(scope="module")
def baseline(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    train.main(["--epochs=1", "--batch-size=32", "--width=0.1", "--downsample=8", "--lr=0.05",
                f"--data={tiny}", f"--run-dir={folder}"])  # fmt: skip
    return folder / "checkpoints/baseline.pth"


def run(tiny, baseline, folder, *flags):
    prune.main([*FLAGS, f"--data={tiny}", f"--parent={baseline}", f"--run-dir={folder}", *flags])
    lines = [json.loads(x) for x in (folder / "logs/prune.jsonl").read_text().splitlines()]
    return checkpoint.load(folder / "checkpoints/pruned.pth"), lines


@pytest.fixture(scope="module")
def whole(tiny, baseline, tmp_path_factory):
    """An uninterrupted run: (checkpoint, log)."""
    return run(tiny, baseline, tmp_path_factory.mktemp("whole"))


def test_lamp_is_its_definition_and_loses_no_layer():
    model = MobileNetV2(standard(0.1))
    with torch.no_grad():  # a layer of tiny weights, which plain magnitude would lose whole
        model.features[18][0].weight.mul_(1e-4)
    before = {n: x.weight.detach().clone() for n, x in weight_layers(model).items()}
    scores = []
    for weight in before.values():
        squares = weight.double().square().flatten()
        scores += [float(s / squares[squares >= s].sum()) for s in squares]
    total, keep = len(scores), 300
    pruning.keep_best(model, keep, "lamp")
    after = torch.cat([x.weight.flatten() for x in weight_layers(model).values()])
    expected = torch.tensor(scores).argsort(descending=True)[:keep]
    assert set(after.nonzero().flatten().tolist()) == set(expected.tolist())
    assert all(x.weight.any() for x in weight_layers(model).values()) and keep < total / 100
    for name, layer in weight_layers(model).items():  # the largest of each layer
        kept = layer.weight != 0
        assert before[name][kept].abs().min() >= before[name][~kept].abs().max()


def ranks(x: torch.Tensor) -> torch.Tensor:
    return x.argsort().argsort().double()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def outputs_of(model, name: str, images) -> torch.Tensor:
    """What a layer of the network gives."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda *x: seen.append(x[2]))
    model(images)
    hook.remove()
    return seen[0].clone()  # a ReLU6 after it may work in place


def test_obd_scores_say_what_the_loss_of_a_weight_does_to_the_logits(small, pixels):
    """Each weight of a sample is left out, and the batch norm after it takes up the constant part
    of the error, as it does in fine-tuning."""
    model = fold(small(0))
    scores = pruning.weight_errors(small(0), pixels)
    with torch.no_grad():
        expected, found, guessed, sizes = model(pixels), [], [], []
        for name, layer in weight_layers(model).items():
            alive = layer.weight.nonzero()
            for at in map(tuple, alive[:: max(1, len(alive) // 6)].tolist()):
                weight, bias = layer.weight[at].item(), layer.bias.clone()
                before = outputs_of(model, name, pixels)
                layer.weight[at] = 0
                change = (before - outputs_of(model, name, pixels)).movedim(1, -1)
                change = change.flatten(0, -2).mean(0)
                layer.bias += change
                error = model(pixels) - expected
                found.append((error - error.mean(1, keepdim=True)).square().sum(1).mean().item())
                layer.weight[at], layer.bias[:] = weight, bias
                guessed.append(scores[name][at].item())
                sizes.append(abs(weight))
    found, guessed, sizes = (torch.tensor(x) for x in (found, guessed, sizes))
    assert correlation(found, guessed) > 0.9
    assert correlation(found, sizes) < correlation(found, guessed) - 0.1


def test_a_weight_alone_in_its_row_takes_more_bits_than_one_among_others():
    weight = torch.zeros(8, 16)
    weight[:4, :8] = 1.0
    weight[6, 12] = 1.0
    bits = pruning._bits_over_zero(weight)
    assert bits.shape == weight.shape and bits.min() >= 1
    assert bits[6, 12] > bits[0, 0] + 3
    assert bits[0, 9] > bits[0, 0] and bits[5, 0] > bits[0, 0]


@pytest.mark.parametrize("score", ["magnitude", "obd"])
def test_each_score_prunes_to_the_target(tiny, baseline, tmp_path, score):
    pruned, lines = run(tiny, baseline, tmp_path, f"--score={score}", "--no-compact")
    assert lines[-1]["sparsity"] == pytest.approx(0.8, abs=0.002)


def test_the_last_round_may_be_longer(tiny, baseline, tmp_path):
    _, lines = run(tiny, baseline, tmp_path, "--epochs=1", "--rounds=2", "--last-epochs=3")
    assert [len(line["epochs"]) for line in lines] == [0, 1, 3]
    steps = 290 // 32  # an epoch; one schedule over all
    rates = [0.05 * (1 - (number * steps - 1) / (3 * steps)) for number in (1, 2, 3)]
    assert [line["lr"] for line in lines[2]["epochs"]] == pytest.approx(rates)


def test_a_pruned_parent_is_pruned_further_and_learns_from_the_dense_network(
    tiny, baseline, whole, tmp_path
):
    first, flags = whole[0], ("--rounds=1", "--epochs=1", "--target=0.9")
    own, _ = run(tiny, first.file, tmp_path / "own", *flags)
    taught, lines = run(tiny, first.file, tmp_path / "taught", *flags, f"--teacher={baseline}")
    assert 0.9 <= lines[1]["sparsity"] < 0.92  # of the first network's weights
    assert [a["sha256"] for a in taught.ancestors] == [
        checkpoint.load(baseline).sha256, first.sha256
    ]  # fmt: skip
    assert taught.command.endswith("--teacher baseline.pth")
    assert any(not torch.equal(own.state[n], t) for n, t in taught.state.items())
    quantized = tmp_path / "q.pth"
    checkpoint.save(quantized, "quantized", first.build(), train.Settings(), None, metrics={},
                    data={}, quantization=ptq.make_scheme(8, 8))  # fmt: skip
    with pytest.raises(UserError, match="q.pth is quantized: give an fp32 network as --teacher"):
        run(tiny, first.file, tmp_path / "bad", f"--teacher={quantized}")


@pytest.mark.parametrize("share", [1.0, 0.7, 0.044, 0.001])
def test_exactly_the_largest_weights_of_all_layers_stay(share):
    model = MobileNetV2(standard(0.1))
    before = torch.cat([x.weight.detach().flatten() for x in weight_layers(model).values()])
    keep = round(share * len(before))
    pruning.keep_best(model, keep, "magnitude")
    after = torch.cat([x.weight.detach().flatten() for x in weight_layers(model).values()])
    stay = after != 0
    assert int(stay.sum()) == keep and torch.equal(after[stay], before[stay])
    if keep < len(before):
        assert before[~stay].abs().max() <= before[stay].abs().min()


def test_equal_magnitudes_are_still_counted_exactly_and_pruning_only_removes():
    model = MobileNetV2(standard(0.1))
    with torch.no_grad():
        for layer in weight_layers(model).values():
            layer.weight.fill_(0.5)
    total = sum(layer.weight.numel() for layer in weight_layers(model).values())
    supports = []
    for keep in (total * 6 // 10, total * 3 // 10):
        pruning.keep_best(model, keep, "magnitude")
        supports.append(torch.cat([x.weight.flatten() != 0 for x in weight_layers(model).values()]))
        assert int(supports[-1].sum()) == keep
    assert (supports[1] <= supports[0]).all()


@pytest.mark.parametrize("flags", [[], ["--no-compact"]])
def test_pruned_weights_stay_at_positive_zero(tiny, baseline, tmp_path, flags):
    pruned, lines = run(tiny, baseline, tmp_path, *flags)
    dense = checkpoint.load(baseline)
    weights = [v for k, v in pruned.state.items() if k.endswith("weight") and v.ndim > 1]
    assert not any(torch.signbit(w[w == 0]).any() for w in weights)
    nonzeros = sum(int((w != 0).sum()) for w in weights)
    # Never more than the schedule leaves. Compaction takes some that lead nowhere, and a weight
    # may become zero by its own chance.
    assert nonzeros <= round(0.2 * dense.weights)
    assert nonzeros == pytest.approx(0.2 * dense.weights, rel=0.3 if not flags else 0.001)
    assert lines[-1]["sparsity"] == pytest.approx(1 - nonzeros / dense.weights)
    assert pruned.original_weights == dense.weights
    assert pruned.ancestors[0]["sha256"] == dense.sha256
    if flags:
        assert pruned.settings == dense.settings
    else:
        assert pruned.weights < dense.weights
        macs = [line["macs"] for line in lines]
        assert macs == sorted(macs, reverse=True) and macs[-1] < macs[0]


def test_schedules():
    assert pruning.cubic(0.1, 0.9, 0, 5) == pytest.approx(0.1)
    assert pruning.cubic(0.1, 0.9, 5, 5) == 0.9
    steps = [pruning.cubic(0, 0.95, i, 8) for i in range(9)]
    gains = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert gains == sorted(gains, reverse=True)
    # The course report: 14 rounds of 20% are 95.60%.
    assert pruning.geometric(0, 0.2, 14) == pytest.approx(0.9560, abs=1e-4)


@pytest.mark.parametrize("dies_in", ["a round", "writing a round", "the end"])
def test_resumed_equals_uninterrupted(tiny, baseline, whole, tmp_path, monkeypatch, dies_in):
    expected, lines = whole
    folder, calls = tmp_path, 0

    def dying(original, at):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        if dies_in == "a round":  # epochs are 1..6, each evaluated, and each round once more
            patch.setattr(engine, "evaluate", dying(evaluate, 6))
        elif dies_in == "writing a round":  # after the state of round 1 was written
            patch.setattr(prune.logs.Log, "__call__", dying(prune.logs.Log.__call__, 1))
        else:
            patch.setattr(checkpoint, "save", dying(checkpoint.save, 1))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, baseline, folder)
    assert not (folder / "checkpoints/pruned.pth").exists()
    resumed, again = run(tiny, baseline, folder)
    assert all(torch.equal(expected.state[k], resumed.state[k]) for k in expected.state)
    assert [x["round"] for x in again] == [x["round"] for x in lines] == [0, 1, 2, 3]
    assert [x["val_correct"] for x in again] == [x["val_correct"] for x in lines]
    for line in again:  # of all epochs, those before the interruption too; rounded
        assert line["seconds"] >= sum(epoch["seconds"] for epoch in line["epochs"]) - 0.1
    assert not list((folder / "checkpoints").glob("*.resume"))


def test_an_interrupted_round_goes_on_from_the_network_that_it_pruned(
    tiny, baseline, whole, tmp_path, monkeypatch
):
    """Scores that are computed again may be rounded otherwise, on another device for example."""
    fit, keep_best, fits, prunings = engine.fit, pruning.keep_best, [], []

    def interrupted(*args, **kwargs):
        fits.append(0)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, baseline, tmp_path)
    monkeypatch.setattr(pruning, "keep_best",
                        lambda *args: prunings.append(args[1]) or keep_best(*args))  # fmt: skip
    resumed, _ = run(tiny, baseline, tmp_path)
    # The first attempt at round 3.
    assert prunings[0] == round((1 - pruning.cubic(0, 0.8, 3, 3)) * resumed.original_weights)
    assert all(torch.equal(whole[0].state[k], resumed.state[k]) for k in resumed.state)


def test_two_processes_fine_tune_one_network(tiny, baseline, tmp_path):
    """Each process computes the scores of obd, perhaps rounded otherwise: the first one's count."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import prune
from lib import pruning
errors = pruning.weight_errors
def disturbed(*args):
    factor = 1 + dist.get_rank()  # the second process would choose other weights
    return {{n: e ** factor for n, e in errors(*args).items()}}
pruning.weight_errors = disturbed
prune.main(sys.argv[1:])
"""
    script = tmp_path / "disturbed.py"
    script.write_text(code)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
         "--rdzv-endpoint=localhost:0", script, "--score=obd", "--rounds=2", "--epochs=1",
         "--batch-size=32", "--target=0.8", "--max-drop=100", "--no-sync-batchnorm", "--device=cpu",
         f"--data={tiny}", f"--parent={baseline}", f"--run-dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [json.loads(x) for x in (tmp_path / "logs/prune.jsonl").read_text().splitlines()]
    assert [x["round"] for x in lines] == [0, 1, 2] and lines[-1]["sparsity"] >= 0.8


def test_a_state_of_an_earlier_version_is_refused(tiny, baseline, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "fit", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny, baseline, tmp_path)
    file = tmp_path / "checkpoints/pruned.pth.resume"
    state = checkpoint.read(file)
    checkpoint.write(file, {k: v for k, v in state.items() if k != "code"})
    with pytest.raises(UserError, match="pruned.pth.resume is of an earlier version: --no-resume"):
        run(tiny, baseline, tmp_path)


def test_stops_at_the_floor_and_keeps_the_last_good_round(tiny, baseline, tmp_path, monkeypatch):
    scores = iter([30, 29, 29, 28, 29, 5, 5, 5])  # parent; then 2 epochs and the round, twice

    def scripted(model, split, *args, **kwargs):
        n = next(scores)
        return Evaluation(n, 30, 1.0, torch.zeros(30))

    for module in (prune, engine):
        monkeypatch.setattr(module, "evaluate", scripted)
    pruned, lines = run(tiny, baseline, tmp_path, "--max-drop=10", "--no-compact")
    assert [x["kept"] for x in lines] == [True, True, False]
    assert pruned.metrics["round"] == 1 and pruned.metrics["val_correct"] == 28
    layers = weight_layers(pruned.build())
    left = sum(int((x.weight != 0).sum()) for x in layers.values()) / pruned.original_weights
    assert left == pytest.approx(1 - pruning.cubic(0, 0.8, 1, 3), abs=1e-3)


def test_a_first_round_under_the_floor_leaves_its_network_beside_the_output(
    tiny, baseline, tmp_path, monkeypatch
):
    """Its epochs may have taken hours."""
    scores = iter([30, 20, 21, 22])  # parent; then 2 epochs and the round

    def scripted(model, split, *args, **kwargs):
        return Evaluation(next(scores), 30, 1.0, torch.zeros(30))

    for module in (prune, engine):
        monkeypatch.setattr(module, "evaluate", scripted)
    with pytest.raises(UserError, match="under the floor of .* is in .*pruned.rejected.pth"):
        run(tiny, baseline, tmp_path, "--rounds=1", "--target=0.5", "--max-drop=10")
    (file,) = (tmp_path / "checkpoints").iterdir()
    rejected = checkpoint.load(file)
    assert rejected.stage == "pruned" and rejected.metrics["val_correct"] == 22
    assert rejected.metrics["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_a_round_that_loses_exactly_the_largest_drop_is_kept(
    tiny, baseline, tmp_path, monkeypatch
):
    """Answers are counted: 24/30 - 0.1 is more than 21/30 in floating point."""
    assert 24 / 30 - 10 / 100 > 21 / 30
    scores = iter([24, 24, 24, 21, 24, 24, 20])  # parent; then 2 epochs and the round, twice

    def scripted(model, split, *args, **kwargs):
        return Evaluation(next(scores), 30, 1.0, torch.zeros(30))

    for module in (prune, engine):
        monkeypatch.setattr(module, "evaluate", scripted)
    pruned, lines = run(tiny, baseline, tmp_path, "--max-drop=10")
    assert [x["kept"] for x in lines] == [True, True, False]
    assert pruned.metrics["val_correct"] == 21


def test_a_round_that_diverges_leaves_the_last_good_one(tiny, baseline, tmp_path, monkeypatch):
    original = engine.fit

    def diverging(*args, **kwargs):
        if kwargs["identity"]["round"] == 2:
            raise engine.DivergedError("the loss is nan")
        return original(*args, **kwargs)

    monkeypatch.setattr(engine, "fit", diverging)
    pruned, lines = run(tiny, baseline, tmp_path)
    assert pruned.metrics["round"] == 1 and [x["round"] for x in lines] == [0, 1]


def test_a_round_that_answers_nan_leaves_the_last_good_one(tiny, baseline, tmp_path, monkeypatch):
    original, asked = engine.evaluate, []

    def broken(model, *args):
        asked.append(1)
        if len(asked) > 1:  # in the second round
            raise BrokenNetworkError("the network answers with NaN or infinite logits")
        return original(model, *args)

    monkeypatch.setattr(engine, "evaluate", broken)
    pruned, lines = run(tiny, baseline, tmp_path, "--epochs=1")
    assert pruned.metrics["round"] == 1 and [x["round"] for x in lines] == [0, 1]


def test_no_resume_discards_the_old_state_at_once(tiny, baseline, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny, baseline, tmp_path)
    state = tmp_path / "checkpoints/pruned.pth.resume"
    assert state.exists()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "fit", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny, baseline, tmp_path, "--no-resume", "--seed=1")
    kept = checkpoint.read(state)
    assert kept["identity"]["seed"] == 1 and len(kept["rounds"]) == 1


def test_refusals(tiny, baseline, whole, tmp_path):
    with pytest.raises(UserError, match="no more than the parent's sparsity"):
        run(tiny, whole[0].file, tmp_path / "x")
    with pytest.raises(UserError, match="no validation split: --val-size is 0"):
        run(tiny, baseline, tmp_path / "x", "--val-size=0")
    with pytest.raises(UserError, match="--dequantize: .*baseline.pth is not quantized"):
        run(tiny, baseline, tmp_path / "x", "--dequantize")
    for flags in (["--target=1.5"], ["--start-side=16", "--epochs=1"]):
        with pytest.raises(SystemExit) as error:
            run(tiny, baseline, tmp_path / "x", *flags)
        assert error.value.code == 2
    assert not (tmp_path / "x/checkpoints").exists()


def test_no_rounds_only_converts(tiny, baseline, tmp_path):
    plain = tmp_path / "plain.pth"
    torch.save(checkpoint.load(baseline).state, plain)
    pruned, _ = run(tiny, plain, tmp_path, "--rounds=0")
    assert pruned.stage == "pruned"
    assert all(torch.equal(v, pruned.state[k]) for k, v in checkpoint.load(plain).state.items())


def test_channels_that_die_count_among_the_weights_that_go(
    tiny, baseline, tmp_path, monkeypatch
):
    """A round keeps more single weights where whole channels go with those that it zeroes."""
    keep_best, tried = pruning.keep_best, []

    def with_channels(model, keep, *args):
        """Empty a third of the head's channels as well."""
        tried.append(keep)
        keep_best(model, keep, *args)
        head = model.head[0].weight
        head[: len(head) // 3] = 0

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(pruning, "keep_best", with_channels)
        patch.setattr(engine, "fit", lambda *a, **k: ([], None))
        patch.setattr(engine, "velocity_of", lambda *a: None)
        _, lines = run(tiny, baseline, tmp_path, "--rounds=1")
    assert 0.8 <= lines[1]["sparsity"] < 0.802
    assert len(tried) > 1 and tried[-1] > tried[0]


def test_a_quantized_parent_becomes_fp32_on_request(tiny, whole, tmp_path):
    small = tmp_path / "q.pth"
    images = data.load(tiny)
    sample = data.sample(images.train, 64, 0)
    network, _ = ptq.quantize(whole[0].build(), sample, scheme := ptq.make_scheme(8, 8))
    checkpoint.save(small, "quantized", network, train.Settings(), whole[0], metrics={},
                    data=images.provenance(), quantization=scheme)  # fmt: skip
    with pytest.raises(UserError, match="prune before quantizing, or add --dequantize"):
        run(tiny, small, tmp_path)
    plain, lines = run(tiny, small, tmp_path, "--rounds=0", "--dequantize", "--no-compact")
    assert plain.quantization is None and not plain.settings["folded"]
    assert [a["stage"] for a in plain.ancestors] == ["baseline", "pruned", "quantized"]
    assert all(torch.equal(plain.state[n], t) for n, t in network.state_dict().items()
               if n.endswith(".weight") and t.ndim == 4)  # fmt: skip
    assert abs(lines[0]["val_correct"] - evaluate(network, images.val).correct) <= 3
    # It can be pruned further, with itself as the teacher.
    _, lines = run(tiny, small, tmp_path / "on", "--rounds=1", "--dequantize", "--target=0.9")
    assert 0.9 <= lines[1]["sparsity"] < 0.91 and len(lines[1]["epochs"]) == 2


def test_momentum_follows_its_weights_through_a_compaction(tiny, tmp_path):
    """The stem's weights are channels-last and a compacted buffer is contiguous; a fused optimizer
    that walked both flat would permute the momentum of 27 inputs."""
    images = data.load(tiny)
    torch.manual_seed(0)
    model = MobileNetV2(standard(0.35, 8, dropout=0.0)).to(memory_format=torch.channels_last)
    recipe = engine.Recipe(epochs=1, batch_size=32, lr=0.05, amp=False)
    options = {"identity": {}, "augment": augmentation("none"), "seed": 1}
    engine.fit(model, images, recipe, state_file=tmp_path / "first", **options)
    velocity = engine.velocity_of(tmp_path / "first", model, recipe)
    with torch.no_grad():
        model.features[0][0].weight[:5] = 0  # and so five channels go
    smaller, live = compact(model)
    assert smaller.settings["stem"] < model.settings["stem"]
    velocity = {name: take(buffer, live[name]) for name, buffer in velocity.items()}
    fused, plain = smaller, copy.deepcopy(smaller)
    few = data.Split(images.train.images[:32], images.train.labels[:32])
    one_step = data.Data("tiny", images.classes, few, images.val, images.test)
    second = tmp_path / "second"
    engine.fit(fused, one_step, recipe, state_file=second, velocity=velocity, **options)

    optimizer = torch.optim.SGD(
        engine.parameter_groups(plain, recipe), lr=recipe.lr, momentum=0.9, nesterov=True,
        foreach=False, fused=False,
    )  # fmt: skip
    for name, parameter in plain.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = velocity[name].clone()
    ((x, labels),) = data.batches(one_step.train, 32, options["augment"], seed=1, epoch=0)
    torch.nn.functional.cross_entropy(plain.train()(x), labels).backward()
    optimizer.step()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
