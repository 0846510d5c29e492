"""The quantized network in integers alone: the specification that other runtimes are held against.

What lib.quantizers calls `ptq` and `qat`, at 8 bits or fewer. Levels of activations are integers of
at most 8 bits, of weights int8; a sum of their products is a 32-bit accumulator:

    image       a table of 3 x 256 levels: what the float32 network makes of each pixel
    layer       acc = bias + sum of weight * level;          level = clip(round(acc * M))
    residual    level = clip(round(x * M1 + addend * M2)), one rounding of the exact sum
    average     level = clip(round(sum over the map * M)), M holds the map's size
    input       level = clip(round(level * M)), where a stream has more bits than its reader
    classifier  logits = acc * scale, the only float

An accumulator counts in units of (input's step) * (weight's step), its bias too, as that of the
fake-quantized network (quantizers.bias_in_accumulator_units). M, the ratio of two scales in float32, one for each
output channel, is a fixed-point number, and `round` the one rounding there is, halves up:
lib/fixedpoint.py. Clipping to [0, high] is ReLU6; signed levels go from -128 to 127.

Two rows are special. A row without weights has no step of its own: its accumulator counts in
2^-24 of its bias. And where a bias is so large against a row's step that 32 bits would not hold it
(a channel whose weights have died away), the row's step is doubled until they do.

Sums are computed by float convolutions, exactly: products and partial sums in any order are
integers below 2^24 in float32, else (no layer of ours) below 2^53 in float64; both are bounded from
the weights. Only sums of products may do them: a 3x3 convolution over several channels, where a
library might choose Winograd's transform, goes through unfolding.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import data, quantizers
from lib.fixedpoint import Grid, Multiplier, Sum, fixed_point
from lib.metrics import weight_layers
from lib.quantizers import Quantizer, per_row
from models.mobilenetv2 import ConvBNReLU6, InvertedResidual, MobileNetV2

INT32 = 2**31 - 1
CHUNK = 16  # images at a time: their 64-bit products stay in the cache
SIZE = 32  # of the images: the average knows its map


class Layer:
    """A convolution or the classifier. What it writes is None for the classifier: logits."""

    def __init__(self, name: str, layer: nn.Module, levels: Tensor, reads: Grid, writes):
        """layer: the fake-quantized one; levels: its weights, int8. Asserts that no accumulator,
        partial sums included, can pass 32 bits."""
        self.name, self.reads, self.writes = name, reads, writes
        conv = isinstance(layer, nn.Conv2d)
        self.stride, self.padding = (layer.stride[0], layer.padding[0]) if conv else (1, 0)
        self.groups = layer.groups if conv else 1
        step = layer.weight_scale.double().cpu()
        levels = levels.double().cpu() * per_row(step.sign(), levels)  # steps may be negative
        bias = layer.bias.detach().double().cpu()
        scale = reads.step * step.abs()
        empty = levels.flatten(1).count_nonzero(1) == 0
        scale = torch.where(empty, bias.abs().clamp(min=1e-6) / 2**24, scale)
        doubled = torch.zeros_like(scale)
        while True:
            weight = torch.round(levels / per_row(2**doubled, levels))
            unit = scale * 2**doubled
            largest = max(-reads.low, reads.high)
            sums = weight.abs().flatten(1).sum(1) * largest
            bound = sums + torch.round(bias / unit).abs()
            if not (over := bound > INT32).any():
                break
            doubled += over
        assert bound.max() <= INT32 and weight.abs().max() <= 127
        self.bound = int(bound.max())
        self.weight, self.scale = weight.to(torch.int8), unit
        self.bias = torch.round(bias / unit).to(torch.int32)
        self.kind = torch.float32 if sums.max() < 2**24 else torch.float64
        assert sums.max() < 2**53
        self.kernel = self.weight.to(self.kind)
        self.per_channel = (-1, 1, 1) if conv else (-1,)
        if writes is not None:
            # In float32, step by step as runtimes with float multipliers do: theirs are the same.
            ratio = reads.step * (unit / reads.step).float() / writes.step
            m = fixed_point(ratio, writes)
            shape = self.per_channel
            self.requantize = Multiplier(m.mantissa.view(shape), m.shift.view(shape), writes)

    def __call__(self, x: Tensor) -> Tensor:
        """Levels (n, in, h, w) or (n, in) to levels int16, or to logits float32."""
        acc = self.accumulate(x)
        if self.writes is None:
            return (acc * self.scale).float()
        return self.requantize(acc)

    def accumulate(self, x: Tensor) -> Tensor:
        """int64 that fit into int32."""
        x, kernel = x.to(self.kind), self.kernel
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
class Block:
    input: Multiplier | None
    layers: list[Layer]
    sum: Sum | None

    def __call__(self, x: Tensor) -> Tensor:
        y = x if self.input is None else self.input(x.long())
        for layer in self.layers:
            y = layer(y)
        return y if self.sum is None else self.sum(x, y)


class IntegerNetwork:
    """uint8 images (n, 3, 32, 32) as they come to logits float32 (n, classes). On the CPU."""

    def __init__(self, model: MobileNetV2, state: dict[str, Tensor]):
        """model: fake-quantized (see `convert`); state: that of quantizers.integer_state."""
        self.settings = model.settings
        self.image = grid(model.image)
        self.table = _image_table(model.image)  # int16 (3, 256)
        names = {layer: name for name, layer in weight_layers(model).items()}

        def integer(layer: nn.Module, reads: Grid, writes: Grid | None) -> Layer:
            return Layer(names[layer], layer, state[f"{names[layer]}.weight"], reads, writes)

        def activated(module: ConvBNReLU6, reads: Grid) -> Layer:
            return integer(module[0], reads, grid(module[2]))

        self.stem = activated(model.features[0], self.image)
        self.blocks, stream = [], self.stem.writes
        for block in model.features[1:-1]:
            assert isinstance(block, InvertedResidual)
            rescale, reads = None, stream
            if isinstance(block.input, Quantizer):
                reads = grid(block.input)
                rescale = fixed_point(torch.tensor(stream.step / reads.step), reads)
            out, layers = grid(block.stream), []
            for module in block.conv:
                if isinstance(module, ConvBNReLU6):
                    layers.append(activated(module, reads))
                elif isinstance(module, nn.Conv2d):
                    layers.append(integer(module, reads, grid(block.addend, out)))
                reads = layers[-1].writes
            total = Sum(stream, reads, out) if block.residual else None
            self.blocks.append(Block(rescale, layers, total))
            stream = out
        self.head = activated(model.features[-1], stream)
        size = SIZE  # of the head's map
        for layer in self.layers():
            size = (size + 2 * layer.padding - layer.kernel.shape[-1]) // layer.stride + 1
        self.pooled = grid(model.pooled)
        ratio = self.head.writes.step / (size * size * self.pooled.step)
        self.average = fixed_point(torch.tensor(ratio, dtype=torch.float64), self.pooled)
        self.classifier = integer(model.classifier[1], self.pooled, None)

    def layers(self) -> list[Layer]:
        """The convolutions in their order."""
        return [self.stem, *(layer for block in self.blocks for layer in block.layers), self.head]

    def features(self, images: Tensor) -> Tensor:
        """The head's maps."""
        x = self.table[torch.arange(3).view(3, 1, 1), images.long()]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}")
        logits = []
        for part in images.cpu().split(CHUNK):
            x = self.average(self.features(part).long().sum((2, 3)))
            logits.append(self.classifier(x))
        return torch.cat(logits)


