"""lib/foreign.py: networks as other programs write them are read, or refused by their reason."""

import argparse
import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models import mobilenet_v2

import eval as evaluation
import report
from lib import checkpoint, foreign, memory
from lib.config import UserError


@pytest.fixture(scope="module")
def theirs():
    """torchvision's own class, small, with random weights."""
    torch.manual_seed(0)
    return mobilenet_v2(num_classes=10, width_mult=0.1).eval()


@pytest.fixture(scope="module")
def plain(theirs):
    return dict(theirs.state_dict())


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def equal(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def loaded(content, folder: Path, capfd) -> tuple[dict, str]:
    """The state of the network that is built from a saved content, and what is said of the file."""
    torch.save(content, folder / "x.pth")
    state = checkpoint.load(folder / "x.pth", downsample=4).build().state_dict()
    err = capfd.readouterr().err
    assert err.count("\n") <= 1
    return state, err.removeprefix(f"{folder}/x.pth: ").rstrip("\n")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, downsample=4).build()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 400
    return message


# ---- state dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "model.", "module._orig_mod.", "net.backbone.",
])  # fmt: skip
def test_a_prefix_is_taken_off_and_named(plain, tmp_path, capfd, prefix):
    state, said = loaded(prefixed(prefix, plain), tmp_path, capfd)
    assert equal(state, plain) and said == f"without the prefix {prefix!r}"


def test_real_wrappers_have_these_prefixes(theirs, plain, tmp_path, capfd):
    for model in (nn.DataParallel(theirs), torch.compile(theirs)):
        state, said = loaded(model.state_dict(), tmp_path, capfd)
        assert equal(state, plain) and said.startswith("without the prefix '")


@pytest.mark.parametrize("key", ["net", "model", "state_dict", "model_state_dict", "ema", "other"])
def test_a_wrapping_is_taken_off_and_named(plain, tmp_path, capfd, key):
    state, said = loaded({"epoch": 3, key: plain, "optimizer": {"state": {}}}, tmp_path, capfd)
    assert equal(state, plain) and said == f"taken from '{key}'"
    nested = {"checkpoint": {key: prefixed("module.", plain), "acc": 91.2}}
    state, said = loaded(nested, tmp_path, capfd)
    assert equal(state, plain)
    assert said == f"taken from 'checkpoint' > '{key}', without the prefix 'module.'"


def test_of_two_networks_the_first_is_taken_and_the_other_named(plain, tmp_path, capfd):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
    content = {"model": plain, "ema": prefixed("module.", zeros)}
    state, said = loaded(content, tmp_path, capfd)
    assert equal(state, plain)
    assert said == "taken from 'model', not the network at 'ema' > 'module.'"


def test_a_network_among_the_names_of_another_is_left_out_and_named(plain, tmp_path, capfd):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
    state, said = loaded(plain | prefixed("teacher.", zeros), tmp_path, capfd)
    assert equal(state, plain) and said == "not the network at 'teacher.'"


def test_a_weight_that_is_there_with_and_without_its_mask_is_not_lost(plain, tmp_path, capfd):
    weight = plain["features.0.0.weight"]
    masked = {"weight_orig": weight, "weight_mask": torch.ones_like(weight)}
    state, _ = loaded(plain | prefixed("features.0.0.", masked), tmp_path, capfd)
    assert equal(state, plain)


def test_a_key_named_format_is_no_claim_to_be_ours(plain, tmp_path, capfd):
    state, said = loaded({"format": "pt", "model": plain}, tmp_path, capfd)
    assert equal(state, plain) and said == "taken from 'model'"
    torch.save({"format": "mobilenetv2-cifar10/99", "state": plain}, tmp_path / "x.pth")
    assert "has format 'mobilenetv2-cifar10/99'; this program reads" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
def test_levels_without_scales_are_refused(plain, tmp_path, dtype):
    torch.save(plain | {"features.0.0.weight": plain["features.0.0.weight"].to(dtype)},
               tmp_path / "x.pth")  # fmt: skip
    assert f"features.0.0.weight holds {dtype}, no floats" in refusal(tmp_path / "x.pth")


