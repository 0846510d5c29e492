"""Quantizers, and how a network carries them.

A scheme is plain data in the checkpoint; `attach` gives a network what it needs, so that its state
then loads strictly. 32 bits is off.

    {"method": "reference", "weight_bits", "act_bits"}
    {"method": "ptq" or "qat", "weight_bits", "act_bits", "weight_scale", "layer_bits"} and perhaps
        "last_act_bits", of the classifier's input

**reference**: the report's. One step a tensor (`<layer>.weight_scale`), activations dynamic.

**ptq, qat**: what an integer network needs, and nothing is quantized later. Batch norm is folded.
A weight is a level times its output channel's step (`<layer>.weight_scale`, (out,)); layer_bits has
the layers that differ from weight_bits. Activations have one static step a tensor (`<place>.step`):

- the image: 8 bits, signed;
- what leaves a ReLU6: unsigned; clipping to the largest level is the nonlinearity, so that ReLU6
  itself is gone;
- a residual stream: signed. A sum of two tensors is no input of a multiplication, and costs little
  to keep: a stream that is added to has at least 8 bits, as has the addend; where a convolution
  reads it at fewer, it is quantized again for that (`input`). A stream that is only read has the
  bits of its reader;
- the head's maps, which are only averaged: at least 8 bits; their average: unsigned, act_bits.

Weight levels are symmetric and zero is a level, so pruned weights stay zero (Jacob et al. 2018;
Nagel et al. 2021, "A white paper on neural network quantization", section 2). Signed activations
use all levels, -128 to 127 at 8 bits. A bias counts in what its accumulator does, (input's step) *
(weight's step): see `bias_in_accumulator_units`.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lib.data import MEAN, STD
from lib.metrics import weight_layers
from models.mobilenetv2 import ConvBNReLU6, InvertedResidual, MobileNetV2

BITS = (*range(2, 17), 32)
# The farthest that a normalized pixel is from 0: the image's step covers it with 127 levels.
LARGEST_PIXEL = max(max(m, 1 - m) / s for m, s in zip(MEAN, STD, strict=True))


def max_level(bits: int) -> int:
    """The largest level of a signed quantizer: 127 at 8 bits, 1 at 2. Weights leave -128 unused."""
    return 2 ** (bits - 1) - 1


def symmetric_scale(x: Tensor, bits: int) -> Tensor:
    """One step for a whole tensor, from its largest magnitude; a tensor of zeros gets 1."""
    top = x.abs().amax() / max_level(bits)
    return torch.where(top > 0, top, torch.ones_like(top))


def to_levels(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integers, as floats: round to nearest even, clipped. Zeros stay zero.

    scale: a step for all, or one for each index of the first dimension.
    """
    return torch.round(x / per_row(scale, x)).clamp_(-max_level(bits), max_level(bits))


def round_mantissa(x: Tensor, bits: int, rounding: Callable = torch.round) -> Tensor:
    """x rounded to so many mantissa bits, the leading one not counted: 23 is float32 itself."""
    fraction, exponent = torch.frexp(x)  # 0.5 <= |fraction| < 1
    return torch.ldexp(rounding(fraction * 2 ** (bits + 1)), exponent - (bits + 1))


def bias_on_grid(layer: nn.Module) -> Tensor:
    """The layer's bias on its grid, if lib.ptq gave it one (`bias_scale`)."""
    step = getattr(layer, "bias_scale", None)
    return layer.bias if step is None else torch.round(layer.bias / step) * step


def per_row(scale: Tensor, x: Tensor) -> Tensor:
    """Shaped to multiply x: (out,) becomes (out, 1, ...), one step for all stays as it is."""
    return scale.view(-1, *[1] * (x.ndim - 1)) if scale.ndim == 1 else scale


def bits_of(layer: str, scheme: dict) -> int:
    """Of that layer's weights."""
    return scheme.get("layer_bits", {}).get(layer, scheme["weight_bits"])


class FakeQuantize(torch.autograd.Function):
    """x rounded to a multiple of step between low * step and high * step; any float type.

    step: one for all, or one for each index of the first dimension.
    Backward: the straight-through estimator for x inside the range, zero outside; for the step the
    gradient of LSQ (Esser et al. 2020, equation 3).
    One function, since on a CPU memory is what costs: forward makes two tensors, backward two.
    """

    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        step = per_row(step, x)
        scaled = x * (1 / step)
        ctx.save_for_backward(scaled)
        ctx.low, ctx.high, ctx.rows = low, high, step.ndim > 0
        return torch.round(scaled).clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (scaled,) = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, scaled, ctx.low, ctx.high)
        grad_step = None
        if ctx.needs_input_grad[1]:
            # Inside: level - scaled; outside: the level. Sums run in float32 whatever the type;
            # the result is asked for in it where fp16 could overflow. In bf16 that costs a copy.
            slope = torch.round(scaled).clamp_(ctx.low, ctx.high)
            slope -= torch.ops.aten.hardtanh_backward(scaled, scaled, ctx.low, ctx.high)
            slope *= grad
            wide = torch.float32 if grad.dtype == torch.float16 else None
            grad_step = slope.flatten(1).sum(1) if ctx.rows else slope.sum(dtype=wide)
        return inside, grad_step, None, None


