"""Networks as ONNX graphs, built node by node: in fp32, and in integers.

Standard operators of opset 17 only, weights included, any batch size, the same bytes for the same
network. The integer graph is in QDQ form: Conv, Add, GlobalAveragePool and Gemm in floating point,
each between a DequantizeLinear per input and a QuantizeLinear. onnxruntime fuses each such group
into one integer kernel (QLinearConv, QLinearAdd, QLinearGlobalAveragePool, QGemm), and OpenVINO
reads it too. It then computes what lib.integer computes, with these differences:

- Activations are uint8: unsigned levels as they are, signed ones with zero point 128. So ReLU6 is
  what the type cuts off.
- Weights are stored in 8 bits even if they have fewer. Processors with AVX2 but without VNNI
  multiply uint8 by int8 in pairs whose sum saturates at 16 bits (vpmaddubsw); onnxruntime's kernels
  for two uint8 are exact and take about twice as long. The target says for whom a graph is made:
  - `vnni`: all weights are int8. Wrong on a processor that saturates.
  - `any`: weights are int8 where that is exact on every processor, else uint8 with zero point 128.
    A depthwise layer has no pairs, and weights of up to 7 bits cannot saturate: see `_pairs_fit`.
    In front of a projection, the channels are put in an order in which pairs do not saturate: see
    `_order`. (The channels of a residual stream are read by several layers, and no order suits all
    of them.)
- Channels are padded with zeros to a multiple of 16, so that vectors have no remainders.
- Requantization: onnxruntime multiplies by the same ratio of scales in floating point and rounds
  halves to even. A level may differ from lib.integer's where float rounding crosses a half.
- A bias is the int32 of the accumulator; its scale is the product of two others in float32.
- The levels of the image come from the same table of 768 entries, by Gather.
"""

import json

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from lib import quantizers
from lib.fixedpoint import Grid
from lib.integer import IntegerNetwork, Layer
from models import layers
from models.mobilenetv2 import MobileNetV2

OPSET, IR = 17, 8  # of 2022: old enough for any runtime in use
ZERO = 128  # the zero point of signed levels in uint8
MULTIPLE = 16  # of channels
TARGETS = ("any", "vnni")  # processors, see above
PAIR = (2**15 - 1) // 255  # two weights of one sign that add up to no more fit, see `_pairs_fit`
FORMAT, META = "mobilenetv2-cifar10/onnx/1", "mobilenetv2-cifar10"  # value of `format`; its key


