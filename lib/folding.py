"""Batch norm folded into the layers before it, and the way back."""

import contextlib
import copy
import functools

import torch
from torch import Tensor, nn

from lib.metrics import weight_layers
from lib.quantizers import Quantizer, by_channel, per_row
from models.layers import layers
from models.mobilenetv2 import MobileNetV2


@torch.no_grad()
def fold(model: MobileNetV2) -> MobileNetV2:
    """Return a network without batch norms that computes the same in eval mode.

    Each row is multiplied, in float64, by gamma / sqrt(var + eps); what is left of the batch norm
    becomes the bias (Jacob et al. 2018, section 3.2).
    """
    folded = MobileNetV2(copy.deepcopy(model.settings) | {"folded": True})
    state = model.state_dict()
    for name, layer in weight_layers(folded).items():
        weight = state[f"{name}.weight"].double()
        norm = norm_after(model, name)
        if norm is None:
            layer.bias.copy_(state[f"{name}.bias"])
        else:
            factor = norm_factor(norm)
            weight = weight * per_row(factor, weight)
            layer.bias.copy_(norm.bias.double() - norm.running_mean.double() * factor)
        layer.weight.copy_(weight)
    device = next(model.parameters()).device
    return folded.to(device, memory_format=torch.channels_last).eval()


@torch.no_grad()
def dequantize(model: MobileNetV2, images: Tensor) -> MobileNetV2:
    """Return an fp32 network with batch norms, the weights of which are those of a quantized one.

    Activations are no longer rounded, nor clipped in residual streams and behind the average; apart
    from that it computes the same in eval mode. A folded network has no batch norms: each layer
    gets one that has the mean and variance of its outputs for these images, and undoes them, so
    that training can continue.
    images: (n, 3, H, W), normalized.

    Where a quantizer clips at c instead of 6, the batch norm before it multiplies by 6 / c, and the
    one after the next layer (or the classifier's weights) divides by it. A stem that is part of a
    residual stream is the exception: other layers read it too, so it is clipped at 6.
    """
    plain = MobileNetV2(copy.deepcopy(model.settings) | {"folded": False})
    if not model.settings.get("folded"):
        state = model.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        return plain.to(images.device, memory_format=torch.channels_last).eval()

    def stretch(place: str) -> float:
        """Return 6 / c of the quantizer at a place, 1 without one."""
        quantizer = model.get_submodule(place)
        in_stream = quantizer is model.stem[2] and model.blocks[0].residual
        if not isinstance(quantizer, Quantizer) or quantizer.signed or in_stream:
            return 1.0
        return 6 / (quantizer.high * float(quantizer.step))

    stretch_in = 1.0  # of a layer's inputs
    with contextlib.ExitStack() as hooks:
        for layer in layers(model.settings):
            source, target = model.get_submodule(layer.name), plain.get_submodule(layer.name)
            target.weight.copy_(source.weight)
            norm = plain.get_submodule(layer.norm) if layer.norm else None
            stretch_out = stretch(layer.output_place) if layer.has_relu6 else 1.0
            if norm is None:
                target.weight.div_(stretch_in)
                target.bias.copy_(source.bias)
            else:
                undo = functools.partial(_undo_norm, source.bias, stretch_in, stretch_out)
                hooks.enter_context(norm.register_forward_pre_hook(undo))
            stretch_in = stretch_out
        plain.to(images.device, memory_format=torch.channels_last).eval()(images)
    return plain


def _undo_norm(
    bias: Tensor, stretch_in: float, stretch_out: float, norm: nn.BatchNorm2d, inputs: tuple[Tensor]
) -> None:
    """Set a batch norm to the statistics of its inputs, before it computes, so that it adds a bias
    (C,) to them and changes their stretch, and nothing else: a pre-hook of `dequantize`."""
    columns = by_channel(inputs[0])
    mean, variance = columns.mean(0), columns.var(0, correction=0)
    variance = variance.where(variance > 1e-8, 1)  # of dead channels: any
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt() * stretch_out / stretch_in)
    norm.bias.copy_((bias + mean / stretch_in) * stretch_out)


def norm_after(model: MobileNetV2, layer: str) -> nn.BatchNorm2d | None:
    """Return the batch norm after a layer; None for the classifier and in a folded network."""
    name = next(described.norm for described in layers(model.settings) if described.name == layer)
    norm = model.get_submodule(name) if name else None
    return norm if isinstance(norm, nn.BatchNorm2d) else None


def norm_factor(norm: nn.BatchNorm2d) -> Tensor:
    """Return what batch norm multiplies each channel by in eval mode, float64 (C,)."""
    return norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
