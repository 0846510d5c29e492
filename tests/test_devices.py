"""--device: what a stage runs on, what it says about it, and what GPUs and CPUs do differently.

There is no GPU in CI: torch.cuda's functions are replaced where they are asked.
"""

import functools
import math
import re
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from lib import config, console, devices, engine, processes, ptq, quantizers
from lib.folding import fold
from models.mobilenetv2 import MobileNetV2, standard

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update"


@pytest.fixture
def gpus(monkeypatch):
    """A function of a number: that many GPUs, as far as devices.choose asks. Returns the calls."""
    def install(count: int, error: Exception | None = None) -> list:
        calls = []

        def probe(device):
            calls.append(device)
            if device.type == "cuda" and error:
                raise error
            if device.type == "cuda" and device.index >= count:
                raise RuntimeError("CUDA error: invalid device ordinal\nmore lines")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(devices, "_probe", probe)
        return calls

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "SIGNS_OF_A_GPU", [])
    return install


def test_the_device_of_a_name_becomes_the_current_one_and_runs_a_kernel(monkeypatch):
    current, ran = [], []
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "ones", lambda *a, device, **k: ran.append(device) or ones(*a, **k))
    assert devices.choose("cuda:1") == torch.device("cuda:1")
    assert current == ran == [torch.device("cuda:1")]
    assert devices.choose("cpu") == torch.device("cpu") and len(current) == 1


@pytest.mark.parametrize(("rank", "count", "share", "index"), [
    ("0", 1, False, 0), ("1", 2, False, 1), ("1", 1, True, 0), ("3", 2, True, 1), ("2", 4, True, 2),
])  # fmt: skip
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_per_process_or_shared_ones(gpus, monkeypatch, name, rank, count, share, index):
    gpus(count)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert devices.choose(name, share) == torch.device("cuda", index)


def test_more_processes_than_gpus_are_refused_where_each_needs_one(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("auto", "cuda"):
        with pytest.raises(config.UserError, match="cuda:1 cannot be used here: .* ordinal$"):
            devices.choose(name)


@pytest.mark.parametrize("name", ["mps", "meta", "cuda:99", "xla", "nonsense", "cuda:", ""])
def test_devices_that_do_not_work_are_one_short_line(name):
    with pytest.raises(config.UserError) as caught:
        devices.choose(name)
    text = str(caught.value)
    assert text.startswith(f"--device {name} cannot be used here: ") and "\n" not in text
    assert len(text) < 400


def test_float64_is_asked_for(monkeypatch):
    """Apple's GPUs have none, and the sums of an epoch need it."""
    def ones(*_, dtype, device):
        assert (dtype, device.type) == (torch.float64, "mps")
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                        "doesn't support float64. Please use float32 instead.")  # fmt: skip

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(config.UserError, match="--device mps cannot be used here: .* float64$"):
        devices.choose("mps")


@pytest.mark.parametrize(("count", "error", "why"), [
    (0, RuntimeError(f"{TOO_OLD} your GPU driver"), "too old (found version 11040)"),
    (1, RuntimeError("CUDA error: no kernel image is available for execution on the device\nx"),
     "no kernel image is available"),
])  # fmt: skip
def test_a_gpu_that_cannot_be_used_is_a_warning(gpus, monkeypatch, tmp_path, capfd, count, error,
                                                why):  # fmt: skip
    gpus(count, error)
    monkeypatch.setattr(devices, "SIGNS_OF_A_GPU", [tmp_path])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert devices.choose("auto") == torch.device("cpu")
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("warning: running on the CPU, ")
    assert why in err and "pytorch.org/get-started" in err and torch.__version__ in err
    with pytest.raises(config.UserError, match="cannot be used here"):
        devices.choose("cuda")
    monkeypatch.setenv("RANK", "1")  # one line for all processes
    assert devices.choose("auto") == torch.device("cpu") and capfd.readouterr().err == ""


@pytest.mark.parametrize("hidden", [None, "", "-1"])
def test_no_gpu_and_a_hidden_one_are_no_warning(gpus, monkeypatch, tmp_path, capfd, hidden):
    gpus(0, RuntimeError("no GPU"))
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        monkeypatch.setattr(devices, "SIGNS_OF_A_GPU", [tmp_path])
    assert devices.choose("auto") == torch.device("cpu")
    assert capfd.readouterr() == ("", "")