def test_tensors_beside_the_network_are_left_out_and_named(plain, tmp_path, capfd):
    state, said = loaded(plain | {"epoch": 3, "ema": torch.zeros(3)}, tmp_path, capfd)
    assert equal(state, plain) and said == "without 'ema' beside it"
    averaged = torch.optim.swa_utils.AveragedModel(mobilenet_v2(num_classes=10, width_mult=0.1))
    state, said = loaded(averaged.state_dict(), tmp_path, capfd)
    assert list(state) == list(plain)
    assert said == "without the prefix 'module.', without 'n_averaged' beside it"


def test_tensors_that_might_be_of_the_network_are_not_left_out(plain, tmp_path):
    torch.save(plain | {"attention.weight": torch.zeros(3)}, tmp_path / "x.pth")
    assert 'Unexpected key(s) in state_dict: "attention.weight"' in refusal(tmp_path / "x.pth")


def test_masks_of_pruning_are_applied(plain, tmp_path, capfd):
    model = mobilenet_v2(num_classes=10, width_mult=0.1)
    model.load_state_dict(plain)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", 0.5)
    masked = model.state_dict()
    for layer in layers:
        prune.remove(layer, "weight")
    for content in (masked, {"net": prefixed("module.", masked)}):
        state, said = loaded(content, tmp_path, capfd)
        assert state.keys() == plain.keys()
        assert all(torch.equal(state[k], t) for k, t in model.state_dict().items())
        assert said.endswith("its weights multiplied by their masks")
    masked["features.0.0.weight_mask"] = torch.ones(3)
    torch.save(masked, tmp_path / "x.pth")
    assert "features.0.0.weight_mask is (3,), not (8, 3, 3, 3)" in refusal(tmp_path / "x.pth")


def test_dicts_that_hold_themselves_end(plain, tmp_path):
    content = {"x": torch.zeros(1)}
    content["self"] = content
    torch.save(content, tmp_path / "x.pth")
    assert "not the state dict of a MobileNetV2" in refusal(tmp_path / "x.pth")


def test_a_list_of_missing_tensors_is_cut(plain, tmp_path):
    few = {n: t for n, t in plain.items() if "conv.0.1" not in n or n.endswith("tracked")}
    torch.save(few, tmp_path / "x.pth")
    message = refusal(tmp_path / "x.pth")
    assert message.endswith(
        'Missing key(s) in state_dict: "features.1.conv.0.1.weight", "features.1.conv.0.1.bias", '
        '"features.1.conv.0.1.running_mean" and 65 more'
    )


@pytest.mark.parametrize(("dtype", "name"), [
    (torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32"),
    (torch.float64, "fp64"),
])  # fmt: skip
def test_the_type_of_the_weights_is_told(plain, tmp_path, capfd, dtype, name):
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain.items()}
    state, said = loaded(cast, tmp_path, capfd)
    assert said == "" and {t.dtype for t in state.values()} == {torch.float32, torch.int64}
    assert checkpoint.load(tmp_path / "x.pth", 4).dtype == name


def test_eval_tells_the_type_of_the_weights(plain, tiny, tmp_path, capfd):
    halves = {n: t.half() if t.is_floating_point() else t for n, t in plain.items()}
    torch.save(halves, tmp_path / "half.pth")
    flags = [f"{tmp_path}/half.pth", f"--data={tiny}", f"--run-dir={tmp_path}"]
    evaluation.main(flags)
    assert re.search(r"\n  size       [\d,]+ bytes, fp16\n", capfd.readouterr().out)
    evaluation.main([*flags, "--json"])
    assert json.loads(capfd.readouterr().out)["dtype"] == "fp16"


# ---- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [
    np.float64(91.2), np.float32(0.5), np.int64(-3), np.uint8(7), np.bool_(True), np.str_("cosine"),
    np.array(2.5, ">f8")[()],
])  # fmt: skip
def test_numpy_scalars_become_plain_values(plain, tmp_path, capfd, value):
    state, _ = loaded({"state_dict": plain, "best": value}, tmp_path, capfd)
    assert equal(state, plain)
    best = checkpoint.read(tmp_path / "x.pth")["best"]
    assert best == value.item() and type(best) in (float, int, bool, str)


