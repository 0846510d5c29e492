"""Post-training quantization: a network, some images without labels, and no training.

The network is walked once, layer by layer, in two copies: the fp32 one, and the quantized one whose
inputs carry the errors of everything before. Each layer is fitted so that on its *quantized* inputs
it gives the fp32 layer's outputs.

- **Layer reconstruction.** A layer is linear in its inputs, so its output's mean squared error is a
  quadratic form with the Gram matrix of the inputs (Nagel et al. 2020, "Up or Down?", equation 20;
  Frantar et al. 2022, GPTQ). Its integer minimum is sought by coordinate descent, all rows at once:
  each weight in turn goes to the best level given the others, and the row's step to the best step
  given its levels. Pruned weights are no coordinates: they stay zero.
- **Bias correction** (Nagel et al. 2019, section 4.2) is the intercept of that fit.
- **Clips** by mean squared error against the fp32 activations.
- **Equalization** (Nagel et al. 2019, section 4.1). A step a tensor wastes levels on channels of a
  small range. Dividing a channel by what its reader's column is multiplied by changes nothing, once
  ReLU6 is the quantizer's own clipping; into a depthwise layer that is a clip a channel for free.

For a small file, two more:

- **Short side values.** Rows' steps keep a few mantissa bits, biases lie on a grid. Both are
  rounded before what can make up for it: the last descent of the levels, the layers that follow.
- **Rate-distortion optimized quantization** (as in DeepCABAC, Wiedemann et al. 2020, section 3.2).
  The descent minimizes distortion + rate * bits, bits being those of lib/coder.py. So that a bit is
  worth the same everywhere, distortion is what it does to the logits: a row's error is weighed by
  the mean squared gradient of the logits behind it (KFC's approximation, Grosse and Martens 2016).
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import data, quantizers
from lib.metrics import weight_layers
from lib.quantizers import Quantizer, largest, per_row
from lib.rate import prices
from models.mobilenetv2 import ConvBNReLU6, InvertedResidual, MobileNetV2

ROWS = 65536  # positions that a layer is fitted on, at the most
SWEEPS = 3  # over the coordinates, between two fits of the steps
ROUNDS = 4  # fits of the steps
RIDGE = 1e-2  # of the mean eigenvalue: how much a weight is held where the images say nothing


@torch.no_grad()
def quantize(
    model: MobileNetV2, images: Tensor, scheme: dict, progress: Callable = iter, *,
    scale_bits: int | None = None, bias_bits: int = 2, rate: float = 0.0,
) -> tuple[MobileNetV2, dict[str, Tensor]]:  # fmt: skip
    """The network quantized by a scheme of lib.quantizers, in eval mode; the model stays as it was.

    images: (n, 3, H, W), normalized: see `calibration`. scheme["weight_scale"]: `channel`; or
    `tensor`: one step a tensor on the weights as they are before folding, rounded to nearest, batch
    norm's factor joining the steps, without equalization or reconstruction, so that weights on a
    grid keep their integers.
    scale_bits: mantissa bits of the rows' steps; None: 3, which the levels make up for, and 5 for
    `tensor`, where they cannot. bias_bits: biases are multiples of a power of two, about
    2^-bias_bits of the step of what the layer writes; 32: float32, as behind activations that are
    not quantized. rate: the squared error of an image's logits that a bit may cost; 0: bits cost
    nothing. Not for `tensor`.
    Returns the network and its weights as they were before rounding, by layer, for lib.qat.
    """
    target = quantizers.fold(model)
    quantized = copy.deepcopy(target)
    quantizers.attach(quantized, scheme)
    walk = _Walk(target, quantized, scheme, model)
    if scale_bits is None:
        scale_bits = 5 if walk.by_tensor else 3
    walk.scale_bits, walk.bias_bits, walk.rate = scale_bits, bias_bits, rate
    if rate:
        walk.sensitivity = sensitivity(target, images)
    if scheme["act_bits"] < 32 and scheme["weight_scale"] == "channel":
        walk.equalize(images[:256])
    walk.run(images, progress)
    return quantized.eval(), walk.latent


@torch.no_grad()
def layers_alone(
    model: MobileNetV2, images: Tensor, weight_bits: int, progress: Callable = iter
) -> dict[str, dict[str, Tensor]]:
    """The weight and bias of each layer of the folded network when it alone has so few bits."""
    target = quantizers.fold(model)
    quantized = copy.deepcopy(target)
    setup = scheme(weight_bits, 32)
    quantizers.attach(quantized, setup)
    _Walk(target, quantized, setup, model, alone=True).run(images, progress)
    return {
        name: {"weight": layer.weight, "bias": layer.bias}
        for name, layer in weight_layers(quantized).items()
    }


def scheme(weight_bits: int, act_bits: int, **more) -> dict:
    """That of lib.quantizers with the usual choices; more: what differs."""
    return {
        "method": "ptq", "weight_bits": weight_bits, "act_bits": act_bits,
        "weight_scale": "channel", "layer_bits": {}, **more,
    }  # fmt: skip


def calibration(split: data.Split, count: int, seed: int) -> Tensor:
    """So many images of a split, normalized; which ones depends on the seed alone."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return data.normalize(split.images[order[:count].to(split.images.device)])


