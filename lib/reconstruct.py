"""Layer reconstruction: integer weights for one layer, from its inputs and wanted outputs.

    reconstruct(layer, inputs, outputs, bits)       # changes layer.weight and layer.weight_scale

A layer is linear in its inputs, so the mean squared error of its output is a quadratic form with
the Gram matrix of the inputs (Nagel et al. 2020, "Up or Down?", equation 20; Frantar et al. 2022,
GPTQ). Its minimum over integer levels is approached by coordinate descent on all rows at once: each
weight in turn goes to the best level given the other weights, and each row's scale to the best
scale given its levels. Pruned weights (zeros) are not optimized: they stay zero. With
`lambda_per_bit` the descent minimizes error + lambda_per_bit * bits, with the bits of lib/rate.py.

This module knows one layer and nothing of the network around it.

Names used throughout: a layer is written as `groups` independent matrix products (1, or one per
channel if depthwise), each of `rows` outputs and `columns` inputs.

    gram      (groups, columns, columns)   mean of input * input over positions
    cross     (groups, rows, columns)      mean of output * input
    weight    (groups, rows, columns)      level * scale
    scale     (groups, rows, 1)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.quantizers import max_level, put_on_grid, round_mantissa
from lib.rate import prices

POSITIONS = 65536  # positions (pixels of output maps) that a layer is fitted on, at most
SWEEPS = 3  # over the coordinates, between two fits of the scales
ROUNDS = 4  # fits of the scales
FLOAT_SWEEPS = 4  # over the coordinates at 32 bits, where there is nothing to round
DEPTHWISE_POSITIONS = POSITIONS // 4  # with nine columns per row, fewer are enough
# A refit that would shrink a scale below this share of itself is left out: the levels of such a row
# explain nothing of its outputs, and its scale could end at 0 or below.
SMALLEST_REFIT = 0.1
RIDGE = 1e-2  # share of the mean eigenvalue: how much a weight is held where the images say nothing


@torch.no_grad()
def reconstruct(
    layer: nn.Module, inputs: Tensor, outputs: Tensor, bits: int, *, scale_bits: int,
    row_importance: Tensor | None = None, lambda_per_bit: float = 0.0,
) -> None:  # fmt: skip
    """Fit a layer's weights, and their scales, to given outputs on given inputs, in place.

    layer: a Conv2d or Linear with a buffer `weight_scale` (rows,) unless bits is 32.
    inputs, outputs: (images, channels, height, width), or (images, features) for Linear. Their
        means are taken out first: the caller corrects the bias for them.
    bits: of the weights; 32 leaves them floats, which are still fitted.
    scale_bits: mantissa bits that the scales are rounded to. A row of zeros gets the scale 1.
    lambda_per_bit: with row_importance (rows,), what is minimized is the sum over rows of
        row_importance * squared error, plus lambda_per_bit * bits. 0: bits cost nothing.
    """
    images = slice(0, max(1, POSITIONS * inputs.shape[1] // inputs[0].numel()))
    inputs, outputs = as_matrix_product(layer, inputs[images], outputs[images])
    fit = IntegerLeastSquares(*_normal_equations(layer, inputs, outputs), bits)
    if bits == 32:
        fit.descend(FLOAT_SWEEPS)
        layer.weight.copy_(fit.weight.reshape(layer.weight.shape))
        return
    fit.choose_scales()
    if lambda_per_bit:
        row_lambda = lambda_per_bit / row_importance.reshape(fit.weight.shape[:2]).clamp(min=1e-12)
        fit.set_prices(row_lambda)
        fit.choose_scales()
    for _ in range(ROUNDS):
        fit.descend(SWEEPS)
        fit.refit_scales()
        if lambda_per_bit:
            fit.set_prices(row_lambda)
    fit.round_scales(scale_bits)
    fit.descend(SWEEPS)
    scale = torch.where(fit.weight.any(2, keepdim=True), fit.scale, 1)
    layer.weight_scale.copy_(scale.flatten())
    layer.weight.copy_(fit.weight.reshape(layer.weight.shape))
    put_on_grid(layer, bits)


def as_matrix_product(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's inputs and outputs as those of one matrix product per group.

    Shapes: (groups, positions, columns) and (groups, positions, rows).
    """
    if isinstance(layer, nn.Linear):
        return inputs[None], outputs[None]
    channels = outputs.shape[1]
    outputs = outputs.permute(0, 2, 3, 1)
    if layer.kernel_size == (1, 1):
        inputs = inputs.permute(0, 2, 3, 1).reshape(1, -1, inputs.shape[1])
        return inputs, outputs.reshape(1, -1, channels)
    if layer.groups > 1:
        images = max(1, DEPTHWISE_POSITIONS // outputs[0, :, :, 0].numel())
        inputs, outputs = inputs[:images], outputs[:images]
    patches = F.unfold(inputs, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    # (images, groups, columns, positions of an image)
    patches = patches.view(len(inputs), layer.groups, -1, patches.shape[-1])
    patches = patches.permute(1, 0, 3, 2).reshape(layer.groups, -1, patches.shape[2])
    outputs = outputs.reshape(-1, layer.groups, channels // layer.groups)
    return patches, outputs.transpose(0, 1)


def _normal_equations(layer: nn.Module, inputs: Tensor, outputs: Tensor):
    """Return (weight, gram, cross) of the legend, with a ridge that holds the weights."""
    groups, positions, columns = inputs.shape
    inputs = inputs - inputs.mean(1, keepdim=True)
    outputs = outputs - outputs.mean(1, keepdim=True)
    gram = inputs.transpose(1, 2) @ inputs / positions
    cross = outputs.transpose(1, 2) @ inputs / positions
    weight = layer.weight.reshape(groups, -1, columns).clone()
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    gram = gram + ridge[:, None, None] * torch.eye(columns, device=gram.device)
    return weight, gram, cross + ridge[:, None, None] * weight


class IntegerLeastSquares:
    """Minimize per row w gram w - 2 cross w over w = level * scale, zeros of the start held.

    After `set_prices`, the bits that the levels cost are added. Shapes: see the module's legend.
    Start with `choose_scales` (not at 32 bits, where there are no levels), then call `descend` and
    `refit_scales` in turn.
    """

    def __init__(self, weight: Tensor, gram: Tensor, cross: Tensor, bits: int):
        self.start, self.weight = weight, weight.clone()
        self.mask, self.gram, self.cross = weight != 0, gram, cross
        self.max_level = max_level(bits) if bits < 32 else None
        self.scale = self.prices = None

    def error(self, weight: Tensor) -> Tensor:
        """Return the squared error of each row, up to a constant: (groups, rows, 1)."""
        return ((weight @ self.gram - 2 * self.cross) * weight).sum(2, keepdim=True)

    def levels(self) -> Tensor:
        return (self.weight / self.scale).round_()

    def on_grid(self, weight: Tensor, scale: Tensor) -> Tensor:
        return (weight / scale).round_().clamp_(-self.max_level, self.max_level) * scale

    def set_prices(self, row_lambda: Tensor) -> None:
        """Let bits cost from now on, at the prices that the present levels make.

        row_lambda: (groups, rows), the squared error of that row that one bit is worth.
        """
        self.row_lambda = row_lambda[:, :, None]
        zero, nonzero, magnitude = prices(self.levels().flatten(0, 1), self.max_level)
        self.prices = zero.view_as(self.weight), nonzero.view_as(self.weight), magnitude

    def cost(self, levels: Tensor, columns=slice(None)) -> Tensor:
        """Return what levels in those columns cost, in units of their rows' squared error."""
        zero, nonzero, magnitude = self.prices
        magnitudes = magnitude[levels.abs().long()]
        nonzero = nonzero[:, :, columns] + magnitudes
        return self.row_lambda * torch.where(levels == 0, zero[:, :, columns], nonzero)

    def choose_scales(self) -> None:
        """Search each row's scale on a grid: the clip that loses least by rounding to nearest.

        29 clips, from the row's largest weight down to 0.3 of it. Once bits have prices they start
        at twice the largest weight: coarser levels cost fewer bits.
        """
        top = self.start.abs().amax(2, keepdim=True)
        top = torch.where(top > 0, top, torch.ones_like(top) * self.max_level)
        least = torch.full_like(top, torch.inf)
        self.scale = top / self.max_level
        for share in torch.linspace(2 if self.prices else 1, 0.3, 29).tolist():
            scale = top * share / self.max_level
            weight = self.on_grid(self.start, scale)
            error = self.error(weight)
            if self.prices:
                error += (self.cost((weight / scale).round_()) * self.mask).sum(2, keepdim=True)
            self.scale = torch.where(error < least, scale, self.scale)
            least = torch.minimum(error, least)
        self.weight = self.on_grid(self.start, self.scale)

    def descend(self, sweeps: int) -> None:
        """Move each weight in turn to its best level given the others, `sweeps` times."""
        weight, gram = self.weight, self.gram
        slope = weight @ gram - self.cross  # half the gradient
        for _ in range(sweeps):
            for j in range(weight.shape[2]):
                curvature = gram[:, j, j, None]
                new = weight[:, :, j] - slope[:, :, j] / curvature
                if self.max_level:
                    scale = self.scale[:, :, 0]
                    level = (new / scale).round_().clamp_(-self.max_level, self.max_level)
                    if self.prices:
                        level = self._cheapest(new / scale, level, curvature * scale**2, j)
                    new = level * scale
                change = torch.where(self.mask[:, :, j], new - weight[:, :, j], 0)
                slope.addcmul_(change[:, :, None], gram[:, None, j])
                weight[:, :, j] += change

    def _cheapest(self, exact: Tensor, nearest: Tensor, curvature: Tensor, column: int) -> Tensor:
        """Return the cheapest of the nearest level, its neighbour towards zero, and zero."""
        levels = torch.stack([nearest, nearest - nearest.sign(), torch.zeros_like(nearest)], 2)
        error = (levels - exact[:, :, None]).square_() * curvature[:, :, None]
        best = (error + self.cost(levels, slice(column, column + 1))).argmin(2, keepdim=True)
        return levels.gather(2, best)[:, :, 0]

    def refit_scales(self) -> None:
        """Set each row's scale to the best one for its present levels."""
        curvature = ((self.weight @ self.gram) * self.weight).sum(2, keepdim=True)
        factor = (self.cross * self.weight).sum(2, keepdim=True) / curvature.clamp(min=1e-20)
        factor = torch.where((curvature > 0) & (factor > SMALLEST_REFIT), factor, 1.0)
        self.scale, self.weight = self.scale * factor, self.weight * factor

    def round_scales(self, bits: int) -> None:
        """Round each scale to `bits` mantissa bits, down or up, whichever loses less.

        With many weight bits that is up: rounding down would clip the largest weight.
        """
        below, above = (round_mantissa(self.scale, bits, r) for r in (torch.floor, torch.ceil))
        weights = self.on_grid(self.weight, below), self.on_grid(self.weight, above)
        better = self.error(weights[0]) <= self.error(weights[1])
        self.scale = torch.where(better, below, above)
        self.weight = torch.where(better, *weights)