class Call:
    """Pickled, a call of numpy's constructor with arguments of our choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_numpy_scalars_of_objects_or_too_few_bytes_are_refused(tmp_path):
    scalar = np._core.multiarray.scalar
    for arguments in ((np.dtype("O"), b"x" * 8), (np.dtype("f8"), b"x"), (np.dtype("V8"), b"x" * 8),
                      (np.dtype("M8[s]"), b"x" * 8)):  # fmt: skip
        torch.save({"best": Call(scalar, *arguments)}, tmp_path / "x.pth")
        assert "holds pickled numpy" in refusal(tmp_path / "x.pth")


class Net(nn.Module):
    """A network of somebody's own."""


OWNERS_LINE = 'Its owner can run: torch.save(model.state_dict(), "plain.pth")'


@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_objects_are_refused_by_name(theirs, plain, tmp_path, old_format):
    for content, name in [
        (theirs, "torchvision.models.mobilenetv2.MobileNetV2"),
        ({"model": Net()}, f"{Net.__module__}.Net"),
        ({"state_dict": plain, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
    ]:
        path = tmp_path / "x.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not old_format)
        message = refusal(path)
        assert f"holds a pickled {name}" in message and OWNERS_LINE in message
        assert "damaged" not in message


def test_numpy_arrays_are_refused_with_the_line_that_converts_them(plain, tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in plain.items()}
    torch.save(arrays, tmp_path / "a.pth")
    for protocol in (2, 4, 5):
        (tmp_path / f"b{protocol}.pkl").write_bytes(pickle.dumps(arrays, protocol))
    for path in tmp_path.iterdir():
        message = refusal(path)
        assert "holds pickled numpy arrays" in message and "damaged" not in message
        line = message.partition("Its owner can run: ")[2].replace("plain.pth", str(path))
        exec(line, {"torch": torch, "state": arrays})
        assert equal(checkpoint.load(path, 4).state, plain)


def test_plain_pickles_of_tensors_are_refused_by_their_protocol(plain, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(plain))
    torch.save(plain, tmp_path / "x.pth", pickle_protocol=4)
    for name in ("x.pkl", "x.pth"):
        message = refusal(tmp_path / name)
        assert "is pickled with protocol 4, torch.save's is 2" in message and OWNERS_LINE in message


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_torchscript_is_refused_with_the_line_that_converts_it(theirs, plain, tmp_path):
    torch.jit.script(theirs).save(tmp_path / "jit.pt")
    message = refusal(tmp_path / "jit.pt")
    assert "is a TorchScript archive, which holds code" in message
    line = message.partition("Its owner can run: ")[2].replace("plain.pth", f"{tmp_path}/plain.pth")
    exec(line.replace('"jit.pt"', f'"{tmp_path}/jit.pt"'), {"torch": torch})
    state = checkpoint.load(tmp_path / "plain.pth", 4).build().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())


# ---- safetensors ---------------------------------------------------------------------------------


def safetensors(state: dict, change=lambda header: None) -> bytes:
    """The bytes of a safetensors file, written from its documentation alone."""
    names = {v: k for k, v in foreign.DTYPES.items()}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        content = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(content)]}  # fmt: skip
        body += content
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def test_safetensors(plain, tmp_path, capfd):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain.items()}
        (tmp_path / "x.safetensors").write_bytes(safetensors(prefixed("module.", cast)))
        found = checkpoint.load(tmp_path / "x.safetensors", 4)
        assert equal(found.state, cast)
        assert all(found.state[name].dtype == tensor.dtype for name, tensor in cast.items())
        found.build()
    assert capfd.readouterr().err == (
        f"{tmp_path}/x.safetensors: without the prefix 'module.'\n" * 4
    )


def entry(**changes):
    return lambda header: header["features.0.0.weight"].update(changes)


