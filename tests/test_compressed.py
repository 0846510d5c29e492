"""lib/compressed.py: a network as a .nnz file and back, the same to the bit; all else is refused.

The file itself: tests/test_nnz_frame.py, tests/test_nnz_v1.py, tests/test_nnz_v3.py.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn

import train
from lib import checkpoint, compressed, data, integer, metrics, ptq, quantizers
from lib.config import UserError
from lib.nnz import v1
from models.mobilenetv2 import MobileNetV2, standard


def network():
    """Sparse as a mask leaves it, with negative zeros, and with settled batch norms."""
    torch.manual_seed(3)
    model = MobileNetV2(standard(0.1, 8)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for layer in metrics.weight_layers(model).values():
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.2)
        for module in model.modules():  # statistics of these weights, or the signal dies out
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


def source(folder, bits, act_bits=32):
    """A checkpoint at these bits, its weights stored as floats (as quantize.py does), or fp32."""
    model = network()
    scheme = quantizers.quantize_reference(model, bits, act_bits) if bits else None
    return checkpoint.save(
        folder / f"{bits}.pth", "quantized" if bits else "pruned", model, train.Settings(), None,
        metrics={"val_correct": 1}, data={"source": "cifar10", "val_size": 30}, quantization=scheme,
    )  # fmt: skip


def identical(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].contiguous().numpy().tobytes() == b[k].contiguous().numpy().tobytes()
        for k in a
    )


def logits(found):
    torch.manual_seed(9)
    images = torch.randn(3, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return found.build()(images)


@pytest.mark.parametrize(
    ("bits", "act_bits"), [(None, 32), (32, 8), (16, 32), (12, 8), (9, 32), (8, 8), (4, 32), (2, 2)]
)
def test_round_trip(tmp_path, bits, act_bits):
    parent = source(tmp_path, bits, act_bits)
    raw = compressed.encode(parent)
    (tmp_path / "x.nnz").write_bytes(raw)
    found = checkpoint.load(tmp_path / "x.nnz")
    assert identical(found.state, compressed.stored(parent)[1])
    for name, tensor in parent.state.items():
        assert torch.equal(quantizers.float_state(found.state)[name], tensor)
    assert torch.equal(logits(found), logits(parent))
    assert (found.stage, found.bytes) == ("compressed", len(raw))
    assert found.settings == parent.settings and found.quantization == parent.quantization
    assert (found.val_size(None), found.seed) == (30, 47)
    assert found.ancestors[-1]["sha256"] == parent.sha256
    assert compressed.encode(parent) == raw  # the same bytes every time


def test_only_what_is_not_zero_takes_bytes(tmp_path):
    """Negative zeros, which a mask leaves where a negative weight was, are zeros."""
    parent = source(tmp_path, None)
    assert any((torch.signbit(t) & (t == 0)).any() for t in parent.state.values())
    values = v1.part_sizes(compressed.encode(parent))["values"]
    assert values == 4 * sum(z for _, _, z in metrics.layer_counts(parent.build()))


def test_fewer_bits_are_fewer_bytes(tmp_path):
    sizes = [len(compressed.encode(source(tmp_path, bits))) for bits in (2, 4, 8, 12, 16, None)]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_a_file_can_be_encoded_again(tmp_path):
    """From a .nnz, and from a checkpoint of integers, come the same tensors."""
    parent = source(tmp_path, 8)
    (tmp_path / "a.nnz").write_bytes(compressed.encode(parent))
    first = checkpoint.load(tmp_path / "a.nnz")
    second = compressed.decode(compressed.encode(first))
    assert identical(first.state, second["state"])
    assert len(second["ancestors"]) == len(first.ancestors) + 1


def test_tells_how_to_use_it(tmp_path):
    meta, weights, dense, bits = v1.decode(compressed.encode(source(tmp_path, 4)))
    assert (meta["mean"], meta["std"]) == (list(data.MEAN), list(data.STD))
    assert meta["data"]["classes"] == list(data.CLASSES)
    assert set(bits.values()) == {4} and len(weights) == 53
    assert "features.0.1.running_var" in dense and "features.0.0.weight_scale" in dense


# ---- version 3 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded(small, pixels, tmp_path_factory):
    """A function of a scheme: the checkpoint of a network quantized by ptq."""
    folder, made = tmp_path_factory.mktemp("folded"), {}

    def make(weight_bits, act_bits, **more):
        key = f"{weight_bits}-{act_bits}-{sorted(more)}"
        if key not in made:
            scheme = ptq.make_scheme(weight_bits, act_bits, **more)
            model, _ = ptq.quantize(small(1), pixels[:16], scheme)
            parent = checkpoint.save(folder / "parent.pth", "pruned", small(1), train.Settings(),
                                     None, metrics={}, data={})  # fmt: skip
            made[key] = checkpoint.save(
                folder / f"{key}.pth", "quantized", model, train.Settings(), parent, metrics={},
                data={"source": "cifar10", "val_size": 30}, quantization=scheme,
            )  # fmt: skip
        return made[key]

    return make


@pytest.mark.parametrize(("bits", "act_bits", "more"), [
    (8, 8, {"weight_scale": "tensor"}), (4, 6, {}), (12, 32, {}),
    (2, 4, {"layer_bits": {"features.0.0": 8, "classifier.1": 8}, "last_act_bits": 8}),
])  # fmt: skip
def test_a_folded_network_comes_back_from_version_3(tmp_path, folded, bits, act_bits, more):
    parent = folded(bits, act_bits, **more)
    raw = compressed.encode(parent)
    assert compressed.version(raw) == 3 and sum(compressed.part_sizes(raw).values()) == len(raw)
    (tmp_path / "x.nnz").write_bytes(raw)
    found = checkpoint.load(tmp_path / "x.nnz")
    settings, state = compressed.stored(parent)
    assert identical(found.state, state) and found.settings == settings
    assert found.weights < parent.weights  # channels of it are read by no layer
    assert torch.allclose(logits(found), logits(parent), atol=1e-5)
    if act_bits <= 8:
        images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
        assert torch.equal(integer.convert(found)(images), integer.convert(parent)(images))
    assert found.quantization == parent.quantization
    assert found.data == {"classes": list(data.CLASSES)} | parent.data
    assert (found.stage, found.seed, found.val_size(None)) == ("compressed", 47, 30)
    assert [a["stage"] for a in found.ancestors] == ["pruned", "quantized"]
    assert [a["sha256"] for a in found.ancestors] == [None, parent.sha256]
    assert found.original_weights == parent.original_weights
    # From the file itself, too.
    assert identical(compressed.decode(compressed.encode(found))["state"], found.state)


@pytest.mark.parametrize(("bits", "act_bits", "more"), [
    (32, 8, {}), (8, 8, {"layer_bits": {"classifier.1": 32}}), (8, 8, {"last_act_bits": 32}),
])  # fmt: skip
def test_what_is_not_quantized_throughout_is_of_version_1(tmp_path, folded, bits, act_bits, more):
    parent = folded(bits, act_bits, **more)
    raw = compressed.encode(parent)
    assert compressed.version(raw) == 1
    (tmp_path / "x.nnz").write_bytes(raw)
    found = checkpoint.load(tmp_path / "x.nnz")
    assert identical(found.state, compressed.stored(parent)[1])
    assert torch.equal(logits(found), logits(parent))


def test_damage_to_version_3_is_one_line(tmp_path, folded):
    raw, rng = compressed.encode(folded(4, 6)), random.Random(0)
    for _ in range(20):
        flipped = bytearray(raw)
        flipped[rng.randrange(4, len(raw))] ^= 1 << rng.randrange(8)
        refused(tmp_path / "x.nnz", flipped)
        refused(tmp_path / "x.nnz", raw[: rng.randrange(4, len(raw))])
    refused(tmp_path / "x.nnz", raw + b"\0", "after the declared end")


# ---- refusals ------------------------------------------------------------------------------------


def refused(path, raw, what=""):
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path).build()
    message = str(caught.value)
    assert message.startswith(str(path)) and what in message and "\n" not in message, message


def test_damaged_files(tmp_path):
    raw, rng = compressed.encode(source(tmp_path, 8)), random.Random(0)
    for _ in range(60):
        flipped = bytearray(raw)
        flipped[rng.randrange(4, len(raw))] ^= 1 << rng.randrange(8)
        refused(tmp_path / "x.nnz", flipped)
        refused(tmp_path / "x.nnz", raw[: rng.randrange(4, len(raw))])
    refused(tmp_path / "x.nnz", raw + b"\0", "after the declared end")
    # The first bytes tell the format: damaged there, it is nobody's file.
    refused(tmp_path / "x.nnz", b"\x88" + raw[1:], "is not a checkpoint, or is damaged")


@pytest.mark.parametrize(("change", "what"), [
    (lambda m: {"hello": 1}, "is a .nnz file of something else"),
    (lambda m: {k: v for k, v in m.items() if k != "settings"}, "'settings' missing"),
    (lambda m: m | {"mean": [0.5, 0.5, 0.5]}, "is of images with mean [0.5, 0.5, 0.5] and"),
    (lambda m: m | {"std": [1.0, 1.0, 1.0]}, "standard deviation [1.0, 1.0, 1.0]: this program"),
    (lambda m: {k: v for k, v in m.items() if k != "mean"}, "'mean' missing"),
    (lambda m: {k: v for k, v in m.items() if k != "quantization"}, "'quantization' missing"),
    (lambda m: m | {"settings": 5}, "does not fit its own description"),
    (lambda m: m | {"settings": {}}, "does not fit its own description"),
    (lambda m: m | {"settings": m["settings"] | {"head": "8"}}, "does not fit"),
    (lambda m: m | {"settings": standard(0.35)}, "does not fit its own description: size mismatch"),
    (lambda m: m | {"quantization": None}, "does not fit its own description"),
    (lambda m: m | {"quantization": {"weight_bits": "8", "act_bits": 8}}, "does not fit"),
])  # fmt: skip
def test_foreign_metadata(tmp_path, change, what):
    meta, weights, dense, bits = v1.decode(compressed.encode(source(tmp_path, 8)))
    refused(tmp_path / "x.nnz", v1.encode(change(meta), weights, dense, bits), what)


def test_other_tensors(tmp_path):
    meta, weights, dense, bits = v1.decode(compressed.encode(source(tmp_path, 8)))
    path, what = tmp_path / "x.nnz", "does not fit its own description"
    refused(path, v1.encode(meta, {}, dense, {}), what)
    extra = dense | {"extra": np.zeros(3, np.float32)}
    refused(path, v1.encode(meta, weights, extra, bits), what)
    scaleless = {k: v for k, v in dense.items() if not k.endswith("_scale")}
    refused(path, v1.encode(meta, weights, scaleless, bits), what)


@pytest.mark.parametrize(("change", "what"), [
    (lambda t: t.half(), "does not fit into a .nnz file"),
    (lambda t: t.bfloat16(), "BFloat16"),
])  # fmt: skip
def test_weights_of_other_types_cannot_be_encoded(tmp_path, change, what):
    parent = source(tmp_path, None)
    parent.state["classifier.1.weight"] = change(parent.state["classifier.1.weight"])
    with pytest.raises(UserError, match=what):
        compressed.encode(parent)


def test_weights_off_their_grid_cannot_be_encoded(tmp_path):
    parent = source(tmp_path, 8)
    parent.state["classifier.1.weight"] += 1e-3
    with pytest.raises(UserError, match=r"8\.pth: classifier.1.weight does not lie on its 8-bit"):
        compressed.encode(parent)
