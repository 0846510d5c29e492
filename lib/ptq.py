"""Post-training quantization: a network and some images without labels; no training.

Two copies of the network are walked side by side, layer by layer: the fp32 one, and the quantized
one, whose activations carry the errors of all layers before. Each layer is fitted so that on its
*quantized* inputs it gives the outputs of the fp32 layer.

- **Layer reconstruction** chooses a layer's levels and scales: see lib/reconstruct.py.
- **Bias correction** (Nagel et al. 2019, section 4.2) is the intercept of that fit.
- **Calibration** chooses each activation scale by the mean squared error against the fp32
  activations.
- **Equalization** (Nagel et al. 2019, section 4.1). An activation tensor has one scale, which must
  suit its widest channel, so a channel of a small range uses few of the levels. Dividing each
  channel by its range, its equalization factor, makes all ranges alike. The layer that gives the
  channel divides its row and bias by the factor, the layer that reads it multiplies its column by
  it, and the network computes what it did. (ReLU6 would stand in the way, as 6 is not divided; but
  the quantizer that replaces it clips at its own largest level.) Before a depthwise layer this
  loses nothing: there a column is a whole row, whose own scale takes up the factor.

A row of a layer is one output channel. Three more things make the file small:

- **Short scales and biases.** The scales of rows keep a few mantissa bits, and biases lie on a
  grid. They are rounded early, so that what comes later can compensate: the last descent of the
  levels, and the fits of the layers after.
- **Rate-distortion optimized quantization** (as in DeepCABAC, Wiedemann et al. 2020, section 3.2).
  The levels minimize a cost, error + lambda * bits, with the bits of the file's coder (estimated:
  lib/rate.py). So that a bit is worth the same in every layer, the error is that of the logits: a
  row's error is multiplied by its importance (lib/importance.py).
- **Thinning**: before all else, channels that are not worth their bytes go (lib/thinning.py).
"""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib import quantizers
from lib.folding import fold, norm_after, norm_factor
from lib.importance import bias_importance, row_importance
from lib.metrics import weight_layers
from lib.quantizers import Quantizer, by_channel, per_row
from lib.rate import ideal_squared_scale
from lib.reconstruct import reconstruct, refit_floats
from lib.thinning import thin
from models.mobilenetv2 import ConvBNReLU6, InvertedResidual, MobileNetV2

# How many images the ranges of channels are taken from: millions of activations.
EQUALIZATION_IMAGES = 256
# Positions (pixels of a map of an image, chosen at random) that a scale is searched on: of each
# channel, and of a whole tensor.
CHANNEL_SAMPLE, TENSOR_SAMPLE = 8192, 4096
# The smallest equalization factor, as a share of the layer's median: a row that is hardly ever
# positive would otherwise be divided by next to nothing.
SMALLEST_FACTOR = 0.02


@torch.no_grad()
def quantize(
    model: MobileNetV2, images: Tensor, scheme: dict, progress: Callable = iter, *,
    scale_bits: int | None = None, bias_bits: int | None = None, lambda_per_bit: float = 0.0,
    importance: dict[str, Tensor] | None = None,
) -> tuple[MobileNetV2, dict[str, Tensor]]:  # fmt: skip
    """Return the network quantized by a scheme, in eval mode; the model itself is not changed.

    images: (n, 3, H, W), normalized; their labels are not needed.
    scheme: see lib.quantizers. Its "weight_scale" is a granularity: `channel`, or `tensor`: one
        scale per tensor, for the weights as they are before folding, rounded to nearest. Batch
        norm's factors then multiply that scale, and there is neither equalization nor
        reconstruction, so that weights which lie on a grid keep their integers.
    scale_bits: mantissa bits of the rows' scales. None: 3, which the levels make up for, or 2 with
        lambda_per_bit; 5 for `tensor`, where levels cannot make up for it.
    bias_bits: biases are multiples of a power of two, about 2^-bias_bits times the scale of the
        layer's output; 32: float32, as where the output is not quantized. None: 2, or with
        lambda_per_bit the grid of least cost, per layer (see `_Walk.bias_exponent`).
    lambda_per_bit: the squared error of an image's logits that saving one bit may add; 0: bits are
        not counted. Not for `tensor`. The network returned may have fewer channels.
    importance: what `row_importance` of lib.importance returns for the folded model and these
        images, if it is there already; else it is computed where lambda_per_bit needs it.
    Returns (network, latent); latent: the weights before rounding, by layer, for lib.qat.
    """
    if lambda_per_bit:
        importance = importance or row_importance(fold(model), images)
        model, importance = thin(model, images, importance, lambda_per_bit)
    fp32 = fold(model)
    quantized = copy.deepcopy(fp32)
    quantizers.attach(quantized, scheme)
    per_channel = scheme["weight_scale"] == "channel"
    if scale_bits is None:
        scale_bits = (2 if lambda_per_bit else 3) if per_channel else 5
    of_biases = bias_importance(fp32, images) if bias_bits is None and lambda_per_bit else {}
    walk = _Walk(fp32, quantized, scheme, model, _Options(
        scale_bits, 2 if bias_bits is None else bias_bits, lambda_per_bit,
        importance if lambda_per_bit else {}, of_biases,
    ))  # fmt: skip
    if scheme["act_bits"] < 32 and per_channel:
        walk.equalize(images[:EQUALIZATION_IMAGES])
    walk.run(images, progress)
    return quantized.eval(), walk.latent