class Quantizer(nn.Module):
    """A tensor of activations on a static grid."""

    def __init__(self, bits: int, signed: bool):
        super().__init__()
        self.bits, self.signed = bits, signed
        self.high = max_level(bits) if signed else 2**bits - 1
        self.low = -self.high - 1 if signed else 0  # as saturating runtimes clip
        self.register_buffer("step", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return FakeQuantize.apply(x, self.step, self.low, self.high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class QuantConv2d(nn.Conv2d):
    """With quantized weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, bias_in_accumulator_units(self, self.bias, self.weight))


class QuantLinear(nn.Linear):
    """With quantized weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, bias_in_accumulator_units(self, self.bias, self.weight))


@torch.no_grad()
def bias_in_accumulator_units(layer: nn.Module, bias: Tensor, weight: Tensor) -> Tensor:
    """The layer's bias rounded to whole numbers of what the layer's accumulator counts in.

    It moves an output by a thousandth of a level or so. But an integer network that alone did it
    would have other levels from the first layer on, and every layer multiplies what differs. In
    the forward pass, since files keep biases as short as they are. Rows of zeros have no unit.
    """
    live = weight.flatten(1).any(1)
    unit = layer.weight_scale.double().abs() * layer.reads[0].step.double()
    return torch.where(live, torch.round(bias.double() / unit) * unit, bias).to(bias.dtype)


def attach(model: MobileNetV2, scheme: dict) -> None:
    """Give the network what the scheme needs: steps for the state, quantizers for activations."""
    reference = scheme["method"] == "reference"
    for name, layer in weight_layers(model).items():
        device, out = layer.weight.device, layer.weight.shape[0]
        if bits_of(name, scheme) < 32:
            scale = torch.ones(() if reference else out, device=device)
            layer.register_buffer("weight_scale", scale)
        if reference and scheme["act_bits"] < 32:
            layer.act_bits = scheme["act_bits"]
            layer.register_forward_pre_hook(_quantize_input)
    if not reference and scheme["act_bits"] < 32:
        bits = scheme["act_bits"]
        _attach_quantizers(model, bits, scheme.get("last_act_bits", bits))
        for layer, reads in layers_with_input_quantizers(model):
            if hasattr(layer, "weight_scale") and isinstance(reads, Quantizer):
                layer.__class__ = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
                layer.reads = (reads,)  # a tuple, so that it is no part of this layer's state
        model.to(device)


def _attach_quantizers(model: MobileNetV2, bits: int, last_bits: int) -> None:
    """See the module's text for what has how many bits."""
    kept = max(bits, 8)  # where it is only added or averaged
    model.image = Quantizer(8, signed=True)
    model.image.step.fill_(LARGEST_PIXEL / max_level(8))
    blocks = [m for m in model.features if isinstance(m, InvertedResidual)]
    for number, (block, after) in enumerate(zip(blocks, [*blocks[1:], None], strict=True)):
        added = after is not None and after.residual
        block.stream = Quantizer(kept if added else bits, signed=True)
        if block.residual:
            block.addend = Quantizer(kept, signed=True)
            if kept > bits:
                # The first block reads the stem's, which a ReLU6 leaves none negative.
                block.input = Quantizer(bits, signed=number > 0)
    stored = [model.features[-1]] + [model.features[0]] * blocks[0].residual
    for module in model.modules():
        if isinstance(module, ConvBNReLU6):
            module[2] = Quantizer(kept if module in stored else bits, signed=False)
    if last_bits < 32:
        model.pooled = Quantizer(last_bits, signed=False)


@torch.no_grad()
def fold(model: MobileNetV2) -> MobileNetV2:
    """A network without batch norms that computes the same in eval mode (Jacob 2018, section 3.2).

    Rows are multiplied, in float64, by gamma / sqrt(var + eps); what that leaves is the bias.
    """
    folded = MobileNetV2(copy.deepcopy(model.settings) | {"folded": True})
    state = model.state_dict()
    for name, layer in weight_layers(folded).items():
        weight = state[f"{name}.weight"].double()
        norm = norm_behind(model, name)
        if norm is None:
            layer.bias.copy_(state[f"{name}.bias"])
        else:
            factor = norm_factor(norm)
            weight = weight * per_row(factor, weight)
            layer.bias.copy_(norm.bias.double() - norm.running_mean.double() * factor)
        layer.weight.copy_(weight)
    device = next(model.parameters()).device
    return folded.to(device, memory_format=torch.channels_last).eval()


def norm_behind(model: MobileNetV2, layer: str) -> nn.BatchNorm2d | None:
    """A convolution's batch norm is its successor in the Sequential; the classifier has none."""
    parent, index = layer.rsplit(".", 1)
    found = dict(model.named_modules()).get(f"{parent}.{int(index) + 1}")
    return found if isinstance(found, nn.BatchNorm2d) else None


def norm_factor(norm: nn.BatchNorm2d) -> Tensor:
    """What batch norm multiplies each channel by, float64 (C,)."""
    return norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)


