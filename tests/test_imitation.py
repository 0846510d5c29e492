"""The stages on an imitation of a GPU: nothing mixes devices, and no step waits for the device."""

import json

import imitation
import pytest
import torch
from imitation import CUDA

import eval as evaluation
import prune
import quantize
import train
from autoaugment import augmentation
from lib import checkpoint, data, devices, engine, pruning, reconstruct, replay
from lib.config import UserError

# Functions that put a constant on the device, once per process.
CONSTANTS = {"_moments", "_mean_colour", "_crop_flip_sources", "_warp_sources", "_stretch_tables"}


@pytest.fixture
def waits():
    """The waits of a test that runs where the imitated GPU is."""
    with imitation.gpu() as waits:
        yield waits


def within(waits, function: str) -> list[imitation.Wait]:
    """The waits in a function and in what it calls."""
    return [w for w in waits if any(p.endswith(f" {function}") for p in w.path)]


def name_of(place: str) -> str:
    return place.split(" ")[1]


# ---- the imitation itself ------------------------------------------------------------------------

X = torch.arange(12.0).view(3, 4)
WAITING = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 1).any()),
    "a number as an index": lambda x: x[x.argmax() // 12],
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x + 0),  # with x itself it does not look
    "nonzero": lambda x: x.nonzero(),
    "read by a mask": lambda x: x[x > 1],
    "written by a mask": lambda x: x.__setitem__(x > 1, x.sum()),
    "a number written by indices": lambda x: x.__setitem__(torch.arange(2, device=x.device), 1.0),
    "masked_select": lambda x: x.masked_select(x > 1),
    "bincount": lambda x: x.long().flatten().bincount(),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 1].long(), 0),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy_ to the host": lambda x: torch.empty(3, 4).copy_(x),
    "pageable": lambda x: torch.ones(3, 4).to(x.device),
    "pageable, non_blocking": lambda x: torch.ones(3, 4).to(x.device, non_blocking=True),
    "pinned, blocking": lambda x: torch.ones(3, 4).pin_memory().to(x.device),
    "copy_ to the device": lambda x: x.copy_(torch.ones(3, 4)),
    "CPU indices": lambda x: x[torch.tensor([0, 2])],
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
}
FREE = {
    "pinned, non_blocking": lambda x: torch.ones(3, 4).pin_memory().to(x.device, non_blocking=True),
    "made there": lambda x: torch.zeros(3, 4, device=x.device) + torch.arange(4, device=x.device),
    "indices": lambda x: x[torch.arange(2, device=x.device)],
    "written by indices": lambda x: x.__setitem__(torch.arange(2, device=x.device), x.sum()),
    "a number written by a mask": lambda x: x.__setitem__(x > 1, 0.0),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "a CPU number": lambda x: x * torch.tensor(2.0),
    "its type": lambda x: x.to(torch.float64).half().to(memory_format=torch.preserve_format),
    "sorted": lambda x: x.sort(stable=True).values.cumsum(1).topk(2).values,
}
REFUSED = {
    "sum": lambda x: x + torch.ones(4),
    "product": lambda x: x @ torch.ones(4, 2),
    "cat": lambda x: torch.cat([x, torch.ones(3, 4)]),
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "index_select": lambda x: x.index_select(0, torch.tensor([1])),
    "indices on the device of a CPU tensor": lambda x: torch.ones(3)[x[0, :2].long()],
    "a value from the CPU": lambda x: x.__setitem__(torch.arange(2, device=x.device), X[:2]),
    "numpy": lambda x: x.numpy(),
    "a CPU generator": lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
    "a CPU generator in place": lambda x: x.uniform_(generator=torch.Generator()),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_recorded(waits, name):
    x = X.to(CUDA)
    waits.clear()
    WAITING[name](x)
    assert len(waits) == 1 and waits[0].place.startswith("tests/test_imitation.py"), waits


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_recorded(waits, name):
    x = X.to(CUDA)
    waits.clear()
    FREE[name](x)
    assert not waits


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(waits, name):
    x = X.to(CUDA)
    with pytest.raises((RuntimeError, TypeError), match="device|generator|numpy"):
        REFUSED[name](x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_imitation_has_the_rules_of_cuda():
    others, x = [], X.to(CUDA)
    for name, function in (WAITING | FREE | REFUSED).items():
        if name == "pageable, non_blocking":  # the driver waits, and torch does not know of it
            continue
        expected = "free" if name in FREE else "waits" if name in WAITING else "refused"
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(x)
            happened = "free"
        except (RuntimeError, TypeError) as error:
            happened = "waits" if "synchronizing" in str(error) else "refused"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if happened != expected:
            others.append((name, expected, happened))
    assert not others


# ---- training ------------------------------------------------------------------------------------


class Marks:
    """A log that notes how many waits there were at the end of each epoch."""

    def __init__(self, waits=()):
        self.waits, self.counts = waits, []

    def begin(self, past):
        pass

    def __call__(self, line):
        self.counts.append(len(self.waits))


def fit(make, source, device, state_file, log=None, amp=False, **options):
    """Train with all that a step can have; return the history, without times, and the weights."""
    images = data.load(source, device=device)
    model, teacher = (make(seed).to(device) for seed in (0, 1))
    recipe = engine.Recipe(
        epochs=2, batch_size=32, lr=0.01, amp=amp, ema=0.9, distill=0.5, label_smoothing=0.1,
        start_side=20, **options,
    )  # fmt: skip
    history, _ = engine.fit(
        model, images, recipe, augmentation("auto"), 1, state_file, identity={}, teacher=teacher,
        after_step=pruning.Mask(model).apply, log=log,
    )  # fmt: skip
    for line in history:
        for key in ("seconds", "images_per_second", "peak_bytes"):
            line.pop(key, None)
    return history, {name: t.cpu() for name, t in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"optimizer": "adam"}, {"amp": True}])