@torch.no_grad()
def layers_alone(
    model: MobileNetV2, images: Tensor, weight_bits: int, progress: Callable = iter
) -> dict[str, dict[str, Tensor]]:
    """Return each layer's weight and bias when only that layer is quantized to `weight_bits`.

    {layer: {"weight", "bias"}}, of the folded network; all other layers are fp32. The scales of the
    rows and the biases are float32, not shortened as `quantize` does by default.
    """
    fp32 = fold(model)
    quantized = copy.deepcopy(fp32)
    scheme = make_scheme(weight_bits, 32)
    quantizers.attach(quantized, scheme)
    options = _Options(scale_bits=23, bias_bits=32, alone=True)
    walk = _Walk(fp32, quantized, scheme, model, options)
    walk.run(images, progress)
    return {
        name: {"weight": layer.weight, "bias": layer.bias}
        for name, layer in weight_layers(quantized).items()
    }


def make_scheme(weight_bits: int, act_bits: int, **others) -> dict:
    """Return a scheme of lib.quantizers with the usual choices; others: keys that differ."""
    return {
        "method": "ptq", "weight_bits": weight_bits, "act_bits": act_bits,
        "weight_scale": "channel", "layer_bits": {}, **others,
    }  # fmt: skip


# ---- the walk ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """The same activations in the two networks, (n, C, H, W), or (n, C) after the average."""

    fp32: Tensor
    quantized: Tensor  # near fp32 / factors
    factors: Tensor | None = None  # per channel, (C,), after an equalized ReLU6; None: all are 1


@dataclass(frozen=True)
class _Options:
    """Options of a walk that are not part of the scheme."""

    scale_bits: int  # as for `quantize`, as is bias_bits
    bias_bits: int
    lambda_per_bit: float = 0.0
    # What lib.importance.row_importance returns; empty without lambda.
    importance: dict[str, Tensor] = field(default_factory=dict)
    # {layer: (rows,)}: squared error of an image's logits per squared error of a bias; empty where
    # bias_bits decides.
    bias_importance: dict[str, Tensor] = field(default_factory=dict)
    alone: bool = False  # quantize each layer as if all others were fp32


