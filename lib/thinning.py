"""Remove the channels that are not worth their bytes, before quantization.

    smaller, importance = thin(model, images, importance, lambda_per_bit)

A hidden channel of a block is a row of the expansion, a filter and a column of the projection, with
two scales and two biases; a channel of the head is a row, a column of the classifier, a scale and a
bias. All of it goes if the squared error of the logits without it is less than a share (CAUTION) of
lambda_per_bit * its bits. The layer that reads the channel is then fitted anew by least squares, so
that its outputs stay what they were as nearly as the other channels allow (He et al. 2017, "Channel
pruning for accelerating very deep neural networks", section 3.1).

The channels of residual streams stay: too many layers share them.
"""

import copy

import torch
from torch import Tensor

from lib.compaction import compact, take
from lib.quantizers import norm_factor, per_row
from lib.reconstruct import reconstruct
from models.layers import CLASSIFIER, PROJECT, layers
from models.mobilenetv2 import MobileNetV2

IMAGES = 512  # that statistics are taken from
# Bits in a file of a non-zero weight, position and sign included, and of the scale and bias of a
# row: as measured on the reference report's network at W4A8.
WEIGHT_BITS, ROW_BITS = 5.5, 11.5
# A channel goes if its error is less than this share of lambda * its bits: errors of many channels
# that go together add up to more than their sum, and some of the bits would go without it as well.
CAUTION = 0.1


@torch.no_grad()
def thin(
    model: MobileNetV2, images: Tensor, importance: dict[str, Tensor], lambda_per_bit: float
) -> tuple[MobileNetV2, dict[str, Tensor]]:
    """Return a network without the channels that are not worth their bytes, and the importance of
    its rows, {layer: (rows,)}.

    model: with batch norms, in eval mode; it is not changed.
    images: (n, 3, H, W), normalized; the first IMAGES are used.
    importance: of the model's rows, {layer: (rows,)}, see lib.ptq.row_importance.
    lambda_per_bit: see lib.ptq.quantize.
    """
    thinned, described = copy.deepcopy(model), layers(model.settings)
    readers = {layer.block: layer for layer in described if layer.role in (PROJECT, CLASSIFIER)}
    makers = {
        group: [layer.name for layer in described if layer.output_group == group]
        for group in {layer.input_group for layer in readers.values()}
    }

    def fit_reader(block: int | None, model_x: Tensor, x: Tensor) -> None:
        """Take channels from the inputs of a projection, or of the classifier (None), and refit it.

        model_x, x: these inputs in the model and in the thinned network, (n, C, H, W) or (n, C).
        """
        layer = readers[block]
        old, new = model.get_submodule(layer.name), thinned.get_submodule(layer.name)
        norm = thinned.get_submodule(layer.norm) if layer.norm else None
        weight = new.weight.flatten(1)
        folded = weight if norm is None else per_row(norm_factor(norm), weight).to(weight) * weight
        variance = x.movedim(1, -1).flatten(0, -2).var(0, correction=0)
        error = variance * (importance[layer.name][:, None] * folded.square()).sum(0)
        saved = WEIGHT_BITS * (weight != 0).sum(0)
        for name in makers[layer.input_group]:
            rows = thinned.get_submodule(name).weight.flatten(1)
            saved = saved + WEIGHT_BITS * (rows != 0).sum(1) + ROW_BITS
        gone = error < CAUTION * lambda_per_bit * saved
        if not gone.any():
            return
        wanted = old(model_x)
        new.weight[:, gone] = 0
        reconstruct(new, x, wanted, 32, scale_bits=23)
        shift = (new(x) - wanted).movedim(1, -1).flatten(0, -2).mean(0)
        if norm is None:
            new.bias.sub_(shift)
        else:
            norm.running_mean.add_(shift)

    model_x = x = images[:IMAGES]
    model_x, x = model.stem(model_x), thinned.stem(x)
    for number, (model_block, block) in enumerate(
        zip(model.blocks, thinned.blocks, strict=True), start=1
    ):
        model_y, y = model_block.conv[:-2](model_x), block.conv[:-2](x)
        if block.expand is not None:  # else its hidden channels are the stem's
            fit_reader(number, model_y, y)
        model_y, y = (b.project_norm(b.project(h))
                      for b, h in ((model_block, model_y), (block, y)))  # fmt: skip
        model_x, x = (model_x + model_y, x + y) if block.residual else (model_y, y)
    fit_reader(None, model.head(model_x).mean((2, 3)), thinned.head(x).mean((2, 3)))
    thinned, kept = compact(thinned)
    return thinned, {
        name: take(value, kept[f"{name}.weight"][:1]) for name, value in importance.items()
    }
