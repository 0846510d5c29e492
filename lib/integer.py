"""The quantized network in integers alone: what other runtimes are tested against.

It covers the methods `ptq` and `qat` of lib.quantizers at 8 bits or fewer, with the arithmetic of
Jacob et al. 2018 (section 2). Levels of activations have at most 8 bits, levels of weights are
int8; their products are summed in 32-bit accumulators:

    image       level = table[channel, pixel], 3 x 256 levels: those of the float32 network
    layer       acc = bias + sum of weight * level;          level = clip(round(acc * M))
    residual    level = clip(round(x * M1 + addend * M2)), one rounding of the exact sum
    average     level = clip(round(sum over the map * M)); M divides by the map's size, too
    input       level = clip(round(level * M)), where a stream has more bits than the layer reads
    classifier  logits = acc * unit, the only floating-point operation

The unit of an accumulator, and of its bias, is (scale of the input) * (scale of the weights), one
per output channel, as in the fake-quantized network: see quantizers.bias_in_accumulator_units. M is
the ratio of two scales as a fixed-point number, in a layer that of the unit to the scale of the
output, divided in float32. `round` is the only rounding, halves up: see lib/fixedpoint.py. Clipping
to [0, high] is ReLU6; signed levels go from -128 to 127 at 8 bits.

Two kinds of rows (the weights of one output channel) are special. A row of zeros has no scale of
its own: its unit is 2^-24 of its bias. And where a bias in its unit would exceed 32 bits (the
weights of the channel have almost vanished), the unit is doubled until the bias fits, and the
weights are rounded to it.

Sums are computed by floating-point convolutions, and are exact: products and partial sums, in any
order, are integers below 2^24 in float32, or else (in no layer so far) below 2^53 in float64; both
bounds are computed from the weights. That holds for plain sums of products only. So a 3x3
convolution over several channels, for which a library might choose Winograd's transform, goes
through unfolding.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import data, quantizers
from lib.fixedpoint import Grid, Multiplier, Sum, fixed_point
from lib.quantizers import Quantizer, per_row
from models.layers import blocks, layers
from models.mobilenetv2 import MobileNetV2

INT32 = 2**31 - 1  # the largest int32
CHUNK = 16  # images at a time: their 64-bit products stay in the cache
SIZE = 32  # side of the images, in pixels


class IntegerLayer:
    """A convolution or the classifier in integers.

    weight: int8 (out, in / groups, k, k) or (out, in)
    unit: float64 (out,), the value that one count of an accumulator stands for: the scale of the
        input times that of the weights
    bias: int32 (out,), in that unit
    bound: no accumulator's magnitude exceeds it, partial sums included
    """

    def __init__(
        self, name: str, layer: nn.Module, levels: Tensor, input_grid: Grid,
        output_grid: Grid | None,
    ):  # fmt: skip
        """Convert a fake-quantized layer.

        levels: of its weights, int8, in their shape; input_grid, output_grid: of what it reads and
        writes, the latter None for the classifier, whose outputs are logits. Asserts that no
        accumulator, partial sums included, can exceed 32 bits.
        """
        self.name, self.input_grid, self.output_grid = name, input_grid, output_grid
        conv = isinstance(layer, nn.Conv2d)
        self.stride, self.padding = (layer.stride[0], layer.padding[0]) if conv else (1, 0)
        self.groups = layer.groups if conv else 1
        row_scale = layer.weight_scale.double().cpu()
        # A scale per tensor times a factor of batch norm may be negative: the levels take its sign.
        levels = levels.double().cpu() * per_row(row_scale.sign(), levels)
        bias = layer.bias.detach().double().cpu()
        finest = input_grid.scale * row_scale.abs()  # the unit, if 32 bits hold the bias in it
        empty = levels.flatten(1).count_nonzero(1) == 0
        # The bias of an empty row may be zero as well, but a unit is positive.
        finest = torch.where(empty, bias.abs().clamp(min=1e-6) / 2**24, finest)
        doubled = torch.zeros_like(finest)  # how often, per row
        while True:
            weight = torch.round(levels / per_row(2**doubled, levels))
            unit = finest * 2**doubled
            largest_level = max(-input_grid.low, input_grid.high)
            sums = weight.abs().flatten(1).sum(1) * largest_level
            bound = sums + torch.round(bias / unit).abs()
            if not (over := bound > INT32).any():
                break
            doubled += over
        assert bound.max() <= INT32 and weight.abs().max() <= 127
        self.bound = int(bound.max())
        self.weight, self.unit = weight.to(torch.int8), unit
        self.bias = torch.round(bias / unit).to(torch.int32)
        self.dtype = torch.float32 if sums.max() < 2**24 else torch.float64  # exact in either
        assert sums.max() < 2**53
        self.kernel = self.weight.to(self.dtype)
        self.per_channel = (-1, 1, 1) if conv else (-1,)  # the view of (out,) that multiplies acc
        if output_grid is not None:
            # In float32 and in the order in which onnxruntime computes its multipliers
            # (qlinearconv.cc), so that both have the same.
            ratio = input_grid.scale * self.weight_scale.float() / output_grid.scale
            m = fixed_point(ratio, output_grid)
            shape = self.per_channel
            self.requantize = Multiplier(m.mantissa.view(shape), m.shift.view(shape), output_grid)

    @property
    def weight_scale(self) -> Tensor:
        """The scales of the weights, float64 (out,).

        They are those of the fake-quantized layer, made positive; only special rows have others.
        """
        return self.unit / self.input_grid.scale

    def __call__(self, x: Tensor) -> Tensor:
        """Return levels, int16, or logits, float32, from levels (n, in, h, w) or (n, in)."""
        acc = self.accumulate(x)
        if self.output_grid is None:
            return (acc * self.unit).float()
        return self.requantize(acc)

    def accumulate(self, x: Tensor) -> Tensor:
        """Return the accumulators of levels (n, in, h, w) or (n, in): int64, but they fit in int32.

        Their shape is (n, out, height, width) or (n, out).
        """
        x, kernel = x.to(self.dtype), self.kernel
        if kernel.ndim == 2:
            sums = x @ kernel.T
        elif kernel.shape[2] > 1 and self.groups == 1:
            height, width = ((s + 2 * self.padding - 3) // self.stride + 1 for s in x.shape[2:])
            columns = F.unfold(x, kernel.shape[2:], padding=self.padding, stride=self.stride)
            sums = (kernel.flatten(1) @ columns).unflatten(2, (height, width))
        else:  # depthwise, or 1x1
            sums = F.conv2d(x, kernel, None, self.stride, self.padding, groups=self.groups)
        return sums.long().add_(self.bias.view(self.per_channel))


@dataclasses.dataclass
class IntegerBlock:
    """An inverted residual block in integers."""

    requantize_input: Multiplier | None  # where the stream has more bits than the first layer reads
    layers: list[IntegerLayer]  # expand (not in all), depthwise, project
    sum: Sum | None  # None: the block is not residual

    def __call__(self, x: Tensor) -> Tensor:
        """Return the stream's levels after the block, int16, from those before it."""
        y = x if self.requantize_input is None else self.requantize_input(x.long())
        for layer in self.layers:
            y = layer(y)
        return y if self.sum is None else self.sum(x, y)


