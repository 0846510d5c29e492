"""lib/quantizers.py: what quantizers promise of every tensor, and networks that carry them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import quantize
from lib import checkpoint, folding, metrics, ptq, quantizers
from lib.folding import fold
from lib.metrics import weight_layers
from lib.quantizers import (
    BITS,
    FakeQuantize,
    Quantizer,
    float_state,
    grid_scale,
    integer_state,
    max_level,
    per_row,
    quantize_reference,
    symmetric_scale,
    to_levels,
)
from models.mobilenetv2 import ConvBNReLU6, MobileNetV2, standard

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
    assert [max_level(b) for b in (2, 4, 8, 16)] == [1, 7, 127, 32767]


@pytest.mark.parametrize("kind", tensors())
@pytest.mark.parametrize("bits", LOW)
def test_levels(kind, bits):
    x = tensors()[kind]
    scale = symmetric_scale(x, bits)
    assert scale.ndim == 0 and scale > 0
    levels = to_levels(x, scale, bits)
    assert torch.equal(levels, levels.round())  # integers
    top = 0 if kind == "zero" else max_level(bits)
    assert levels.abs().max() == top  # all the range, no more
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
    assert levels.tolist() == [-max_level(bits), max_level(bits), max_level(bits)]


def test_halves_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert to_levels(x, torch.tensor(1.0), 8).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (5, 7)])
def test_a_step_a_row_is_each_row_on_its_own(shape):
    x, steps = torch.randn(shape), torch.rand(shape[0]) / 5 + 0.01
    rows = torch.stack([to_levels(row, step, 4) for row, step in zip(x, steps, strict=True)])
    assert torch.equal(to_levels(x, steps, 4), rows)
    assert per_row(steps, x).shape == (5, *[1] * (len(shape) - 1))
    assert per_row(steps[0], x).shape == ()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_grid_is_found_again(bits):
    """Also without its largest levels; where there is no grid, from the largest magnitude."""
    step = torch.tensor(0.0123)
    levels = torch.randint(-max_level(bits), max_level(bits) + 1, (6, 5, 3, 3)).float()
    levels[0, 0, 0, 0], levels[0, 0, 0, 1] = max_level(bits), 1  # no common factor
    assert grid_scale(levels * step, bits) == pytest.approx(step.item(), rel=1e-6)
    if bits > 2:
        levels[levels.abs() > 0.7 * max_level(bits)] = 0
        x = levels * step
        found = grid_scale(x, bits)
        assert found == pytest.approx(step.item(), rel=1e-6) and found > symmetric_scale(x, bits)
        assert torch.equal(to_levels(x, found, bits), levels)
    x = torch.randn(40, 7)
    assert grid_scale(x, bits) == symmetric_scale(x, bits)
    assert torch.equal(to_levels(torch.zeros(3, 3), grid_scale(torch.zeros(3, 3), bits), bits),
                       torch.zeros(3, 3))  # fmt: skip


# ---- FakeQuantize --------------------------------------------------------------------------------


class _Round(torch.autograd.Function):
    """The straight-through estimator, alone."""

    @staticmethod
    def forward(_, x):
        return x.round()

    @staticmethod
    def backward(_, grad):
        return grad


def composed(x, step, low, high):
    """As the papers write it: autograd gives LSQ's gradient for the step by itself."""
    step = per_row(step, x)
    return _Round.apply((x / step).clamp(low, high)) * step


