"""lib/ptq.py: what is kept exactly, what is on its grid, and what each step of it improves."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from lib import data, ptq, quantizers
from lib.compaction import compact, take
from lib.folding import fold, norm_after, norm_factor
from lib.importance import bias_importance, row_importance
from lib.integer import IntegerNetwork
from lib.metrics import weight_layers
from lib.nnz import coder
from lib.quantizers import Quantizer, integer_state, max_level


@pytest.fixture(scope="module")
def quantized(small, pixels):
    """(parent, its quantized network, latent weights, scheme), each made once."""

    @functools.cache
    def make(weight_bits: int, act_bits: int, seed: int = 0):
        model = small(seed)
        scheme = ptq.make_scheme(weight_bits, act_bits)
        return model, *ptq.quantize(model, pixels, scheme), scheme

    return make


@torch.no_grad()
def distance(model: nn.Module, parent: nn.Module, images) -> float:
    """The root mean square of the logits' errors, over what the logits tell of the images."""
    expected = parent(images)
    error = (model(images) - expected).square().mean().sqrt()
    return float(error / expected.std(0).square().mean().sqrt())


# ---- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 32), (3, 4), (8, 8), (16, 16)])
def test_zeros_stay_zero_and_all_weights_are_levels(quantized, weight_bits, act_bits):
    parent, model, latent, scheme = quantized(weight_bits, act_bits)
    levels = integer_state(model.state_dict(), scheme)  # raises where a weight is off its grid
    for name, layer in weight_layers(parent).items():
        zero = layer.weight == 0
        found = levels[f"{name}.weight"]
        assert found.dtype == (torch.int8 if weight_bits <= 8 else torch.int16)
        assert zero.any() and not found[zero].any() and found.abs().max() <= max_level(weight_bits)
        assert torch.equal(latent[name] == 0, zero)
        scale = model.get_submodule(name).weight_scale
        assert scale.shape == (len(layer.weight),) and (scale > 0).all()
        assert found[~zero].any()
    floats = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert all(t.isfinite().all() for t in floats)


def test_off_is_exactly_the_folded_network(quantized):
    parent, model, latent, _ = quantized(32, 32)
    folded = fold(parent)
    assert list(model.state_dict()) == list(folded.state_dict())
    assert all(torch.equal(v, folded.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(w, folded.get_submodule(k).weight) for k, w in latent.items())


@pytest.mark.parametrize("seed", range(3))
def test_many_bits_are_nearly_fp32_on_the_image_as_it_enters(quantized, pixels, seed):
    """Equalization is in this: it must not change the function."""
    parent, model, _, _ = quantized(16, 16, seed)
    exact = copy.deepcopy(parent)
    exact.image = model.image
    assert distance(model, exact, pixels) < 0.03


def test_more_bits_are_nearer(quantized, pixels):
    for pairs in ([(b, 32) for b in (2, 4, 6, 8)], [(32, b) for b in (2, 4, 6, 8)]):
        errors = []
        for weight_bits, act_bits in pairs:
            parent, model, _, _ = quantized(weight_bits, act_bits)
            errors.append(distance(model, parent, pixels))
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.15 * errors[0]


def test_same_seed_same_result_and_the_parent_stays(small, pixels):
    model = small(0)
    before = copy.deepcopy(model.state_dict())
    (a, first), (b, second) = (ptq.quantize(model, pixels, ptq.make_scheme(4, 4)) for _ in range(2))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_calibration_depends_on_the_seed_alone():
    split = data.Split(torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8), torch.zeros(50))
    a, b, other = (data.sample(split, 20, seed) for seed in (1, 1, 2))
    assert a.shape == (20, 3, 32, 32) and torch.equal(a, b) and not torch.equal(a, other)
    assert data.sample(split, 99, 1).shape[0] == 50  # all there are


def test_bits_of_a_layer_are_honoured(small, pixels):
    own = {"features.0.0": 8, "features.3.conv.1.0": 32, "features.4.conv.2": 2, "classifier.1": 16}
    scheme = ptq.make_scheme(4, 4, layer_bits=own, last_act_bits=8)
    model, _ = ptq.quantize(small(0), pixels, scheme)
    levels = integer_state(model.state_dict(), scheme)
    for name in weight_layers(model):
        bits = own.get(name, 4)
        weight = levels[f"{name}.weight"]
        assert (f"{name}.weight_scale" in levels) == (bits < 32)
        if bits == 32:
            assert weight.dtype == torch.float32
        else:
            assert max_level(bits) // 2 < weight.abs().max() <= max_level(bits)
    assert model.pooled.bits == 8 and model.features[1].conv[0][2].bits == 4


