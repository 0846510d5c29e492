"""lib/checkpoint.py: what was saved comes back to the bit; all else is refused in one line."""

import copy
import hashlib
import io
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import mobilenet_v2

import prune
import quantize
import sparse_compress
import train
from lib import checkpoint, compressed, config, data, ptq, quantizers
from lib.config import UserError
from lib.files import atomic
from lib.nnz import v1
from models.mobilenetv2 import MobileNetV2, standard

SETTINGS = standard(0.1, 8)
REFERENCE = {"method": "reference", "weight_bits": 8, "act_bits": 8}
ANCESTOR = {"stage": "pruned", "sha256": None, "bytes": None, "weights": 5, "metrics": {}}


def save(path, stage="baseline", parent=None, model=None, **kwargs):
    model = model or MobileNetV2(SETTINGS)
    options = {"metrics": {"val_correct": 3}, "data": {"val_size": 30}} | kwargs
    return checkpoint.save(path, stage, model, train.Settings(), parent, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint") / "x.pth"
    save(path)
    return path.read_bytes()


def changed_block(number, **changes):
    """The settings with another block of this number, counted from 1."""
    settings = copy.deepcopy(SETTINGS)
    settings["blocks"][number - 1] |= changes
    return settings


def nnz_of(source, path):
    path.write_bytes(compressed.encode(source))
    return path


def refused(path, what: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path).build()
    message = str(caught.value)
    assert what in message and str(path) in message and "\n" not in message, message


def identical(a: dict, b: dict) -> bool:
    """To the bit: types, signs of zero and NaNs as well."""
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].contiguous().numpy().tobytes() == b[k].contiguous().numpy().tobytes()
        for k in a
    )


# ---- round trips ---------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    model = MobileNetV2(SETTINGS).to(memory_format=torch.channels_last)
    model.state_dict()["features.0.1.running_mean"][:3] = torch.tensor([-0.0, 1e-45, 3e38])
    saved, loaded = save(tmp_path / "a.pth", model=model), checkpoint.load(tmp_path / "a.pth")
    assert identical(saved.state, model.state_dict())
    built = loaded.build()
    assert identical(built.state_dict(), model.state_dict())
    assert not built.training and built.settings == SETTINGS
    assert loaded.bytes == (tmp_path / "a.pth").stat().st_size
    assert loaded.sha256 == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert (loaded.stage, loaded.seed, loaded.metrics) == ("baseline", 47, {"val_correct": 3})
    assert loaded.val_size(None) == 30 and loaded.val_size(0) == 0


