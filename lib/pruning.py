"""Unstructured pruning: choose the weights to remove, and hold them at zero."""

import contextlib

import torch
from torch import Tensor, nn

from lib import rate
from lib.folding import fold
from lib.importance import removal_errors, row_importance
from lib.metrics import weight_layers
from lib.quantizers import by_channel

STEPS = 6  # obd removes weights in this many steps, and estimates their bits anew before each
# Estimated bits for the magnitude of a 4-bit weight; its non-zero flag and its sign come on top.
MAGNITUDE_BITS = 2.0


@torch.no_grad()
def keep_best(
    model: nn.Module, keep: int, score: str, errors: dict[str, Tensor] | None = None
) -> None:
    """Zero all weights of Conv2d and Linear layers but the `keep` with the highest scores.

    Global and unstructured: one threshold for all layers. score:
        magnitude: |w| (Han et al. 2015; global as in Renda et al. 2020);
        lamp: w^2 divided by the sum of all squares in its layer that are no smaller (Lee et al.
            2021, equation 1). The order within a layer is the same, but a layer of small weights
            cannot vanish, since the largest weight of each layer scores 1;
        obd: the squared error of an image's logits without the weight, by a diagonal curvature
            (LeCun, Denker and Solla 1990, "Optimal Brain Damage"; see `weight_errors`), per bit
            that the weight takes in the file (see `_bits_over_zero`). A weight is cheap among
            others in its row and column, so rows and columns of few weights empty, and whole
            channels die.
    errors: for obd alone: the `weight_errors` of this model.
    Of equal scores, those of the first layers are removed. What is zero already is removed first,
    so that pruning again only ever removes more.
    """
    weights = [layer.weight for layer in weight_layers(model).values()]
    if score != "obd":
        score_of = {"magnitude": torch.abs, "lamp": _lamp}[score]
        _keep(weights, [score_of(weight.flatten()) for weight in weights], keep)
        return
    flat = [error.flatten() for error in errors.values()]
    present = sum(int(weight.count_nonzero()) for weight in weights)
    for step in range(1, STEPS + 1):
        scores = [
            error / _bits_over_zero(weight).flatten()
            for error, weight in zip(flat, weights, strict=True)
        ]
        _keep(weights, scores, round(present * (keep / present) ** (step / STEPS)))


def _keep(weights: list[Tensor], scores: list[Tensor], keep: int) -> None:
    """Zero all weights but the `keep` with the highest scores.

    scores: for each of the weight tensors a flat tensor; each score is at least 0.
    """
    # A weight without which nothing changes has the score 0 as well, under obd.
    scores = torch.cat([
        score.masked_fill(weight.flatten() == 0, -1)
        for score, weight in zip(scores, weights, strict=True)
    ])  # fmt: skip
    order = torch.sort(scores, stable=True).indices
    removed = torch.zeros_like(scores, dtype=torch.bool)
    removed[order[: max(0, len(order) - keep)]] = True
    for weight, part in zip(weights, removed.split([w.numel() for w in weights]), strict=True):
        weight.masked_fill_(part.view_as(weight), 0.0)


def _bits_over_zero(weight: Tensor) -> Tensor:
    """Return how many more bits a weight takes than a zero, at each place of a layer, at least 1.

    They depend on which other weights there are.
    """
    zero, nonzero, _ = rate.code_lengths((weight != 0).flatten(1).float(), 1)
    return (nonzero - zero + MAGNITUDE_BITS).clamp(min=1).view_as(weight)


@torch.no_grad()
def weight_errors(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the error of the logits without each weight, by layer, of the shape of the weights.

    images: (n, 3, 32, 32), normalized; their labels are not needed.

    They are those of the folded network, see lib.importance.removal_errors: batch norm takes up a
    constant error.
    """
    folded = fold(model)
    importance, errors = row_importance(folded, images), {}
    with contextlib.ExitStack() as hooks:
        for name, layer in weight_layers(folded).items():

            def keep_errors(layer, inputs, name=name):
                variance = by_channel(inputs[0]).var(0, correction=0)
                errors[name] = removal_errors(
                    layer.weight, variance, importance[name],
                    depthwise=getattr(layer, "groups", 1) > 1,
                )  # fmt: skip

            hooks.enter_context(layer.register_forward_pre_hook(keep_errors))
        folded(images)
    return {name: errors[name] for name in weight_layers(folded)}


def _lamp(weight: Tensor) -> Tensor:
    """Return the score of each weight of a layer, float64: see `keep_best`."""
    squares = weight.double().square()
    ranked, order = torch.sort(squares, descending=True, stable=True)
    scores = torch.empty_like(squares)
    scores[order] = ranked / ranked.cumsum(0).clamp(min=torch.finfo(ranked.dtype).tiny)
    return scores


class Mask:
    """Holds at zero the weights that are zero when it is made.

    Call `apply` after every optimizer step.
    """

    def __init__(self, model: nn.Module):
        self.weights = [layer.weight for layer in weight_layers(model).values()]
        self.masks = [(weight.detach() != 0).to(weight.dtype) for weight in self.weights]

    @torch.no_grad()
    def apply(self) -> None:
        """Zero these weights again."""
        torch._foreach_mul_(self.weights, self.masks)
        torch._foreach_add_(self.weights, 0.0)  # -0.0 becomes 0.0, whose bits are all zero


def cubic(start: float, target: float, number: int, rounds: int) -> float:
    """Return the sparsity after round `number` of `rounds`, from `start` to `target`.

    It grows fast while weights are many and slowly at the end (Zhu and Gupta 2017, equation 1).
    """
    return target + (start - target) * (1 - number / rounds) ** 3


def geometric(start: float, share: float, number: int) -> float:
    """Return the sparsity after `number` rounds that each remove a share of what remains."""
    return 1 - (1 - start) * (1 - share) ** number