class _Walk:
    """Walks the fp32 network and the quantized one side by side.

    Where a ReLU6 was equalized, each channel of the quantized network is the fp32 channel divided
    by a factor of its own. Its layer's row, scale and bias are divided too, and the next layer's
    column is multiplied. All other tensors, the residual streams among them, are as in the fp32
    network.
    """

    def __init__(
        self, fp32: MobileNetV2, quantized: MobileNetV2, scheme: dict, unfolded: MobileNetV2,
        options: _Options,
    ):  # fmt: skip
        """Prepare a walk over two folded networks.

        unfolded: the network before folding, whose weights may lie on a grid per tensor.
        """
        self.fp32, self.quantized, self.unfolded = fp32, quantized, unfolded
        self.scheme, self.options = scheme, options
        # Mean over a layer's rows: squared logit error per squared error of a bias, after the
        # division by the factors of the layer's outputs.
        self.mean_bias_importance: dict[nn.Module, float] = {}
        self.per_tensor = scheme["weight_scale"] == "tensor"
        self.names = {layer: name for name, layer in weight_layers(quantized).items()}
        self.latent: dict[str, Tensor] = {}  # weights before rounding, by layer
        # Equalization factors of output channels, (C,), by module of `fp32`.
        self.factors: dict[ConvBNReLU6, Tensor] = {}

    def equalize(self, images: Tensor) -> None:
        """Choose the factor of each channel after a ReLU6: the clip that loses least at act_bits.

        Residual streams are left out: their factors would have to suit all blocks of a stage, and
        that did not pay. So is the head, whose maps are only averaged.
        """
        outputs = {}

        def keep_output(module, _, y):
            outputs[module] = y

        depthwise = [block.depthwise for block in self.fp32.blocks]
        with contextlib.ExitStack() as hooks:
            for module in self.fp32.features[:-1].modules():
                if isinstance(module, ConvBNReLU6):
                    hooks.enter_context(module.register_forward_hook(keep_output))
            self.fp32(images)
        for module, output in outputs.items():
            clips = _channel_clips(output, self.scheme["act_bits"])
            # The next layer's columns are multiplied by the factors. A depthwise row is one column,
            # so its scale absorbs the factor. A projection has one scale over all its columns,
            # which would have to cover the widest: there it is only the square root of the clip.
            self.factors[module] = clips.sqrt() if module in depthwise else clips
        if self.fp32.blocks[0].residual:  # the stem's outputs are part of a residual stream
            del self.factors[self.fp32.stem]

    def run(self, images: Tensor, progress: Callable) -> None:
        """Quantize all layers, in the order in which they run."""
        pair = Pair(images, self.quantized.image(images))
        modules = list(zip(self.fp32.features, self.quantized.features, strict=True))
        for fp32_module, module in progress(modules):
            is_block = isinstance(module, InvertedResidual)
            step = self.quantize_block if is_block else self.quantize_conv_and_relu6
            pair = step(fp32_module, module, pair)
        pair = Pair(pair.fp32.mean((2, 3)), pair.quantized.mean((2, 3)))
        pair = self.calibrate(self.quantized.pooled, pair)
        self.quantize_layer(self.fp32.linear, self.quantized.linear, pair)

    def quantize_block(
        self, fp32_block: InvertedResidual, block: InvertedResidual, pair: Pair
    ) -> Pair:
        """Quantize a block; return its outputs."""
        inputs, pair = pair, self.calibrate(block.input, pair)
        if block.expand is not None:
            pair = self.quantize_conv_and_relu6(fp32_block.expand, block.expand, pair)
        pair = self.quantize_conv_and_relu6(fp32_block.depthwise, block.depthwise, pair)
        pair = self.quantize_layer(fp32_block.project, block.project, pair)
        if not block.residual:
            return self.calibrate(block.stream, pair, block.project)
        pair = self.calibrate(block.addend, pair, block.project)
        pair = Pair(inputs.fp32 + pair.fp32, inputs.quantized + pair.quantized)
        return self.calibrate(block.stream, pair)

    def quantize_conv_and_relu6(
        self, fp32_module: ConvBNReLU6, module: ConvBNReLU6, pair: Pair
    ) -> Pair:
        """Quantize a convolution and the quantizer that replaces its ReLU6; return its outputs."""
        factors = self.factors.get(fp32_module)
        pair = self.quantize_layer(fp32_module.conv, module.conv, pair, factors)
        pair = pair._replace(fp32=fp32_module.activation(pair.fp32))
        return self.calibrate(module.activation, pair, module.conv)

    def calibrate(self, quantizer: nn.Module, pair: Pair, layer: nn.Module | None = None) -> Pair:
        """Choose the scale of an activation quantizer; return the pair after it.

        layer: what gives these activations, if its bias is to be put on the grid that suits the
        scale. Not before the sum of a residual stream, to which no bias belongs.
        An Identity (32 bits) changes nothing.
        """
        if isinstance(quantizer, Quantizer):
            quantizer.step.copy_(_best_scale(pair, quantizer))
            if layer is not None:
                outputs = self.put_bias_on_grid(layer, quantizer, pair.quantized)
                pair = pair._replace(quantized=outputs)
        return pair._replace(quantized=quantizer(pair.quantized))

    def put_bias_on_grid(self, layer: nn.Module, quantizer: Quantizer, outputs: Tensor) -> Tensor:
        """Round the bias of the layer before that quantizer to multiples of a power of two.

        outputs: the layer's. Returns them as they are with the new bias.
        """
        # A layer of 32 bits has no weight_scale: no file will hold its bias as integers.
        if self.options.bias_bits == 32 or not hasattr(layer, "weight_scale"):
            return outputs
        # On the host, by an exact ldexp: exp2 of a device may be a few units in the last place off.
        layer.bias_scale = math.ldexp(1.0, self.bias_exponent(layer, quantizer))
        return _add_to_bias(layer, quantizers.bias_on_grid(layer) - layer.bias, outputs)

    def bias_exponent(self, layer: nn.Module, quantizer: Quantizer) -> int:
        """Return e: the biases of the layer before that quantizer are rounded to multiples of 2^e.

        Where bias_bits decides, 2^e is about 2^-bias_bits times the quantizer's scale. Else lambda
        does: 2^e is about the scale of least cost, with the mean importance of the layer's biases.
        """
        if layer not in self.mean_bias_importance:
            return round(math.log2(float(quantizer.step))) - self.options.bias_bits
        importance = self.mean_bias_importance[layer]
        squared = ideal_squared_scale(self.options.lambda_per_bit, importance)
        return round(math.log2(squared) / 2)

    def quantize_layer(
        self, fp32_layer: nn.Module, layer: nn.Module, pair: Pair,
        output_factors: Tensor | None = None,
    ) -> Pair:  # fmt: skip
        """Quantize a layer of the quantized network; return its outputs and those of `fp32_layer`.

        pair: their inputs. output_factors: (rows,), what the quantized outputs are divided by;
        None: they are not.
        """
        name = self.names[layer]
        bits = quantizers.bits_of(name, self.scheme)
        _equalize_layer(layer, pair.factors, output_factors)
        squared_factors = 1.0 if output_factors is None else output_factors**2
        if name in self.options.bias_importance:
            mean = (self.options.bias_importance[name] * squared_factors).mean()
            self.mean_bias_importance[layer] = max(float(mean), 1e-12)
        self.latent[name] = layer.weight.clone()
        fp32_y = fp32_layer(pair.fp32)
        target = _divide(fp32_y, output_factors)
        if self.per_tensor:
            self.put_on_tensor_grid(name, layer, bits)
        elif bits == 32:
            if self.scheme["act_bits"] < 32:  # its inputs were rounded
                refit_floats(layer, pair.quantized, target)
        else:
            importance = self.options.importance.get(name)
            reconstruct(
                layer, pair.quantized, target, bits, scale_bits=self.options.scale_bits,
                row_importance=None if importance is None else importance * squared_factors,
                lambda_per_bit=self.options.lambda_per_bit,
            )  # fmt: skip
        layer.scale_bits = self.options.scale_bits
        y = layer(pair.quantized)
        y = _add_to_bias(layer, by_channel(target - y).mean(0), y)
        return Pair(fp32_y, fp32_y if self.options.alone else y, output_factors)

    def put_on_tensor_grid(self, name: str, layer: nn.Module, bits: int) -> None:
        """Round a folded layer's weights to the grid that its weight tensor lies on before folding:
        see lib.quantizers.grid_scale."""
        if bits == 32:
            return
        weight = self.unfolded.get_submodule(name).weight
        scale = quantizers.grid_scale(weight, bits)
        norm = norm_after(self.unfolded, name)
        factor = torch.ones(len(weight), device=weight.device)
        if norm is not None:
            factor = norm_factor(norm).to(weight.dtype)
        levels = quantizers.to_levels(weight, scale, bits)
        levels[factor == 0] = 0  # such a row has no effect, and a scale may not be zero
        row_scale = quantizers.round_mantissa(scale * factor, self.options.scale_bits)
        layer.weight_scale.copy_(torch.where(levels.flatten(1).any(1), row_scale, 1.0))
        layer.weight.copy_(levels * per_row(layer.weight_scale, levels) + 0.0)


