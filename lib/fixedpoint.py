"""Requantization in integers alone: from one grid to another by multiplying by a ratio of scales.

A ratio is mantissa * 2^-shift with a 31-bit mantissa in [2^30, 2^31) (Jacob et al. 2018, section
2.2). A product is rounded once, to nearest, halves up, as (product + 2^(shift-1)) >> shift in 64
bits, and then clipped to the grid.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that a tensor of activations may have: level * scale, low <= level <= high."""

    scale: float
    low: int
    high: int

    @property
    def signed(self) -> bool:
        """Whether some of its levels are negative."""
        return self.low < 0


@dataclasses.dataclass
class Multiplier:
    """Computes round(x * mantissa * 2^-shift), clipped to a grid.

    mantissa, shift: one per channel, in a shape that broadcasts to that of x, or one for all.
    """

    mantissa: Tensor  # int64
    shift: Tensor  # int64, 1 to 62
    grid: Grid

    def __call__(self, x: Tensor) -> Tensor:
        """Return levels, int16, of x: int64 but of at most 32 bits, changed in place."""
        return self.rounded(x.mul_(self.mantissa))

    def rounded(self, product: Tensor) -> Tensor:
        """Return levels, int16, from a product, x * mantissa: int64, changed in place."""
        product.add_(1 << (self.shift - 1)).bitwise_right_shift_(self.shift)
        return product.clamp_(self.grid.low, self.grid.high).to(torch.int16)


def fixed_point(ratio: Tensor, grid: Grid) -> Multiplier:
    """Return the multiplier onto a grid by the fixed-point numbers nearest to the ratios.

    ratio: of any shape, not negative; taken as float64. Below 2^-32 a mantissa loses bits, which
    changes nothing: any 32-bit x times such a ratio rounds to 0. Raises ValueError for a ratio of
    2^30 or more.
    """
    fraction, exponent = torch.frexp(ratio.double())  # 0.5 <= fraction < 1
    mantissa, shift = torch.round(fraction * 2**31).long(), 31 - exponent.long()
    carry = mantissa == 2**31  # a fraction that was rounded up to 1
    mantissa, shift = torch.where(carry, 2**30, mantissa), torch.where(carry, shift - 1, shift)
    excess = (shift - 62).clamp(0, 62)
    mantissa, shift = mantissa >> excess, shift.clamp(max=62)  # at 62, no product overflows int64
    if (shift < 1).any():
        raise ValueError("the scales of two tensors are too far apart for a fixed-point multiplier")
    return Multiplier(mantissa, shift, grid)


class Sum:
    """The residual addition: both terms times mantissas of a common shift, then one rounding."""

    def __init__(self, x_grid: Grid, addend_grid: Grid, output_grid: Grid):
        self.x_grid, self.addend_grid, self.output_grid = x_grid, addend_grid, output_grid
        scales = torch.tensor([x_grid.scale, addend_grid.scale])
        ratios = (scales / output_grid.scale).double()  # divided in float32, as in lib.integer
        larger = fixed_point(ratios.max(), output_grid)  # the smaller takes its shift
        self.mantissas = torch.round(ratios * 2.0**larger.shift).long().tolist()
        self.requantize = larger

    def __call__(self, x: Tensor, addend: Tensor) -> Tensor:
        """Return the levels of the sum, int16, from those of its terms: integers of one shape."""
        total = x.long().mul_(self.mantissas[0]) + addend.long().mul_(self.mantissas[1])
        return self.requantize.rounded(total)
