"""Unstructured magnitude pruning: which weights go, and how they stay away."""

import torch
from torch import Tensor, nn

from lib.metrics import weight_layers


@torch.no_grad()
def keep_largest(model: nn.Module, keep: int, score: str = "magnitude") -> None:
    """Zero all weights of Conv2d and Linear layers but the `keep` best of them together.

    Global and unstructured: one threshold for all layers. score:
        magnitude: the largest stay (Han et al. 2015; globally as in Renda et al. 2020);
        lamp: the largest by w^2 over the sum of the squares in its layer that are no smaller (Lee
            et al. 2021, equation 1): the order within a layer is the same, but a layer of small
            weights cannot be lost whole, since the largest weight of each scores 1.
    Of equal scores those of the first layers go, and what is zero already goes first, so that
    pruning again only ever removes more.
    """
    weights = [layer.weight for layer in weight_layers(model).values()]
    rate = {"magnitude": torch.abs, "lamp": _lamp}[score]
    scores = torch.cat([rate(weight.flatten()) for weight in weights])
    order = torch.sort(scores, stable=True).indices
    gone = torch.zeros_like(scores, dtype=torch.bool)
    gone[order[: max(0, len(order) - keep)]] = True
    for weight, part in zip(weights, gone.split([w.numel() for w in weights]), strict=True):
        weight.masked_fill_(part.view_as(weight), 0.0)


def _lamp(weight: Tensor) -> Tensor:
    squares = weight.double().square()
    ranked, order = torch.sort(squares, descending=True, stable=True)
    scores = torch.empty_like(squares)
    scores[order] = ranked / ranked.cumsum(0).clamp(min=torch.finfo(ranked.dtype).tiny)
    return scores


class Mask:
    """Holds at zero the weights that are zero when it is made: apply after every optimizer step."""

    def __init__(self, model: nn.Module):
        self.weights = [layer.weight for layer in weight_layers(model).values()]
        self.masks = [(weight.detach() != 0).to(weight.dtype) for weight in self.weights]

    @torch.no_grad()
    def apply(self, _progress: float = 0.0) -> None:
        torch._foreach_mul_(self.weights, self.masks)
        torch._foreach_add_(self.weights, 0.0)  # -0.0 becomes 0.0: a pruned weight's bits are zero


def cubic(start: float, target: float, step: int, steps: int) -> float:
    """Sparsity after round `step` of `steps`: fast while weights are many, slow at the end
    (Zhu and Gupta 2017, equation 1)."""
    return target + (start - target) * (1 - step / steps) ** 3


def geometric(start: float, rate: float, step: int) -> float:
    """Sparsity after `step` rounds that each remove the share `rate` of what remains."""
    return 1 - (1 - start) * (1 - rate) ** step
