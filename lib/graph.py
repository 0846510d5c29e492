"""Networks as ONNX graphs, built node by node: fp32, and the integer network.

Standard operators of opset 17 alone, weights inside, any number of images, the same bytes for the
same network. The integer graph is lib.integer's, with what ONNX says otherwise:

- Activations are uint8: unsigned levels as they are, signed ones with zero point 128.
- Weights are in 8 bits, at fewer bits too: int8 where that is exact everywhere, else uint8 with
  zero point 128. Processors with AVX2 and without VNNI multiply uint8 by int8 in pairs whose sum
  saturates at 16 bits (vpmaddubsw); onnxruntime's kernels for two uint8 are exact, and take about
  twice as long. A depthwise layer has no pairs, and levels of up to 7 bits cannot saturate: see
  `_pairs_fit`. Before a projection, channels are put in an order in which pairs do not: `_order`.
  (A stream's have several readers, which no order suits all.)
- Channels are padded with zeros to a multiple of 16, so that vectors have no remainders.
- Requantization: QLinearConv multiplies by the same ratio of scales in floating point and rounds
  halves to even. A level differs from lib.integer's where the rounding of floats crosses a half.
- The residual addition and the average are DequantizeLinear, Add or GlobalAveragePool,
  QuantizeLinear; onnxruntime makes integer kernels of each three.
- The classifier is MatMulInteger, its int32 bias is added to it; logits = float(acc) * scale.
- The image's levels come from the same table of 768, by Gather.
"""

import json

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lib import quantizers
from lib.fixedpoint import Grid
from lib.integer import IntegerNetwork, Layer
from models.mobilenetv2 import ConvBNReLU6, InvertedResidual, MobileNetV2

OPSET, IR = 17, 8  # of 2022: old enough for any runtime in use
ZERO = 128  # the zero point of signed levels in uint8
MULTIPLE = 16  # of channels
PAIR = (2**15 - 1) // 255  # two weights of one sign that add up to no more fit, see `_pairs_fit`
FORMAT, META = "mobilenetv2-cifar10/onnx/1", "mobilenetv2-cifar10"  # value of `format`; its key


