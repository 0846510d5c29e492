"""lib/reconstruct.py: against every choice there is, and against rounding to nearest."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import price
from lib import quantizers
from lib.quantizers import max_level
from lib.reconstruct import IntegerLeastSquares, as_matrix_product, reconstruct


def problem(columns: int, bits: int, rows: int = 40) -> IntegerLeastSquares:
    """Rows of correlated inputs, about a fifth of the weights pruned."""
    x = torch.randn(200, columns) @ torch.randn(columns, columns)
    weight = torch.randn(1, rows, columns) * (torch.rand(1, rows, columns) < 0.8)
    gram = (x.T @ x / 200)[None]
    return IntegerLeastSquares(weight, gram, weight @ gram, bits)


def errors(fit: IntegerLeastSquares) -> torch.Tensor:
    return fit.error(fit.weight).flatten()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_move_of_the_descent_makes_it_worse(bits):
    fit = problem(12, bits)
    mask, full = fit.mask.clone(), fit.error(fit.weight).abs().flatten()
    fit.choose_scales()
    last = errors(fit)
    for _ in range(4):
        for move in (lambda: fit.descend(1), fit.refit_scales, lambda: fit.descend(2)):
            move()
            assert (errors(fit) <= last + 1e-4 * full).all()
            last = errors(fit)
            assert not fit.weight[~mask].any()
            levels = fit.weight / fit.scale
            assert (levels - levels.round()).abs().max() < 1e-4 * max_level(bits)
            assert levels.abs().max() < max_level(bits) + 1e-3


@pytest.mark.parametrize("columns", [3, 4])
def test_descent_against_every_choice_there_is(columns):
    fit = problem(columns, 2)
    fit.choose_scales()
    rounded, step, mask = errors(fit), fit.scale, fit.mask
    fit.descend(20)
    choices = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=columns)))
    every = choices[:, None, None] * step * mask  # (choices, 1, rows, columns)
    least = torch.stack([fit.error(w).flatten() for w in every]).amin(0)
    found, scale = errors(fit), least.abs()
    assert (found >= least - 1e-4 * scale).all() and (found <= rounded + 1e-4 * scale).all()
    assert (found <= least + 1e-4 * scale).float().mean() > 0.8  # mostly the best of all
    assert found.mean() < rounded.mean()
    # Where it ended, no single weight can do better.
    for j, level in itertools.product(range(columns), (-1.0, 0.0, 1.0)):
        moved = fit.weight.clone()
        moved[:, :, j] = level * (step * mask)[:, :, j]
        assert (fit.error(moved).flatten() >= found - 1e-4 * scale).all()


def test_a_refitted_scale_is_the_best_for_its_levels():
    fit = problem(8, 3)
    fit.choose_scales()
    fit.refit_scales()
    found = errors(fit)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (fit.error(fit.weight * factor).flatten() >= found - 1e-4 * found.abs()).all()


LAYERS = {
    "full": lambda: nn.Conv2d(3, 8, 3, 2, 1),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, 2, 1, groups=12),
    "1x1": lambda: nn.Conv2d(12, 10, 1), "linear": lambda: nn.Linear(12, 10),
}  # fmt: skip


def inputs_of(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(200, 12) @ torch.randn(12, 12)
    x = torch.rand(8, layer.in_channels, 9, 9).to(memory_format=torch.channels_last)
    return F.avg_pool2d(x, 3, 1, 1)  # neighbours resemble each other


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_layer_is_the_product_of_its_rows(kind):
    layer = LAYERS[kind]()
    x = inputs_of(layer)
    z = layer(x)
    inputs, outputs = as_matrix_product(layer, x, z)
    groups, _, columns = inputs.shape
    weight = layer.weight.reshape(groups, -1, columns)
    product = inputs @ weight.transpose(1, 2) + layer.bias.view(groups, 1, -1)
    torch.testing.assert_close(product, outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_reconstruction_beats_the_best_rounding(kind, bits):
    layer = LAYERS[kind]()
    layer.register_buffer("weight_scale", torch.ones(len(layer.weight)))
    x = inputs_of(layer)
    z, weight = layer(x), layer.weight.clone()

    def error() -> torch.Tensor:
        wrong = (layer(x) - z).movedim(1, -1).flatten(0, -2)
        return (wrong - wrong.mean(0)).square().mean(0)  # the mean is the bias's

    best, top = torch.full((len(weight),), torch.inf), weight.flatten(1).abs().amax(1)
    for share in torch.linspace(0.3, 1, 50):  # rounding to nearest, each row with its best step
        layer.weight.copy_(weight)
        layer.weight_scale.copy_(top * share / max_level(bits))
        quantizers.put_on_grid(layer, bits)
        best = torch.minimum(best, error())
    layer.weight.copy_(weight)
    reconstruct(layer, x, z, bits, scale_bits=23)
    assert error().sum() < best.sum()
    assert (error() <= best * 1.1 + 1e-8).float().mean() > 0.8


@torch.no_grad()
def test_counted_bits_move_levels_only_where_the_cost_falls():
    """Every choice of a sweep is the best of its candidates, by error + row_lambda * bits."""
    torch.manual_seed(0)
    fit = problem(12, 4)
    fit.choose_scales()
    fit.row_lambda = torch.full((1, 40, 1), 0.05)
    fit.estimate_lengths()
    before = fit.cost(fit.weight, fit.scale)
    fit.descend(1)
    first = fit.cost(fit.weight, fit.scale)
    fit.descend(3)
    last = fit.cost(fit.weight, fit.scale)
    assert (first <= before + 1e-5).all() and (last <= first + 1e-5).all()
    assert (first < before - 1e-3).any()


@torch.no_grad()
@pytest.mark.parametrize("name", price.variants())
def test_the_parts_that_a_benchmark_leaves_out_can_be_left_out(name):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 12, 1), torch.randn(8, 16, 8, 8)
    outputs = layer(x)
    layer.weight.mul_(torch.rand_like(layer.weight) < 0.7)
    layer.register_buffer("weight_scale", torch.ones(12))
    pruned = layer.weight == 0
    with contextlib.ExitStack() as stack:
        for replacement in price.variants()[name][0]:
            stack.enter_context(replacement)
        reconstruct(layer, x, outputs, 8, scale_bits=3, row_importance=torch.ones(12),
                    lambda_per_bit=1e-4)  # fmt: skip
    came_back = layer.weight[pruned].any()
    assert layer.weight.any() and came_back == (name == "pruned weights may come back")