@torch.no_grad()
def sensitivity(model: MobileNetV2, images: Tensor) -> dict[str, Tensor]:
    """Of each layer's rows: the squared error of an image's logits, up to a common shift, for an
    error of variance 1 in the row's outputs. {layer: (rows,)}.

    Between the rows of a layer, by the mean squared gradient of a random direction of the logits,
    which takes errors at different places for independent (KFC). They are not: a head's errors all
    point one way and are averaged over the map. So a layer's rows are scaled together to what is
    seen when its smallest weights are left out.
    """
    layers = weight_layers(model)
    found = _mean_squared_gradients(model, layers, images[:256])
    few = images[:64]
    expected = model(few)
    for name, layer in layers.items():
        if not layer.weight.any():
            continue
        kept = copy.deepcopy(layer)
        sizes = layer.weight[layer.weight != 0].abs().sort().values
        gone = (sizes.square().cumsum(0) < 0.02 * sizes.square().sum()).sum()
        kept.weight[layer.weight.abs() <= sizes[gone]] = 0
        size = torch.zeros_like(found[name])

        def disturb(_, inputs, y, kept=kept, size=size):
            error = (kept(inputs[0]) - y).movedim(1, -1)
            error = error - error.flatten(0, -2).mean(0)
            size.copy_(error.flatten(0, -2).square().mean(0))
            return y + error.movedim(-1, 1)

        hook = layer.register_forward_hook(disturb)
        error = model(few) - expected
        hook.remove()
        seen = (error - error.mean(1, keepdim=True)).square().sum(1).mean()
        found[name] *= seen / (found[name] * size).sum().clamp(min=1e-20)
    return found


@torch.enable_grad()
def _mean_squared_gradients(model, layers: dict, images: Tensor) -> dict[str, Tensor]:
    """{layer: (rows,)}, summed over places, the mean of the images."""
    found, hooks = dict.fromkeys(layers, 0.0), []

    def add(grad: Tensor, name: str) -> None:
        found[name] += grad.square().sum([d for d in range(grad.ndim) if d != 1])

    for name, layer in layers.items():
        hooks.append(layer.register_forward_hook(
            lambda _, __, y, name=name: y.register_hook(lambda grad: add(grad, name)) and None
        ))  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    for batch in images.split(64):
        x = batch.clone().requires_grad_()
        logits = model(x)
        direction = torch.randn(logits.shape, generator=draw).to(logits.device)
        torch.autograd.grad(logits, x, direction - direction.mean(1, keepdim=True))
    for hook in hooks:
        hook.remove()
    return {name: total / len(images) for name, total in found.items()}


