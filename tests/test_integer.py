"""lib/integer.py and lib/fixedpoint.py: operations against exact arithmetic, networks against
their fake-quantized parents."""

import copy
import dataclasses
from fractions import Fraction

import pytest
import torch
from torch import nn

from lib import data, integer, ptq, quantizers, synthetic
from lib.fixedpoint import Grid, Sum, fixed_point
from lib.integer import INT32, IntegerLayer, IntegerNetwork

UNSIGNED, SIGNED = Grid(0.02, 0, 255), Grid(0.05, -128, 127)


def half_up(x: Fraction) -> int:
    return (x + Fraction(1, 2)).__floor__()


def rounded(exact: Fraction, grid: Grid) -> int:
    return min(max(half_up(exact), grid.low), grid.high)


# ---- fixed point ---------------------------------------------------------------------------------


def test_multipliers_are_the_nearest_of_31_bits():
    ratios = 10 ** torch.empty(2000, dtype=torch.float64).uniform_(-9, 6)
    m = fixed_point(ratios, SIGNED)
    assert (m.mantissa >= 2**30).all() and (m.mantissa < 2**31).all()
    assert (m.shift >= 1).all() and (m.shift <= 62).all()
    for ratio, mantissa, shift in zip(*(t.tolist() for t in (ratios, m.mantissa, m.shift)),
                                      strict=True):  # fmt: skip
        error = abs(Fraction(mantissa, 2**shift) - Fraction(ratio))
        assert error <= Fraction(1, 2 ** (shift + 1))


def test_multipliers_at_the_ends():
    m = fixed_point(torch.tensor([0.0, 1e-300, 1e-12, 1 - 2.0**-53]), UNSIGNED)
    x = m(torch.full((4,), INT32))
    assert x[:2].tolist() == [0, 0] and x[3] == 255
    assert x[2] == half_up(Fraction(INT32) * Fraction(1e-12))
    tiny = fixed_point(2.0 ** -torch.arange(33, 1000).double(), SIGNED)  # which no x makes a half
    assert (tiny.shift <= 62).all() and not tiny(torch.full((967,), INT32)).any()
    with pytest.raises(ValueError, match="too far apart"):
        fixed_point(torch.tensor(2.0**30), UNSIGNED)


@pytest.mark.parametrize("grid", [UNSIGNED, SIGNED, Grid(1.0, 0, 15), Grid(1.0, -7, 7)])
def test_rounding_is_to_nearest_halves_up_then_clipped(grid):
    for ratio in (0.5, 0.25, 0.0037, 3e-7, 1.7):
        m = fixed_point(torch.tensor(ratio, dtype=torch.float64), grid)
        x = torch.cat([torch.randint(-INT32, INT32, (500,)), torch.arange(-600, 600)])
        exact = Fraction(m.mantissa.item(), 2 ** m.shift.item())
        assert m(x.clone()).tolist() == [rounded(v * exact, grid) for v in x.tolist()]
    half = fixed_point(torch.tensor(0.5), SIGNED)
    assert half(torch.tensor([-3, -1, 1, 3])).tolist() == [-1, 0, 1, 2]


def test_the_sum_rounds_once():
    total = Sum(SIGNED, Grid(0.013, -127, 127), Grid(0.06, -127, 127))
    x, y = torch.randint(-127, 128, (2, 1000), dtype=torch.int16)
    shift = total.requantize.shift.item()
    a, b = (Fraction(m, 2**shift) for m in total.mantissas)
    assert float(a) == float(torch.tensor(0.05) / 0.06) and abs(float(b) - 0.013 / 0.06) < 1e-7
    exact = [p * a + q * b for p, q in zip(x.tolist(), y.tolist(), strict=True)]
    assert total(x, y).tolist() == [rounded(v, total.output_grid) for v in exact]


# ---- layers --------------------------------------------------------------------------------------


def layer_of(
    module: nn.Module, reads=UNSIGNED, writes=UNSIGNED, bits=8
) -> tuple[IntegerLayer, nn.Module]:
    """Return a layer of random levels and its float module; some of its scales are negative."""
    out = module.weight.shape[0]
    scale = torch.empty(out).uniform_(0.001, 0.01)
    module.register_buffer("weight_scale", scale * torch.where(torch.rand(out) < 0.3, -1, 1))
    high = quantizers.max_level(bits)
    levels = torch.randint(-high, high + 1, module.weight.shape, dtype=torch.int8)
    levels *= torch.rand(levels.shape) < 0.6
    with torch.no_grad():
        module.weight.copy_(levels * quantizers.per_row(module.weight_scale, levels))
        module.bias.normal_()
    return IntegerLayer("x", module, levels, reads, writes), module


