"""What errors in a layer do to the logits: the importance of its rows, biases and weights."""

import contextlib
import copy

import torch
from torch import Tensor, nn

from lib.metrics import weight_layers
from lib.quantizers import by_channel

# How many images statistics are taken from. Their time grows with the images, and what they give
# is a mean over images, which a few hundred settle.
GRADIENT_IMAGES, DISTURBED_IMAGES = 256, 64
BATCH = 64  # images per backward pass: bounds the memory of its activations
DISTURBANCE = 0.02  # share of a layer's sum of squares left out to see what that does to the logits


@torch.no_grad()
def row_importance(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return {layer: (rows,)}: the squared error of an image's logits, without the offset that all
    logits share, per unit of error variance in each row's outputs.

    model: folded. images: (n, 3, H, W), normalized; their labels are not needed.

    Between the rows of a layer it is the mean squared gradient of a random direction of the logits,
    which treats errors at different positions as independent (the approximation of KFC, Grosse and
    Martens 2016). They are not: the errors of one row of the head are correlated over positions,
    and the average over the map keeps them. So all rows of a layer are multiplied by one factor,
    such that the sum is what is observed when the layer's smallest weights are left out.
    """
    importance = _mean_squared_gradients(model, images)
    images = images[:DISTURBED_IMAGES]
    expected = model(images)
    for name, layer in weight_layers(model).items():
        if not layer.weight.any():
            continue
        variance, logits = _without_smallest_weights(model, layer, images)
        error = logits - expected
        observed = (error - error.mean(1, keepdim=True)).square().sum(1).mean()
        importance[name] *= observed / (importance[name] * variance).sum().clamp(min=1e-20)
    return importance


def bias_importance(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return {layer: (rows,)}: the squared error of an image's logits, without the offset that all
    logits share, per squared error of each row's bias.

    model, images: as for `row_importance`. A bias shifts all positions alike, so its gradient is
    the sum of theirs.
    """
    return _mean_squared_gradients(model, images, of_biases=True)


def removal_errors(
    weight: Tensor, variance: Tensor, importance: Tensor, *, depthwise: bool
) -> Tensor:
    """Return the squared error of an image's logits without each weight of a layer, of the shape of
    the weights, by a diagonal curvature (LeCun, Denker and Solla 1990, "Optimal Brain Damage").

    weight: of the folded network. variance: of the layer's inputs, (channels,). The variance and
    not the mean square: the bias takes up a constant error. importance: of its rows, (rows,).
    """
    others = [1] * (weight.ndim - 1)
    by_input = (-1, *others) if depthwise else (1, -1, *others[1:])
    return weight.square() * variance.view(by_input) * importance.view(-1, *others)


def _without_smallest_weights(
    model: nn.Module, layer: nn.Module, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Leave out a layer's smallest weights, which hold DISTURBANCE of its sum of squares.

    Errors have no mean, as after bias correction. Returns (variance of the error in each row's
    outputs (rows,), the logits (n, classes)).
    """
    reduced = copy.deepcopy(layer)
    sizes = layer.weight[layer.weight != 0].abs().sort().values
    left_out = (sizes.square().cumsum(0) < DISTURBANCE * sizes.square().sum()).sum()
    reduced.weight[layer.weight.abs() <= sizes[left_out]] = 0
    variances = []

    def disturb(_, inputs, outputs):
        error = reduced(inputs[0]) - outputs
        error = error - by_channel(error).mean(0).view(-1, *[1] * (error.ndim - 2))
        variances.append(by_channel(error).square().mean(0))
        return outputs + error

    with layer.register_forward_hook(disturb):
        logits = model(images)
    return variances[0], logits


@torch.enable_grad()
def _mean_squared_gradients(
    model: nn.Module, images: Tensor, of_biases: bool = False
) -> dict[str, Tensor]:
    """Return, by layer, the squared gradient of a random combination of the logits with respect to
    each output channel, (rows,): summed over positions, averaged over the first images.

    of_biases: with respect to the channel's bias: the gradients are summed before they are squared.
    """
    images = images[:GRADIENT_IMAGES]
    totals = dict.fromkeys(weight_layers(model), 0.0)

    def add(grad: Tensor, name: str) -> None:
        grad = grad.reshape(*grad.shape[:2], -1)  # (images, rows, positions)
        grad = grad.sum(2, keepdim=True) if of_biases else grad
        totals[name] += grad.square().sum((0, 2))

    generator = torch.Generator().manual_seed(0)
    with contextlib.ExitStack() as hooks:
        for name, layer in weight_layers(model).items():

            def watch(_, __, y, name=name):
                y.register_hook(lambda grad: add(grad, name))

            hooks.enter_context(layer.register_forward_hook(watch))
        for batch in images.split(BATCH):
            x = batch.clone().requires_grad_()
            logits = model(x)
            direction = torch.randn(logits.shape, generator=generator).to(logits.device)
            torch.autograd.grad(logits, x, direction - direction.mean(1, keepdim=True))
    return {name: total / len(images) for name, total in totals.items()}