def test_the_images_step_covers_every_pixel(quantized):
    image = quantized(4, 4)[1].image
    extremes = torch.stack([torch.full((3, 32, 32), v, dtype=torch.uint8) for v in (0, 255)])
    levels = data.normalize(extremes) / image.step
    assert levels.abs().max() == pytest.approx(127) and image.bits == 8
    assert (image(data.normalize(extremes)) / image.step - levels).abs().max() <= 0.501


# ---- its parts -----------------------------------------------------------------------------------


@torch.no_grad()
def test_biases_leave_no_error_on_average(small, quantized, pixels):
    parent, model, _, _ = quantized(3, 32)
    folded = fold(parent)
    seen = {}
    for net in (folded, model):
        for layer in weight_layers(net).values():
            layer.register_forward_hook(lambda m, _, y: seen.__setitem__(m, y.clone()))
        net(pixels)
    for name, layer in weight_layers(folded).items():
        a, b = (seen[m].movedim(1, -1).flatten(0, -2) for m in (layer, model.get_submodule(name)))
        assert (a - b).abs().mean() > 1e-3 and (a - b).mean(0).abs().max() < 1e-4
        layer._forward_hooks.clear(), model.get_submodule(name)._forward_hooks.clear()
    # With activations the layers have factors of their own, but the logits have none; a bias is in
    # whole numbers of what the accumulator counts in.
    parent, model, _, _ = quantized(4, 4)
    unit = model.pooled.step * model.classifier[1].weight_scale
    assert ((model(pixels) - parent(pixels)).mean(0).abs() < unit).all()


@torch.no_grad()
def test_outputs_are_whole_numbers_of_what_accumulators_count_in(quantized, pixels):
    _, model, _, _ = quantized(4, 4)
    pairs, seen = dict(quantizers.layers_with_input_quantizers(model)), {}
    assert list(pairs) == list(weight_layers(model).values())
    for layer in pairs:
        layer.register_forward_hook(lambda m, x, y: seen.__setitem__(m, (x[0], y)))
    model(pixels)
    for layer, reads in pairs.items():
        x, y = seen[layer]
        assert ((x / reads.step) - (x / reads.step).round()).abs().max() < 1e-3
        unit = reads.step.double() * layer.weight_scale.double()
        number = y.movedim(1, -1).double() / unit
        live = layer.weight.flatten(1).any(1)
        assert live.any() and (number - number.round())[..., live].abs().max() < 0.02
        whole = quantizers.bias_in_accumulator_units(layer, layer.bias, layer.weight)
        assert (whole - layer.bias).abs().le(unit / 2 * 1.001).all()
        assert torch.equal(whole[~live], layer.bias[~live])
        layer._forward_hooks.clear()


def test_equalization_helps_channels_of_unlike_ranges(small, pixels, monkeypatch):
    model = small(1)
    with torch.no_grad():
        for block in model.features[2:-1]:  # expand's channels from 1 to a fiftieth
            norm, hidden = block.conv[0][1], block.conv[0][1].num_features
            factor = torch.logspace(0, -1.7, hidden)[torch.randperm(hidden)]
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            block.conv[1][0].weight.div_(factor.view(-1, 1, 1, 1))
    with_it, _ = ptq.quantize(model, pixels, ptq.make_scheme(32, 6))
    monkeypatch.setattr(ptq._Walk, "equalize", lambda *_: None)
    without, _ = ptq.quantize(model, pixels, ptq.make_scheme(32, 6))
    assert distance(with_it, model, pixels) < 0.8 * distance(without, model, pixels)


@pytest.mark.parametrize("channels", [7, 20, 64, 96])
@pytest.mark.parametrize("signed", [False, True])
def test_a_clip_sees_all_channels(channels, signed):
    """Whatever their number has in common with the stride of the sample."""
    x = torch.rand(512, channels, 8, 8) - 0.5 * signed
    x[:, 1::2] *= 10
    quantizer = Quantizer(4, signed)
    clip = ptq._best_scale(ptq.Pair(x, x), quantizer) * quantizer.high
    assert 0.7 * x.abs().max() < clip < 1.1 * x.abs().max()


# ---- one scale per tensor ------------------------------------------------------------------------