@pytest.mark.parametrize(("low", "high"), [(-7, 7), (0, 15), (-1, 1), (0, 255)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", [(6, 4, 5, 5), (6, 9), (6, 1, 3, 3)])
def test_fused_is_composed(low, high, rows, shape):
    size = (6,) if rows else ()
    step = (torch.rand(size) + 0.5) * 1.5 / high  # some values are clipped
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        x[0] = 0
    results, weight = [], torch.randn(shape)
    for function in (FakeQuantize.apply, composed):
        a, b = x.clone().requires_grad_(), step.clone().requires_grad_()
        y = function(a, b, low, high)
        (y * weight).sum().backward()
        results.append((y.detach(), a.grad, b.grad))
    for fused, slow in zip(*results, strict=True):
        torch.testing.assert_close(fused, slow, rtol=1e-4, atol=1e-5)
    assert results[0][2].shape == step.shape and (results[0][1] == 0).any()


@pytest.mark.parametrize("rows", [False, True])
def test_in_bf16_it_is_within_a_level(rows):
    step = torch.rand(6 if rows else ()) / 50 + 0.01
    x = torch.randn(6, 8, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.randn(x.shape)
    results = []
    for y in (x, x.float()):
        a, b = y.clone().requires_grad_(), step.clone().requires_grad_()
        out = FakeQuantize.apply(a, b, -127, 127)
        (out.float() * weight).sum().backward()
        assert a.grad.dtype == y.dtype and b.grad.dtype == torch.float32
        results.append((out.detach().float(), b.grad))
    # A level, and what bf16's 8 bits round the product by: a quarter of one at 64 to 127 levels.
    levels = (results[0][0] - results[1][0]).abs() / per_row(step, x)
    assert levels.max() <= 1.3 and levels.mean() < 0.25
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=1.0)


def test_a_quantizer_is_a_grid():
    x = torch.linspace(-3, 3, 10_001)
    for signed, levels in ((True, range(-8, 8)), (False, range(16))):
        quantizer = Quantizer(4, signed)
        quantizer.step.fill_(0.125)
        y = quantizer(x)
        assert torch.unique(y / 0.125).tolist() == [*levels]
        inside = (x > quantizer.low * 0.125) & (x < quantizer.high * 0.125)
        assert (y - x)[inside].abs().max() <= 0.0626
        assert torch.equal(quantizer(y), y)


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
        assert levels.abs().max() <= max_level(bits) and not levels[zero].any()
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


def test_dequantizing_gives_a_network_with_batch_norms_that_computes_the_same(small, pixels):
    quantized, _ = ptq.quantize(small(0), pixels, ptq.make_scheme(6, 32))
    plain = folding.dequantize(quantized, pixels)
    assert not plain.settings["folded"] and not plain.training
    weights = weight_layers(quantized)
    assert all(torch.equal(layer.weight, weights[n].weight)
               for n, layer in weight_layers(plain).items())  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels), quantized(pixels), rtol=1e-4, atol=1e-4)
        # In training the statistics of these images are those that the batch norms hold already.
        trained = copy.deepcopy(plain).train()
        trained.classifier.eval()  # no dropout
        torch.testing.assert_close(trained(pixels), plain(pixels), rtol=1e-2, atol=1e-2)


def test_dequantizing_keeps_what_clips_activations(small, pixels):
    """Equalization gives channels other factors, in which a quantizer clips, but not at 6."""
    rounded, _ = ptq.quantize(small(0), pixels, ptq.make_scheme(8, 16))
    clips = [float(block[2].high * block[2].step) for block in rounded.modules()
             if isinstance(block, ConvBNReLU6)]  # fmt: skip
    assert min(clips) < 5.5
    with torch.no_grad():
        plain = folding.dequantize(rounded, pixels)(pixels)
        torch.testing.assert_close(plain, rounded(pixels), rtol=1e-2, atol=1e-2)


def test_dequantizing_a_network_that_has_its_batch_norms(pixels):
    model, rounded = sparse_network(), sparse_network()
    quantize_reference(model, 8, 32)
    quantize_reference(rounded, 8, 8)
    for network in (model, rounded):
        with torch.no_grad():
            assert torch.equal(folding.dequantize(network, pixels)(pixels), model(pixels))


