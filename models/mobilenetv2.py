"""MobileNetV2 (Sandler et al. 2018) for small images, with torchvision's parameter names.

Every width, stride and residual connection is data (`standard()` makes the usual ones), so that
a compacted network is the same class with other numbers, and a checkpoint can rebuild its own.
"""

import torch
from torch import Tensor, nn

# Expansion, channels, blocks, stride of each stage: table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
          (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip


def standard(
    width: float = 1.0, downsample: int = 4, dropout: float = 0.2, classes: int = 10
) -> dict:
    """Return the settings of the usual network, in plain types.

    downsample: the side of the input divided by the side of the final map. 4 is the report's choice
    (32x32 -> 8x8: the first three of the five layers that have stride 2 in the paper get stride 1);
    8 leaves 4x4 at a third of the MACs; 32 is torchvision's network.
    """
    full_size = {4: 3, 8: 2, 16: 1, 32: 0}  # downsample: how many of the five get stride 1
    if downsample not in full_size:
        raise ValueError(f"downsample must be one of {sorted(full_size)}, not {downsample}")
    if not width > 0:
        raise ValueError(f"width must be over 0, not {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    at_one = full_size[downsample]
    stem = _round_channels(32 * width)
    settings = {
        "stem": stem, "stem_stride": 1 if at_one else 2, "blocks": [],
        "head": _round_channels(1280 * max(1.0, width)), "classes": classes, "dropout": dropout,
    }  # fmt: skip
    channels, seen = stem, 1  # the stem is the first of the five
    for expansion, out, repeats, stride in STAGES:
        out = _round_channels(out * width)
        if stride == 2:
            seen += 1
            stride = 1 if seen <= at_one else 2
        for i in range(repeats):
            s = stride if i == 0 else 1
            settings["blocks"].append({
                "hidden": channels * expansion, "out": out, "stride": s,
                "expand": expansion != 1, "residual": has_residual(s, channels, out),
            })  # fmt: skip
            channels = out
    return settings


def has_residual(stride: int, inputs: int, outputs: int) -> bool:
    """Return whether a block of the usual network adds its input to its output.

    It does wherever the shapes allow it (section 3.3 of the paper). At small widths that includes
    the first block of some stages.
    """
    return stride == 1 and inputs == outputs


def _round_channels(value: float) -> int:
    """Round to a multiple of 8, at most 10% below the value (torchvision's _make_divisible)."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def settings_of(state: dict[str, Tensor], downsample: int = 4) -> dict:
    """Return the settings of a plain torchvision state dict.

    Widths come from its shapes. Strides leave no trace in a state dict: they are those that
    `standard` has for `downsample`, and residual connections follow from shapes and strides.
    Raises ValueError if the tensors are not those of a MobileNetV2.
    """
    settings = standard(downsample=downsample)
    try:
        settings["stem"] = channels = state["features.0.0.weight"].shape[0]
        for i, block in enumerate(settings["blocks"], start=1):
            project = state[f"features.{i}.conv.{2 if block['expand'] else 1}.weight"]
            block["out"], block["hidden"] = project.shape[:2]
            block["residual"] = has_residual(block["stride"], channels, block["out"])
            channels = block["out"]
        settings["head"] = state["features.18.0.weight"].shape[0]
        settings["classes"] = state["classifier.1.weight"].shape[0]
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"not the state dict of a MobileNetV2 (at {error})") from None
    return settings


def conv_norm(
    folded: bool, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution and its batch norm.

    folded: the batch norm is part of the convolution's weight and bias; an Identity replaces it.
    """
    if type(stride) is not int or not 1 <= stride <= 255:
        raise ValueError(f"a stride of {stride!r}, not 1 to 255")
    if min(inputs, outputs) < 1:
        raise ValueError(f"a layer of {inputs} channels to {outputs}")
    pad = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=folded)
    return [conv, nn.Identity() if folded else nn.BatchNorm2d(outputs)]


class ConvBNReLU6(nn.Sequential):
    """A convolution, batch norm and ReLU6; arguments as of `conv_norm`.

    Named fields for what a state dict calls 0, 1 and 2, as torchvision does.
    """

    conv = property(lambda self: self[0])
    norm = property(lambda self: self[1])
    activation = property(lambda self: self[2])  # set by index: nn.Module hides property setters

    def __init__(self, *args):
        # Not in place: autograd would copy the input first, and a training step is bound by memory.
        super().__init__(*conv_norm(*args), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, activation = self
        # oneDNN has no bf16 kernel for the backward pass of a strided depthwise convolution on the
        # CPU, and its stand-in takes half of a training step: these two or three layers stay fp32.
        if torch.is_autocast_enabled("cpu") and conv.groups > 1 and conv.stride[0] > 1:
            with torch.autocast("cpu", enabled=False):
                x = conv(x.float()).to(x.dtype)
        else:
            x = conv(x)
        return activation(norm(x))


class InvertedResidual(nn.Module):
    """A block: 1x1 expansion, 3x3 depthwise, 1x1 linear projection (section 3.3 of the paper).

    `input`, `addend` and `stream` do nothing until a quantizer takes their place. The layers of
    `conv` have names; `expand` is None in a block without expansion.
    """

    expand = property(lambda self: self.conv[0] if len(self.conv) == 4 else None)
    depthwise = property(lambda self: self.conv[-3])
    project = property(lambda self: self.conv[-2])
    project_norm = property(lambda self: self.conv[-1])

    def __init__(self, folded, inputs, hidden, out, stride, expand, residual):
        super().__init__()
        if residual and not has_residual(stride, inputs, out):
            raise ValueError(f"a residual block of stride {stride}, {inputs} channels to {out}")
        if not expand and hidden != inputs:
            raise ValueError(f"a block without expansion, {inputs} channels, {hidden} hidden ones")
        layers = [ConvBNReLU6(folded, inputs, hidden, 1)] if expand else []
        layers += [
            ConvBNReLU6(folded, hidden, hidden, 3, stride, hidden),
            *conv_norm(folded, hidden, out, 1),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = residual
        self.input, self.addend, self.stream = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.addend(self.conv(self.input(x)))
        return self.stream(x + y if self.residual else y)


class MobileNetV2(nn.Module):
    """The network: from images (N, 3, H, W), normalized floats, to logits (N, classes).

    settings: see `standard`; with `folded` true there are no batch norms. `image` and `pooled` do
    nothing until a quantizer takes their place.
    """

    stem = property(lambda self: self.features[0])
    blocks = property(lambda self: list(self.features)[1:-1])
    head = property(lambda self: self.features[-1])
    linear = property(lambda self: self.classifier[1])

    def __init__(self, settings: dict):
        super().__init__()
        self.settings = settings
        channels, folded = settings["stem"], settings.get("folded", False)
        self.image, self.pooled = nn.Identity(), nn.Identity()
        features = [ConvBNReLU6(folded, 3, channels, 3, settings["stem_stride"])]
        for block in settings["blocks"]:
            features.append(InvertedResidual(folded, channels, **block))
            channels = block["out"]
        features.append(ConvBNReLU6(folded, channels, settings["head"], 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Dropout(settings["dropout"]), nn.Linear(settings["head"], settings["classes"])
        )
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.image(x))
        if x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
            x.register_hook(_channels_last)
        x = nn.functional.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(self.pooled(torch.flatten(x, 1)))


def _channels_last(gradient: Tensor) -> Tensor:
    """Return a gradient in the layout of the network: that of the pooling is contiguous, and with
    two layouts at once batch norm takes many times as long (on the CPU 26 ms, not 1.6)."""
    return gradient.contiguous(memory_format=torch.channels_last)


def _initialize(module: nn.Module) -> None:
    """Draw initial weights as torchvision does: He et al. 2015, fan-out; the classifier's small."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)
