"""Quantizers, and how a network carries them.

A scheme is plain data, stored in the checkpoint. `attach` gives a network the buffers and modules
that its scheme needs, so that its state dict loads strictly. 32 bits means: not quantized.

    {"method": "reference", "weight_bits", "act_bits"}
    {"method": "ptq" or "qat", "weight_bits", "act_bits", "weight_scale", "layer_bits"} and perhaps
        "last_act_bits", of the classifier's input

"weight_scale" is a granularity there, `channel` or `tensor`; in a state dict, on the other hand,
`<layer>.weight_scale` is the tensor of a layer's scales, and `<place>.step` the scale of an
activation. Files that exist have these names; everything else says granularity and scale.

**reference**: the report's method. One weight scale per tensor; activation scales are dynamic.

**ptq, qat**: what an integer network needs, with nothing left to quantize later. Batch norm is
folded. A weight is a level times the scale of its output channel (`<layer>.weight_scale`, (out,));
layer_bits names the layers whose bits differ from weight_bits. Activations have one static scale
per tensor:

- the image: 8 bits, signed;
- the output of a ReLU6: unsigned. Clipping to the largest level is the nonlinearity, so ReLU6
  itself is replaced;
- a residual stream: signed. The sum of two tensors is not an input of a multiplication, and more
  bits for it cost little: a stream that is added to has at least 8 bits, as has the addend. If the
  convolution that reads it uses fewer, a second quantizer (`input`) reduces them. A stream that is
  only read has the bits of the layer that reads it. Where the first block is residual (widths of
  0.25 and less), its stream begins with the stem's output, which then has at least 8 bits too;
- the head's maps, which are only averaged: at least 8 bits. Their average: unsigned, act_bits.

Weight levels are symmetric and zero is a level, so pruned weights stay zero (Jacob et al. 2018;
Nagel et al. 2021, "A white paper on neural network quantization", section 2). Signed activations
use all levels, -128 to 127 at 8 bits. A bias is a whole number of its accumulator's unit,
(scale of the input) * (scale of the weight): see `bias_in_accumulator_units`.

What the modules of lib hang on the layers and quantizers of a network:

    attribute        on         set by               read by                          in state dict
    weight_scale     layer      attach: ones; then   all that needs levels            yes
                                ptq or reference
    step             Quantizer  attach: ones (image: all that quantizes activations,  yes
                                fixed); then ptq     bias_in_accumulator_units
    act_bits         layer      attach (reference)   its pre-hook, is_dynamic         no
    input_quantizer  layer      attach               bias_in_accumulator_units, qat   no
    bias_scale       layer      ptq                  bias_on_grid, qat.pack           no: biases
                                                                                      are rounded
    scale_bits       layer      ptq                  qat: mantissa bits of scales     no

For training, qat.begin sets these, and only qat reads them; qat.finish removes log_scale:

    log_scale        both       instead of weight_scale or step: its logarithm        yes
    weight_bits      layer      bits of its levels                                    no
    clip             Quantizer  largest value, where activations are not rounded      no
    plain            both       the class outside training                            no
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lib.data import MEAN, STD
from lib.metrics import weight_layers
from models.layers import layers, places
from models.mobilenetv2 import ConvBNReLU6, MobileNetV2

BITS = (*range(2, 17), 32)
# The largest magnitude of a normalized pixel: the image's scale covers it with 127 levels.
LARGEST_PIXEL = max(max(m, 1 - m) / s for m, s in zip(MEAN, STD, strict=True))


def max_level(bits: int) -> int:
    """Return the largest level of a signed quantizer: 127 at 8 bits. Weights never use -128."""
    return 2 ** (bits - 1) - 1


def symmetric_scale(x: Tensor, bits: int) -> Tensor:
    """Return one scale for a tensor, (), from its largest magnitude; 1 for a tensor of zeros."""
    top = x.abs().amax() / max_level(bits)
    return torch.where(top > 0, top, torch.ones_like(top))


def to_levels(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the levels of x: integers, as floats, rounded to nearest even and clipped.

    scale: (), or one per index of the first dimension. Zeros stay zero.
    """
    return torch.round(x / per_row(scale, x)).clamp_(-max_level(bits), max_level(bits))


def round_mantissa(x: Tensor, bits: int, rounding: Callable = torch.round) -> Tensor:
    """Round x to `bits` mantissa bits, not counting the leading one: 23 is float32 itself."""
    fraction, exponent = torch.frexp(x)  # 0.5 <= |fraction| < 1
    return torch.ldexp(rounding(fraction * 2 ** (bits + 1)), exponent - (bits + 1))


def bias_on_grid(layer: nn.Module) -> Tensor:
    """Return the layer's bias, rounded to multiples of its `bias_scale` if lib.ptq gave it one."""
    scale = getattr(layer, "bias_scale", None)
    return layer.bias if scale is None else torch.round(layer.bias / scale) * scale