@pytest.mark.parametrize("bits", [2, 8, 16, 32])
def test_round_trip_of_a_quantized_network(tmp_path, bits):
    model = MobileNetV2(SETTINGS)
    scheme = quantizers.quantize_reference(model, bits, 8)
    state = quantizers.integer_state(model.state_dict(), scheme)
    loaded = save(tmp_path / "q.pth", "int8", model=model, quantization=scheme, state=state)
    assert loaded.quantization == scheme and identical(loaded.state, state)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    built = loaded.build()
    assert identical(built.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(built(x), model.to(memory_format=torch.channels_last).eval()(x))


def test_building_twice_shares_nothing(tmp_path):
    source = save(tmp_path / "a.pth")
    a, b = source.build(), source.build()
    torch.nn.init.zeros_(a.classifier[1].weight)
    assert b.classifier[1].weight.any() and source.state["classifier.1.weight"].any()


def test_holds_plain_types_alone(tmp_path):
    save(tmp_path / "a.pth")
    raw = torch.load(tmp_path / "a.pth", weights_only=True)  # the strictest reader takes it
    assert raw["format"] == checkpoint.FORMAT
    assert {"code", "environment", "config", "ancestors"} <= set(raw)
    assert raw["environment"]["torch"] == torch.__version__
    assert raw["config"]["lr"] == train.Settings().lr


def test_plain_torchvision_state_dict(tmp_path):
    theirs = mobilenet_v2(num_classes=10, width_mult=0.1)
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")
    loaded = checkpoint.load(tmp_path / "plain.pth")
    assert loaded.settings == standard(0.1, 4) and loaded.quantization is None
    assert identical(loaded.build().state_dict(), theirs.state_dict())
    assert loaded.val_size(None) is None and loaded.ancestors == []


def test_strides_that_a_state_dict_does_not_hold_are_told_or_said(tmp_path, capfd):
    torch.save(mobilenet_v2(num_classes=10, width_mult=0.1).state_dict(), tmp_path / "plain.pth")
    assert checkpoint.load(tmp_path / "plain.pth").settings == standard(0.1, 4)
    assert capfd.readouterr().err == (
        f"{tmp_path}/plain.pth does not say its strides: taken as --assume-downsample 4 "
        "(32x32 down to 8x8)\n"
    )
    for downsample in (4, 8, 16, 32):
        found = checkpoint.load(tmp_path / "plain.pth", downsample).settings
        assert found == standard(0.1, downsample)
    own = save(tmp_path / "own.pth").settings  # a file of ours knows
    assert checkpoint.load(tmp_path / "own.pth", 4).settings == own == SETTINGS
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["features.3.conv.0.0.weight", "features.18.1.running_var"])
def test_values_that_are_no_numbers_are_refused(tmp_path, value, name):
    state = MobileNetV2(SETTINGS).state_dict()
    state[name].view(-1)[-1] = value
    torch.save(state, tmp_path / "plain.pth")
    refused(tmp_path / "plain.pth", f"holds NaN or infinite values in {name}")
    model = MobileNetV2(SETTINGS)
    model.load_state_dict(state)
    before = save(tmp_path / "kept.pth").sha256
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        save(tmp_path / "kept.pth", model=model)
    assert checkpoint.load(tmp_path / "kept.pth").sha256 == before
    raw = {"format": checkpoint.FORMAT, "stage": "baseline", "settings": SETTINGS, "state": state}
    torch.save(raw, tmp_path / "own.pth")
    refused(tmp_path / "own.pth", f"holds NaN or infinite values in {name}")


def test_lineage_has_every_ancestor_oldest_first(tmp_path):
    stages, parent, chain = ("baseline", "pruned", "quantized", "int8"), None, []
    for stage in stages:
        parent = save(tmp_path / f"{stage}.pth", stage, parent, metrics={"of": stage})
        chain.append(parent)
    last = checkpoint.load(tmp_path / "int8.pth")
    assert [a["stage"] for a in last.lineage()] == list(stages)
    for record, source in zip(last.lineage(), chain, strict=True):
        assert record["sha256"] == source.sha256 and record["bytes"] == source.bytes
        assert record["metrics"] == {"of": source.stage}
    fields = compressed.decode(compressed.encode(last))
    assert [a["stage"] for a in fields["ancestors"]] == list(stages)


# ---- writing -------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, old):
    path = tmp_path / "x.pth"
    if old:
        path.write_bytes(old)
    before = list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        checkpoint.write(path, {"a": torch.zeros(100_000), "b": Bomb()})
    with pytest.raises(KeyboardInterrupt), atomic(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == before
    assert not old or path.read_bytes() == old


def test_the_command_is_recorded_without_folders(tmp_path):
    assert save(tmp_path / "a.pth").command == "python train.py"
    cfg = prune.Settings(
        parent="/some where/b.pth", teacher="/x/c.pth", run_dir="/run", data="/data", seed=3,
        schedule="geometric", prune_fraction=0.5, amp=False, device="cuda:1",
    )  # fmt: skip
    model = MobileNetV2(SETTINGS)
    saved = checkpoint.save(tmp_path / "b.pth", "pruned", model, cfg, None, metrics={}, data={})
    assert saved.command == (
        "python prune.py --parent b.pth --schedule geometric --prune-fraction 0.5 "
        "--teacher c.pth --no-amp --seed 3"
    )
    cfg = quantize.Settings(layer_bits="/home/me/bits.json,first=8")
    assert config.command(cfg) == "python quantize.py --layer-bits bits.json,first=8"


def test_a_file_of_before_the_command_was_recorded_still_loads(tmp_path):
    content = checkpoint.read(save(tmp_path / "a.pth").file)
    del content["command"]
    checkpoint.write(tmp_path / "a.pth", content)
    assert checkpoint.load(tmp_path / "a.pth").command is None


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 63, 1000, 0.3, 0.6, 0.9, -1000, -22, -1])
def test_truncated(whole, tmp_path, keep):
    path = tmp_path / "x.pth"
    path.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else keep])
    refused(path, "is not a checkpoint, or is damaged")


