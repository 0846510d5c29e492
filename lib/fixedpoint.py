"""From one integer grid to another: multiplication by a ratio of two steps, in integers alone.

A ratio is mantissa * 2^-shift with a 31-bit mantissa in [2^30, 2^31) (Jacob et al. 2018, section
2.2). The only rounding is to nearest, halves up: (product + 2^(shift-1)) >> shift in 64 bits, then
clipping to the grid.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Grid:
    """Of a tensor of activations: level * step, low <= level <= high."""

    step: float
    low: int
    high: int

    @property
    def signed(self) -> bool:
        return self.low < 0


@dataclasses.dataclass
class Multiplier:
    """round(x * mantissa * 2^-shift), clipped to a grid; a mantissa for each channel or one."""

    mantissa: Tensor  # int64
    shift: Tensor  # int64, 1 to 62
    grid: Grid

    def __call__(self, x: Tensor) -> Tensor:
        """x: int64, changed in place; returns int16."""
        return self.rounded(x.mul_(self.mantissa))

    def rounded(self, product: Tensor) -> Tensor:
        product.add_(1 << (self.shift - 1)).bitwise_right_shift_(self.shift)
        return product.clamp_(self.grid.low, self.grid.high).to(torch.int16)


def fixed_point(ratio: Tensor, grid: Grid) -> Multiplier:
    """The fixed-point multiplier nearest to each ratio, float64 and none negative.

    Under 2^-31 the mantissa loses bits that no 32-bit accumulator could show.
    Raises ValueError for one of 2^30 or more.
    """
    fraction, exponent = torch.frexp(ratio.double())  # 0.5 <= fraction < 1
    mantissa, shift = torch.round(fraction * 2**31).long(), 31 - exponent.long()
    carry = mantissa == 2**31
    mantissa, shift = torch.where(carry, 2**30, mantissa), torch.where(carry, shift - 1, shift)
    excess = (shift - 62).clamp(0, 62)
    mantissa, shift = mantissa >> excess, shift - excess
    if (shift < 1).any():
        raise ValueError("the steps of two tensors are too far apart for a fixed-point multiplier")
    return Multiplier(mantissa, shift, grid)


class Sum:
    """The residual addition: x and the addend at a common shift, then one rounding."""

    def __init__(self, x: Grid, addend: Grid, writes: Grid):
        self.x, self.addend, self.writes = x, addend, writes
        ratios = (torch.tensor([x.step, addend.step]) / writes.step).double()  # as of lib.integer
        larger = fixed_point(ratios.max(), writes)
        self.mantissas = torch.round(ratios * 2.0**larger.shift).long().tolist()
        self.requantize = larger

    def __call__(self, x: Tensor, addend: Tensor) -> Tensor:
        total = x.long().mul_(self.mantissas[0]) + addend.long().mul_(self.mantissas[1])
        return self.requantize.rounded(total)
