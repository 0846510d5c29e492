"""What lib/coder.py will take for a layer's levels, estimated: the rate in rate-distortion.

A static estimate of an adaptive coder: the odds of a non-zero are those of its row times those of
its column, over the layer's; a sign is a bit; magnitudes have one distribution a layer. Prices are
read off the levels of now and taken for constant while other levels are weighed against them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LN2 = math.log(2)
KILOBYTE = 8000  # bits: what --rate is the price of


@torch.no_grad()
def prices(levels: Tensor, max_level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of levels in a layer. levels: (rows, columns), those of now, none over `max_level`.

    Returns (zero, nonzero, size), of shapes (rows, columns), (rows, columns), (max_level + 1,): a
    zero there; the flag and the sign of a non-zero there; and what its magnitude adds.
    """
    flags = (levels != 0).float()

    def log_odds(count: Tensor) -> Tensor:
        cells = flags.numel() / count.numel()
        return torch.log((count + 0.5) / (cells - count + 0.5))

    x = log_odds(flags.sum(1, keepdim=True)) + log_odds(flags.sum(0)) - log_odds(flags.sum())
    # At 6 bits and more, magnitudes are counted in 16 classes: single ones are too few.
    group = torch.arange(max_level + 1, device=levels.device) * 16 // (max_level + 1)
    count = torch.zeros(16, device=levels.device)
    count.index_add_(0, group[levels.abs().long()].flatten(), flags.flatten())
    members = torch.bincount(group[1:], minlength=16).clamp(min=1)
    count = count + 0.5
    size = -torch.log2(count / count.sum() / members)[group]
    return F.softplus(x) / LN2, F.softplus(-x) / LN2 + 1, size


def bits(weight: Tensor, step: Tensor, max_level: int) -> Tensor:
    """Those of a layer in training, (): between two levels linearly interpolated, so that it has a
    gradient for the weight (rows, columns) and the step (rows, 1). Zeros are pruned, and free."""
    x = (weight.abs() / step).clamp(max=max_level)
    with torch.no_grad():
        zero, nonzero, size = prices(x.round() * weight.sign(), max_level)
        below = x.floor().clamp(max=max_level - 1)
        k = below.long()
        low = torch.where(k == 0, zero, nonzero + size[k])
        slope = (nonzero + size[k + 1] - low) * (weight != 0)
        low = low * (weight != 0)
    return (low + slope * (x - below)).sum()