@pytest.mark.parametrize("where", ["anywhere", "pickle", "directory"])
def test_flipped_bits_are_refused_or_load_but_never_crash(whole, tmp_path, where):
    """torch checks no CRC of its own files, so a flip in a weight does load. Of the pickle, whose
    instructions are listed first, it is checked."""
    infos = zipfile.ZipFile(io.BytesIO(whole)).infolist()
    entry = next(i for i in infos if i.filename.endswith("data.pkl"))
    low, high = {
        "anywhere": (0, len(whole)),
        "pickle": (entry.header_offset, entry.header_offset + 64 + entry.file_size),
        "directory": (len(whole) - 60 * len(infos), len(whole)),
    }[where]
    rng, path, outcomes = random.Random(where), tmp_path / "x.pth", set()
    for _ in range(50):
        raw = bytearray(whole)
        raw[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        try:
            checkpoint.load(path).build()
            outcomes.add("loaded")
        except UserError as error:
            assert str(error).count("\n") == 0
            outcomes.add("refused")
    assert outcomes == {"refused"} | ({"loaded"} if where != "pickle" else set())


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
@pytest.mark.parametrize("place", ["all", "state", "metrics"])
def test_code_in_a_pickle_is_not_executed(tmp_path, writer, place):
    trap = Malice(tmp_path / "executed")
    content = {
        "all": trap,
        "state": {"format": checkpoint.FORMAT, "stage": "baseline", "state": trap},
        "metrics": {"features.0.0.weight": torch.zeros(3), "metrics": [trap]},
    }[place]
    path = tmp_path / "x.pth"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    refused(path, "is not a checkpoint, or is damaged")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("content", "what"), [
    (b"", "is damaged"), (b"PK\x03\x04", "is damaged"), (b"GIF89a" + bytes(100), "is damaged"),
    (b"\x80\x04.", "is damaged"), (b"\x89NNZ", "truncated"), (b"\x89NNZ\r\n\x1a\nxx", "truncated"),
    ([1, 2], "holds a list, not a checkpoint"), (torch.zeros(3), "holds a Tensor"),
    ({}, "not the state dict of a MobileNetV2"),
    ({"state_dict": {"x": torch.zeros(1)}}, "not the state dict of a MobileNetV2"),
    ({"format": "mobilenetv2-cifar10/99"}, "has format 'mobilenetv2-cifar10/99'; this program"),
    ({"format": checkpoint.FORMAT, "stage": "baseline"}, "lacks a field"),
])  # fmt: skip
def test_foreign_content(tmp_path, content, what):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refused(path, what)