def test_an_epoch_waits_for_the_device_at_its_end_alone(small, tiny, tmp_path, waits, options):
    marks = Marks(waits)
    fit(small, tiny, CUDA, tmp_path / "state", marks, **options)
    first, second = waits[: marks.counts[0]], waits[marks.counts[0] : marks.counts[1]]
    assert {name_of(w.place) for w in within(first, "train_epoch")} == CONSTANTS
    assert not within(second, "train_epoch")
    # The loss and the correct answers; of the validation split; the best weights; the state.
    places = list(dict.fromkeys(name_of(w.place) for w in second))
    assert places in (
        ["fit", "evaluate_function", "TrainingState.add", "write"],
        ["fit", "evaluate_function", "write"],  # not the best epoch
    )
    assert [w.place for w in second].count("lib/engine.py fit") == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_equals_the_cpus_to_the_bit_resumed_or_not(small, tiny, tmp_path, optimizer):
    class Interrupt(Marks):
        def __call__(self, line):
            raise KeyboardInterrupt

    history, weights = fit(small, tiny, "cpu", tmp_path / "cpu", optimizer=optimizer)
    with imitation.gpu():
        with pytest.raises(KeyboardInterrupt):
            fit(small, tiny, CUDA, tmp_path / "cuda", Interrupt(), optimizer=optimizer)
        again, resumed = fit(small, tiny, CUDA, tmp_path / "cuda", optimizer=optimizer)
    assert history == again and same(weights, resumed)


def test_a_step_is_recorded_once_per_epoch_and_replayed(small, tiny, tmp_path, waits, monkeypatch):
    counts = []

    def record(step, inputs):
        replayed = imitation.record(step, inputs)
        counts.append(0)

        def count():
            counts[-1] += 1
            replayed()

        return count

    monkeypatch.setattr(replay, "record", record)
    fit(small, tiny, CUDA, tmp_path / "state")
    steps = (320 - 32) // 32  # without the validation images
    assert counts == [steps - replay.WARM_UP] * 2


def test_a_replay_repeats_the_kernels_with_the_numbers_that_they_had(waits):
    total, factor = torch.zeros(2, device=CUDA), [1.0]

    def step(x):
        total.add_(x * factor[0])

    replayed = imitation.record(step, inputs := [torch.ones(2, device=CUDA)])
    replayed()
    assert total.tolist() == [1.0, 1.0]
    factor[0] = 100.0  # a number of the host: the recording has the old one
    inputs[0].copy_(torch.full((2,), 3.0, device=CUDA))
    replayed()
    assert total.tolist() == [4.0, 4.0]


def test_a_step_that_cannot_be_recorded_is_refused(waits):
    seen = []

    def step(x):
        seen.append(x.sum().item())

    do = replay.Replayed(step)
    for i in range(replay.WARM_UP):
        do(torch.full((2,), float(i), device=CUDA))
    with pytest.raises(UserError, match="cannot be recorded .*capturing.*: give --no-cuda-graph$"):
        do(torch.ones(2, device=CUDA))
    assert seen == [0.0, 2.0, 4.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"optimizer": "adam"}, {"amp": True}])