KINDS = {
    "stem": lambda: nn.Conv2d(3, 8, 3, 1, 1),
    "stem, stride 2": lambda: nn.Conv2d(3, 8, 3, 2, 1),
    "1x1": lambda: nn.Conv2d(12, 7, 1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, 1, 1, groups=6),
    "depthwise, stride 2": lambda: nn.Conv2d(6, 6, 3, 2, 1, groups=6),
    "classifier": lambda: nn.Linear(20, 10),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", [UNSIGNED, SIGNED])
def test_accumulators_are_the_sums(kind, reads):
    layer, module = layer_of(KINDS[kind](), reads)
    shape = (2, module.weight.shape[1] * layer.groups) + ((9, 9) if layer.weight.ndim == 4 else ())
    x = torch.randint(reads.low, reads.high + 1, shape, dtype=torch.int16)
    exact = copy.deepcopy(module).double()  # sums in float64, of the very integers
    with torch.no_grad():
        exact.weight.copy_(layer.weight)
        exact.bias.copy_(layer.bias)
        assert torch.equal(layer.accumulate(x).double(), exact(x.double()))
        # And what they stand for: the float layer's outputs, but for the bias's rounding.
        floats = module(x * reads.scale)
    unit = layer.unit.view(layer.per_channel)
    assert ((layer.accumulate(x) * unit - floats).abs() <= 0.5 * unit + 1e-4).all()
    assert torch.allclose(layer.weight_scale, module.weight_scale.abs().double())
    layer.dtype, layer.kernel = torch.float64, layer.kernel.double()
    assert torch.equal(layer.accumulate(x).double(), exact(x.double()))


@pytest.mark.parametrize("kind", list(KINDS)[:-1])
def test_levels_are_the_float_layers(kind):
    layer, module = layer_of(KINDS[kind]())
    x = torch.randint(0, 256, (4, module.weight.shape[1] * layer.groups, 16, 16))
    with torch.no_grad():
        floats = module(x * UNSIGNED.scale)
    levels = torch.round(floats / UNSIGNED.scale).clamp(0, 255)
    difference = (layer(x.to(torch.int16)) - levels).abs()
    assert difference.max() <= 1  # the bias's rounding moves some over a half
    assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("reads", [UNSIGNED, SIGNED])
def test_the_worst_input_reaches_the_bound_and_32_bits_hold_it(reads):
    layer, module = layer_of(nn.Conv2d(1280, 4, 1), reads)
    row = int((layer.weight.flatten(1).long().abs().sum(1)).argmax())
    signs = layer.weight[row].sign().to(torch.int16) * layer.bias[row].sign()
    best = torch.where(signs > 0, reads.high, reads.low)[None]
    top = layer.accumulate(best).abs()[0, row].item()
    assert top <= layer.bound <= INT32
    if reads.signed:  # unsigned levels cannot take the negative weights' part
        assert top >= layer.bound * 127 / 128


def test_a_row_whose_bias_32_bits_cannot_hold_gets_a_coarser_unit():
    module = nn.Conv2d(6, 3, 1)
    layer_of(module)
    with torch.no_grad():
        levels = torch.randint(-127, 128, module.weight.shape, dtype=torch.int8)
        module.weight_scale.copy_(torch.tensor([1e-13, 1e-8, 1e-3]))
        module.bias.copy_(torch.tensor([3.0, -4.0, 1.0]))
    layer = IntegerLayer("x", module, levels, UNSIGNED, Grid(0.05, -127, 127))
    assert layer.bound <= INT32
    assert torch.equal(layer.weight[2], levels[2]) and not layer.weight[0].any()
    x = torch.randint(0, 256, (5, 6, 4, 4), dtype=torch.int16)
    assert (layer(x)[:, 0] == 60).all() and (layer(x)[:, 1] == -80).all()


def test_a_row_without_weights_is_its_bias():
    module = nn.Conv2d(6, 3, 1)
    layer_of(module)
    with torch.no_grad():
        module.weight_scale.fill_(1.0)  # what a row of zeros has
        module.bias.copy_(torch.tensor([0.0, 1.234, -0.5]))
    levels = torch.zeros(module.weight.shape, dtype=torch.int8)
    layer = IntegerLayer("x", module, levels, UNSIGNED, Grid(0.01, -127, 127))
    x = torch.randint(0, 256, (5, 6, 4, 4), dtype=torch.int16)
    assert [layer(x)[0, c, 0, 0].item() for c in range(3)] == [0, 123, -50]


# ---- networks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(synthetic.make(64, 1)[0]).permute(0, 3, 1, 2).contiguous()


def integer_network(model, scheme) -> IntegerNetwork:
    return IntegerNetwork(model, quantizers.integer_state(model.state_dict(), scheme))


SCHEMES = {
    "W8A8": ptq.make_scheme(8, 8), "W4A8": ptq.make_scheme(4, 8), "W8A4": ptq.make_scheme(8, 4),
    "W3A6": ptq.make_scheme(3, 6), "mixed": ptq.make_scheme(4, 6, layer_bits={"features.0.0": 8},
                                                  last_act_bits=8),
    "a scale per tensor": ptq.make_scheme(8, 8, weight_scale="tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_the_network_is_its_fake_quantized_parent(small, pixels, images, name):
    scheme = SCHEMES[name]
    model, _ = ptq.quantize(small(1), pixels, scheme)
    network = integer_network(model, scheme)
    with torch.no_grad():
        expected = model(pixels)
        scale = expected.std()
        assert ((network(images) - expected).abs().mean() < 0.1 * scale).all()
        same = (network(images).argmax(1) == expected.argmax(1)).sum()
        assert same >= 63
        # Layer by layer on the same levels there is no error to build up.
        x = network.stem(network.table[torch.arange(3).view(3, 1, 1), images.long()])
        y = model.features[0](model.image(pixels)) / model.features[0][2].step
        assert (x - y.round()).abs().max() <= 1 and (x != y.round()).float().mean() < 1e-4
    if name == "a scale per tensor":
        assert any((m.weight_scale < 0).any() for m in quantizers.weight_layers(model).values())
    for layer in [*network.layers(), network.classifier]:
        assert layer.weight.dtype == torch.int8 and layer.bias.dtype == torch.int32
        assert layer.bound <= INT32
        if layer.output_grid is not None:
            assert layer.output_grid.high <= 255
            assert (layer.requantize.mantissa >= 2**30).all()


def test_the_answer_does_not_depend_on_the_batch(small, pixels, images):
    model, _ = ptq.quantize(small(2), pixels, ptq.make_scheme(8, 8))
    network = integer_network(model, ptq.make_scheme(8, 8))
    whole = network(images)
    assert torch.equal(whole, torch.cat([network(images[i : i + 1]) for i in range(64)]))
    for wrong in (images.float(), images[:, :1], images[:, :, :16]):
        with pytest.raises(ValueError, match="images are"):
            network(wrong)


def test_the_table_is_what_the_float_network_sees():
    image = quantizers.Quantizer(8, signed=True)
    image.step.fill_(quantizers.LARGEST_PIXEL / 127)
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    levels = (image(data.normalize(values)) / image.step).round()
    table = integer._image_table(image)
    assert torch.equal(table.view(1, 3, 16, 16).float(), levels)
    assert table.abs().max() <= 127


def test_schemes_without_an_integer_network_say_why():
    for bits in (2, 8):
        assert integer.why_no_integer_network(ptq.make_scheme(bits, bits)) is None
    for scheme, what in [
        (None, "not quantized"),
        ({"method": "reference", "weight_bits": 8, "act_bits": 8}, "change with every batch"),
        (ptq.make_scheme(16, 8), "16 bits"), (ptq.make_scheme(32, 8), "32 bits"),
        (ptq.make_scheme(8, 32), "32, and 8 is most"),
        (ptq.make_scheme(8, 8, last_act_bits=16), "16, and"),
        (ptq.make_scheme(8, 8, layer_bits={"features.0.0": 9}), "9 bits"),
    ]:  # fmt: skip
        assert what in integer.why_no_integer_network(scheme)


def test_grids_say_their_sign():
    assert SIGNED.signed and not UNSIGNED.signed
    with pytest.raises(dataclasses.FrozenInstanceError):
        SIGNED.scale = 1