class _Graph:
    """Nodes and initializers in the order in which they were added."""

    def __init__(self):
        self.nodes, self.constants = [], {}

    def constant(self, name: str, array) -> str:
        if torch.is_tensor(array):
            array = array.detach().cpu().numpy()
        self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def __call__(self, kind: str, inputs: list[str], name: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def model(self, image: int, classes: int, meta: dict) -> onnx.ModelProto:
        """image: type of the elements of the input `images` (n, 3, 32, 32); output: `logits`."""
        inputs = [helper.make_tensor_value_info("images", image, ["n", 3, 32, 32])]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", classes])]
        graph = helper.make_graph(
            self.nodes, "MobileNetV2", inputs, outputs, list(self.constants.values())
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR,
            producer_name=META,
        )  # fmt: skip
        text = json.dumps(meta, sort_keys=True)
        helper.set_model_props(model, {"format": FORMAT, META: text})
        onnx.checker.check_model(model, full_check=True)
        return model


# ---- fp32 ----------------------------------------------------------------------------------------


@torch.no_grad()
def fp32(model: MobileNetV2, meta: dict) -> onnx.ModelProto:
    """A network in eval mode, batch norm folded; its input is float32, normalized."""
    model = quantizers.fold(model).cpu()
    g = _Graph()

    def conv(layer: nn.Conv2d, x: str, name: str) -> str:
        inputs = [x, g.constant(f"{name}.weight", layer.weight.contiguous()),
                  g.constant(f"{name}.bias", layer.bias)]  # fmt: skip
        geometry = _geometry(layer.stride[0], layer.padding[0], layer.weight)
        return g("Conv", inputs, name, group=layer.groups, **geometry)

    def activated(module: ConvBNReLU6, x: str, name: str) -> str:
        return g("Clip", [conv(module[0], x, f"{name}.0"), *clip], f"{name}.relu6")

    clip = [g.constant("zero", np.float32(0)), g.constant("six", np.float32(6))]
    x = "images"
    for i, module in enumerate(model.features):
        if not isinstance(module, InvertedResidual):
            x = activated(module, x, f"features.{i}")
            continue
        y = x
        for j, layer in enumerate(module.conv):
            name = f"features.{i}.conv.{j}"
            if isinstance(layer, ConvBNReLU6):
                y = activated(layer, y, name)
            elif isinstance(layer, nn.Conv2d):
                y = conv(layer, y, name)
        x = g("Add", [x, y], f"features.{i}.sum") if module.residual else y
    x = g("Flatten", [g("GlobalAveragePool", [x], "average")], "flat")
    layer = model.classifier[1]
    inputs = [x, g.constant("classifier.1.weight", layer.weight),
              g.constant("classifier.1.bias", layer.bias)]  # fmt: skip
    g("Gemm", inputs, "logits", transB=1)
    return g.model(TensorProto.FLOAT, model.settings["classes"], meta)


def _geometry(stride: int, padding: int, kernel: torch.Tensor) -> dict:
    size = list(kernel.shape[2:])
    return {"kernel_shape": size, "strides": [stride] * 2, "pads": [padding] * 4}


# ---- integers ------------------------------------------------------------------------------------


def int8(network: IntegerNetwork, meta: dict) -> onnx.ModelProto:
    """The integer network; its input is uint8, as images come.

    A padded channel has no weights and no bias: its level is 0.
    """
    g = _Graph()
    for name, point in (("unsigned.zero", 0), ("signed.zero", ZERO)):
        g.constant(name, np.uint8(point))
    g.constant("int8.zero", np.int8(0))

    def of(name: str, grid: Grid) -> list[str]:
        """Scale and zero point of a tensor."""
        step = g.constant(f"{name}.step", np.float32(grid.step))
        return [step, "signed.zero" if grid.signed else "unsigned.zero"]

    def conv(layer: Layer, x: str, order=slice(None), inputs=slice(None)) -> str:
        """order, inputs: of the channels that it writes, and reads."""
        kernel, scale = layer.weight[order][:, inputs], layer.scale[order] / layer.reads.step
        bias, more = layer.bias[order], -len(kernel) % MULTIPLE
        columns = -kernel.shape[1] % MULTIPLE if layer.groups == 1 and x != "image" else 0
        kernel = F.pad(kernel, (0, 0, 0, 0, 0, columns, 0, more))
        scale = F.pad(scale.float(), (0, more), value=1.0)
        signed = layer.groups > 1 or _pairs_fit(kernel)
        inputs = [x, *of(x, layer.reads), weight(layer, kernel, signed),
                  g.constant(f"{layer.name}.weight_scale", scale),
                  "int8.zero" if signed else "signed.zero", *of(layer.name, layer.writes),
                  g.constant(f"{layer.name}.bias", F.pad(bias, (0, more)))]  # fmt: skip
        geometry = _geometry(layer.stride, layer.padding, kernel)
        groups = len(kernel) if layer.groups > 1 else 1
        return g("QLinearConv", inputs, layer.name, group=groups, **geometry)

    def weight(layer: Layer, levels: torch.Tensor, signed: bool) -> str:
        if not signed:
            levels = (levels.to(torch.int16) + ZERO).to(torch.uint8)
        return g.constant(f"{layer.name}.weight", levels)

    def decoded(x: str, grid: Grid, name: str) -> str:
        return g("DequantizeLinear", [x, *of(x, grid)], f"{name}.float")

    def encoded(x: str, grid: Grid, name: str) -> str:
        return g("QuantizeLinear", [x, *of(name, grid)], name)

    first = g.constant("table.first", np.arange(0, 768, 256, dtype=np.int32).reshape(3, 1, 1))
    table = g.constant("table", (network.table + ZERO).to(torch.uint8).flatten())
    places = g("Add", [g("Cast", ["images"], "pixels", to=TensorProto.INT32), first], "places")
    x = conv(network.stem, g("Gather", [table, places], "image"))
    for i, block in enumerate(network.blocks, 1):
        *expand, depthwise, projection = block.layers
        order = _order(projection.weight) if expand else slice(None)
        y = x
        for layer in expand:
            y = conv(layer, y, order)
        y = conv(projection, conv(depthwise, y, order), inputs=order)
        if block.sum is not None:
            name, total = f"features.{i}.sum", block.sum
            terms = [decoded(x, total.x, f"{name}.x"), decoded(y, total.addend, f"{name}.addend")]
            y = encoded(g("Add", terms, f"{name}.float"), total.writes, name)
        x = y
    x = decoded(conv(network.head, x), network.head.writes, "head")
    x = encoded(g("GlobalAveragePool", [x], "average.float"), network.pooled, "average")
    last, x = network.classifier, g("Flatten", [x], "flat")
    levels = F.pad(last.weight, (0, -last.weight.shape[1] % MULTIPLE)).T
    inputs = [x, weight(last, levels, signed=False), "unsigned.zero", "signed.zero"]
    acc = g("Add", [g("MatMulInteger", inputs, "products"), g.constant("bias", last.bias)], "acc")
    acc = g("Cast", [acc], "acc.float", to=TensorProto.FLOAT)
    g("Mul", [acc, g.constant("scale", last.scale.float())], "logits")
    return g.model(TensorProto.UINT8, len(last.bias), meta)


def _sides(kernel: torch.Tensor) -> list[torch.Tensor]:
    """The positive weights of each row, and the negative: signs that differ cannot add up."""
    rows = kernel.flatten(1).to(torch.int32)
    return [rows.clamp(min=0), -rows.clamp(max=0)]


def _pairs_fit(kernel: torch.Tensor) -> bool:
    """Whether two products of uint8 with these weights, int8 (out, in, k, k), always fit into 16
    bits together: those of inputs 2i and 2i + 1, or of any two where the kernel is not 1x1."""
    for side in _sides(kernel):
        two = side.unflatten(1, (-1, 2)) if kernel.shape[2] == 1 else side.topk(2).values
        if two.sum(-1).max() > PAIR:
            return False
    return True


def _order(kernel: torch.Tensor) -> torch.Tensor:
    """The inputs of a 1x1 kernel, int8 (out, in, 1, 1), in an order in which pairs fit, if found.

    A matching: whoever has the fewest partners left takes the one with the fewest.
    """
    count = kernel.shape[1]
    kernel = F.pad(kernel, (0, 0, 0, 0, 0, count % 2))  # the padding's zeros, somebody's partner
    asis = torch.arange(count)
    if _pairs_fit(kernel):
        return asis
    fits = ~torch.eye(kernel.shape[1], dtype=torch.bool)
    for side in _sides(kernel):
        fits &= torch.stack([(side + column[:, None]).amax(0) <= PAIR for column in side.T])
    partners, free, pairs = fits.sum(1), set(range(kernel.shape[1])), []
    while free:
        first = min(free, key=lambda i: (int(partners[i]), i))
        left = [i for i in fits[first].nonzero().flatten().tolist() if i in free]
        if not left:
            return asis
        second = min(left, key=lambda i: (int(partners[i]), i))
        partners -= fits[first].int() + fits[second].int()
        free -= {first, second}
        pairs.append(sorted((first, second)))
    pairs.sort(key=max)  # padding comes last
    return torch.tensor(pairs).flatten()[:count]


def to_bytes(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)