def grid(quantizer: nn.Module, otherwise: Grid | None = None) -> Grid:
    if not isinstance(quantizer, Quantizer):
        return otherwise
    return Grid(float(quantizer.step), quantizer.low, quantizer.high)


def _image_table(image: Quantizer) -> Tensor:
    """The level of each value of a pixel in each channel, by the float32 network's own steps."""
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 1, 1)
    step = image.step.detach().cpu()
    levels = torch.round(data.normalize(pixels) * (1 / step)).clamp_(image.low, image.high)
    return levels.view(256, 3).T.contiguous().to(torch.int16)


def why_no_integer_network(scheme: dict | None) -> str | None:
    """Why a scheme has no integer network, or None if it has one."""
    if not scheme:
        return "it is not quantized"
    if scheme["method"] == "reference":
        return "the reference method's steps change with every batch"
    weights = max([scheme["weight_bits"], *scheme["layer_bits"].values()])
    acts = max(scheme["act_bits"], scheme.get("last_act_bits", 0))
    if max(weights, acts) > 8:
        return f"some of its weights have {weights} bits, of its activations {acts}, and 8 is most"
    return None


def convert(source) -> IntegerNetwork:
    """The integer network of a checkpoint (lib.checkpoint.Checkpoint).

    Raises ValueError, saying why, for a scheme that has none.
    """
    if reason := why_no_integer_network(source.quantization):
        raise ValueError(reason)
    model = source.build()
    return IntegerNetwork(model, quantizers.integer_state(model.state_dict(), source.quantization))