@pytest.mark.parametrize("seed", range(4))
def test_folding_keeps_the_function(small, pixels, seed):
    model = small(seed)
    with torch.no_grad():  # statistics that are far from these images'
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(torch.randn_like(module.bias) * module.running_var.sqrt())
                module.running_var.mul_(torch.rand_like(module.bias) * 2 + 0.3)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    with torch.no_grad():
        expected = model(pixels)
        assert (folded(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert folded.settings == model.settings | {"folded": True} and "folded" not in model.settings
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert metrics.macs(folded.settings) == metrics.macs(model.settings)
    for name, layer in metrics.weight_layers(model).items():
        assert not folded.get_submodule(name).weight[layer.weight == 0].any()


def random_steps(model: nn.Module, scheme: dict) -> None:
    """A state for every place that `attach` has made."""
    with torch.no_grad():
        for name, layer in metrics.weight_layers(model).items():
            if hasattr(layer, "weight_scale"):
                bits = quantizers.bits_of(name, scheme)
                top = layer.weight.flatten(1).abs().amax(1)
                layer.weight_scale.copy_(torch.where(top > 0, top, 1) / max_level(bits))
                quantizers.put_on_grid(layer, bits)
        for module in model.modules():
            if isinstance(module, Quantizer) and module is not model.image:
                module.step.copy_((6 + torch.rand(())) / module.high)


SCHEMES = {
    "W8A8": ptq.make_scheme(8, 8), "W4A6 qat": ptq.make_scheme(4, 6, method="qat"),
    "W2A32": ptq.make_scheme(2, 32), "W32A4": ptq.make_scheme(32, 4),
    "W16A12": ptq.make_scheme(16, 12), "W32A32": ptq.make_scheme(32, 32),
    "mixed": ptq.make_scheme(4, 4, last_act_bits=8, layer_bits={
        "features.0.0": 8, "features.3.conv.1.0": 32, "features.4.conv.2": 10, "classifier.1": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_scheme_comes_back_from_a_file(small, pixels, tmp_path, kind):
    scheme, model = SCHEMES[kind], fold(small(0))
    quantizers.attach(model, scheme)
    random_steps(model, scheme)
    cfg = quantize.Settings()
    common = dict(metrics={}, data={}, quantization=scheme)  # noqa: C408
    saved = checkpoint.save(tmp_path / "x.pth", "quantized", model, cfg, None, **common)
    integers = integer_state(model.state_dict(), scheme)
    small_file = checkpoint.save(
        tmp_path / "y.pth", "int8", model, cfg, None, state=integers, **common
    )
    assert identical(float_state(integers), model.state_dict())
    for name in metrics.weight_layers(model):
        bits = quantizers.bits_of(name, scheme)
        kinds = {True: torch.int8, bits > 8: torch.int16, bits == 32: torch.float32}
        assert integers[f"{name}.weight"].dtype == kinds[True]
        assert (f"{name}.weight_scale" in integers) == (bits < 32)
    with torch.no_grad():
        expected = model(pixels)
        for found in (saved, small_file):
            assert found.quantization == scheme
            assert identical(found.build().state_dict(), model.state_dict())
            assert torch.equal(found.build()(pixels), expected)


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_where_activations_have_how_many_bits(small, bits):
    """In a network whose third and fifth block are residual."""
    model = fold(small(0))
    scheme = ptq.make_scheme(8, bits, last_act_bits=6)
    quantizers.attach(model, scheme)
    kept = max(bits, 8)
    image = model.image
    assert (image.bits, image.signed, image.low, image.high) == (8, True, -128, 127)
    blocks = model.features[1:-1]
    assert [b.residual for b in blocks] == [False, False, True, False, True, False]
    assert [b.stream.bits for b in blocks] == [bits, kept, bits, kept, bits, bits]
    for block in blocks:
        assert block.stream.signed and block.stream.low == -block.stream.high - 1
        assert isinstance(block.addend, Quantizer) == block.residual
        assert isinstance(block.input, Quantizer) == (block.residual and bits < 8)
        if block.residual:
            assert block.addend.bits == kept and block.addend.signed
        if block.residual and bits < 8:
            assert block.input.bits == bits and block.input.signed
    unsigned = [m for m in model.modules() if isinstance(m, Quantizer) and not m.signed]
    assert [q.bits for q in unsigned] == [6, *[bits] * (len(unsigned) - 2), kept]
    assert all(q.low == 0 and q.high == 2**q.bits - 1 for q in unsigned)
    assert not any(isinstance(m, nn.ReLU6) for m in model.modules())  # clipping is the nonlinearity


def test_the_last_activations_can_be_off(small):
    model = fold(small(0))
    quantizers.attach(model, ptq.make_scheme(4, 4, last_act_bits=32))
    assert not isinstance(model.pooled, Quantizer)


@pytest.mark.parametrize("bits", [3, 8, 12])
def test_a_row_off_its_grid_is_refused(small, bits):
    scheme = ptq.make_scheme(4, 32, layer_bits={"features.2.conv.0.0": bits})
    model = fold(small(0))
    quantizers.attach(model, scheme)
    random_steps(model, scheme)
    with torch.no_grad():
        layer = model.features[2].conv[0][0]
        row = int(layer.weight.flatten(1).abs().amax(1).argmax())
        layer.weight[row] += layer.weight_scale[row] / 3
    with pytest.raises(ValueError, match=f"0.0.weight does not lie on its {bits}-bit grid"):
        integer_state(model.state_dict(), scheme)


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.skipif(not (REFERENCE / "pruned.pth").is_file(), reason="no reference files here")
def test_levels_of_the_reference_report():
    """On its pruned network our method finds the integers that its own int8 file holds."""
    source = checkpoint.load(REFERENCE / "pruned.pth")
    model = source.build()
    assert metrics.macs(model.settings) == 296_473_088
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