@pytest.mark.parametrize(("change", "what"), [
    ({"settings": {"blocks": [{}]}}, "'stem'"), ({"settings": {}}, "'blocks'"),
    ({"settings": None}, "NoneType"),
    ({"settings": SETTINGS | {"head": -3}}, "channels to -3"),
    ({"settings": SETTINGS | {"blocks": SETTINGS["blocks"][1:2] * 256}}, "no list of 1 to 255"),
    ({"settings": SETTINGS | {"blocks": []}}, "no list of 1 to 255"),
    ({"settings": SETTINGS | {"blocks": ()}}, "no list of 1 to 255"),
    ({"settings": SETTINGS | {"blocks": [{"x": 1}]}}, "unexpected keyword argument 'x'"),
    ({"settings": standard(0.35, 8)}, "size mismatch"),
    ({"state": {}}, "Missing key"),
    ({"state": 3}, "'int' object"),
    ({"quantization": {"method": "ptq", "bits": 8}}, "'weight_bits'"),
    ({"quantization": {"method": "x", "weight_bits": 8, "act_bits": 8}}, "'method'"),
    ({"settings": SETTINGS | {"stem_stride": 0}}, "a stride of 0, not 1 to 255"),
    ({"settings": SETTINGS | {"stem_stride": 1.0}}, "a stride of 1.0"),
    ({"settings": changed_block(2, residual=True, stride=2)}, "a residual block of stride 2"),
    ({"settings": changed_block(17, residual=True)}, "a residual block of stride 1, 16"),
    ({"settings": SETTINGS | {"head": 0}}, "channels to 0"),
    ({"settings": changed_block(1, hidden=9)}, " channels, 9 hidden ones"),
    ({"settings": changed_block(2, hidden=65535)}, "over the limit of 8,388,608"),
    ({"settings": SETTINGS | {"classes": 0}}, "its 'classes' are no number over 0"),
    ({"seed": -1}, "a seed that is not 0 to 2"), ({"seed": 2**32}, "a seed that is not 0 to 2"),
    ({"quantization": REFERENCE | {"method": "ptq", "layer_bits": {}}}, "with batch norms"),
    ({"stage": None}, "its stage is no text"), ({"stage": "a\nb"}, "its stage is no text"),
    ({"ancestors": [ANCESTOR | {"stage": "\x1b[31m"}]}, "an ancestor without a legal stage"),
    ({"state": {"classifier.1.weight": [1]}}, "'classifier.1.weight' in its state is no tensor"),
    ({"state": {1: torch.zeros(1)}}, "1 in its state is no tensor"),
    ({"state": {"x": torch.zeros(2, 2).to_sparse()}}, "'x' in its state is no dense tensor"),
    ({"state": {"x": torch.zeros(2, device="meta")}}, "'x' in its state is no dense tensor"),
    ({"quantization": 8}, "quantization: not a dict"),
    ({"quantization": {}}, "'weight_bits'"),
    ({"quantization": REFERENCE | {"act_bits": 8.0}}, "'act_bits' is not 2 to 16, or 32"),
    ({"quantization": REFERENCE | {"weight_bits": 1000}}, "'weight_bits' is not 2 to 16, or 32"),
    ({"quantization": REFERENCE | {"method": ["ptq"]}}, "'method'"),
    ({"quantization": REFERENCE | {"method": "ptq"}}, "'layer_bits'"),
    ({"quantization": REFERENCE | {"layer_bits": {"x": None}}}, "'x' is not 2 to 16, or 32"),
    ({"data": []}, "data: a 'list' object, not a dict"),
    ({"data": {"classes": "abc"}}, "names of classes"),
    ({"data": {"classes": list(range(10))}}, "names of classes"),
    ({"data": {"classes": ["cat", "dog"]}}, "2 names of 10 classes"),
    ({"data": {"val_size": "30"}}, "val_size"), ({"data": {"val_size": -1}}, "val_size"),
    ({"ancestors": {}}, "ancestors: not a list"), ({"ancestors": ["pruned"]}, "an ancestor"),
    ({"ancestors": [ANCESTOR | {"sha256": 3}]}, "an ancestor without a legal"),
    ({"ancestors": [ANCESTOR | {"stage": None}]}, "an ancestor without a legal"),
    ({"ancestors": [ANCESTOR, ANCESTOR | {"metrics": None}]}, "an ancestor without a legal"),
    ({"ancestors": [ANCESTOR | {"weights": 0}]}, "the first ancestor has no weights"),
    ({"ancestors": [ANCESTOR | {"weights": None}]}, "the first ancestor has no weights"),
    ({"config": 1}, "config"), ({"metrics": 1}, "metrics"),
])  # fmt: skip
def test_content_that_does_not_fit_itself(whole, tmp_path, change, what):
    raw = torch.load(io.BytesIO(whole), weights_only=True)
    torch.save(raw | change, tmp_path / "x.pth")
    if " in its state is no " not in what:
        refused(tmp_path / "x.pth", "does not fit its own description")
    refused(tmp_path / "x.pth", what)