def _equalize_layer(
    layer: nn.Module, input_factors: Tensor | None, output_factors: Tensor | None
) -> None:
    """Change a layer so that it takes inputs, and gives outputs, that are divided by factors (C,),
    in place. None: they are not divided."""
    weight = layer.weight
    if input_factors is not None:
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        shape = (-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)
        weight.mul_(input_factors.view(shape))
    if output_factors is not None:
        weight.div_(per_row(output_factors, weight))
        layer.bias.div_(output_factors)


def _divide(fp32: Tensor, factors: Tensor | None) -> Tensor:
    """Return activations (n, C, H, W) divided by factors (C,); None: all are 1."""
    return fp32 if factors is None else fp32 / factors.view(-1, 1, 1)


def _add_to_bias(layer: nn.Module, change: Tensor, outputs: Tensor) -> Tensor:
    """Add `change` (rows,) to a layer's bias; return its outputs with the new bias, as the forward
    pass rounds it."""
    before = layer.bias.clone()
    layer.bias[:] = layer.bias + change
    if isinstance(layer, quantizers.QuantConv2d | quantizers.QuantLinear):
        rounded = quantizers.bias_in_accumulator_units
        change = rounded(layer, layer.bias, layer.weight)
        change -= rounded(layer, before, layer.weight)
    return outputs + change.view(-1, *[1] * (outputs.ndim - 2))


