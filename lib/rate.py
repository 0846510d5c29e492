"""Estimate the code lengths of a layer's levels, the bits that the coder of .nnz files takes for
them: the rate of rate-distortion optimization.

A static estimate of an adaptive coder: the odds of a non-zero are the odds of its row times the
odds of its column, divided by the odds of the layer; a sign takes one bit; magnitudes have one
distribution per layer. The code length of each level is estimated from how often it occurs among
the present levels, and is treated as a constant while other levels are compared with these.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LN2 = math.log(2)
BITS_PER_KILOBYTE = 8000  # --rd-lambda is per 1,000 bytes, lambda_per_bit per bit
# Magnitudes below this are counted one by one, larger ones in two classes per octave.
COUNTED_ALONE = 16
CLASSES = COUNTED_ALONE + 2 * 11  # there are 11 octaves from 16 to 32767


class CodeLengths(NamedTuple):
    """Estimated bits of each possible level at each place of a layer."""

    zero: Tensor  # (rows, columns), of a zero there
    nonzero: Tensor  # (rows, columns), of the flag and sign of a non-zero there
    magnitude: Tensor  # (max_level + 1,), that a non-zero's magnitude adds


@torch.no_grad()
def code_lengths(levels: Tensor, max_level: int) -> CodeLengths:
    """Return the estimated bits of each possible level at each place of a layer.

    levels: (rows, columns), the present ones, magnitudes up to `max_level`.
    """
    is_nonzero = (levels != 0).float()

    def log_odds(nonzeros: Tensor) -> Tensor:
        """Return the log odds of a non-zero, from the non-zeros of each row, column or layer."""
        places = is_nonzero.numel() / nonzeros.numel()
        # + 0.5, as if half of one more had been seen of both: so no code length is infinite.
        return torch.log((nonzeros + 0.5) / (places - nonzeros + 0.5))

    by_row, by_column = is_nonzero.sum(1, keepdim=True), is_nonzero.sum(0)
    of_nonzero = log_odds(by_row) + log_odds(by_column) - log_odds(is_nonzero.sum())

    class_of = _classes(max_level, levels.device)
    count = torch.zeros(CLASSES, device=levels.device)
    count.index_add_(0, class_of[levels.abs().long()].flatten(), is_nonzero.flatten())
    # Not bincount, which would wait for the device: in QAT this is part of every step.
    classes = torch.arange(CLASSES, device=levels.device)
    magnitudes_in_class = (class_of[1:, None] == classes).sum(0)
    probability = torch.where(magnitudes_in_class > 0, count + 0.5, 0)
    # Of one magnitude: its class's, divided evenly.
    probability = probability / probability.sum() / magnitudes_in_class.clamp(min=1)
    magnitude = -torch.log2(probability.clamp(min=1e-9))[class_of]
    # -log2 of a probability whose log odds are x is softplus(-x) / ln 2; 1 more bit for the sign.
    zero, nonzero = F.softplus(of_nonzero) / LN2, F.softplus(-of_nonzero) / LN2 + 1
    return CodeLengths(zero, nonzero, magnitude)


def ideal_squared_scale(
    lambda_per_bit: float | Tensor, curvature: float | Tensor
) -> float | Tensor:
    """Return the square of the scale at which the cost of a value, error + lambda * bits, is least.

    On a grid of scale s, a value has an expected error of curvature * s^2 / 12, and doubling s
    saves one bit: curvature * s^2 / 12 - lambda * log2 s is least at s^2 = 6 / ln 2 * lambda /
    curvature (Gish and Pierce 1968, the uniform quantizer followed by an entropy coder).
    curvature: the error per squared change of the value. Both are floats, or tensors over 0.
    """
    return 6 / LN2 * lambda_per_bit / curvature


def _classes(max_level: int, device: torch.device) -> Tensor:
    """Return the class in which each magnitude from 0 to max_level is counted, (max_level + 1,).

    Single large magnitudes are too rare to be counted one by one.
    """
    magnitudes = torch.arange(max_level + 1, device=device)
    fraction, exponent = torch.frexp(magnitudes.float())  # 0.5 <= fraction < 1
    shared = COUNTED_ALONE + 2 * (exponent - COUNTED_ALONE.bit_length()) + (fraction >= 0.75)
    return torch.where(magnitudes < COUNTED_ALONE, magnitudes, shared).long()


def coded_bits(weight: Tensor, scale: Tensor, max_level: int) -> Tensor:
    """Return the estimated bits of a layer in training, (), interpolated linearly between levels.

    So it has gradients for the weight (rows, columns) and the scale (rows, 1). Zeros are pruned
    weights, which are not counted.
    """
    x = (weight.abs() / scale).clamp(max=max_level)
    with torch.no_grad():
        zero, nonzero, magnitude = code_lengths(x.round(), max_level)
        below = x.floor().clamp(max=max_level - 1)
        level = below.long()
        low = torch.where(level == 0, zero, nonzero + magnitude[level])
        slope = (nonzero + magnitude[level + 1] - low) * (weight != 0)
        low = low * (weight != 0)
    return (low + slope * (x - below)).sum()