@pytest.mark.parametrize("change", [
    entry(dtype="float"), entry(dtype=None), entry(shape=[8, 3, 3]), entry(shape=[-8, -3, 3, 3]),
    entry(shape=[1 << 62, 4]), entry(shape="8"), entry(shape=[8.0, 27]), entry(data_offsets=[0]),
    entry(data_offsets=[8, 872]), entry(data_offsets=[0, 1 << 40]), entry(data_offsets=[-864, 0]),
    entry(data_offsets=["0", "864"]), lambda header: header.pop("features.0.0.weight"),
    lambda header: header.update(x=3), lambda header: header.pop("classifier.1.bias"),
])  # fmt: skip
def test_damaged_headers_of_safetensors(plain, tmp_path, change):
    (tmp_path / "x.safetensors").write_bytes(safetensors(plain, change))
    assert "is a damaged safetensors file" in refusal(tmp_path / "x.safetensors")


def test_types_of_8_bit_floats_are_named(plain, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(plain, entry(dtype="F8_E4M3")))
    assert "'features.0.0.weight' is of type F8_E4M3: convert it to F32" in refusal(path)
    name = "classifier.1.weight"
    torch.save(plain | {name: plain[name].to(torch.float8_e4m3fn)}, tmp_path / "x.pth")
    assert f"'{name}' is of torch.float8_e4m3fn: convert it" in refusal(tmp_path / "x.pth")


def test_what_could_ask_for_any_amount_of_memory_is_refused(plain, tmp_path, monkeypatch):
    path, packed = tmp_path / "x.pth", tmp_path / "packed.pth"
    torch.save(plain, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for item in whole.infolist():
            new.writestr(item.filename, whole.read(item))
    called = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: called.append(args))
    assert "is a compressed archive" in refusal(packed)

    class Large:
        def __reduce__(self):
            return bytearray, (1000,)

    for old_format in (True, False):
        torch.save({"x": Large()}, path, _use_new_zipfile_serialization=not old_format)
        assert "it asks to call" in (message := refusal(path)) and "bytearray" in message
        if old_format:  # cut, with an archive at its end, by which zipfile takes it for one
            raw = path.read_bytes()
            path.write_bytes(raw[: raw.rindex(b"bytearray") + 20] + packed.read_bytes())
            assert "is not a checkpoint, or is damaged" in refusal(path)
    for first in (b"cbuiltins\nbytearray\nK\x05\x85R.", b"."):  # none says its protocol
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/first-data.pkl", first)
            archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        assert "is not a checkpoint, or is damaged" in refusal(path)
    assert called == []


def test_damaged_safetensors(plain, tmp_path):
    raw, path = safetensors(plain), tmp_path / "x.safetensors"
    for damaged in (raw[:-1], raw + b"x", raw[:8] + b"{" * 10_000 + raw[10_008:]):
        path.write_bytes(damaged)
        assert "is a damaged safetensors file" in refusal(path)
    for damaged in (raw[:7], raw[:100], b"\xff" * 8 + raw[8:]):
        path.write_bytes(damaged)
        assert "is not a checkpoint, or is damaged" in refusal(path)


# ---- in a report ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["prefix", "masks", "safetensors"])
def test_their_weights_are_counted_as_bytes(plain, tmp_path, form):
    path, name = tmp_path / "baseline.pth", "features.0.0.weight"
    if form == "prefix":
        torch.save({"model": prefixed("module.", plain)}, path)
    elif form == "masks":
        rest = {n: t for n, t in plain.items() if n != name}
        masked = {f"{name}_orig": plain[name], f"{name}_mask": torch.ones_like(plain[name])}
        torch.save(rest | masked, path)
    else:
        path.write_bytes(safetensors(plain))
    source = checkpoint.load(path, 4)
    parts = memory.bytes_by_part(source)
    assert parts[memory.WEIGHTS] == 4 * source.weights and sum(parts.values()) == source.bytes
    assert report.status(tmp_path)[0][4] == "up to date: the start of a chain"