@pytest.mark.parametrize("act_bits", [8, 32])
def test_integers_of_a_dequantized_network_are_kept(small, pixels, act_bits):
    model = small(2)
    with torch.no_grad():  # the largest weights are in channels that compaction removes
        project = model.features[3].conv[2].weight
        project[:, 5] = 0
        model.features[3].conv[0][0].weight[5] *= 3
        model.features[3].conv[1][0].weight[5] *= 3
    scheme = quantizers.quantize_reference(model, 8, 32)
    before = integer_state(model.state_dict(), scheme)
    for layer in weight_layers(model).values():
        del layer.weight_scale  # plain fp32 weights, which happen to lie on a grid
    smaller, kept = compact(model)
    assert smaller.settings != model.settings
    scheme = ptq.make_scheme(8, act_bits, weight_scale="tensor")
    found, latent = ptq.quantize(smaller, pixels, scheme, scale_bits=23)
    after = integer_state(found.state_dict(), scheme)
    lost = 0
    for name in weight_layers(found):
        key = f"{name}.weight"
        expected = take(before[key], kept[key])
        assert torch.equal(after[key], expected), name
        lost += int(expected.abs().max() < before[key].abs().max())
        assert torch.allclose(latent[name], found.get_submodule(name).weight, rtol=1e-5, atol=0)
    assert lost >= 2
    assert distance(found, model, pixels) < (0.2 if act_bits == 8 else 1e-4)


@torch.no_grad()
def test_one_scale_per_tensor_is_one_before_folding(small, pixels):
    model = small(3)
    scheme = ptq.make_scheme(4, 32, weight_scale="tensor")
    found, _ = ptq.quantize(model, pixels, scheme, scale_bits=23)
    for name, layer in weight_layers(found).items():
        norm = norm_after(model, name)
        factor = torch.ones(len(layer.weight)) if norm is None else norm_factor(norm)
        live = layer.weight.flatten(1).any(1)
        assert (layer.weight_scale[~live] == 1).all()
        steps = (layer.weight_scale / factor)[live]
        assert torch.allclose(steps, steps[0], rtol=1e-5)
        weight = model.get_submodule(name).weight
        assert steps[0] == pytest.approx(float(quantizers.symmetric_scale(weight, 4)), rel=1e-5)


# ---- for a small file ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale", ["channel", "tensor"])
def test_side_values_are_short_and_little_is_lost(small, pixels, scale):
    model = small(0)
    scheme = ptq.make_scheme(8, 8, weight_scale=scale)
    exact, _ = ptq.quantize(model, pixels, scheme, scale_bits=23, bias_bits=32)
    short, _ = ptq.quantize(model, pixels, scheme, scale_bits=4, bias_bits=3)
    rounded = 0
    for name, layer in weight_layers(short).items():
        step = layer.weight_scale
        assert torch.equal(quantizers.round_mantissa(step, 4), step)
        dead = ~layer.weight.flatten(1).any(1)
        assert (step[dead] == 1).all()
        if name != "classifier.1":  # its output is on no grid
            grid = layer.bias_scale
            assert grid == 2.0 ** round(np.log2(grid))
            assert torch.equal(torch.round(layer.bias / grid) * grid, layer.bias)
            other = exact.get_submodule(name)
            exact_scale = other.weight_scale
            rounded += int((quantizers.round_mantissa(exact_scale, 4) != exact_scale).sum())
    assert rounded > 100
    assert distance(short, model, pixels) < distance(exact, model, pixels) + 0.05


@torch.no_grad()
def test_a_coarser_grid_costs_more_and_takes_less(small, pixels):
    model, biases, errors = small(2), [], []
    for bits in (8, 0, -2):  # the last error is 1.2 times the first: processors round otherwise
        found, _ = ptq.quantize(model, pixels, ptq.make_scheme(8, 8), scale_bits=23, bias_bits=bits)
        layers = list(weight_layers(found).values())[:-1]
        numbers = torch.cat([(m.bias / m.bias_scale).abs() for m in layers])
        biases.append(float(numbers.log2().clamp(0).sum()))
        errors.append(distance(found, model, pixels))
    assert biases == sorted(biases, reverse=True) and errors[2] > errors[0]


@torch.no_grad()
def test_lambda_decides_the_grid_of_the_biases(small, pixels):
    model, grids = small(0), []
    for lambda_per_bit in (1e-6, 1e-6 * 4**3):
        found, _ = ptq.quantize(model, pixels, ptq.make_scheme(8, 8), lambda_per_bit=lambda_per_bit)
        layers = list(weight_layers(found).values())[:-1]
        assert all(torch.equal(quantizers.bias_on_grid(m), m.bias) for m in layers)
        grids.append(torch.tensor([m.bias_scale for m in layers]).log2())
    # Error grows with the square of the grid, so it is three powers of two apart, but for thinning.
    assert (grids[1] - grids[0]).median() == 3
    # An error of the biases does what the importance says, which is theirs and not the outputs'.
    folded = fold(model)
    layers = weight_layers(folded)
    found = bias_importance(folded, pixels)
    expected, ratios = folded(pixels), []
    for name, layer in layers.items():
        error = torch.where(torch.rand_like(layer.bias) < 0.5, 1e-3, -1e-3)
        layer.bias.add_(error)
        change = folded(pixels) - expected
        layer.bias.sub_(error)
        change -= change.mean(1, keepdim=True)
        ratios.append(float(change.square().sum(1).mean() / (found[name] * error.square()).sum()))
    assert 0.7 < np.median(ratios) < 1.4