def test_recorded_training_is_training_step_by_step(small, tiny, tmp_path, monkeypatch, options):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recorded, weights = fit(small, tiny, "cuda", tmp_path / "a", **options)
    history, expected = fit(small, tiny, "cuda", tmp_path / "b", cuda_graph=False, **options)
    for a, b in zip(recorded, history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
    if options == {"optimizer": "sgd"}:  # where gradients are noise, the others make steps of it
        assert all(torch.allclose(weights[k], expected[k], atol=1e-2) for k in expected)


def test_a_first_step_that_loss_scaling_skips_leaves_no_trace(small):
    """fp16, on a GPU without bf16, begins with a scale at which gradients overflow: the step is
    skipped, and momentum must not be what lay in memory."""
    plain, skipped = small(0), small(0)
    recipe = engine.Recipe(1, lr=0.01)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        for model, gradients in ((plain, [1.0]), (skipped, [float("inf"), 1.0])):
            optimizer = engine.build_optimizer(model, recipe)
            scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
            for gradient in gradients:
                optimizer.zero_grad()
                scaler.scale(sum(gradient * p.sum() for p in model.parameters())).backward()
                scaler.step(optimizer)
                scaler.update()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(plain.state_dict(), skipped.state_dict())


# ---- the stages ----------------------------------------------------------------------------------

PRUNE = ["--score=obd", "--epochs=1", "--rounds=2", "--target=0.8", "--batch-size=32",
         "--max-drop=100", "--no-amp"]  # fmt: skip
QUANTIZE = ["--calibration=16", "--rd-lambda=0.001", "--weight-bits=4", "--act-bits=4"]
QAT = ["--method=qat", "--epochs=1", "--batch-size=32", "--ema=0.9", "--no-amp"]


@pytest.fixture(scope="module")
def parent(small, tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("parent") / "baseline.pth"
    provenance = data.load(tiny).provenance()
    checkpoint.save(file, "baseline", small(0), train.Settings(), None, metrics={}, data=provenance)
    return file


@pytest.fixture(scope="module")
def chains(tiny, parent, tmp_path_factory):
    """Every stage on both devices: (folder of the CPU's run, of the imitation's, its waits)."""

    def run(name: str):
        folder = tmp_path_factory.mktemp(name)
        flags = [f"--data={tiny}", f"--run-dir={folder}", f"--device={name}"]
        prune.main([*PRUNE, f"--parent={parent}", *flags])
        quantize.main([*QUANTIZE, f"--out={folder / 'checkpoints/ptq.pth'}", *flags])
        quantize.main([*QUANTIZE, *QAT, *flags])
        quantize.main(["--method=reference", f"--out={folder / 'checkpoints/reference.pth'}",
                       *flags])  # fmt: skip
        evaluation.main([str(f) for f in sorted((folder / "checkpoints").iterdir())] + flags)
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "ROUNDS", 1)  # for time's sake
        patch.setattr(reconstruct, "SWEEPS", 1)
        cpu = run("cpu")
        patch.setattr(devices, "choose", lambda name: CUDA)
        with imitation.gpu() as waits:
            return cpu, run("cuda"), list(waits)


@pytest.mark.parametrize("file", ["pruned", "ptq", "quantized", "reference"])
def test_each_stage_equals_the_cpus_to_the_bit(chains, file):
    cpu, cuda = (checkpoint.load(x / f"checkpoints/{file}.pth") for x in chains[:2])
    assert cpu.settings == cuda.settings and same(cpu.state, cuda.state)


def test_evaluation_equals_the_cpus(chains):
    lines = [
        [json.loads(x) for x in (folder / "logs/eval-test.jsonl").read_text().splitlines()]
        for folder in chains[:2]
    ]
    keys = ("correct", "loss", "nonzeros", "change", "arithmetic")
    cpu, cuda = ([{k: x.get(k) for k in keys} for x in of_device] for of_device in lines)
    assert len(cpu) == 4 and cpu == cuda


def test_no_step_of_pruning_or_qat_waits_for_the_device(chains):
    places = {name_of(w.place) for w in within(chains[2], "train_epoch")}
    assert places <= CONSTANTS


def test_momentum_that_a_compaction_leaves_in_another_order_is_refused(
    tiny, parent, tmp_path, waits, monkeypatch
):
    monkeypatch.setattr(devices, "choose", lambda name: CUDA)
    build = engine.build_optimizer

    def contiguous(model, recipe, velocity):
        optimizer = build(model, recipe, velocity)
        for state in optimizer.state.values() if velocity else ():
            state["momentum_buffer"] = state["momentum_buffer"].contiguous()
        return optimizer

    monkeypatch.setattr(engine, "build_optimizer", contiguous)
    flags = [f"--data={tiny}", f"--run-dir={tmp_path}", f"--parent={parent}", "--device=cuda"]
    with pytest.raises(RuntimeError, match="_fused_sgd_.* has strides"):
        prune.main([*PRUNE, "--score=lamp", *flags])
    lines = (tmp_path / "logs/prune.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1]  # it is the second that fails
