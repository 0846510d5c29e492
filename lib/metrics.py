"""Counts (weights, non-zero weights, MACs) and the interval of an accuracy."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from models.layers import CLASSIFIER, Layer, layers


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of an accuracy of correct / total, as two shares (Wilson 1927)."""
    if not total:
        return 0.0, 1.0
    p, n, z = correct / total, total, 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_weight(name: str, tensor) -> bool:
    """Say whether an entry of a state dict is the weight of a Conv2d or Linear layer.

    Weights of batch norms, biases and scales have one dimension at most.
    """
    return name.endswith(".weight") and tensor.ndim > 1


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the Conv2d and Linear layers by name: those that are pruned and quantized."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def layer_counts(model: nn.Module) -> list[tuple[str, int, int]]:
    """Return (name, weights, non-zero weights) of every Conv2d and Linear layer, without biases."""
    return [
        (name, layer.weight.numel(), int(torch.count_nonzero(layer.weight)))
        for name, layer in weight_layers(model).items()
    ]


def macs(settings: dict) -> int:
    """Return the multiply-accumulates of all layers of a network for one image of 32x32.

    settings: the network's. Weights that are zero count like the others.
    """
    return sum(side**2 * math.prod(layer.shape) for layer, _, side in layers_and_sides(settings))


def largest_map(settings: dict) -> int:
    """Return the largest number of outputs that a layer has for one image of 32x32."""
    return max(side**2 * layer.shape[0] for layer, _, side in layers_and_sides(settings))


def layers_and_sides(settings: dict) -> Iterator[tuple[Layer, int, int]]:
    """Yield each layer of a network with the sides of its input and output maps, in pixels."""
    side = 32
    for layer in layers(settings):
        before = 1 if layer.role == CLASSIFIER else side  # it reads the pooled map
        side = (before - 1) // layer.stride + 1
        yield layer, before, side