def test_a_torch_without_cuda_is_named_as_the_reason(gpus, monkeypatch, tmp_path, capfd):
    gpus(0)
    monkeypatch.setattr(devices, "SIGNS_OF_A_GPU", [tmp_path])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert devices.choose("auto") == torch.device("cpu")
    assert "this PyTorch was built without CUDA" in capfd.readouterr().err


def test_the_first_line_says_what_a_stage_runs_on(tiny, tmp_path, capsys):
    train.main([f"--data={tiny}", f"--run-dir={tmp_path}", "--epochs=1", "--batch-size=32",
                "--width=0.1", "--device=cpu"])  # fmt: skip
    first, count = capsys.readouterr().out.splitlines()[0], torch.get_num_threads()
    threads = f"{count} thread" if count == 1 else f"{count} threads"
    assert first.startswith("device: cpu, ") and re.search(rf", {threads}\b", first)


def test_the_first_line_names_the_gpu_and_the_processes(monkeypatch, capsys):
    names = {torch.device("cuda:1"): "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: names[d])
    monkeypatch.setattr(processes, "world_and_rank", lambda: (2, 0))
    console.say_device(torch.device("cuda:1"))
    assert capsys.readouterr().out == "device: cuda:1, NVIDIA H100 80GB HBM3, 2 processes\n"


# ---- states, batch norm, powers of two -----------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_state_moves_between_devices_that_scale_the_loss_and_those_that_do_not(
    tmp_path, before, after
):
    def state(scaling):
        torch.manual_seed(0)
        model = MobileNetV2(standard(0.1))
        optimizer = engine.build_optimizer(model, engine.Recipe(1))
        scaler = torch.amp.GradScaler("cpu", enabled=scaling, init_scale=8.0)
        return engine.TrainingState(model, optimizer, scaler, None)

    old, new = state(before), state(after)
    old.add({"epoch": 1})
    old.save(tmp_path / "state", {})
    new.scaler = torch.amp.GradScaler("cpu", enabled=after, init_scale=32.0)
    new.restore(tmp_path / "state", {})
    assert new.history == [{"epoch": 1}]
    assert new.scaler.get_scale() == (8.0 if before and after else 32.0 if after else 1.0)


@pytest.mark.parametrize(("backend", "theirs"), [("nccl", True), ("gloo", False)])
def test_batch_norm_of_several_processes(monkeypatch, small, pixels, backend, theirs):
    """On GPUs it is torch's own; for all other code it stays a BatchNorm2d."""
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    model = small(0)
    expected, keys = model(pixels), list(model.state_dict())
    processes.synchronize_batchnorm(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) == theirs for m in norms)
    assert list(model.state_dict()) == keys and torch.equal(model(pixels), expected)
    assert torch.equal(fold(model)(pixels), fold(small(0))(pixels))
    if theirs:  # without other processes it trains as BatchNorm2d does
        plain = small(0).train()
        torch.manual_seed(1)  # of dropout
        out = model.train()(pixels[:8])
        torch.manual_seed(1)
        assert torch.equal(out, plain(pixels[:8]))
        a, b = model.state_dict(), plain.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in keys)


@pytest.mark.parametrize(("device", "share", "backend"), [
    ("cuda:0", False, "nccl"), ("cuda:0", True, "gloo"), ("cpu", False, "gloo"),
    ("cpu", True, "gloo"),
])  # fmt: skip
def test_processes_that_share_gpus_do_not_need_nccl(monkeypatch, device, share, backend):
    started = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: started.append(backend))
    processes.start(torch.device(device), share)
    assert started == [backend]


@pytest.mark.parametrize("step", [0.03, 2.0**-7, 1.5 * 2.0**-9, 1.0, 3.7])
def test_the_grid_of_biases_is_a_power_of_two_also_where_exp2_is_not(monkeypatch, step):
    """A GPU's exp2 may be off by a few units in the last place."""
    inexact = lambda x: torch.full_like(x, 2 ** x.item() * (1 + 2e-7))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "exp2", inexact)
    walk = types.SimpleNamespace(options=ptq._Options(23, 2), mean_bias_importance={})
    walk.bias_exponent = functools.partial(ptq._Walk.bias_exponent, walk)
    layer = nn.Conv2d(2, 2, 1).requires_grad_(False)
    layer.weight_scale = torch.ones(2)
    quantizer = quantizers.Quantizer(8, True)
    quantizer.step.fill_(step)
    ptq._Walk.put_bias_on_grid(walk, layer, quantizer, torch.zeros(1, 2, 1, 1))
    assert math.frexp(layer.bias_scale)[0] == 0.5
    assert 2**-0.5 <= layer.bias_scale * 4 / step <= 2**0.5


