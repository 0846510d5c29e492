"""Unstructured magnitude pruning: which weights go, and how they stay away."""

import torch
from torch import nn

from lib.metrics import weight_layers


@torch.no_grad()
def keep_largest(model: nn.Module, keep: int) -> None:
    """Zero all weights of Conv2d and Linear layers but the `keep` largest of them together.

    Global and unstructured (Han et al. 2015; one threshold for all layers as in Renda et al. 2020).
    Of equal magnitudes those of the first layers go, and what is zero already goes first, so that
    pruning again only ever removes more.
    """
    weights = [layer.weight for layer in weight_layers(model).values()]
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    order = torch.sort(magnitudes, stable=True).indices
    gone = torch.zeros_like(magnitudes, dtype=torch.bool)
    gone[order[: max(0, len(order) - keep)]] = True
    for weight, part in zip(weights, gone.split([w.numel() for w in weights]), strict=True):
        weight.masked_fill_(part.view_as(weight), 0.0)


class Mask:
    """Holds at zero the weights that are zero when it is made: apply after every optimizer step."""

    def __init__(self, model: nn.Module):
        self.weights = [layer.weight for layer in weight_layers(model).values()]
        self.masks = [(weight.detach() != 0).to(weight.dtype) for weight in self.weights]

    @torch.no_grad()
    def apply(self) -> None:
        torch._foreach_mul_(self.weights, self.masks)
        torch._foreach_add_(self.weights, 0.0)  # -0.0 becomes 0.0: a pruned weight's bits are zero


def cubic(start: float, target: float, step: int, steps: int) -> float:
    """Sparsity after round `step` of `steps`: fast while weights are many, slow at the end
    (Zhu and Gupta 2017, equation 1)."""
    return target + (start - target) * (1 - step / steps) ** 3


def geometric(start: float, rate: float, step: int) -> float:
    """Sparsity after `step` rounds that each remove the share `rate` of what remains."""
    return 1 - (1 - start) * (1 - rate) ** step
