"""Quantization-aware training: the weights behind the levels, and their way back to a grid.

Steps are learned with the weights (LSQ, Esser et al. 2020), of a weight's row and of an activation
tensor alike; what the optimizer sees is their logarithm (Jain et al. 2020, "Trained Quantization
Thresholds", section 3.2), so that one rate suits small and large ones and none turns negative.
Training starts from post-training quantization and ends with `finish`, on the grid.
"""

import torch
from torch import Tensor, nn

from lib import quantizers, rate
from lib.metrics import weight_layers
from lib.quantizers import FakeQuantize, Quantizer, max_level, per_row


class _Conv2d(nn.Conv2d):
    weight_scale = property(lambda self: _step(self))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *_on_grid(self))


class _Linear(nn.Linear):
    weight_scale = property(lambda self: _step(self))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *_on_grid(self))


class _Quantizer(Quantizer):
    step = property(lambda self: self.log_step.exp())

    def forward(self, x: Tensor) -> Tensor:
        return FakeQuantize.apply(x, self.step, self.low, self.high)


LOSS_PER_SQUARED_ERROR = 0.01  # of loss for a squared error of 1 in the logits: 0.008 for the reference at W4A8
SCALE_LR_FACTOR = 5.0  # of the learning rate: a logarithm is moved by its share, not by its size
TRAINED = {
    nn.Conv2d: _Conv2d, nn.Linear: _Linear, quantizers.QuantConv2d: _Conv2d, quantizers.QuantLinear: _Linear,
    Quantizer: _Quantizer,
}  # fmt: skip


def _on_grid(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias as `finish` will leave them."""
    high, step = max_level(layer.weight_bits), _step(layer)
    weight = FakeQuantize.apply(layer.weight, step, -high, high)
    bias = quantizers.bias_on_grid(layer)
    if hasattr(layer, "reads"):
        bias = quantizers.bias_in_accumulator_units(layer, bias, weight)
    return weight, _straight_through(layer.bias, bias)


def _step(layer: nn.Module) -> Tensor:
    step = layer.log_step.exp()
    return _straight_through(step, quantizers.round_mantissa(step, layer.scale_bits))


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, to the bit, with the gradient of x."""
    return rounded.detach() + (x - x.detach())


@torch.no_grad()
def begin(model: nn.Module, scheme: dict, latent: dict[str, Tensor]) -> None:
    """Let a network that is quantized by `lib.ptq` be trained, in place.

    latent: the weights before they were rounded, by layer. Each starts as near to its own as its
    level allows, so that training begins with the very network that it was given. Short steps and
    biases stay as short as they were made.
    """
    for name, layer in weight_layers(model).items():
        bits = quantizers.bits_of(name, scheme)
        if bits < 32:
            step = per_row(layer.weight_scale, layer.weight)
            rounding = (latent[name] - layer.weight).clamp(-0.49 * step, 0.49 * step)
            layer.weight.add_(torch.where(latent[name] == 0, 0, rounding))
            layer.weight_bits = bits
            _learn(layer, "weight_scale")
    for module in model.modules():
        if isinstance(module, Quantizer) and module is not model.image:
            _learn(module, "step")


def _learn(module: nn.Module, step: str) -> None:
    module.log_step = nn.Parameter(getattr(module, step).log())
    module.log_step.rate = SCALE_LR_FACTOR
    delattr(module, step)
    module.plain, module.__class__ = type(module), TRAINED[type(module)]


def bits(model: nn.Module) -> Tensor:
    """What the coder will take for the weights, estimated, (), with gradients: see lib/rate.py."""
    return sum(
        rate.bits(layer.weight.flatten(1), _step(layer)[:, None], max_level(layer.weight_bits))
        for layer in weight_layers(model).values() if hasattr(layer, "log_step")
    )  # fmt: skip


@torch.no_grad()
def dampen(model: nn.Module, share: float) -> None:
    """Move weights within their range towards their level by a share of the distance.

    Weights that sit on the border between two levels flip from step to step; this is the gradient
    step of the dampening loss (Nagel et al. 2022, "Overcoming Oscillations", section 4.2) apart
    from the optimizer, as decoupled weight decay is.
    """
    for layer in weight_layers(model).values():
        if hasattr(layer, "log_step"):
            step, bits = per_row(_step(layer), layer.weight), layer.weight_bits
            level = quantizers.to_levels(layer.weight, step, bits) * step
            inside = layer.weight.clamp(-max_level(bits) * step, max_level(bits) * step)
            layer.weight.add_(level - inside, alpha=share)


@torch.no_grad()
def finish(model: nn.Module) -> None:
    """Put the weights on their grid; the network is then what `attach` and its state make."""
    for module in model.modules():
        if hasattr(module, "log_step"):
            is_layer = not isinstance(module, Quantizer)
            step = _step(module) if is_layer else module.step
            del module.log_step
            module.__class__ = module.plain
            module.register_buffer("weight_scale" if is_layer else "step", step)
            if is_layer:
                # + 0.0: of what rounds to -0.0, which no grid of integers has (4.5 KB in a file).
                module.bias.copy_(quantizers.bias_on_grid(module) + 0.0)
                quantizers.put_on_grid(module, module.weight_bits)
                step[~module.weight.flatten(1).any(1)] = 1.0
