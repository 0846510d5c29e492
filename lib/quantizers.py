"""Quantizers, and how a network carries one.

A scheme is plain data in the checkpoint: {"method", "weight_bits", "act_bits"}; 32 bits is off.
The scales are buffers in the state dict (`<layer>.weight_scale`); `attach` gives a network the
buffers and the activation quantizers of a scheme, so that its state then loads strictly.
"""

import torch
from torch import Tensor, nn

from lib.metrics import weight_layers

BITS = (*range(2, 17), 32)


def largest(bits: int) -> int:
    """The largest level of a symmetric signed quantizer: 127 at 8 bits, 1 at 2; -128 is unused."""
    return 2 ** (bits - 1) - 1


def symmetric_scale(x: Tensor, bits: int) -> Tensor:
    """One step for a whole tensor, from its largest magnitude; a tensor of zeros gets 1."""
    top = x.abs().amax() / largest(bits)
    return torch.where(top > 0, top, torch.ones_like(top))


def to_levels(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integers, as floats: round to nearest even, clipped. Zeros stay zero."""
    return torch.round(x / scale).clamp_(-largest(bits), largest(bits))


def _quantize_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Dynamic: the step is the largest magnitude in this batch over the largest level."""
    x, bits = inputs[0], layer.act_bits
    scale = symmetric_scale(x, bits)
    return (to_levels(x, scale, bits) * scale,)


def attach(model: nn.Module, scheme: dict) -> None:
    """Give the network what the scheme needs: buffers for the state, hooks for the activations."""
    for layer in weight_layers(model).values():
        if scheme["weight_bits"] < 32:
            layer.register_buffer("weight_scale", torch.ones((), device=layer.weight.device))
        if scheme["act_bits"] < 32:
            layer.act_bits = scheme["act_bits"]
            layer.register_forward_pre_hook(_quantize_input)


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
            levels = to_levels(layer.weight, layer.weight_scale, weight_bits)
            # + 0.0: small negative weights round to -0.0, which an integer cannot hold.
            layer.weight.copy_(levels * layer.weight_scale + 0.0)
    return scheme


def integer_state(state: dict[str, Tensor], scheme: dict) -> dict[str, Tensor]:
    """A quantized network's state with its weights as int8 (int16 over 8 bits) levels.

    Raises ValueError if a weight is not a level times its scale: nothing is rounded silently.
    """
    if scheme["weight_bits"] == 32:
        return dict(state)
    kind = torch.int8 if scheme["weight_bits"] <= 8 else torch.int16
    out = {}
    for name, tensor in state.items():
        scale = state.get(f"{name}_scale")
        if scale is not None:
            levels = to_levels(tensor, scale, scheme["weight_bits"]).to(kind)
            if not torch.equal(levels * scale, tensor):
                raise ValueError(f"{name} does not lie on its {scheme['weight_bits']}-bit grid")
            tensor = levels
        out[name] = tensor
    return out


def float_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `integer_state`."""
    return {
        name: t * state[f"{name}_scale"] if t.dtype in (torch.int8, torch.int16) else t
        for name, t in state.items()
    }