def test_no_memory_is_taken_for_a_state_that_does_not_fit(tmp_path, monkeypatch):
    """A small file can say any number of classes: its network is first made without memory."""
    built = []

    class Watched(MobileNetV2):
        def __init__(self, settings):
            built.append(torch.empty(0).device.type)
            super().__init__(settings)

    meta = {"settings": SETTINGS | {"classes": 1000}, "quantization": None, "data": {}, "seed": 1,
            "ancestors": [], "mean": list(data.MEAN), "std": list(data.STD)}  # fmt: skip
    (tmp_path / "x.nnz").write_bytes(v1.encode(meta, {}, {}, {}))
    state = MobileNetV2(SETTINGS).state_dict()
    torch.save(state | {"classifier.1.weight": torch.zeros(1000, 0)}, tmp_path / "x.pth")
    wide = state["classifier.1.weight"].to(torch.int8)[:1]  # one row, for the scales of many
    state |= {"classifier.1.weight": wide, "classifier.1.weight_scale": torch.ones(1000)}
    content = {"format": checkpoint.FORMAT, "stage": "int8", "settings": SETTINGS, "state": state}
    torch.save(content, tmp_path / "y.pth")
    monkeypatch.setattr(checkpoint, "MobileNetV2", Watched)
    for name in ("x.nnz", "x.pth", "y.pth"):
        refused(tmp_path / name, "does not fit its own description")
    assert built == ["meta"] * 3


