"""Quantization-aware training (QAT): train the weights behind the levels, then return to the grid.

    model, latent = lib.ptq.quantize(..., scheme)
    begin(model, scheme, latent)
    ...                             # any training loop
    finish(model)

The scales of weight rows, and those of activations of less than UNROUNDED bits, are learned
together with the weights (LSQ, Esser et al. 2020). The optimizer sees their logarithms (Jain et al.
2020, "Trained Quantization Thresholds", section 3.2), so that one learning rate suits small and
large scales and none becomes negative.

Activations of UNROUNDED bits and more are not rounded during training, and their scales stay as
they are: these errors are small beside those of the weights, and a training step takes little more
than half the time. `finish` brings the rounding back, and `finished` shows the network with it
meanwhile.
"""

import copy

import torch
from torch import Tensor, nn

from lib import quantizers, rate
from lib.checkpoint import Checkpoint
from lib.evaluation import Evaluation
from lib.metrics import weight_layers
from lib.quantizers import FakeQuantize, Quantizer, max_level, per_row
from models.mobilenetv2 import MobileNetV2


class _TrainedConv2d(nn.Conv2d):
    """A convolution whose weights and bias go through their grids, and whose scales are learned."""

    weight_scale = property(lambda self: _row_scale(self))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *_on_grid(self))


class _TrainedLinear(nn.Linear):
    """A linear layer in the same way."""

    weight_scale = property(lambda self: _row_scale(self))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *_on_grid(self))


class _TrainedQuantizer(Quantizer):
    """A quantizer whose scale is learned."""

    step = property(lambda self: self.log_scale.exp())


class _Unrounded(Quantizer):
    """Clips to the quantizer's range without rounding; a signed one, which clips hardly anything,
    does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.signed else nn.functional.hardtanh(x, 0.0, self.clip)


SMALLEST_LOSS = 1e-6  # of a network without errors
# Scales learn this many times faster than weights: a step changes a logarithm, so a scale moves by
# a share of itself.
SCALE_LR_FACTOR = 5.0
BESIDE_STATE = ("scale_bits", "bias_scale")  # what lib.ptq leaves on a layer, not in its state
UNROUNDED = 8  # bits of activations from which on they are not rounded in training
TRAINED = {
    nn.Conv2d: _TrainedConv2d, quantizers.QuantConv2d: _TrainedConv2d,
    nn.Linear: _TrainedLinear, quantizers.QuantLinear: _TrainedLinear, Quantizer: _TrainedQuantizer,
}  # fmt: skip


def _on_grid(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a layer's weight and bias as `finish` will leave them, with gradients."""
    high = max_level(layer.weight_bits)
    weight = FakeQuantize.apply(layer.weight, _row_scale(layer), -high, high)
    bias = quantizers.bias_on_grid(layer)
    if hasattr(layer, "input_quantizer"):
        bias = quantizers.bias_in_accumulator_units(layer, bias, weight)
    return weight, _straight_through(layer.bias, bias)


