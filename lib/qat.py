"""Quantization-aware training: the weights behind the levels, and their way back to a grid.

Steps are learned with the weights (LSQ, Esser et al. 2020), of a weight's row and of an activation
tensor alike; what the optimizer sees is their logarithm (Jain et al. 2020, "Trained Quantization
Thresholds", section 3.2), so that one rate suits small and large ones and none turns negative.
Training starts from post-training quantization and ends with `finish`, on the grid.
"""

import torch
from torch import Tensor, nn

from lib import quantizers
from lib.metrics import weight_layers
from lib.quantizers import FakeQuantize, Quantizer, largest, per_row


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _on_grid(self), self.bias)


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, _on_grid(self), self.bias)


class _Quantizer(Quantizer):
    def forward(self, x: Tensor) -> Tensor:
        return FakeQuantize.apply(x, self.log_step.exp(), self.low, self.high)


STEP_RATE = 5.0  # of the learning rate: a logarithm is moved by its share, not by its size
TRAINED = {nn.Conv2d: _Conv2d, nn.Linear: _Linear, Quantizer: _Quantizer}
PLAIN = {trained: plain for plain, trained in TRAINED.items()}


def _on_grid(layer: nn.Module) -> Tensor:
    high = largest(layer.weight_bits)
    return FakeQuantize.apply(layer.weight, layer.log_step.exp(), -high, high)


@torch.no_grad()
def begin(model: nn.Module, scheme: dict, latent: dict[str, Tensor]) -> None:
    """Let a network that is quantized by `lib.ptq` be trained, in place.

    latent: the weights before they were rounded, by layer. Each starts as near to its own as its
    level allows, so that training begins with the very network that it was given.
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
    module.log_step.rate = STEP_RATE
    delattr(module, step)
    module.__class__ = TRAINED[type(module)]


@torch.no_grad()
def dampen(model: nn.Module, share: float) -> None:
    """Move weights within their range towards their level by a share of the distance.

    Weights that sit on the border between two levels flip from step to step; this is the gradient
    step of the dampening loss (Nagel et al. 2022, "Overcoming Oscillations", section 4.2) apart
    from the optimizer, as decoupled weight decay is.
    """
    for layer in weight_layers(model).values():
        if type(layer) in PLAIN:
            step, bits = per_row(layer.log_step.exp(), layer.weight), layer.weight_bits
            level = quantizers.to_levels(layer.weight, step, bits) * step
            inside = layer.weight.clamp(-largest(bits) * step, largest(bits) * step)
            layer.weight.add_(level - inside, alpha=share)


@torch.no_grad()
def finish(model: nn.Module) -> None:
    """Put the weights on their grid; the network is then what `attach` and its state make."""
    for module in model.modules():
        if type(module) in PLAIN:
            step = module.log_step.exp()
            del module.log_step
            module.__class__ = PLAIN[type(module)]
            if isinstance(module, Quantizer):
                module.register_buffer("step", step)
            else:
                module.register_buffer("weight_scale", step)
                quantizers.put_on_grid(module, module.weight_bits)