def per_row(scale: Tensor, x: Tensor) -> Tensor:
    """Reshape a scale so that it multiplies x: (out,) to (out, 1, ...); a scalar stays as it is."""
    return scale.view(-1, *[1] * (x.ndim - 1)) if scale.ndim == 1 else scale


def by_channel(x: Tensor) -> Tensor:
    """Return activations, (n, C, H, W) or (n, C), as (positions, C)."""
    return x.movedim(1, -1).flatten(0, -2)


def bits_of(layer: str, scheme: dict) -> int:
    """Return the bits of that layer's weights."""
    return scheme.get("layer_bits", {}).get(layer, scheme["weight_bits"])


def most_weight_bits(scheme: dict) -> int:
    """Return the largest number of bits that a layer's weights have."""
    return max([scheme["weight_bits"], *scheme.get("layer_bits", {}).values()])


@torch.no_grad()
def bits_used(model: nn.Module) -> dict[str, int]:
    """Return the bits that each quantized layer's levels take, at least 2: {layer: bits}."""
    used = {}
    for name, layer in weight_layers(model).items():
        if hasattr(layer, "weight_scale"):
            levels = layer.weight / per_row(layer.weight_scale, layer.weight)
            used[name] = max(2, 1 + round(float(levels.abs().max())).bit_length())
    return used


class FakeQuantize(torch.autograd.Function):
    """Round x to multiples of scale from low * scale to high * scale, in any floating type.

    scale: (), or one per index of the first dimension.
    Backward: the straight-through estimator for x inside the range, zero outside; for the scale the
    gradient of LSQ (Esser et al. 2020, equation 3).
    Written as one function because memory traffic is what costs on a CPU: forward and backward
    allocate two tensors each.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        scale = per_row(scale, x)
        scaled = x * (1 / scale)
        ctx.save_for_backward(scaled)
        ctx.low, ctx.high, ctx.per_row = low, high, scale.ndim > 0
        return torch.round(scaled).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (scaled,) = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, scaled, ctx.low, ctx.high)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # Inside: level - scaled; outside: the level. Sums run in float32 in any type; the
            # result is float32 too for fp16, which could overflow. In bf16 that would cost a copy.
            slope = torch.round(scaled).clamp_(ctx.low, ctx.high)
            slope -= torch.ops.aten.hardtanh_backward(scaled, scaled, ctx.low, ctx.high)
            slope *= grad
            wide = torch.float32 if grad.dtype == torch.float16 else None
            grad_scale = slope.flatten(1).sum(1) if ctx.per_row else slope.sum(dtype=wide)
        return inside, grad_scale, None, None


class Quantizer(nn.Module):
    """Rounds activations to a static grid, one scale per tensor: fake-quantization.

    The levels go from 0 to 2^bits - 1, or if signed from -2^(bits-1) to 2^(bits-1) - 1.
    """

    def __init__(self, bits: int, signed: bool):
        super().__init__()
        self.bits, self.signed = bits, signed
        self.high = max_level(bits) if signed else 2**bits - 1
        self.low = -self.high - 1 if signed else 0  # as saturating runtimes clip
        self.register_buffer("step", torch.ones(()))  # the scale; files have it under this name

    def forward(self, x: Tensor) -> Tensor:
        return FakeQuantize.apply(x, self.step, self.low, self.high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class QuantConv2d(nn.Conv2d):
    """A convolution whose weights and inputs lie on grids: its bias is in accumulator units."""

    def forward(self, x: Tensor) -> Tensor:
        bias = bias_in_accumulator_units(self, self.bias, self.weight)
        return self._conv_forward(x, self.weight, bias)


class QuantLinear(nn.Linear):
    """A linear layer whose weights and inputs lie on grids: its bias is in accumulator units."""

    def forward(self, x: Tensor) -> Tensor:
        bias = bias_in_accumulator_units(self, self.bias, self.weight)
        return nn.functional.linear(x, self.weight, bias)


@torch.no_grad()
def bias_in_accumulator_units(layer: nn.Module, bias: Tensor, weight: Tensor) -> Tensor:
    """Round a bias (out,) to whole numbers of what the layer's accumulator counts in.

    This moves an output by about a thousandth of a level. But if only the integer network did it,
    its levels would differ from the first layer on, and every layer would multiply the difference.
    It is done in the forward pass because files keep the short biases that `bias_on_grid` makes.
    Rows of zeros have no unit: their bias stays as it is.
    """
    live = weight.flatten(1).any(1)
    unit = layer.weight_scale.double().abs() * layer.input_quantizer.step.double()
    return torch.where(live, torch.round(bias.double() / unit) * unit, bias).to(bias.dtype)


def attach(model: MobileNetV2, scheme: dict) -> None:
    """Give the network what the scheme needs: buffers for scales, which are ones, and quantizers
    for activations. Weights stay as they are. See the table in the module's docstring."""
    reference, device = scheme["method"] == "reference", next(model.parameters()).device
    for name, layer in weight_layers(model).items():
        if bits_of(name, scheme) < 32:
            scale = torch.ones(() if reference else len(layer.weight), device=device)
            layer.register_buffer("weight_scale", scale)
        if reference and scheme["act_bits"] < 32:
            layer.act_bits = scheme["act_bits"]
            layer.register_forward_pre_hook(_quantize_input)
    if not reference and scheme["act_bits"] < 32:
        bits = scheme["act_bits"]
        _attach_quantizers(model, bits, scheme.get("last_act_bits", bits))
        for layer, quantizer in layers_with_input_quantizers(model):
            if hasattr(layer, "weight_scale") and isinstance(quantizer, Quantizer):
                layer.__class__ = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
                # Past nn.Module, so that it does not become part of this layer's state.
                object.__setattr__(layer, "input_quantizer", quantizer)
        model.to(device)