class _Walk:
    """The fp32 network and the quantized one, side by side.

    t and x are a tensor in the two; where it has ranges (channels,), x is in their unit: x = t / r.
    """

    def __init__(self, target, quantized, scheme: dict, model: MobileNetV2, alone=False):
        self.target, self.quantized, self.scheme = target, quantized, scheme
        self.model = model  # not folded: where the grid of one step a tensor lies
        self.alone = alone  # each layer as if all others were fp32
        self.by_tensor = scheme["weight_scale"] == "tensor"
        self.names = {layer: name for name, layer in weight_layers(target).items()}
        self.layers = weight_layers(quantized)
        self.latent: dict[str, Tensor] = {}  # weights before rounding, by layer
        self.ranges: dict[ConvBNReLU6, Tensor] = {}  # of its outputs, by the target's module
        self.scale_bits, self.bias_bits, self.rate = 23, 32, 0.0
        self.sensitivity: dict[str, Tensor] = {}  # see there; of the target's outputs

    def equalize(self, images: Tensor) -> None:
        """Find the range of each channel behind a ReLU6: the clip that loses least at act_bits.

        Not of the streams, whose ranges would have to suit all blocks of a stage: it did not pay.
        """
        outputs = {}
        blocks = self.target.features[1:-1]
        depthwise = [[m for m in block.conv if isinstance(m, ConvBNReLU6)][-1] for block in blocks]
        hooks = [
            module.register_forward_hook(lambda m, _, y: outputs.__setitem__(m, y))
            for module in self.target.features[:-1].modules()
            if isinstance(module, ConvBNReLU6)
        ]
        self.target(images)
        for hook in hooks:
            hook.remove()
        for module, y in outputs.items():
            clips = _channel_clips(y, self.scheme["act_bits"])
            # The reader's columns take the ranges. A depthwise row is one column: its step takes
            # them whole. In a projection they would widen its rows, so they share: half each.
            self.ranges[module] = clips.sqrt() if module in depthwise else clips
        if blocks[0].residual:  # the stem's outputs are added to a stream, which has no ranges
            del self.ranges[self.target.features[0]]

    def run(self, images: Tensor, progress: Callable) -> None:
        target, quantized = self.target, self.quantized
        t, x, reads = images, quantized.image(images), None
        pairs = list(zip(target.features, quantized.features, strict=True))
        for a, b in progress(pairs):
            if isinstance(a, InvertedResidual):
                x, t = self.block(a, b, x, t, reads)
                reads = None
            else:
                x, t, reads = self.activated(a, b, x, t, reads)
        x, t = x.mean((2, 3)), t.mean((2, 3))
        self.calibrate(quantized.pooled, x, t)
        self.layer(target.classifier[1], quantized.pooled(x), t)

    def activated(self, a: ConvBNReLU6, b: ConvBNReLU6, x: Tensor, t: Tensor, reads):
        """A convolution and what stands for its ReLU6: the outputs in the two, and their ranges."""
        writes = self.ranges.get(a)
        x, t = self.layer(a[0], x, t, reads, writes)
        t = a[2](t)
        self.calibrate(b[2], x, t, writes)
        return b[2](self.shorten_bias(b[0], b[2], x)), t, writes

    def block(self, a: InvertedResidual, b: InvertedResidual, x: Tensor, t: Tensor, reads):
        x0, t0 = x, t
        self.calibrate(b.input, x, t)
        x = b.input(x)
        for c, d in zip(a.conv, b.conv, strict=True):
            if isinstance(c, ConvBNReLU6):
                x, t, reads = self.activated(c, d, x, t, reads)
            elif isinstance(c, nn.Conv2d):
                x, t = self.layer(c, x, t, reads)
        projection = list(weight_layers(b).values())[-1]
        if a.residual:
            self.calibrate(b.addend, x, t)
            x = x0 + b.addend(self.shorten_bias(projection, b.addend, x))
            t = t0 + t
            self.calibrate(b.stream, x, t)
        else:
            self.calibrate(b.stream, x, t)
            x = self.shorten_bias(projection, b.stream, x)
        return b.stream(x), t

    def calibrate(self, quantizer: nn.Module, x: Tensor, t: Tensor, ranges=None) -> None:
        if isinstance(quantizer, Quantizer):
            quantizer.step.copy_(_best_step(x, t, ranges, quantizer))

    def shorten_bias(self, layer: nn.Module, quantizer: nn.Module, x: Tensor) -> Tensor:
        """Put the bias of a layer that writes x on its grid; returns x with that bias."""
        if self.bias_bits == 32 or not isinstance(quantizer, Quantizer):
            return x
        if not hasattr(layer, "weight_scale"):  # 32 bits: no file will hold it as integers
            return x
        layer.bias_step = float(quantizer.step.log2().round().exp2()) * 2.0**-self.bias_bits
        return _add_to_bias(layer, quantizers.short_bias(layer) - layer.bias, x)

    def layer(self, a: nn.Module, x: Tensor, t: Tensor, reads=None, writes=None):
        """Quantize the layer that stands for `a`; returns the outputs of the two."""
        name = self.names[a]
        layer, bits = self.layers[name], quantizers.bits_of(name, self.scheme)
        weight = layer.weight
        if reads is not None:
            depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
            weight.mul_(reads.view(-1, 1, 1, 1) if depthwise else reads.view(1, -1, 1, 1))
        if writes is not None:
            weight.div_(per_row(writes, weight))
            layer.bias.div_(writes)
        self.latent[name] = weight.clone()
        t = a(t)
        wanted = t if writes is None else t / writes.view(-1, 1, 1)
        if self.by_tensor:
            self.put_on_tensor_grid(name, layer, bits)
        elif bits < 32 or self.scheme["act_bits"] < 32:
            weights = self.sensitivity.get(name)
            if weights is not None and writes is not None:
                weights = weights * writes**2
            _reconstruct(layer, x, wanted, bits, self.scale_bits, weights, self.rate)
        layer.scale_bits = self.scale_bits
        y = (a if self.alone else layer)(x)
        error = (wanted - (layer(x) if self.alone else y)).movedim(1, -1).flatten(0, -2).mean(0)
        corrected = _add_to_bias(layer, error, y)
        return y if self.alone else corrected, t

    def put_on_tensor_grid(self, name: str, layer: nn.Module, bits: int) -> None:
        if bits == 32:
            return
        weight = self.model.get_submodule(name).weight
        scale = quantizers.grid_scale(weight, bits)
        norm = quantizers.norm_behind(self.model, name)
        factor = torch.ones(len(weight), device=weight.device)
        if norm is not None:
            factor = quantizers.norm_factor(norm).to(weight.dtype)
        levels = quantizers.to_levels(weight, scale, bits)
        levels[factor == 0] = 0  # nothing is read of such a row, and a step has to be a number
        step = quantizers.short(scale * factor, self.scale_bits)
        layer.weight_scale.copy_(torch.where(levels.flatten(1).any(1), step, 1.0))
        layer.weight.copy_(levels * per_row(layer.weight_scale, levels) + 0.0)


