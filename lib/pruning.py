"""Unstructured magnitude pruning: which weights go, and how they stay away."""

import torch
from torch import Tensor, nn

from lib.metrics import weight_layers


def magnitude_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Masks by layer that keep the largest weights of all Conv2d and Linear layers together.

    Global and unstructured (Han et al. 2015; one threshold for all layers as in Renda et al. 2020).
    Exactly round(sparsity * weights) weights go, equal magnitudes in the order of the layers; what
    is zero already goes first, so that a sparser mask is a subset of the one before it.
    """
    layers = weight_layers(model)
    magnitudes = torch.cat([layer.weight.detach().abs().flatten() for layer in layers.values()])
    order = torch.sort(magnitudes, stable=True).indices
    keep = torch.ones_like(magnitudes)
    keep[order[: round(sparsity * len(magnitudes))]] = 0
    parts = keep.split([layer.weight.numel() for layer in layers.values()])
    return {
        name: part.view_as(layer.weight)
        for (name, layer), part in zip(layers.items(), parts, strict=True)
    }


class Mask:
    """Holds weights at zero: apply once, then after every optimizer step."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]):
        layers = weight_layers(model)
        self.weights = [layers[name].weight for name in masks]
        self.masks = [
            mask.to(memory_format=torch.channels_last) if mask.ndim == 4 else mask
            for mask in masks.values()
        ]

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
