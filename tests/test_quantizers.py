"""lib/quantizers.py: what the report's quantizer promises of every tensor, and integers of it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lib import checkpoint, metrics, quantizers
from lib.quantizers import (
    BITS,
    float_state,
    integer_state,
    largest,
    quantize_reference,
    symmetric_scale,
    to_levels,
)
from models.mobilenetv2 import MobileNetV2, standard

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT.parent / "shared/reference"
LOW = [b for b in BITS if b < 32]


def tensors():
    """Ordinary, sparse, one-sided, constant, empty-looking, tiny, huge, with an outlier."""
    x = torch.randn(40, 7, 3, 3, generator=torch.Generator().manual_seed(1))
    outlier = x.clone()
    outlier[0, 0, 0, 0] = 1e4
    return {
        "normal": x, "sparse": x * (x > 1), "one-sided": x.abs(), "outlier": outlier,
        "constant": torch.full((5,), -3.0), "zero": torch.zeros(4, 4),
        "tiny": x * 1e-30, "huge": x * 1e30,
    }  # fmt: skip


def test_bit_widths():
    assert BITS == (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 32)
    assert [largest(b) for b in (2, 4, 8, 16)] == [1, 7, 127, 32767]


@pytest.mark.parametrize("kind", tensors())
@pytest.mark.parametrize("bits", LOW)
def test_levels(kind, bits):
    x = tensors()[kind]
    scale = symmetric_scale(x, bits)
    assert scale.ndim == 0 and scale > 0
    levels = to_levels(x, scale, bits)
    assert torch.equal(levels, levels.round())  # integers
    assert levels.abs().max() == (0 if kind == "zero" else largest(bits))  # all the range, no more
    assert not levels[x == 0].any()
    assert ((levels == 0) | (levels.sign() == x.sign())).all()
    # At most half a step away; 1e-2 of a step is for float32 at 32,767 steps.
    assert ((x - levels * scale).abs() <= 0.51 * scale).all()
    # Order is kept.
    assert (to_levels(x.flatten().sort().values, scale, bits).diff() >= 0).all()
    # What is on the grid stays there, with its own step and with one found anew.
    grid = levels * scale
    assert torch.equal(to_levels(grid, scale, bits), levels)
    if kind != "zero":
        assert symmetric_scale(grid, bits) == pytest.approx(scale.item(), rel=1e-6)
        assert torch.equal(to_levels(grid, symmetric_scale(grid, bits), bits), levels)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_out_of_range_are_clipped(bits):
    levels = to_levels(torch.tensor([-1e9, 1e9, torch.inf]), torch.tensor(0.5), bits)
    assert levels.tolist() == [-largest(bits), largest(bits), largest(bits)]


def test_halves_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert to_levels(x, torch.tensor(1.0), 8).tolist() == [0, 2, 2, 0, -2]


# ---- networks ------------------------------------------------------------------------------------


def sparse_network(seed=0):
    torch.manual_seed(seed)
    model = MobileNetV2(standard(0.1, 8)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for layer in metrics.weight_layers(model).values():
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)  # leaves -0.0, as a mask does
        model.features[3].conv[2].weight.zero_()  # a layer without any weight
        for module in model.modules():  # statistics of these weights, or the signal dies out
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


def identical(a: dict, b: dict) -> bool:
    """To the bit, signs of zero included."""
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype
        and a[k].contiguous().numpy().tobytes() == b[k].contiguous().numpy().tobytes()
        for k in a
    )


@pytest.mark.parametrize("bits", LOW)
def test_integers_are_the_same_network(bits):
    model = sparse_network()
    zeros = {n: m.weight == 0 for n, m in metrics.weight_layers(model).items()}
    others = {k: v.clone() for k, v in model.state_dict().items() if v.ndim < 2}
    scheme = quantize_reference(model, bits, 32)
    assert scheme == {"method": "reference", "weight_bits": bits, "act_bits": 32}
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in others.items())
    integers = integer_state(state, scheme)
    for name, zero in zeros.items():
        levels = integers[f"{name}.weight"]
        assert levels.dtype == (torch.int8 if bits <= 8 else torch.int16)
        assert levels.abs().max() <= largest(bits) and not levels[zero].any()
    assert identical(float_state(integers), state)
    assert identical(integer_state(float_state(integers), scheme), integers)


def test_off_is_the_identity():
    model = sparse_network()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
        scheme = quantize_reference(model, 32, 32)
        assert identical(model.state_dict(), state)
        assert torch.equal(model(x), before)
    assert identical(integer_state(state, scheme), state) and identical(float_state(state), state)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_weights_off_their_grid_are_refused(bits):
    model = sparse_network()
    scheme = quantize_reference(model, bits, 32)
    state = model.state_dict()
    name = "features.2.conv.0.0.weight"
    state[name] = state[name].clone()
    state[name][0] += state[f"{name}_scale"] / 3
    with pytest.raises(ValueError, match=f"{name} does not lie on its {bits}-bit grid"):
        integer_state(state, scheme)


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_quantized_by_the_batch_at_hand(bits):
    layer = nn.Sequential(nn.Linear(6, 3)).eval()
    quantize_reference(layer, 32, bits)
    x = torch.randn(5, 6)
    scale = symmetric_scale(x, bits)
    expected = nn.functional.linear(to_levels(x, scale, bits) * scale, *layer[0].parameters())
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        # The step belongs to the batch: an outlier in it makes all of it coarser.
        coarse = layer(torch.cat([x, torch.full((1, 6), 1e4)]))[:-1]
        assert torch.allclose(coarse, layer[0].bias.expand(5, 3), atol=1e-6)  # inputs became 0
        assert not torch.allclose(layer(x), coarse)
        # Doubling a batch doubles its step: no state is kept from one to the next.
        bias = layer[0].bias
        assert torch.allclose(layer(2 * x) - bias, 2 * (layer(x) - bias), atol=1e-5)
    assert list(layer.state_dict()) == ["0.weight", "0.bias"]  # dynamic: nothing to store


def test_more_bits_are_nearer():
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact, errors = sparse_network()(x), []
        for bits in (4, 6, 8, 12, 16):
            model = sparse_network()
            quantize_reference(model, bits, bits)
            errors.append((model(x) - exact).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]


@pytest.mark.parametrize("weight_bits", [8, 16, 32])
@pytest.mark.parametrize("act_bits", [8, 32])
def test_attach_makes_room_for_exactly_the_schemes_state(weight_bits, act_bits):
    model = sparse_network()
    scheme = quantize_reference(model, weight_bits, act_bits)
    fresh = MobileNetV2(standard(0.1, 8)).to(memory_format=torch.channels_last).eval()
    quantizers.attach(fresh, scheme)
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.skipif(not (REFERENCE / "pruned.pth").is_file(), reason="no reference files here")
def test_levels_of_the_reference_report():
    """On its pruned network our method finds the integers that its own int8 file holds."""
    source = checkpoint.load(REFERENCE / "pruned.pth")
    model = source.build()
    assert metrics.macs(model) == 296_473_088
    counts = metrics.layer_counts(model)
    assert sum(n for _, n, _ in counts) == 2_202_560
    assert sum(z for _, _, z in counts) == 96_871
    scheme = quantize_reference(model, 8, 8)
    state = integer_state(model.state_dict(), scheme)
    file = torch.load(REFERENCE / "int8.pth", map_location="cpu", weights_only=True)
    assert len(file["int8_weights"]) == len(counts)
    for theirs, levels in file["int8_weights"].items():
        name = theirs.replace(".original_layer", "")
        assert torch.equal(state[name], levels), name
        assert state[f"{name}_scale"].item() == pytest.approx(file["scales"][theirs], rel=1e-6)
