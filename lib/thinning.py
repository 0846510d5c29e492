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
from torch import Tensor, nn

from lib.compaction import compact, take
from lib.folding import norm_factor
from lib.importance import removal_errors
from lib.quantizers import by_channel, per_row
from lib.reconstruct import refit_floats
from models.layers import CLASSIFIER, PROJECT, layers
from models.mobilenetv2 import MobileNetV2

THINNING_IMAGES = 512  # that statistics are taken from
# Bits in a file of a non-zero weight, position and sign included, and of the scale and bias of a
# row: as measured on the course report's network at W4A8.
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
    images: (n, 3, H, W), normalized; the first THINNING_IMAGES are used.
    importance: of the model's rows, {layer: (rows,)}, see lib.importance.
    lambda_per_bit: see lib.ptq.quantize.
    """
    thinned, described = copy.deepcopy(model), layers(model.settings)
    readers = {layer.block: layer for layer in described if layer.role in (PROJECT, CLASSIFIER)}
    makers = {
        group: [layer.name for layer in described if layer.output_group == group]
        for group in {layer.input_group for layer in readers.values()}
    }

    def thin_inputs(block: int | None, before: Tensor, after: Tensor) -> None:
        """Remove channels from the inputs of a projection, or of the classifier (None).

        before, after: these inputs in the model and in the thinned network, (n, C, H, W) or (n, C).
        """
        described_reader = readers[block]
        reader = thinned.get_submodule(described_reader.name)
        norm = thinned.get_submodule(described_reader.norm) if described_reader.norm else None
        made_by = [thinned.get_submodule(name) for name in makers[described_reader.input_group]]
        error = _channel_errors(reader, norm, after, importance[described_reader.name])
        worthless = error < CAUTION * lambda_per_bit * _bits_of_channels(reader, made_by)
        if worthless.any():
            target = model.get_submodule(described_reader.name)(before)
            reader.weight[:, worthless] = 0
            _refit(reader, norm, after, target)

    images = images[:THINNING_IMAGES]
    before, after = model.stem(images), thinned.stem(images)
    for number, blocks in enumerate(zip(model.blocks, thinned.blocks, strict=True), start=1):
        # All but the projection and its batch norm.
        hidden = [block.conv[:-2](x) for block, x in zip(blocks, (before, after), strict=True)]
        if blocks[0].expand is not None:  # else its hidden channels are the stem's
            thin_inputs(number, *hidden)
        y, z = (block.project_norm(block.project(h))
                for block, h in zip(blocks, hidden, strict=True))  # fmt: skip
        before, after = (before + y, after + z) if blocks[0].residual else (y, z)
    thin_inputs(None, model.head(before).mean((2, 3)), thinned.head(after).mean((2, 3)))
    thinned, kept = compact(thinned)
    return thinned, {
        name: take(value, kept[f"{name}.weight"][:1]) for name, value in importance.items()
    }


def _channel_errors(
    layer: nn.Module, norm: nn.Module | None, inputs: Tensor, importance: Tensor
) -> Tensor:
    """Return the squared error of the logits without each input channel of a layer, (C,).

    norm: the batch norm after the layer, if there is one. importance: (rows,).
    """
    weight = layer.weight.flatten(1)
    folded = weight if norm is None else per_row(norm_factor(norm), weight).to(weight) * weight
    variance = by_channel(inputs).var(0, correction=0)
    return removal_errors(folded, variance, importance, depthwise=False).sum(0)


def _bits_of_channels(reader: nn.Module, makers: list[nn.Module]) -> Tensor:
    """Return the bits that a file spends on each input channel of `reader`, (C,); makers: the
    layers with a row for each of these channels."""
    spent = WEIGHT_BITS * (reader.weight.flatten(1) != 0).sum(0)
    for maker in makers:
        spent = spent + WEIGHT_BITS * (maker.weight.flatten(1) != 0).sum(1) + ROW_BITS
    return spent


def _refit(layer: nn.Module, norm: nn.Module | None, inputs: Tensor, target: Tensor) -> None:
    """Fit a layer's weights, and the mean of its outputs, to `target` by least squares, in place.

    inputs: of the layer. target: (n, C, H, W) or (n, C). norm: the batch norm after the layer.
    """
    refit_floats(layer, inputs, target)
    shift = by_channel(layer(inputs) - target).mean(0)
    if norm is None:
        layer.bias.sub_(shift)
    else:
        norm.running_mean.add_(shift)