def _row_scale(layer: nn.Module) -> Tensor:
    """Return the scales of a layer's rows (rows,), rounded to their mantissa bits."""
    scale = layer.log_scale.exp()
    return _straight_through(scale, quantizers.round_mantissa(scale, layer.scale_bits))


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return exactly `rounded`, with the gradient of x."""
    return rounded.detach() + (x - x.detach())


@torch.no_grad()
def begin(model: MobileNetV2, scheme: dict, latent: dict[str, Tensor]) -> None:
    """Make a network that lib.ptq quantized trainable, in place.

    latent: the weights before they were rounded, by layer. Each weight starts as near to its latent
    value as its level allows, so that training begins with exactly the given network. Scales and
    biases that were rounded to a few bits stay so.
    """
    for name, layer in weight_layers(model).items():
        bits = quantizers.bits_of(name, scheme)
        if bits < 32:
            scale = per_row(layer.weight_scale, layer.weight)
            rounding = (latent[name] - layer.weight).clamp(-0.49 * scale, 0.49 * scale)
            layer.weight.add_(torch.where(latent[name] == 0, 0, rounding))
            layer.weight_bits = bits
            _learn(layer, "weight_scale")
    for module in model.modules():
        if isinstance(module, Quantizer) and module is not model.image:
            if module.bits >= UNROUNDED:
                module.clip = float(module.high * module.step)
                module.plain, module.__class__ = type(module), _Unrounded
            else:
                _learn(module, "step")


def loss_per_squared_error(logits: Tensor, distill: float, temperature: float) -> float:
    """Return by how much lib.engine's loss rises per squared error of 1 in an image's logits.

    It turns a lambda in squared error, which ptq has, into one in loss.
    logits: (n, classes), of the network. distill, temperature: see lib.engine.Recipe.
    To second order, cross-entropy rises by half of error^T H error with H = diag(p) - p p^T, where
    p are the probabilities, and so does temperature^2 times the divergence from soft labels, with p
    at that temperature. H is averaged over the (classes - 1) directions that change p:
    (1 - sum of p^2) / (classes - 1).
    """
    def of(p: Tensor) -> float:
        return float((1 - p.square().sum(1)).mean()) / 2 / max(1, logits.shape[1] - 1)

    soft = of((logits / temperature).softmax(1))
    return (1 - distill) * of(logits.softmax(1)) + distill * soft


@torch.no_grad()
def cost_of_a_bit(
    model: nn.Module, images: Tensor, lambda_per_bit: float, result: Evaluation | None,
    distill: float, temperature: float,
) -> tuple[float, float]:  # fmt: skip
    """Return what a bit costs at a lambda: in training loss, and in the share of wrong answers on
    the validation split (0 without one).

    model: the network that training begins with. images: (n, 3, H, W), normalized.
    lambda_per_bit: see lib.ptq.quantize. result: of the model on the validation split, if there is
    one. distill, temperature: see lib.engine.Recipe.
    """
    logits = model(images)
    loss = lambda_per_bit * loss_per_squared_error(logits, distill, temperature)
    if not result:
        return loss, 0.0
    cross_entropy = lambda_per_bit * loss_per_squared_error(logits, 0.0, temperature)
    # Wrong answers rise with the cross-entropy, in about their present proportion. Where there are
    # none yet, one is taken: else bytes would count nothing.
    wrong = max(1, result.total - result.correct) / result.total
    return loss, cross_entropy * wrong / max(result.loss, SMALLEST_LOSS)


def pack(network: MobileNetV2, latent: dict[str, Tensor]) -> dict:
    """Return a network that lib.ptq made, and its latent weights, as plain types and tensors, so
    that training can be continued where lib.ptq might round otherwise."""
    return {
        "settings": network.settings, "state": network.state_dict(), "latent": latent,
        "beside_state": {
            name: {key: value for key, value in vars(layer).items() if key in BESIDE_STATE}
            for name, layer in weight_layers(network).items()
        },
    }  # fmt: skip


def unpack(
    packed: dict, scheme: dict, device: torch.device
) -> tuple[MobileNetV2, dict[str, Tensor]]:
    """Return the network and the latent weights that `pack` was given; scheme: of the network."""
    network = Checkpoint("quantized", packed["settings"], packed["state"], scheme).build(device)
    for name, values in packed["beside_state"].items():
        vars(network.get_submodule(name)).update(values)
    latent = {name: tensor.to(device) for name, tensor in packed["latent"].items()}
    return network, latent


def _learn(module: nn.Module, buffer: str) -> None:
    """Replace a buffer of scales by a parameter, and the module's class by its trained one."""
    module.log_scale = nn.Parameter(getattr(module, buffer).log())
    module.log_scale.lr_factor = SCALE_LR_FACTOR  # see lib.engine.parameter_groups
    delattr(module, buffer)
    module.plain, module.__class__ = type(module), TRAINED[type(module)]


def network_bits(model: nn.Module) -> Tensor:
    """Estimate the bits of the non-zero weights in the file, (), with gradients."""
    return sum(
        rate.coded_bits(
            layer.weight.flatten(1), _row_scale(layer)[:, None], max_level(layer.weight_bits)
        )
        for layer in weight_layers(model).values() if hasattr(layer, "log_scale")
    )  # fmt: skip


def finished(model: nn.Module) -> nn.Module:
    """Return a copy of a network in training as `finish` would leave it."""
    model = copy.deepcopy(model)
    finish(model)
    return model


@torch.no_grad()
def finish(model: nn.Module) -> None:
    """Put the weights on their grid: the network is then what `quantizers.attach` makes."""
    for module in model.modules():
        if isinstance(module, _Unrounded):
            module.__class__ = module.plain
        if hasattr(module, "log_scale"):
            is_layer = not isinstance(module, Quantizer)
            scale = _row_scale(module) if is_layer else module.step
            del module.log_scale
            module.__class__ = module.plain
            module.register_buffer("weight_scale" if is_layer else "step", scale)
            if is_layer:
                # + 0.0: small negative biases round to -0.0, no integer (it took 4.5 KB in a file).
                module.bias.copy_(quantizers.bias_on_grid(module) + 0.0)
                quantizers.put_on_grid(module, module.weight_bits)
                module.weight_scale[~module.weight.flatten(1).any(1)] = 1.0