class IntegerNetwork:
    """Computes logits, float32 (n, classes), from images, uint8 (n, 3, 32, 32), on the CPU.

    Raises ValueError for images of another type or shape.
    """

    def __init__(self, model: MobileNetV2, state: dict[str, Tensor]):
        """Convert a fake-quantized model; state: its own, by quantizers.integer_state."""
        self.settings = model.settings
        self.image = grid(model.image)
        self.table = _image_table(model.image)  # int16 (3, 256)
        integer = {}
        quantizer_pairs = quantizers.layers_with_input_quantizers(model)
        for layer, (module, quantizer) in zip(layers(self.settings), quantizer_pairs, strict=True):
            place = layer.output_place
            output_grid = grid(model.get_submodule(place)) if place else None
            levels = state[f"{layer.name}.weight"]
            integer[layer.name] = IntegerLayer(
                layer.name, module, levels, grid(quantizer), output_grid
            )
        self.stem, *_, self.head, self.classifier = integer.values()
        self.blocks, stream_grid = [], self.stem.output_grid
        for described, block in zip(blocks(self.settings), model.blocks, strict=True):
            parts = [integer[layer.name] for layer in described]
            requantize = None
            if isinstance(block.input, Quantizer):
                input_grid = parts[0].input_grid
                ratio = torch.tensor(stream_grid.scale / input_grid.scale)
                requantize = fixed_point(ratio, input_grid)
            x_grid, stream_grid = stream_grid, grid(block.stream)
            total = Sum(x_grid, parts[-1].output_grid, stream_grid) if block.residual else None
            self.blocks.append(IntegerBlock(requantize, parts, total))
        size = SIZE  # side of the map; after the loop, that of the head's
        for layer in self.layers():
            size = (size + 2 * layer.padding - layer.kernel.shape[-1]) // layer.stride + 1
        self.pooled = grid(model.pooled)
        ratio = self.head.output_grid.scale / (size * size * self.pooled.scale)
        self.average = fixed_point(torch.tensor(ratio, dtype=torch.float64), self.pooled)

    def layers(self) -> list[IntegerLayer]:
        """Return the convolutions in the order in which they run."""
        return [self.stem, *(layer for block in self.blocks for layer in block.layers), self.head]

    def features(self, images: Tensor) -> Tensor:
        """Return the head's maps as levels, int16 (n, channels, h, w); images: as in the class."""
        x = self.table[torch.arange(3).view(3, 1, 1), images.long()]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits; images may be on any device."""
        if images.dtype != torch.uint8 or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}")
        logits = []
        for part in images.cpu().split(CHUNK):
            x = self.average(self.features(part).long().sum((2, 3)))
            logits.append(self.classifier(x))
        return torch.cat(logits)


def grid(quantizer: Quantizer) -> Grid:
    """Return the grid of a quantizer as plain numbers."""
    return Grid(float(quantizer.step), quantizer.low, quantizer.high)


def _image_table(image: Quantizer) -> Tensor:
    """Return the float32 network's level per channel and pixel value, int16 (3, 256)."""
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 1, 1)
    scale = image.step.detach().cpu()
    # Times 1 / scale, as quantizers.FakeQuantize computes it: a quotient may round differently.
    levels = torch.round(data.normalize(pixels) * (1 / scale)).clamp_(image.low, image.high)
    return levels.view(256, 3).T.contiguous().to(torch.int16)


def why_no_integer_network(scheme: dict | None) -> str | None:
    """Return why a scheme has no integer network; None if it has one."""
    if not scheme:
        return "it is not quantized"
    if scheme["method"] == "reference":
        return "the reference method's scales change with every batch"
    weights = quantizers.most_weight_bits(scheme)
    acts = max(scheme["act_bits"], scheme.get("last_act_bits", 0))
    if max(weights, acts) > 8:
        return f"some of its weights have {weights} bits, of its activations {acts}, and 8 is most"
    return None


def convert(source) -> IntegerNetwork:
    """Return the integer network of a checkpoint (lib.checkpoint.Checkpoint).

    Raises ValueError with the reason for a scheme that has none.
    """
    if reason := why_no_integer_network(source.quantization):
        raise ValueError(reason)
    model = source.build()
    return IntegerNetwork(model, quantizers.integer_state(model.state_dict(), source.quantization))