class _Graph:
    """An ONNX graph in the making: nodes and constants in the order in which they were added."""

    def __init__(self):
        self.nodes, self.constants = [], {}

    def constant(self, name: str, array) -> str:
        """Add a constant, from a tensor or an array; return its name."""
        if torch.is_tensor(array):
            array = array.detach().cpu().numpy()
        self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def __call__(self, kind: str, inputs: list[str], name: str, **attributes) -> str:
        """Add a node of that operator; return the name of its output, which is the node's."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def model(self, image: int, classes: int, meta: dict) -> onnx.ModelProto:
        """Return the finished model: input `images` (n, 3, 32, 32), output `logits` (n, classes).

        image: ONNX's type of the elements of the input.
        """
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
    """Return the graph of a network in eval mode, batch norm folded; input: float32, normalized.

    meta: stored with the graph, JSON's types.
    """
    model = quantizers.fold(model).cpu()
    g = _Graph()

    def conv(layer: layers.Layer, x: str) -> str:
        module, name = model.get_submodule(layer.name), layer.name
        inputs = [x, g.constant(f"{name}.weight", module.weight.contiguous()),
                  g.constant(f"{name}.bias", module.bias)]  # fmt: skip
        geometry = _geometry(layer.stride, module.padding[0], module.weight)
        y = g("Conv", inputs, name, group=module.groups, **geometry)
        return g("Clip", [y, *clip], f"{name.rpartition('.')[0]}.relu6") if layer.has_relu6 else y

    clip = [g.constant("zero", np.float32(0)), g.constant("six", np.float32(6))]
    stem, *_, head, classifier = layers.layers(model.settings)
    x = conv(stem, "images")
    for number, block in enumerate(layers.blocks(model.settings), start=1):
        y = x
        for layer in block:
            y = conv(layer, y)
        residual = model.settings["blocks"][number - 1]["residual"]
        x = g("Add", [x, y], f"features.{number}.sum") if residual else y
    x = conv(head, x)
    x = g("Flatten", [g("GlobalAveragePool", [x], "average")], "flat")
    inputs = [x, g.constant(f"{classifier.name}.weight", model.linear.weight),
              g.constant(f"{classifier.name}.bias", model.linear.bias)]  # fmt: skip
    g("Gemm", inputs, "logits", transB=1)
    return g.model(TensorProto.FLOAT, model.settings["classes"], meta)


def _geometry(stride: int, padding: int, kernel: torch.Tensor) -> dict:
    size = list(kernel.shape[2:])
    return {"kernel_shape": size, "strides": [stride] * 2, "pads": [padding] * 4}


# ---- integers ------------------------------------------------------------------------------------


def int8(network: IntegerNetwork, meta: dict, target: str = "any") -> onnx.ModelProto:
    """Return the graph of an integer network; input: uint8 images, not normalized.

    A padded channel has no weights and no bias: its level is 0. meta: as in `fp32`; the target, one
    of TARGETS, is added to it.
    """
    g = _Graph()
    for name, point in (("unsigned.zero", 0), ("signed.zero", ZERO)):
        g.constant(name, np.uint8(point))

    def encoded(x: str, grid: Grid, name: str) -> str:
        """Add the levels of a float tensor; the constants of the grid are named after them."""
        return g("QuantizeLinear", [x, *scale_and_zero(name, grid)], name)

    def decoded(x: str, grid: Grid) -> str:
        """Add the float values of levels, once per tensor."""
        name = f"{x}.float"
        if all(name not in node.output for node in g.nodes):
            g("DequantizeLinear", [x, *scale_and_zero(x, grid)], name)
        return name

    def scale_and_zero(name: str, grid: Grid) -> list[str]:
        scale = g.constant(f"{name}.step", np.float32(grid.scale))
        return [scale, "signed.zero" if grid.signed else "unsigned.zero"]

    def parameters(layer: Layer, kernel, scale, bias, axis: int, signed: bool) -> list[str]:
        """Add the weight and the bias of a layer, as levels and their scales; return the floats.

        kernel: int8; scale: float32 (out,), its own; bias: int32; axis: that of the output in
        `kernel`; signed: whether to store int8 rather than uint8.
        """
        zero, dtype = (0, torch.int8) if signed else (ZERO, torch.uint8)
        kernel = (kernel.to(torch.int16) + zero).to(dtype)
        zeros = torch.full(scale.shape, zero, dtype=dtype)
        bias_scale = np.float32(layer.input_grid.scale) * scale.numpy()
        weight = [g.constant(f"{layer.name}.weight", kernel),
                  g.constant(f"{layer.name}.weight_scale", scale),
                  g.constant(f"{layer.name}.weight_zero", zeros)]  # fmt: skip
        bias = [g.constant(f"{layer.name}.bias", bias),
                g.constant(f"{layer.name}.bias_scale", bias_scale)]  # fmt: skip
        return [g("DequantizeLinear", weight, f"{layer.name}.weight.float", axis=axis),
                g("DequantizeLinear", bias, f"{layer.name}.bias.float", axis=0)]  # fmt: skip

    def conv(layer: Layer, x: str, order=slice(None), inputs=slice(None)) -> str:
        """Add a convolution; order, inputs: the order of its output and of its input channels."""
        kernel, scale = layer.weight[order][:, inputs], layer.weight_scale[order]
        bias, rows = layer.bias[order], -len(kernel) % MULTIPLE  # rows, columns: of padding
        columns = -kernel.shape[1] % MULTIPLE if layer.groups == 1 and x != "image" else 0
        kernel = F.pad(kernel, (0, 0, 0, 0, 0, columns, 0, rows))
        scale, bias = F.pad(scale.float(), (0, rows), value=1.0), F.pad(bias, (0, rows))
        signed = target == "vnni" or layer.groups > 1 or _pairs_fit(kernel)
        inputs = [decoded(x, layer.input_grid), *parameters(layer, kernel, scale, bias, 0, signed)]
        geometry = _geometry(layer.stride, layer.padding, kernel)
        groups = len(kernel) if layer.groups > 1 else 1
        y = g("Conv", inputs, f"{layer.name}.output", group=groups, **geometry)
        return encoded(y, layer.output_grid, layer.name)

    first = g.constant("table.first", np.arange(0, 768, 256, dtype=np.int32).reshape(3, 1, 1))
    table = g.constant("table", (network.table + ZERO).to(torch.uint8).flatten())
    indices = g("Add", [g("Cast", ["images"], "pixels", to=TensorProto.INT32), first], "places")
    x = conv(network.stem, g("Gather", [table, indices], "image"))
    for i, block in enumerate(network.blocks, 1):
        *expand, depthwise, projection = block.layers
        order = _order(projection.weight) if expand and target == "any" else slice(None)
        y = x
        for layer in expand:
            y = conv(layer, y, order)
        y = conv(projection, conv(depthwise, y, order), inputs=order)
        if block.sum is not None:
            name, total = f"features.{i}.sum", block.sum
            terms = [decoded(x, total.x_grid), decoded(y, total.addend_grid)]
            y = encoded(g("Add", terms, f"{name}.output"), total.output_grid, name)
        x = y
    x = decoded(conv(network.head, x), network.head.output_grid)
    x = encoded(g("GlobalAveragePool", [x], "average.output"), network.pooled, "average")
    last, x = network.classifier, g("Flatten", [x], "flat")
    levels = F.pad(last.weight, (0, -last.weight.shape[1] % MULTIPLE)).T
    scale = last.weight_scale.float()
    signed = target == "vnni" or _pairs_fit(levels.T[:, :, None, None])
    inputs = [decoded(x, network.pooled), *parameters(last, levels, scale, last.bias, 1, signed)]
    g("Gemm", inputs, "logits")
    return g.model(TensorProto.UINT8, len(last.bias), meta | {"target": target})


def _sides(kernel: torch.Tensor) -> list[torch.Tensor]:
    """Return the positive weights of each row and the negative ones, as magnitudes (rows, columns).

    They are looked at apart, since products of different signs cannot add up to saturate.
    """
    rows = kernel.flatten(1).to(torch.int32)
    return [rows.clamp(min=0), -rows.clamp(max=0)]


def _pairs_fit(kernel: torch.Tensor) -> bool:
    """Return whether the sum of a pair of products always fits into 16 bits.

    kernel: int8 (out, in, k, k), multiplied by any uint8. A pair are inputs 2i and 2i + 1 of a 1x1
    kernel, any two of others.
    """
    for side in _sides(kernel):
        two = side.unflatten(1, (-1, 2)) if kernel.shape[2] == 1 else side.topk(2).values
        if two.sum(-1).max() > PAIR:
            return False
    return True


def _order(kernel: torch.Tensor) -> torch.Tensor:
    """Return an order (in,) of the inputs of a 1x1 kernel in which pairs fit, if one is found.

    kernel: int8 (out, in, 1, 1). A greedy matching: the input with the fewest possible partners
    takes the partner that itself has the fewest. If it fails, the order stays as it is.
    """
    count = kernel.shape[1]
    kernel = F.pad(kernel, (0, 0, 0, 0, 0, count % 2))  # a column of padding is a partner, too
    unchanged = torch.arange(count)
    if _pairs_fit(kernel):
        return unchanged
    fits = ~torch.eye(kernel.shape[1], dtype=torch.bool)
    for side in _sides(kernel):
        fits &= torch.stack([(side + column[:, None]).amax(0) <= PAIR for column in side.T])
    partners, free, pairs = fits.sum(1), set(range(kernel.shape[1])), []
    while free:
        first = min(free, key=lambda i: (int(partners[i]), i))
        left = [i for i in fits[first].nonzero().flatten().tolist() if i in free]
        if not left:
            return unchanged
        second = min(left, key=lambda i: (int(partners[i]), i))
        partners -= fits[first].int() + fits[second].int()
        free -= {first, second}
        pairs.append(sorted((first, second)))
    pairs.sort(key=max)  # padding comes last
    return torch.tensor(pairs).flatten()[:count]


def to_bytes(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)