def test_activations_that_are_zero_on_all_images_get_a_scale_that_integers_can_have(small, pixels):
    model = small(0)
    model.head.norm.bias.data.fill_(-1e3)  # no image gets over this
    found, _ = ptq.quantize(model, pixels, ptq.make_scheme(8, 8))
    head = found.head.activation
    assert float(head.step) == pytest.approx(6 / head.high)
    integers = IntegerNetwork(found, integer_state(found.state_dict(), ptq.make_scheme(8, 8)))
    assert integers(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).isfinite().all()


@torch.no_grad()
def test_row_importance_tells_what_noise_does_to_the_logits(small, pixels):
    """Of each layer alone, whose smallest weights are left out: exact by construction; and of
    another error of that kind: about right."""
    model = fold(small(0))
    found = row_importance(model, pixels)
    expected = model(pixels)
    ratios = []
    for name, layer in weight_layers(model).items():
        assert found[name].shape == (len(layer.weight),) and (found[name] >= 0).all()
        weight, seen = layer.weight.clone(), {}
        hook = layer.register_forward_hook(lambda _, __, y, seen=seen: seen.update(y=y.clone()))
        model(pixels)
        before = seen["y"]
        layer.weight.mul_(torch.rand_like(weight) > 0.1)  # a tenth of them, whatever their size
        model(pixels)
        hook.remove()
        error = (seen["y"] - before).movedim(1, -1).flatten(0, -2)
        layer.bias.sub_(error.mean(0))
        change = model(pixels) - expected
        layer.bias.add_(error.mean(0))
        layer.weight.copy_(weight)
        change = (change - change.mean(1, keepdim=True)).square().sum(1).mean()
        predicted = (found[name] * (error - error.mean(0)).square().mean(0)).sum()
        ratios.append(float(change / predicted.clamp(min=1e-9)))
    ratios = torch.tensor(ratios)
    assert 0.5 < ratios.median() < 2 and ((ratios > 0.1) & (ratios < 10)).float().mean() > 0.9


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_lambda_buys_bytes_with_error(small, pixels, bits):
    model, sizes, errors, nonzeros = small(0), [], [], []
    scheme = ptq.make_scheme(bits, 8)
    for lambda_per_bit in (0.0, 1e-4, 1e-3, 1e-2):
        found, latent = ptq.quantize(model, pixels, scheme, lambda_per_bit=lambda_per_bit)
        levels = integer_state(found.state_dict(), scheme)
        matrices = [levels[f"{n}.weight"].flatten(1).numpy() for n in weight_layers(found)]
        sizes.append(len(coder.encode(matrices, [coder.EXPAND] * len(matrices))))
        errors.append(distance(found, model, pixels))
        nonzeros.append(sum(int((m != 0).sum()) for m in matrices))
        pruned = torch.cat([latent[n].flatten() == 0 for n in weight_layers(found)])
        assert not np.concatenate([m.ravel() for m in matrices])[pruned.numpy()].any()
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.8 * sizes[0]
    assert errors[-1] > errors[0] and nonzeros[-1] < nonzeros[0]


def test_a_layer_of_zeros_stays_so_with_lambda(small, pixels):
    model = small(0)
    torch.nn.init.zeros_(model.features[3].conv[2].weight)
    found, _ = ptq.quantize(model, pixels, ptq.make_scheme(4, 8), lambda_per_bit=1e-3)
    assert not found.features[3].conv[2].weight.any() and found(pixels).isfinite().all()


@torch.no_grad()
def test_a_scale_suits_all_columns_of_a_map_not_those_at_its_border_alone():
    """Every 40th position of these maps, 50,000 values in all, would be in the first column."""
    x = torch.rand(512, 62, 8, 8, generator=torch.Generator().manual_seed(1))
    x[..., 0] *= 0.01
    quantizer = Quantizer(8, signed=False)
    scale = ptq._best_scale(ptq.Pair(x, x), quantizer)
    assert scale == pytest.approx(1 / 255, rel=0.05)