def test_a_file_without_ancestors_is_not_decompressed(tmp_path):
    meta = {"settings": SETTINGS, "quantization": None, "data": {}, "seed": 1, "ancestors": [],
            "mean": list(data.MEAN), "std": list(data.STD)}  # fmt: skip
    (tmp_path / "x.nnz").write_bytes(v1.encode(meta, {}, {}, {}))
    with pytest.raises(UserError, match="does not say which stage's file it was made of"):
        sparse_compress.main([f"--decompress={tmp_path}/x.nnz", f"--out={tmp_path}/x.pth"])
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("wrapped", ["plain", "masked", "format"])
def test_tensors_that_are_not_stored_whole_are_refused(whole, tmp_path, wrapped):
    """A file of one element can say that it is repeated: any copy would take memory for all."""
    content = torch.load(io.BytesIO(whole), weights_only=True)
    state, name = content["state"], "features.18.0.weight"
    repeated = torch.ones(1).expand(state[name].shape)
    if wrapped == "masked":
        state |= {f"{name}_orig": state.pop(name), f"{name}_mask": repeated}
    else:
        state[name] = repeated
    torch.save(content if wrapped == "format" else state, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", f"is of {4 * repeated.numel()} bytes, of which 4 are stored")


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_activation_scales_are_over_0(tmp_path, scale):
    scheme = ptq.make_scheme(8, 8)
    model = MobileNetV2(SETTINGS | {"folded": True})
    quantizers.attach(model, scheme)
    save(tmp_path / "x.pth", model=model, quantization=scheme).build()
    model.features[3].stream.step.fill_(scale)
    save(tmp_path / "x.pth", model=model, quantization=scheme)
    refused(tmp_path / "x.pth", f"features.3.stream.step, a scale of activations, is {scale}")


def test_weight_scales_are_not_0(tmp_path):
    scheme = ptq.make_scheme(8, 8)
    model = MobileNetV2(SETTINGS | {"folded": True})
    quantizers.attach(model, scheme)
    model.features[18][0].weight_scale[1] = -1.0  # as a scale per tensor may become by folding
    save(tmp_path / "x.pth", model=model, quantization=scheme).build()
    model.features[18][0].weight_scale[1] = 0.0
    save(tmp_path / "x.pth", model=model, quantization=scheme)
    refused(tmp_path / "x.pth", "features.18.0.weight_scale has a scale of 0")


def test_integers_without_their_scale_are_refused(whole, tmp_path):
    raw = torch.load(io.BytesIO(whole), weights_only=True)
    raw["state"]["classifier.1.weight"] = raw["state"]["classifier.1.weight"].to(torch.int8)
    torch.save(raw, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "classifier.1.weight_scale")


@pytest.mark.parametrize(("name", "what"), [
    ("baseline.pth", "`make train` makes it"), ("pruned.pth", "`make prune` makes it"),
    ("quantized.pth", "`make quantize` makes it"), ("int8.pth", "`make int8` makes it"),
    ("compressed.nnz", "`make compress` makes it"), ("other.pth", "check the path"),
])  # fmt: skip
def test_a_missing_file_says_what_makes_it(tmp_path, name, what):
    refused(tmp_path / name, f"does not exist: {what}")


def test_another_validation_split_is_refused(tmp_path):
    saved = save(tmp_path / "x.pth", data={"source": "synthetic", "val_size": 60, "split_seed": 11})
    with pytest.raises(UserError, match="was trained on another validation split"):
        saved.images("synthetic", None, "cpu")


@pytest.fixture
def orders(tiny, tmp_path):
    """A data set in three orders: as it is; validation images the same; others held out."""
    with np.load(tiny) as file:
        arrays = dict(file)
    labels = arrays["y_train"]
    by_class = np.argsort(labels, kind="stable")  # as folders of classes have it
    backwards = np.arange(len(labels))[::-1]
    for name, order in (("a", np.arange(len(labels))), ("b", by_class), ("c", backwards)):
        changed = {key: arrays[key][order] for key in ("x_train", "y_train")}
        np.savez(tmp_path / f"{name}.npz", **(arrays | changed))
    return {name: str(tmp_path / f"{name}.npz") for name in "abc"}


def test_images_in_an_order_that_holds_out_others_are_refused(orders, tmp_path):
    sets = {name: data.load(path) for name, path in orders.items()}
    assert sets["a"].held_out == sets["b"].held_out != sets["c"].held_out
    saved = save(tmp_path / "x.pth", data=sets["a"].provenance())
    assert saved.data["held_out"] == sets["a"].held_out
    saved.images(orders["b"], None, "cpu")
    saved.images(orders["c"], None, "cpu", test_only=True)
    for refusing in (saved, checkpoint.load(nnz_of(saved, tmp_path / "x.nnz"))):
        with pytest.raises(UserError, match="was trained on images that would be held out"):
            refusing.images(orders["c"], None, "cpu")
    with pytest.raises(UserError, match="x.pth was trained on images that would be held out"):
        taught = save(tmp_path / "y.pth", data=sets["c"].provenance())
        taught.teacher(str(tmp_path / "x.pth"), None, sets["c"])


def test_more_images_held_out_than_in_training_are_refused(tiny, tmp_path):
    saved = save(tmp_path / "x.pth", data=data.load(tiny, 20).provenance())
    assert len(saved.images(tiny, 10, "cpu").val) == 10
    with pytest.raises(UserError, match="was trained with --val-size 20: of the 30 images"):
        saved.images(tiny, 30, "cpu")


def test_cifar10_in_its_usual_order_needs_no_record(tmp_path):
    usual = {"source": "cifar10", "val_size": 5000}
    saved = save(tmp_path / "x.pth", data=usual)
    split = data.Split(torch.zeros(5000), torch.zeros(5000))
    images = data.Data("cifar10", data.CLASSES, split, split, split, data.CIFAR10_HELD_OUT)
    saved.check_images(images)
    assert "held_out" not in images.provenance()
    images.held_out += 1
    with pytest.raises(UserError, match="the same in another order"):
        saved.check_images(images)
