"""Layer reconstruction: integer weights for one layer, from its inputs and wanted outputs.

    reconstruct(layer, inputs, outputs, bits, scale_bits=3)  # changes its weight and weight_scale
    refit_floats(layer, inputs, outputs)                     # changes its weight, without levels

A layer is linear in its inputs, so the mean squared error of its output is a quadratic form with
the Gram matrix of the inputs (Nagel et al. 2020, "Up or Down?", equation 20; Frantar et al. 2022,
GPTQ). Its minimum over integer levels is approached by coordinate descent on all rows at once: each
weight in turn goes to the best level given the other weights, and each row's scale to the best
scale given its levels. Pruned weights (zeros) are not optimized: they stay zero.

With `lambda_per_bit`, the cost error + lambda_per_bit * bits is minimized, with the bits of
lib/rate.py. Frequent levels have short codes. So on a fine grid, where large levels are frequent,
these are cheap, and the grid stays fine: each start ends in its own local optimum. So there are
several starts: the code lengths are estimated on the grid that theory gives, in several multiples
(COARSENESS), and with these lengths each row's scale is searched (see `scales_for_lambda`). At the
end each row keeps the start at which its cost is least.

This module knows one layer and nothing of the network around it.

Names used throughout: a layer is written as `groups` independent matrix products (1, or one per
channel if depthwise), each of `rows` outputs and `columns` inputs.

    gram        (groups, columns, columns)   mean of input * input over positions
    cross       (groups, rows, columns)      mean of output * input
    weight      (groups, rows, columns)      level * scale
    scale       (groups, rows, 1)
    row_lambda  (groups, rows, 1)            squared error of a row that saving one bit may add

Several starts are fitted at once, as copies of the rows: copy, row -> copy * rows + row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.quantizers import max_level, put_on_grid, round_mantissa
from lib.rate import CodeLengths, code_lengths, ideal_squared_scale

POSITIONS = 65536  # a layer is fitted on so many pixels of its input maps, at most
SWEEPS = 3  # over the coordinates, between two fits of the scales
ROUNDS = 4  # fits of the scales
SCALES, SCALES_WITH_LAMBDA = 29, 48  # that a search tries
FLOAT_SWEEPS = 4  # over the coordinates where there is nothing to round
DEPTHWISE_POSITIONS = POSITIONS // 4  # with nine columns per row, fewer are enough
# A refit that would shrink a scale below this share of itself is left out: the levels of such a row
# explain nothing of its outputs, and its scale could end at 0 or below.
SMALLEST_REFIT = 0.1
# Multiples of the squared scale that theory gives, from which a fit with lambda starts. Theory is
# of fine grids; on coarse ones, where most levels are 0, larger multiples serve many rows better.
COARSENESS = (0.5, 1.0, 2.0, 4.0)
# Each choice between the multiples estimates bits from the rows that the one before chose; the
# first one from those of the multiple with the index FIRST_CHOICE.
CHOICES, FIRST_CHOICE = 3, 2
RIDGE = 1e-2  # share of the mean eigenvalue: how much a weight is held where the images say nothing


@torch.no_grad()
def reconstruct(
    layer: nn.Module, inputs: Tensor, outputs: Tensor, bits: int, *, scale_bits: int,
    row_importance: Tensor | None = None, lambda_per_bit: float = 0.0,
) -> None:  # fmt: skip
    """Fit a layer's weights, and their scales, to given outputs on given inputs, in place.

    layer: a Conv2d or Linear with a buffer `weight_scale` (rows,).
    inputs, outputs: (images, channels, height, width), or (images, features) for Linear. Their
        means are taken out first: the caller corrects the bias for them.
    bits: of the weights, 2 to 16.
    scale_bits: mantissa bits that the scales are rounded to. A row of zeros gets the scale 1.
    lambda_per_bit: if over 0, the sum over rows of row_importance * squared error, plus
        lambda_per_bit * bits, is minimized. row_importance: (rows,), see lib.importance.
    """
    weight, gram, cross = _normal_equations(layer, inputs, outputs)
    if lambda_per_bit:
        row_lambda = lambda_per_bit / row_importance.reshape(*weight.shape[:2], 1).clamp(min=1e-12)
        fit = _cheapest_of_several(weight, gram, cross, bits, row_lambda)
    else:
        fit = IntegerLeastSquares(weight, gram, cross, bits)
        fit.choose_scales()
        fit.settle()
    fit.round_scales(scale_bits)
    fit.descend(SWEEPS)
    scale = torch.where(fit.weight.any(2, keepdim=True), fit.scale, 1)
    layer.weight_scale.copy_(scale.flatten())
    layer.weight.copy_(fit.weight.reshape(layer.weight.shape))
    put_on_grid(layer, bits)


@torch.no_grad()
def refit_floats(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    """Fit a layer's weights to given outputs on given inputs, in place, as floats: see
    `reconstruct`."""
    fit = IntegerLeastSquares(*_normal_equations(layer, inputs, outputs), 32)
    fit.descend(FLOAT_SWEEPS)
    layer.weight.copy_(fit.weight.reshape(layer.weight.shape))


def as_matrix_product(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's inputs and outputs as those of one matrix product per group.

    inputs, outputs: as for `reconstruct`. Returns (groups, positions, columns) and (groups,
    positions, rows).
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


def _normal_equations(
    layer: nn.Module, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weight, gram, cross) of the legend, with a ridge that holds the weights.

    inputs, outputs: as for `reconstruct`; the first images are used, with POSITIONS in all.
    """
    images = slice(0, max(1, POSITIONS * inputs.shape[1] // inputs[0].numel()))
    inputs, outputs = as_matrix_product(layer, inputs[images], outputs[images])
    groups, positions, columns = inputs.shape
    inputs = inputs - inputs.mean(1, keepdim=True)
    outputs = outputs - outputs.mean(1, keepdim=True)
    gram = inputs.transpose(1, 2) @ inputs / positions
    cross = outputs.transpose(1, 2) @ inputs / positions
    weight = layer.weight.reshape(groups, -1, columns).clone()
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    gram = gram + ridge[:, None, None] * torch.eye(columns, device=gram.device)
    return weight, gram, cross + ridge[:, None, None] * weight


def _cheapest_of_several(
    weight: Tensor, gram: Tensor, cross: Tensor, bits: int, row_lambda: Tensor
) -> "IntegerLeastSquares":
    """Return a fit with lambda, each row from the start at which its cost is least.

    The layer is fitted once from every start. Then each row chooses its start. What a row costs
    depends on what the others chose, as code lengths are estimated from how often a level occurs in
    the whole layer; so all rows choose again, with the lengths that their last choices make.
    weight, gram, cross, row_lambda: see the legend.
    """
    starts, rows = len(COARSENESS), weight.shape[1]
    all_starts = IntegerLeastSquares(
        weight.repeat(1, starts, 1), gram, cross.repeat(1, starts, 1), bits,
        row_lambda.repeat(1, starts, 1), copies=starts,
    )  # fmt: skip
    coarseness = torch.tensor(COARSENESS).repeat_interleave(rows)[:, None].to(weight.device)
    all_starts.scales_for_lambda(coarseness)
    all_starts.settle()
    chosen = IntegerLeastSquares(weight, gram, cross, bits, row_lambda)

    def take(choice: Tensor) -> None:
        """Take each row from the start of that number, (groups, rows)."""
        chosen.weight, chosen.scale = all_starts.rows_of_copies(choice)
        chosen.estimate_lengths()

    take(torch.full(weight.shape[:2], FIRST_CHOICE, device=weight.device))
    for _ in range(CHOICES):
        all_starts.copy_lengths(chosen)
        costs = all_starts.cost(all_starts.weight, all_starts.scale)
        take(costs.unflatten(1, (starts, rows)).argmin(1)[:, :, 0])
    chosen.descend(SWEEPS)
    return chosen


class IntegerLeastSquares:
    """Minimize per row w gram w - 2 cross w over w = level * scale, zeros held.

    There are three modes: levels, at 2 to 16 bits; floats, at 32 (max_level is None); and levels
    whose bits count, once `estimate_lengths` has been called: row_lambda * bits is added.
    Start with `choose_scales` or `scales_for_lambda` (not at 32 bits, where there are no levels),
    then call `settle`, or `descend` and `refit_scales` in turn. Shapes: see the module's legend.
    """

    def __init__(
        self, weight: Tensor, gram: Tensor, cross: Tensor, bits: int,
        row_lambda: Tensor | None = None, copies: int = 1,
    ):  # fmt: skip
        """row_lambda: needed where bits are to count.
        copies: how many times the rows of the layer are there, each time with other scales."""
        self.copies, self.row_lambda = copies, row_lambda
        self.original, self.weight = weight, weight.clone()
        self.mask, self.gram, self.cross = weight != 0, gram, cross
        self.max_level = max_level(bits) if bits < 32 else None
        self.scale: Tensor | None = None
        # Of all rows: magnitude is (copies, levels). None: bits do not count.
        self.lengths: CodeLengths | None = None

    def error(self, weight: Tensor) -> Tensor:
        """Return the squared error of each row, up to a constant: (groups, rows, 1)."""
        return ((weight @ self.gram - 2 * self.cross) * weight).sum(2, keepdim=True)

    def cost(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the error of each row, plus row_lambda * bits once they count: (groups, rows, 1).

        weight: on the grid of `scale`.
        """
        cost = self.error(weight)
        if self.lengths:
            cost_of_bits = self.cost_of_bits((weight / scale).round_())
            cost += (cost_of_bits * self.mask).sum(2, keepdim=True)
        return cost

    def on_grid(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Round weights to multiples of the scale, clipped to the largest level."""
        return (weight / scale).round_().clamp_(-self.max_level, self.max_level) * scale

    def estimate_lengths(self) -> None:
        """Estimate the code lengths from the present levels; from now on, bits count."""
        levels = (self.weight / self.scale).round_().unflatten(1, (self.copies, -1))
        of_copies = [code_lengths(x.flatten(0, 1), self.max_level) for x in levels.unbind(1)]
        zero, nonzero, magnitude = zip(*of_copies, strict=True)
        self.lengths = CodeLengths(
            torch.stack([x.view_as(levels[:, 0]) for x in zero], 1).flatten(1, 2),
            torch.stack([x.view_as(levels[:, 0]) for x in nonzero], 1).flatten(1, 2),
            torch.stack(magnitude),
        )

    def copy_lengths(self, other: "IntegerLeastSquares") -> None:
        """Take the code lengths of a fit that has the rows once, for all copies alike."""
        zero, nonzero, magnitude = other.lengths
        self.lengths = CodeLengths(
            zero.repeat(1, self.copies, 1), nonzero.repeat(1, self.copies, 1),
            magnitude.repeat(self.copies, 1),
        )  # fmt: skip

    def rows_of_copies(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weight, scale) of the rows, each from the copy of that number, (groups, rows)."""

        def pick(x: Tensor) -> Tensor:
            x = x.unflatten(1, (self.copies, -1))
            return x.gather(1, choice[:, None, :, None].expand(-1, 1, -1, x.shape[-1]))[:, 0]

        return pick(self.weight), pick(self.scale)

    def cost_of_bits(self, levels: Tensor, columns=slice(None)) -> Tensor:
        """Return row_lambda * code length of levels, in units of their rows' squared error.

        levels: (groups, rows, n), one for each of those n columns, or n to choose from for one.
        """
        zero, nonzero, magnitude = self.lengths
        copies = torch.arange(self.copies, device=levels.device)[:, None, None]
        magnitudes = magnitude[
            copies, levels.abs().long().unflatten(1, (self.copies, -1))
        ].flatten(1, 2)
        nonzero = nonzero[:, :, columns] + magnitudes
        return self.row_lambda * torch.where(levels == 0, zero[:, :, columns], nonzero)

    def choose_scales(self) -> None:
        """Search each row's scale: the one at which rounding to nearest has the least cost.

        Clips from the row's largest weight down to 0.3 of it; once bits count, up to grids on which
        the largest weight has level 1, too.
        """
        top = self._top()
        least = torch.full_like(top, torch.inf)
        if self.lengths:
            shares = torch.logspace(
                math.log10(self.max_level), math.log10(0.3), SCALES_WITH_LAMBDA
            )
        else:
            shares = torch.linspace(1, 0.3, SCALES)
        self.scale = top / self.max_level
        for share in shares.tolist():
            scale = top * share / self.max_level
            weight = self.on_grid(self.original, scale)
            cost = self.cost(weight, scale)
            self.scale = torch.where(cost < least, scale, self.scale)
            least = torch.minimum(cost, least)
        self.weight = self.on_grid(self.original, self.scale)

    def scales_for_lambda(self, coarseness: Tensor) -> None:
        """Estimate the code lengths on the grid that lambda asks for; with them, search each row's
        scale. From now on, bits count.

        coarseness: (rows, 1), multiples of the squared scale that theory gives (see
        lib.rate.ideal_squared_scale). The scale stays so fine that the largest weight is no zero,
        and so coarse that it is not clipped.
        """
        diagonal = self.gram.diagonal(dim1=1, dim2=2)[:, None]
        live = self.mask.sum(2, keepdim=True).clamp(min=1)
        curvature = (self.mask * diagonal).sum(2, keepdim=True) / live
        squared = ideal_squared_scale(self.row_lambda, curvature.clamp(min=1e-20))
        scale = (coarseness * squared).sqrt()
        top = self._top()
        self.scale = scale.clamp(min=top / self.max_level, max=top)
        self.weight = self.on_grid(self.original, self.scale)
        self.estimate_lengths()
        self.choose_scales()

    def _top(self) -> Tensor:
        """Return the largest original magnitude of each row; of rows of zeros, max_level."""
        top = self.original.abs().amax(2, keepdim=True)
        return torch.where(top > 0, top, self.max_level)

    def settle(self) -> None:
        """Fit levels and scales in turn; if bits count, estimate them from the new levels."""
        for _ in range(ROUNDS):
            self.descend(SWEEPS)
            self.refit_scales()
            if self.lengths:
                self.estimate_lengths()

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
                    if self.lengths:
                        present = (weight[:, :, j] / scale).round_()
                        level = self._cheapest(
                            new / scale, level, present, curvature * scale**2, j
                        )
                    new = level * scale
                change = torch.where(self.mask[:, :, j], new - weight[:, :, j], 0)
                slope.addcmul_(change[:, :, None], gram[:, None, j])
                weight[:, :, j] += change

    def _cheapest(
        self, exact: Tensor, nearest: Tensor, present: Tensor, curvature: Tensor, column: int
    ) -> Tensor:
        """Return the level of least cost: the nearest one, its neighbour towards zero, zero, or the
        present one. exact: the weight in units of its scale, before rounding.

        All are (groups, rows), of one column; curvature: squared error per squared level.
        """
        zero = torch.zeros_like(nearest)
        levels = torch.stack([nearest, nearest - nearest.sign(), zero, present], 2)
        error = (levels - exact[:, :, None]).square_() * curvature[:, :, None]
        cost = error + self.cost_of_bits(levels, slice(column, column + 1))
        return levels.gather(2, cost.argmin(2, keepdim=True))[:, :, 0]

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