def _channel_clips(outputs: Tensor, bits: int) -> Tensor:
    """Return the clip of least squared error per channel, divided by their median: (C,).

    outputs: (N, C, H, W), none negative. A channel that is never positive gets the median.
    """
    values = outputs.transpose(0, 1).flatten(1)
    high, top = 2**bits - 1, values.amax(1)
    values = values[:, _some_of(values.shape[1], CHANNEL_SAMPLE).to(outputs.device)]
    least, clips = torch.full_like(top, torch.inf), top.clone()
    for share in torch.linspace(1, 0.2, 33).tolist():
        scale = (top * share / high).clamp(min=1e-12)[:, None]
        rounded = (values / scale).round_().clamp_(max=high).mul_(scale)
        error = rounded.sub_(values).square_().mean(1)
        clips = torch.where(error < least, top * share, clips)
        least = torch.minimum(least, error)
    median = clips[clips > 0].median() if (clips > 0).any() else clips.new_tensor(1.0)
    return torch.where(clips > 0, clips / median, 1.0).clamp(min=SMALLEST_FACTOR)


def _some_of(count: int, wanted: int) -> Tensor:
    """Return at most `wanted` numbers below `count`, at random but always the same, on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]


def _best_scale(pair: Pair, quantizer: Quantizer) -> Tensor:
    """Return the scale, (), at which rounding the quantized activations gives the least mean
    squared error against the fp32 ones, divided by the same factors: a search."""
    target, inputs = by_channel(pair.fp32), by_channel(pair.quantized)
    factors = 1.0 if pair.factors is None else pair.factors
    top = (torch.maximum(target.amax(0), -target.amin(0)) / factors).amax()
    if not top > 0:  # nothing to see on these images: the range of a ReLU6
        return top + 6 / quantizer.high
    top = top.clamp(min=1e-6)
    # Not every k-th position: where k and the width of the map have a common factor, these would be
    # the same few columns of every image, perhaps those at the border.
    sample = _some_of(len(target), TENSOR_SAMPLE).to(target.device)
    target, inputs = target[sample] / factors, inputs[sample]

    def error(clip: Tensor) -> float:
        scale = clip / quantizer.high
        rounded = (inputs / scale).round_().clamp_(quantizer.low, quantizer.high).mul_(scale)
        return float(rounded.sub_(target).square_().mean())

    best = min((top * 0.95**i for i in range(45)), key=error)
    return min((best * (1 + i / 100) for i in range(-4, 5)), key=error) / quantizer.high