def _add_to_bias(layer: nn.Module, change: Tensor, y: Tensor) -> Tensor:
    """Returns the layer's outputs y with the new bias, as the forward pass rounds it."""
    whole = isinstance(layer, quantizers.Conv2d | quantizers.Linear)
    before, layer.bias[:] = layer.bias.clone(), layer.bias + change
    if whole:
        change = quantizers.whole_bias(layer, layer.bias, layer.weight)
        change -= quantizers.whole_bias(layer, before, layer.weight)
    return y + change.view(-1, *[1] * (y.ndim - 2))


def _channel_clips(y: Tensor, bits: int) -> Tensor:
    """For each channel of (N, C, H, W), none negative, the clip of least squared error, about 1
    altogether. A channel that is never on gets the middle one."""
    values = y.transpose(0, 1).flatten(1)
    high, top = 2**bits - 1, values.amax(1)
    some = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0))[:8192]
    values = values[:, some.to(y.device)]
    least, clips = torch.full_like(top, torch.inf), top.clone()
    for share in torch.linspace(1, 0.2, 33).tolist():
        step = (top * share / high).clamp(min=1e-12)[:, None]
        error = (values / step).round_().clamp_(max=high).mul_(step).sub_(values).square_().mean(1)
        clips = torch.where(error < least, top * share, clips)
        least = torch.minimum(least, error)
    middle = clips[clips > 0].median() if (clips > 0).any() else clips.new_tensor(1.0)
    return torch.where(clips > 0, clips / middle, 1.0).clamp(min=0.02)