def grid_scale(x: Tensor, bits: int) -> Tensor:
    """One step for a whole tensor: of the coarsest grid that it lies on already, if there is one of
    at most `bits` bits (so that integers which were dequantized are found again, even where the
    largest of them has gone); else from its largest magnitude."""
    scale = symmetric_scale(x, bits)
    top = max_level(bits) * scale
    for level in range(1, max_level(bits) + 1) if bits <= 8 else ():
        ratio = x * (level / top)
        if torch.all((ratio - ratio.round()).abs() <= 1e-5 * ratio.abs()):
            return top / level
    return scale


def _quantize_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Dynamic: the step is the largest magnitude in this batch over the largest level."""
    x, bits = inputs[0], layer.act_bits
    scale = symmetric_scale(x, bits)
    return (to_levels(x, scale, bits) * scale,)


@torch.no_grad()
def quantize_reference(model: nn.Module, weight_bits: int, act_bits: int) -> dict:
    """The report's method, in place; returns the scheme.

    Symmetric, linear, one step a tensor from its largest magnitude, zero preserved; weights static,
    the input of every Conv2d and Linear dynamic; arithmetic in fp32.
    """
    scheme = {"method": "reference", "weight_bits": weight_bits, "act_bits": act_bits}
    attach(model, scheme)
    if weight_bits < 32:
        for layer in weight_layers(model).values():
            layer.weight_scale.copy_(symmetric_scale(layer.weight, weight_bits))
            put_on_grid(layer, weight_bits)
    return scheme


@torch.no_grad()
def put_on_grid(layer: nn.Module, bits: int) -> None:
    """Round the weights of a layer to their levels times its scale."""
    levels = to_levels(layer.weight, layer.weight_scale, bits)
    # + 0.0: small negative weights round to -0.0, which an integer cannot hold.
    layer.weight.copy_(levels * per_row(layer.weight_scale, levels) + 0.0)


def layers_with_input_quantizers(model: MobileNetV2) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each layer, in order, and the quantizer of what it reads: a Quantizer, or none at 32 bits."""
    reads = model.image
    for module in model.features:
        if isinstance(module, InvertedResidual):
            reads = module.input if isinstance(module.input, Quantizer) else reads
            layers, after = module.conv, module.stream
        else:
            layers, after = [module], None
        for layer in layers:
            if isinstance(layer, ConvBNReLU6):
                yield layer[0], reads
                reads = layer[2]
            elif isinstance(layer, nn.Conv2d):
                yield layer, reads
        reads = after or reads
    yield model.classifier[1], model.pooled


def integer_state(state: dict[str, Tensor], scheme: dict) -> dict[str, Tensor]:
    """A quantized network's state with its weights as int8 (int16 over 8 bits) levels.

    Raises ValueError if a weight is not a level times its scale: nothing is rounded silently.
    """
    out = {}
    for name, tensor in state.items():
        scale = state.get(f"{name}_scale")
        if scale is not None:
            bits = bits_of(name.removesuffix(".weight"), scheme)
            kind = torch.int8 if bits <= 8 else torch.int16
            levels = to_levels(tensor, scale, bits).to(kind)
            if not torch.equal(levels * per_row(scale, levels), tensor):
                raise ValueError(f"{name} does not lie on its {bits}-bit grid")
            tensor = levels
        out[name] = tensor
    return out


def float_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `integer_state`."""
    return {
        name: t * per_row(state[f"{name}_scale"], t) if t.dtype in (torch.int8, torch.int16) else t
        for name, t in state.items()
    }
