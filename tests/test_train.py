"""train.py: resuming and data-parallel training give what one uninterrupted process gives."""

import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models import mobilenet_v2

import train
from autoaugment import augmentation
from lib import checkpoint, config, data, engine, processes, quantizers
from lib.config import UserError
from lib.folding import fold
from models.mobilenetv2 import MobileNetV2, standard

FLAGS = ["--epochs=3", "--batch-size=32", "--width=0.1", "--downsample=8", "--lr=0.05",
         "--lr-schedule=linear", "--warmup-epochs=0.5", "--ema=0.9", "--start-side=20",
         "--dropout=0.2"]  # fmt: skip


def run_in_process(tiny, folder, *flags):
    train.main([*FLAGS, f"--data={tiny}", f"--run-dir={folder}", *flags])
    return checkpoint.load(folder / "checkpoints/baseline.pth")


def equal(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_images_grow_to_their_full_side_and_never_shrink():
    for epochs in (2, 3, 10, 46):
        sides = [engine.Recipe(epochs, start_side=16).side(e) for e in range(epochs)]
        assert sides == sorted(sides) and set(sides) <= {16, 20, 24, 28, 32}
        assert sides[0] == 16 and all(side == 32 for side in sides[math.ceil(0.7 * epochs) :])
    assert [sides.count(side) for side in (16, 20, 24, 28, 32)] == [8, 8, 8, 8, 14]
    assert engine.Recipe(1, start_side=16).side(0) == engine.Recipe(5).side(0) == 32


def test_small_images_reach_the_network_in_its_layout(tiny, monkeypatch):
    seen = []
    forward = MobileNetV2.forward

    def watch(model, x):
        if model.training:
            seen.append((x.shape[-1], x.is_contiguous(memory_format=torch.channels_last)))
        return forward(model, x)

    monkeypatch.setattr(MobileNetV2, "forward", watch)
    images = data.load(str(tiny), 10)
    model = MobileNetV2(standard(0.1, 8)).to(memory_format=torch.channels_last)
    recipe = engine.Recipe(2, start_side=20, lr=0.0)
    state = engine.TrainingState.start(model, recipe)
    engine.train_epoch(state, images.train, recipe, augmentation("light"), seed=0, epoch=0)
    assert set(seen) == {(20, True)}


def test_a_teacher_sees_images_as_they_are_and_is_asked_once(tiny, tmp_path, monkeypatch):
    """Small images are for the student; answers that are kept serve all sides."""
    seen, forward = [], MobileNetV2.forward

    def watch(model, x):
        of_teacher = model.settings.get("folded", False)  # fit folds it
        if model.training or of_teacher:
            seen.append((of_teacher, x.shape[-1]))
        return forward(model, x)

    monkeypatch.setattr(MobileNetV2, "forward", watch)
    images = data.load(str(tiny), 10)
    model, teacher = (MobileNetV2(standard(0.1, 8)).eval() for _ in range(2))
    recipe = engine.Recipe(4, 32, start_side=20, lr=0.0, distill=0.5, views=2)
    engine.fit(
        model, images, recipe, augmentation("light"), 0, tmp_path / "state", identity={},
        teacher=teacher,
    )  # fmt: skip
    steps = len(images.train) // 32
    asked = [side for of_teacher, side in seen if of_teacher]
    assert asked == [32] * (2 * steps)
    assert [side for of_teacher, side in seen if not of_teacher] == [
        side for epoch in range(4) for side in [recipe.side(epoch)] * steps
    ]  # fmt: skip


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(tiny, tmp_path):
    whole = run_in_process(tiny, tmp_path / "whole")
    broken = tmp_path / "broken"
    command = [sys.executable, "train.py", *FLAGS, f"--data={tiny}", f"--run-dir={broken}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log = broken / "logs/train.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 1):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    out = broken / "checkpoints/baseline.pth"
    assert not out.exists()
    assert out.with_name("baseline.pth.resume").exists()

    resumed = run_in_process(tiny, broken, "--resume")
    assert equal(whole.state, resumed.state)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert not out.with_name("baseline.pth.resume").exists()


def unfinished(tiny, tmp_path):
    """Die just before the end."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(checkpoint, "save", lambda *a, **k: 1 / 0)
        run_in_process(tiny, tmp_path)


def test_state_of_another_run_is_refused_and_kept(tiny, tmp_path, capsys):
    unfinished(tiny, tmp_path)
    state = tmp_path / "checkpoints/baseline.pth.resume"
    before = state.read_bytes()
    with pytest.raises(UserError, match="lr was 0.05, is 0.01"):
        run_in_process(tiny, tmp_path, "--lr=0.01")
    assert state.read_bytes() == before
    saved = checkpoint.read(state)
    assert "is of commit" not in capsys.readouterr().err
    checkpoint.write(state, saved | {"code": "0" * 12})
    unfinished(tiny, tmp_path)
    assert "baseline.pth.resume is of commit 000000000000, and this is " in capsys.readouterr().err
    saved["model"]["another.name"] = saved["model"].pop("classifier.1.bias")
    checkpoint.write(state, saved)
    with pytest.raises(UserError, match="of another version of this program: --no-resume"):
        run_in_process(tiny, tmp_path)


def test_a_state_that_lacks_a_setting_is_of_an_earlier_version():
    with pytest.raises(UserError, match="x is of an earlier version: --no-resume discards it"):
        config.refuse_other_run(Path("x"), {"lr": 0.1}, {"lr": 0.1, "sync_batchnorm": True})
    config.refuse_other_run(Path("x"), {"lr": 0.1}, {"lr": 0.1})


def test_two_processes_give_the_loss_curve_of_one(tiny, tmp_path):
    # In float32 a difference in the last bit grows from layer to layer and step to step, so the
    # rate is low and the tolerance 5e-3 (2.3e-3 seen on AVX2); the float64 test is the exact one.
    flags = ["--dropout=0", "--no-amp", "--ema=0", "--epochs=2", "--lr=0.002", "--width=0.25"]
    run_in_process(tiny, tmp_path / "one", *flags)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "train.py", *FLAGS, *flags,
         f"--data={tiny}", f"--run-dir={tmp_path / 'two'}"],
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    one, two = (
        [json.loads(line) for line in (tmp_path / n / "logs/train.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=5e-3)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=2e-3)
    # The saved network is a plain one: no trace of the processes that made it.
    checkpoint.load(tmp_path / "two/checkpoints/baseline.pth").build()


def _gradients_of_rank(rank, store, out):
    """Loss and gradients of a global batch of 32, in float64: alone, or a half on each rank."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = MobileNetV2(standard(0.1, 8, dropout=0)).double().train()
    alone = copy.deepcopy(model)
    x, y = torch.randn(32, 3, 32, 32).double(), torch.randint(10, (32,))
    F.cross_entropy(alone(x), y).backward()
    processes.synchronize_batchnorm(model)
    half = slice(16 * rank, 16 * rank + 16)
    parallel = nn.parallel.DistributedDataParallel(model)
    F.cross_entropy(parallel(x[half]), y[half]).backward()
    if rank == 0:
        a = {n: p.grad for n, p in alone.named_parameters()} | dict(alone.named_buffers())
        b = {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())
        torch.save([a, b], out)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    store, out = tmp_path / "store", tmp_path / "out"
    torch.multiprocessing.spawn(_gradients_of_rank, (str(store), str(out)), nprocs=2)
    torch.testing.assert_close(*torch.load(out), rtol=1e-9, atol=1e-9)


def test_learning_rate_reaches_its_peak_and_zero():
    recipe = engine.Recipe(epochs=4, lr=1.0, lr_schedule="linear", warmup_epochs=1)
    rates = [recipe.learning_rate(step, 10) for step in range(40)]
    assert max(rates) == 1.0 and rates.index(1.0) == 9
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert recipe.learning_rate(40, 10) == 0
    short = engine.Recipe(epochs=1, lr=1.0, warmup_epochs=0.25)  # 2.25 of 9 steps
    assert max(short.learning_rate(step, 9) for step in range(9)) == 1.0
    cosine = engine.Recipe(epochs=4, lr=1.0)
    assert cosine.learning_rate(20, 10) == pytest.approx(0.5)


def test_average_is_the_exponential_one(tiny):
    """Its decay per step is small at first: min(ema, (1 + step) / (10 + step))."""
    train = data.load(str(tiny)).train
    split = data.Split(train.images[:80], train.labels[:80])
    model, average = (MobileNetV2(standard(0.1)) for _ in range(2))
    recipe = engine.Recipe(1, batch_size=16, lr=0.1, ema=0.25, amp=False)
    state = engine.TrainingState.start(model, recipe)
    state.average = average
    seen, expected = [], average.state_dict()["classifier.1.weight"].clone()
    engine.train_epoch(
        state, split, recipe, augmentation("none"), seed=0, epoch=0,
        after_step=lambda: seen.append(model.classifier[1].weight.detach().clone()),
    )  # fmt: skip
    assert len(seen) == 5
    for weight, decay in zip(seen, (1 / 10, 2 / 11, 3 / 12, 1 / 4, 1 / 4), strict=True):
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(average.classifier[1].weight, expected, atol=1e-7)


def test_a_teacher_answers_batches_that_repeat_once(tiny):
    """The run equals one in which it is asked again."""
    images, asked, seen = data.load(str(tiny), 10), [], []

    class Watched(MobileNetV2):
        def forward(self, x):
            asked.append(x.shape)
            return super().forward(x)

    torch.manual_seed(0)
    student, teacher = MobileNetV2(standard(0.1)), Watched(standard(0.1)).eval()
    recipe = engine.Recipe(3, 31, lr=0.1, distill=0.9, views=2, amp=False)
    ends = []
    for keeps in (True, False):
        state = engine.TrainingState.start(copy.deepcopy(student), recipe)
        for epoch in range(3):
            torch.manual_seed(epoch)  # of dropout
            engine.train_epoch(
                state, images.train, recipe, augmentation("cutout"), seed=0, epoch=epoch,
                teacher=teacher,
            )  # fmt: skip
            seen.append(len(asked))
            state.answers = state.answers if keeps else {}
        ends.append(state.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    steps = len(images.train) // 31
    assert seen == [n * steps for n in (1, 2, 2, 3, 4, 5)]


def _interrupted_and_not(rank, tiny, folder, store):
    """Train twice in two processes, the second time in two pieces."""
    dist.init_process_group(
        "gloo", f"file://{store}", timedelta(minutes=5), world_size=2, rank=rank
    )
    images, asked, ends = data.load(tiny, 10), [], []
    recipe = engine.Recipe(4, 32, lr=0.1, distill=0.9, views=2, amp=False, sync_batchnorm=False)
    forward = MobileNetV2.forward

    def watch(model, x):
        asked.extend([len(x)] if model.settings.get("folded") else [])  # fit folds the teacher
        return forward(model, x)

    def stop(line):
        raise KeyboardInterrupt

    stop.begin = lambda history: None
    MobileNetV2.forward = watch
    for pieces in (1, 2):
        torch.manual_seed(0)
        model, teacher = (MobileNetV2(standard(0.1, 8)) for _ in range(2))
        for piece in range(pieces):
            interrupted = pieces == 2 and piece == 0
            with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
                engine.fit(
                    model, images, recipe, augmentation("light"), 0, folder / str(pieces),
                    identity={}, teacher=teacher.eval(), log=stop if interrupted else None,
                )  # fmt: skip
            dist.barrier()  # the state is written
        ends.append(model.state_dict())
    steps = len(images.train) // 32
    assert asked == [16] * (2 * 2 * steps)  # each piece of two asks in one epoch
    types = {type(module) for module in model.modules()}
    assert nn.BatchNorm2d in types and processes._SyncBatchNorm not in types
    if rank == 0:  # what is written; the best epoch's running statistics are each process's own
        assert equal(*ends)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_with_batch_norms_of_their_own_continue_where_they_were(tiny, tmp_path):
    arguments = (str(tiny), tmp_path, str(tmp_path / "store"))
    torch.multiprocessing.spawn(_interrupted_and_not, arguments, nprocs=2)


def test_decay_can_leave_out_norms_and_biases():
    model = MobileNetV2(standard(0.1))
    groups = engine.parameter_groups(model, engine.Recipe(1, decay_norm=False))
    assert {p.ndim for p in groups[0]["params"]} == {2, 4}
    assert {p.ndim for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_weights_that_are_infinite_at_the_end_are_no_network(tiny, tmp_path):
    """The loss of the last step is of the weights before it."""
    with pytest.raises(engine.DivergedError, match="weights are infinite or NaN at epoch 1: lower"):
        run_in_process(tiny, tmp_path, "--epochs=1", "--lr=1e300", "--batch-size=290")
    assert not list(tmp_path.rglob("*.pth*"))


@pytest.mark.parametrize("flags", [["--batch-size=1000"], ["--val-size=7"],
                                   ["--device=nonsense"], ["--data=/nowhere"]])  # fmt: skip
def test_impossible_flags_are_one_line(tiny, tmp_path, flags):
    run = subprocess.run(
        [sys.executable, "train.py", f"--data={tiny}", f"--run-dir={tmp_path}", *flags],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("train.py: error: ") and run.stderr.count("\n") == 1
    assert not list(Path(tmp_path).rglob("*.pth*"))


# ---- --init --------------------------------------------------------------------------------------


def theirs(folder, classes=10, width=0.1, change=lambda state: state):
    """The plain state dict of torchvision's own class, with random weights, and its file."""
    state = mobilenet_v2(num_classes=classes, width_mult=width).state_dict()
    torch.save(change(state), folder / "theirs.pth")
    return state, folder / "theirs.pth"


def start(tiny, folder, *flags, monkeypatch) -> tuple[dict, dict]:
    """The settings and the state that training begins with."""
    seen = []

    def stop(model, *args, **kwargs):
        seen.append((model.settings, {n: t.clone() for n, t in model.state_dict().items()}))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main([*FLAGS, f"--data={tiny}", f"--run-dir={folder}", *flags])
    monkeypatch.undo()
    return seen[0]


def test_init_starts_from_a_state_dict(tiny, tmp_path, monkeypatch, capfd):
    state, file = theirs(tmp_path, change=lambda s: {"model": {f"module.{n}": s[n] for n in s}})
    settings, begun = start(tiny, tmp_path, f"--init={file}", monkeypatch=monkeypatch)
    assert settings == standard(0.1, 8) and equal(begun, dict(state))
    out, err = capfd.readouterr()
    assert out.splitlines()[0] == f"{file}: starting from its weights"
    assert err == f"{file}: taken from 'model', without the prefix 'module.'\n"


def test_init_leaves_out_the_classifier_of_other_classes(tiny, tmp_path, monkeypatch, capfd):
    state, file = theirs(tmp_path, classes=1000)
    _, new = start(tiny, tmp_path, monkeypatch=monkeypatch)
    _, begun = start(tiny, tmp_path, f"--init={file}", monkeypatch=monkeypatch)
    assert begun["classifier.1.weight"].shape == (10, 1280) and list(begun) == list(state)
    for name, tensor in begun.items():
        ours = name.startswith("classifier.")
        assert torch.equal(tensor, new[name] if ours else state[name])
    line = "starting from its weights, without its classifier (1000 classes, not 10)"
    assert capfd.readouterr().out.splitlines()[-2] == f"{file}: {line}"  # then the device


def test_init_from_a_checkpoint_takes_its_weights_and_the_flags_strides(
    tiny, tmp_path, monkeypatch, capfd
):
    model = MobileNetV2(standard(0.1, 4))
    model.settings["blocks"][1]["residual"] = False  # as a file of an earlier version
    model.settings["blocks"][2]["residual"] = False
    file = tmp_path / "own.pth"
    checkpoint.save(file, "baseline", model, train.Settings(), None, metrics={}, data={})
    settings, begun = start(tiny, tmp_path, f"--init={file}", monkeypatch=monkeypatch)
    assert equal(begun, model.state_dict())
    assert train.strides(settings) == train.strides(standard(0.1, 8))
    assert not settings["blocks"][2]["residual"]  # its stride is the same, and so is its function
    assert "with the strides of --downsample 8, not its own\n" in capfd.readouterr().out
    settings, _ = start(tiny, tmp_path, f"--init={file}", "--downsample=4", monkeypatch=monkeypatch)
    assert settings == model.settings
    assert capfd.readouterr().out.splitlines()[0] == f"{file}: starting from its weights"


def test_init_from_a_network_of_other_classes_is_free_to_hold_out_any_images(
    tiny, tmp_path, monkeypatch
):
    """Sets that are no CIFAR all have the source `images`: their classes tell them apart."""
    with np.load(tiny) as file:
        arrays = dict(file)
    for split in ("train", "test"):
        few = arrays[f"y_{split}"] < 4
        for name in ("x", "y"):
            arrays[f"{name}_{split}"] = arrays[f"{name}_{split}"][few]
    np.savez(tmp_path / "four.npz", **arrays)
    data = {"source": "images", "classes": ["ant", "bee", "cow", "dog"], "val_size": 3,
            "held_out": 1}
    file = tmp_path / "own.pth"
    model = MobileNetV2(standard(0.1, 8, classes=4))
    checkpoint.save(file, "baseline", model, train.Settings(), None, metrics={}, data=data)
    _, begun = start(tmp_path / "four.npz", tmp_path, f"--init={file}", monkeypatch=monkeypatch)
    assert equal(begun, model.state_dict())


def test_init_is_recorded_and_part_of_the_run(tiny, tmp_path, monkeypatch):
    _, file = theirs(tmp_path, classes=1000)
    saved = run_in_process(tiny, tmp_path, "--epochs=1", f"--init={file}")
    assert saved.command.endswith(" --init theirs.pth") or " --init theirs.pth " in saved.command
    assert saved.metrics["init_sha256"] == checkpoint.load(file, 8).sha256
    assert saved.ancestors == []  # sparsity is counted from the network that was trained here
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: 1 / 0)  # die just before the end
    with pytest.raises(ZeroDivisionError):
        run_in_process(tiny, tmp_path, f"--init={file}")
    monkeypatch.undo()
    theirs(tmp_path, classes=100)  # the same name, other weights
    with pytest.raises(UserError, match="init_sha256 was [0-9a-f]{64}, is [0-9a-f]{64}"):
        run_in_process(tiny, tmp_path, f"--init={file}")
    with pytest.raises(UserError, match="init_sha256 was [0-9a-f]{64}, is None"):
        run_in_process(tiny, tmp_path)


def quantized(folder):
    model = MobileNetV2(standard(0.1, 8))
    scheme = quantizers.quantize_reference(model, 8, 8)
    checkpoint.save(folder / "q.pth", "quantized", model, train.Settings(), None, metrics={},
                    data={}, quantization=scheme)  # fmt: skip
    return folder / "q.pth"


def folded(folder):
    model = fold(MobileNetV2(standard(0.1, 8)).eval())
    file = folder / "f.pth"
    checkpoint.save(file, "baseline", model, train.Settings(), None, metrics={}, data={})
    return file


def compacted(folder):
    settings = standard(0.1, 8)
    settings["blocks"][3]["hidden"] -= 1
    model, file = MobileNetV2(settings), folder / "c.pth"
    checkpoint.save(file, "pruned", model, train.Settings(), None, metrics={}, data={})
    return file


@pytest.mark.parametrize(("make", "what"), [
    (lambda folder: folder / "none.pth", "does not exist"),
    (lambda folder: theirs(folder, width=0.5)[1],
     "has other channels than --width 0.1: give --width 0.5"),
    (compacted, "has other channels than --width 0.1: no --width has them"),
    (quantized, "is quantized: --init takes an fp32 network"),
    (folded, "has no batch norms any more"),
])  # fmt: skip
def test_init_refuses_what_does_not_fit(tiny, tmp_path, make, what):
    file = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=what) as caught:
        run_in_process(tiny, tmp_path, f"--init={file}")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("keep", "flags", "what"), [
    (32, ["--val-size=0"], "give --val-size 10 or a multiple of it"),
    (3, [], "give --val-size 10 or a multiple of it"),
    (1, [], "the smallest class has only 1 training image"),
])  # fmt: skip
def test_what_a_set_without_validation_split_means_is_said_at_once(
    tiny, tmp_path, monkeypatch, capfd, keep, flags, what
):
    def stop(*args, **kwargs):
        raise UserError("training begins")

    with np.load(tiny) as file:
        rows = np.concatenate([np.flatnonzero(file["y_train"] == c)[:keep] for c in range(10)])
        kept = {key: file[key][rows] for key in ("x_train", "y_train")}
        np.savez(tmp_path / "cifar10.npz", **kept, x_test=file["x_test"], y_test=file["y_test"])
    monkeypatch.setattr(engine, "fit", stop)
    with pytest.raises(UserError, match="training begins"):
        train.main([*FLAGS, f"--data={tmp_path}/cifar10.npz", f"--run-dir={tmp_path}",
                    *flags])  # fmt: skip
    err = capfd.readouterr().err
    assert err.startswith("train.py: no validation split: ") and err.count("\n") == 1
    assert "prune.py, which needs one" in err and what in err


def test_two_processes_do_not_work_on_one_file(tmp_path):
    pytest.importorskip("fcntl", reason="Windows has no such locks")
    file = tmp_path / "a/x.pth"
    processes.claim(file)
    processes.claim(file)  # the same process may go on
    code = "import sys, pathlib; from lib import processes as p; p.claim(pathlib.Path(sys.argv[1]))"
    for name, refused in [(file, True), (tmp_path / "a/y.pth", False)]:
        run = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        assert ("another process works on " in run.stderr) is refused
        assert bool(run.returncode) is refused
    processes.release()
    run = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