def _attach_quantizers(model: MobileNetV2, bits: int, last_bits: int) -> None:
    """Put quantizers in their places; the module's docstring says which has how many bits."""
    wide_bits = max(bits, 8)  # for what is only added or averaged
    model.image = Quantizer(8, signed=True)
    model.image.step.fill_(LARGEST_PIXEL / max_level(8))
    blocks = model.blocks
    for number, (block, after) in enumerate(zip(blocks, [*blocks[1:], None], strict=True)):
        added = after is not None and after.residual
        block.stream = Quantizer(wide_bits if added else bits, signed=True)
        if block.residual:
            block.addend = Quantizer(wide_bits, signed=True)
            if wide_bits > bits:
                # The first block reads the output of the stem's ReLU6, which is never negative.
                block.input = Quantizer(bits, signed=number > 0)
    wide = [model.head]
    if blocks[0].residual:
        wide.append(model.stem)
    for module in model.modules():
        if isinstance(module, ConvBNReLU6):
            module[2] = Quantizer(wide_bits if module in wide else bits, signed=False)
    if last_bits < 32:
        model.pooled = Quantizer(last_bits, signed=False)


def grid_scale(x: Tensor, bits: int) -> Tensor:
    """Return one scale for a tensor, (): that of the coarsest grid that the tensor lies on already.

    So integers that were dequantized are found again, even if the largest of them was removed. If
    there is no such grid of at most `bits` bits (searched for up to 8), the scale comes from the
    largest magnitude.
    """
    scale = symmetric_scale(x, bits)
    top = max_level(bits) * scale
    for level in range(1, max_level(bits) + 1) if bits <= 8 else ():
        ratio = x * (level / top)
        if torch.all((ratio - ratio.round()).abs() <= 1e-5 * ratio.abs()):
            return top / level
    return scale


def _quantize_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Quantize a layer's input dynamically: the scale comes from this batch's largest magnitude."""
    x, bits = inputs[0], layer.act_bits
    scale = symmetric_scale(x, bits)
    return (to_levels(x, scale, bits) * scale,)


@torch.no_grad()
def quantize_reference(model: nn.Module, weight_bits: int, act_bits: int) -> dict:
    """Quantize by the report's method, in place; return the scheme.

    Symmetric and linear, one scale per tensor from its largest magnitude, zero preserved. Weights
    have static scales, the inputs of Conv2d and Linear dynamic ones. The arithmetic is fp32.
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


def is_dynamic(layer: nn.Module) -> bool:
    """Return whether the scale of a layer's input comes from each batch: the report's method."""
    return hasattr(layer, "act_bits")


def layers_with_input_quantizers(model: MobileNetV2) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each layer, in order, and the module that quantizes its input.

    That module is a Quantizer, or at 32 bits whatever stands in its place.
    """
    order = places(model.settings)
    for layer in layers(model.settings):
        quantizer = model.get_submodule(layer.input_place)
        if layer.input_place.endswith(".input") and not isinstance(quantizer, Quantizer):
            # Nothing is quantized again for this block: it reads what comes before.
            quantizer = model.get_submodule(order[order.index(layer.input_place) - 1])
        yield model.get_submodule(layer.name), quantizer


def integer_state(state: dict[str, Tensor], scheme: dict) -> dict[str, Tensor]:
    """Return a quantized network's state with weights as levels: int8, or int16 over 8 bits.

    Raises ValueError if a weight is not a level times its scale: nothing is rounded silently.
    """
    integers = {}
    for name, tensor in state.items():
        scale = state.get(f"{name}_scale")
        if scale is not None:
            bits = bits_of(name.removesuffix(".weight"), scheme)
            dtype = torch.int8 if bits <= 8 else torch.int16
            levels = to_levels(tensor, scale, bits).to(dtype)
            if not torch.equal(levels * per_row(scale, levels), tensor):
                raise ValueError(f"{name} does not lie on its {bits}-bit grid")
            tensor = levels
        integers[name] = tensor
    return integers


def float_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with its levels multiplied by their scales: inverts `integer_state`."""
    return {
        name: t * per_row(state[f"{name}_scale"], t) if t.dtype in (torch.int8, torch.int16) else t
        for name, t in state.items()
    }
