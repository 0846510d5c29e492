"""lib/rate.py: estimates beside what the coder takes, and gradients beside differences."""

import numpy as np
import pytest
import torch

from lib import rate
from lib.nnz import coder


def levels(max_level: int, spread: float) -> torch.Tensor:
    """(120, 90), the first rows sparse, the last ones dense."""
    rng = np.random.default_rng(4)
    x = np.clip(np.round(rng.laplace(size=(120, 90)) * spread), -max_level, max_level)
    x *= rng.random(x.shape) < np.linspace(0.05, 0.8, 120)[:, None]
    return torch.from_numpy(x).float()


@pytest.mark.parametrize(
    ("max_level", "spread"), [(127, 20), (7, 2), (3, 1), (1, 0.8), (9999, 900)]
)
def test_code_lengths_are_close_to_what_the_coder_takes(max_level, spread):
    x = levels(max_level, spread)
    zero, nonzero, size = rate.code_lengths(x, max_level)
    assert size.shape == (max_level + 1,) and zero.shape == nonzero.shape == x.shape
    bits = torch.where(x == 0, zero, nonzero + size[x.abs().long()]).sum()
    assert 0.93 < float(bits) / 8 / len(coder.encode([x.numpy().astype(np.int16)], [1])) < 1.07
    assert nonzero[100].mean() < nonzero[5].mean() and zero[100].mean() > zero[5].mean()


def test_code_lengths_of_a_layer_of_zeros_are_finite():
    for part in rate.code_lengths(torch.zeros(3, 4), 7):
        assert part.isfinite().all() and (part[1:] >= 0).all()


def test_bits_on_levels_are_those_of_code_lengths():
    x = levels(7, 2)
    step = torch.linspace(0.5, 2, 120)[:, None]
    zero, nonzero, size = rate.code_lengths(x, 7)
    expected = (nonzero + size[x.abs().long()])[x != 0].sum()  # zeros are pruned: free
    torch.testing.assert_close(rate.coded_bits(x * step, step, 7), expected, rtol=1e-5, atol=0)


def test_bits_have_the_gradient_of_their_differences():
    torch.manual_seed(0)
    weight = torch.randn(20, 30, dtype=torch.float64) * 2
    weight = weight.where(((weight * 2).frac().abs() - 0.5).abs() > 0.01, weight + 0.02)
    weight.requires_grad_()
    step = (torch.rand(20, 1, dtype=torch.float64) + 0.5).requires_grad_()
    total = rate.coded_bits(weight, step, 3)
    by_weight, by_step = torch.autograd.grad(total, (weight, step))
    h = 1e-7  # no level changes within it, so code_lengths do not
    for i, j in [(0, 0), (7, 3), (19, 29)]:
        moved = weight.detach().clone()
        moved[i, j] += h
        change = (rate.coded_bits(moved, step, 3) - total) / h
        assert change.item() == pytest.approx(by_weight[i, j].item(), rel=1e-3, abs=1e-4)
    moved = step.detach().clone()
    moved[4] += h
    change = (rate.coded_bits(weight, moved, 3) - total) / h
    assert change.item() == pytest.approx(by_step[4].item(), rel=1e-3, abs=1e-3)


def test_descending_on_bits_makes_files_smaller():
    weight = (levels(7, 2) * 0.9).requires_grad_()
    step = torch.ones(120, 1)
    before = rate.coded_bits(weight, step, 7)
    for _ in range(30):
        (grad,) = torch.autograd.grad(rate.coded_bits(weight, step, 7), weight)
        with torch.no_grad():
            weight -= 0.01 * grad
    sizes = [len(coder.encode([np.round(w.numpy()).clip(-7, 7).astype(np.int16)], [1]))
             for w in (levels(7, 2) * 0.9, weight.detach())]  # fmt: skip
    assert rate.coded_bits(weight, step, 7) < 0.9 * before and sizes[1] < 0.9 * sizes[0]