def _best_step(x: Tensor, t: Tensor, ranges: Tensor | None, quantizer: Quantizer) -> Tensor:
    """The step with which the quantized x comes nearest to t: a search over clips."""
    if ranges is not None:
        t = t / ranges.view(-1, 1, 1)
    top = t.abs().amax().clamp(min=1e-6)
    x, t = (y.movedim(1, -1).flatten(0, -2) for y in (x, t))  # (positions, channels)
    stride = max(1, x.numel() // 50_000)
    x, t = x[::stride], t[::stride]

    def error(clip: Tensor) -> float:
        step = clip / quantizer.high
        y = (x / step).round_().clamp_(quantizer.low, quantizer.high).mul_(step)
        return float(y.sub_(t).square_().mean())

    best = min((top * 0.95**i for i in range(45)), key=error)
    return min((best * (1 + i / 100) for i in range(-4, 5)), key=error) / quantizer.high


def _reconstruct(
    layer, x: Tensor, z: Tensor, bits: int, scale_bits: int = 23, weights=None, rate: float = 0.0
) -> None:
    """Weights and steps of a layer for the least squared error against z on inputs x, each up to
    its mean: that is the bias's. Steps of scale_bits mantissa bits, 1 for rows of zeros.

    With a rate: for the least sum of weights (rows,) * squared error + rate * bits.
    """
    few = slice(0, max(1, ROWS * x.shape[1] // x[0].numel()))  # so many images have ROWS places
    x, z = x[few], z[few]
    inputs, outputs = _rows(layer, x, z)  # (groups, positions, columns), (groups, positions, rows)
    groups, count, columns = inputs.shape
    inputs = inputs - inputs.mean(1, keepdim=True)
    outputs = outputs - outputs.mean(1, keepdim=True)
    gram = inputs.transpose(1, 2) @ inputs / count
    cross = outputs.transpose(1, 2) @ inputs / count
    weight = layer.weight.reshape(groups, -1, columns).clone()
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    gram = gram + ridge[:, None, None] * torch.eye(columns, device=gram.device)
    cross = cross + ridge[:, None, None] * weight
    fit = _Rows(weight, weight != 0, gram, cross, bits)
    if bits == 32:
        fit.descend(sweeps=4)
    else:
        fit.choose_steps()
        if rate:
            price = rate / weights.reshape(groups, -1).clamp(min=1e-12)
            fit.price(price)
            fit.choose_steps()
        for _ in range(ROUNDS):
            fit.descend(SWEEPS)
            fit.refit_steps()
            if rate:
                fit.price(price)
        fit.shorten_steps(scale_bits)
        fit.descend(SWEEPS)
        step = torch.where(fit.weight.any(2, keepdim=True), fit.step, 1)
        layer.weight_scale.copy_(step.flatten())
    layer.weight.copy_(fit.weight.reshape(layer.weight.shape))
    if bits < 32:
        quantizers.put_on_grid(layer, bits)


def _rows(layer, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a layer as those of a matrix product; depthwise: one a channel."""
    if isinstance(layer, nn.Linear):
        return x[None], z[None]
    out = z.permute(0, 2, 3, 1)
    if layer.kernel_size == (1, 1):
        return x.permute(0, 2, 3, 1).reshape(1, -1, x.shape[1]), out.reshape(1, -1, z.shape[1])
    few = max(1, ROWS // 4 // z[0, 0].numel()) if layer.groups > 1 else len(x)
    x, out = x[:few], out[:few]
    patches = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    patches = patches.view(len(x), layer.groups, -1, patches.shape[-1])  # n, groups, columns, HW
    patches = patches.permute(1, 0, 3, 2).reshape(layer.groups, -1, patches.shape[2])
    out = out.reshape(-1, layer.groups, z.shape[1] // layer.groups)
    return patches, out.transpose(0, 1)


class _Rows:
    """min over levels: sum over rows of w H w - 2 c w, w = level * step, on the mask's support;
    with prices, plus those of the levels."""

    def __init__(self, weight, mask, gram, cross, bits):
        self.wanted, self.weight = weight, weight.clone()
        self.mask, self.gram, self.cross, self.bits = mask, gram, cross, bits
        self.high = largest(bits) if bits < 32 else None
        self.step = self.prices = None

    def error(self, weight: Tensor) -> Tensor:
        return ((weight @ self.gram - 2 * self.cross) * weight).sum(2, keepdim=True)

    def levels(self) -> Tensor:
        return (self.weight / self.step).round_()

    def on_grid(self, weight: Tensor, step: Tensor) -> Tensor:
        return (weight / step).round_().clamp_(-self.high, self.high) * step

    def price(self, rate: Tensor) -> None:
        """From here on bits cost; rate: (groups, rows), of a bit in units of the row's error."""
        self.rate = rate[:, :, None]
        zero, nonzero, size = prices(self.levels().flatten(0, 1), self.high)
        self.prices = zero.view_as(self.weight), nonzero.view_as(self.weight), size

    def cost(self, levels: Tensor, at=slice(None)) -> Tensor:
        """Of levels in the columns `at`, in units of their rows' error."""
        zero, nonzero, size = self.prices
        sizes = size[levels.abs().long()]
        return self.rate * torch.where(levels == 0, zero[:, :, at], nonzero[:, :, at] + sizes)

    def choose_steps(self) -> None:
        """Of a range of clips, the one that rounding to nearest loses least with."""
        top = self.wanted.abs().amax(2, keepdim=True)
        top = torch.where(top > 0, top, torch.ones_like(top) * self.high)
        best = torch.full_like(top, torch.inf)
        self.step = top / self.high
        for share in torch.linspace(2 if self.prices else 1, 0.3, 29).tolist():
            step = top * share / self.high
            weight = self.on_grid(self.wanted, step)
            error = self.error(weight)
            if self.prices:
                error += (self.cost((weight / step).round_()) * self.mask).sum(2, keepdim=True)
            self.step = torch.where(error < best, step, self.step)
            best = torch.minimum(error, best)
        self.weight = self.on_grid(self.wanted, self.step)

    def descend(self, sweeps: int) -> None:
        w, gram = self.weight, self.gram
        slope = w @ gram - self.cross  # half the gradient
        for _ in range(sweeps):
            for j in range(w.shape[2]):
                new = w[:, :, j] - slope[:, :, j] / gram[:, j, j, None]
                if self.high:
                    step = self.step[:, :, 0]
                    level = (new / step).round_().clamp_(-self.high, self.high)
                    if self.prices:
                        level = self.cheapest(new / step, level, gram[:, j, j, None] * step**2, j)
                    new = level * step
                change = torch.where(self.mask[:, :, j], new - w[:, :, j], 0)
                slope.addcmul_(change[:, :, None], gram[:, None, j])
                w[:, :, j] += change

    def cheapest(self, exact: Tensor, nearest: Tensor, curve: Tensor, column: int) -> Tensor:
        """Of the nearest level, its neighbour towards zero and zero: (groups, rows)."""
        levels = torch.stack([nearest, nearest - nearest.sign(), torch.zeros_like(nearest)], 2)
        error = (levels - exact[:, :, None]).square_() * curve[:, :, None]
        best = (error + self.cost(levels, slice(column, column + 1))).argmin(2, keepdim=True)
        return levels.gather(2, best)[:, :, 0]

    def refit_steps(self) -> None:
        """The best step for the levels as they are."""
        curve = ((self.weight @ self.gram) * self.weight).sum(2, keepdim=True)
        factor = (self.cross * self.weight).sum(2, keepdim=True) / curve.clamp(min=1e-20)
        factor = torch.where((curve > 0) & (factor > 0.1), factor, 1.0)
        self.step, self.weight = self.step * factor, self.weight * factor

    def shorten_steps(self, bits: int) -> None:
        """To the shorter step below or above, whichever loses less: at many bits the one above,
        since below it the largest weights would be clipped."""
        below, above = (quantizers.short(self.step, bits, r) for r in (torch.floor, torch.ceil))
        weights = self.on_grid(self.weight, below), self.on_grid(self.weight, above)
        better = self.error(weights[0]) <= self.error(weights[1])
        self.step = torch.where(better, below, above)
        self.weight = torch.where(better, *weights)
