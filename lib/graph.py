"""Networks as ONNX graphs, built node by node: in fp32, and in integers.

The graphs have standard operators of opset 17 only, contain their weights, take any batch size, and
are the same bytes for the same network. The integer graph is in QDQ form: Conv, Add,
GlobalAveragePool and Gemm are written in floating point, with a DequantizeLinear before each
input and a QuantizeLinear after it (none after Gemm, whose outputs are the logits). onnxruntime
fuses each such group into one integer kernel (QLinearConv, QLinearAdd, QLinearGlobalAveragePool,
QGemm); OpenVINO reads the form too. The kernels compute what lib.integer does, but:

- Activations are uint8: unsigned levels as they are, signed ones with zero point 128. So clipping
  to the type is ReLU6.
- Weights are stored in 8 bits even if they have fewer. Processors with AVX2 but without VNNI
  multiply uint8 by int8 in pairs whose sum saturates at 16 bits (vpmaddubsw; U8S8 in onnxruntime's
  documentation); onnxruntime's kernels for two uint8 are exact and take about twice as long. The
  target says for which processors a graph is made:
  - `vnni`: all weights are int8. Wrong on a processor that saturates.
  - `any`: weights are int8 where that is exact on every processor, else uint8 with zero point 128.
    A depthwise layer has no pairs, and weights of up to 7 bits cannot saturate: see `_pairs_fit`.
    The hidden channels of a block are put in an order in which the pairs of its projection do not
    saturate: see `_order`. (The channels of a residual stream are read by several layers, and no
    order suits all of them.)
- Channels are padded with zeros to a multiple of 16, so that vectors have no remainders.
- Requantization: onnxruntime multiplies by the same ratio of scales in floating point and rounds
  halves to even. A level may differ from lib.integer's where float rounding crosses a half.
- The unit of an accumulator, which is the scale of its bias, is the product of the scales of input
  and weights in float32.
- The levels of the image come from the same table by Gather, flattened to 768 entries.
"""

import json

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from lib.fixedpoint import Grid, Sum
from lib.folding import fold
from lib.integer import IntegerLayer, IntegerNetwork
from models import layers
from models.mobilenetv2 import MobileNetV2

OPSET, IR = 17, 8  # of 2022: old enough for any runtime in use
ZERO = 128  # the zero point of signed levels in uint8
MULTIPLE = 16  # channels are padded to a multiple of it
TARGETS = ("any", "vnni")  # processors, see above
UNCHANGED = slice(None)  # an order of channels: as they are
PAIR = (2**15 - 1) // 255  # two weights of one sign that add up to no more fit, see `_pairs_fit`
# In a file's metadata, the value of `format`; and the key of what the caller stores with it.
FORMAT, META = "mobilenetv2-cifar10/onnx/1", "mobilenetv2-cifar10"


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

    def node(self, kind: str, inputs: list[str], name: str, **attributes) -> str:
        """Add a node of the operator `kind`; return its name, which is that of its output, too."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def model(self, image: int, classes: int, meta: dict) -> onnx.ModelProto:
        """Return the finished model: input `images` (n, 3, 32, 32), output `logits` (n, classes).

        image: element type of the input, of TensorProto; meta: stored with the graph, JSON's types.
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
    model = fold(model).cpu()
    g = _Graph()

    def conv(layer: layers.Layer, x: str) -> str:
        """Add a convolution, and the ReLU6 after it if there is one."""
        module, name = model.get_submodule(layer.name), layer.name
        inputs = [x, g.constant(f"{name}.weight", module.weight.contiguous()),
                  g.constant(f"{name}.bias", module.bias)]  # fmt: skip
        geometry = _geometry(layer.stride, module.padding[0], module.weight)
        y = g.node("Conv", inputs, name, group=module.groups, **geometry)
        if not layer.has_relu6:
            return y
        return g.node("Clip", [y, *clip], f"{name.rpartition('.')[0]}.relu6")

    clip = [g.constant("zero", np.float32(0)), g.constant("six", np.float32(6))]
    stem, *_, head, classifier = layers.layers(model.settings)
    x = conv(stem, "images")
    for number, block in enumerate(layers.blocks(model.settings), start=1):
        y = x
        for layer in block:
            y = conv(layer, y)
        residual = model.settings["blocks"][number - 1]["residual"]
        x = g.node("Add", [x, y], f"features.{number}.sum") if residual else y
    x = conv(head, x)
    x = g.node("Flatten", [g.node("GlobalAveragePool", [x], "average")], "flat")
    inputs = [x, g.constant(f"{classifier.name}.weight", model.linear.weight),
              g.constant(f"{classifier.name}.bias", model.linear.bias)]  # fmt: skip
    g.node("Gemm", inputs, "logits", transB=1)
    return g.model(TensorProto.FLOAT, model.settings["classes"], meta)


def _geometry(stride: int, padding: int, kernel: torch.Tensor) -> dict:
    """Return those attributes of a Conv; kernel: (out, in / groups, k, k)."""
    size = list(kernel.shape[2:])
    return {"kernel_shape": size, "strides": [stride] * 2, "pads": [padding] * 4}


# ---- integers ------------------------------------------------------------------------------------


def int8(network: IntegerNetwork, meta: dict, target: str = "any") -> onnx.ModelProto:
    """Return the graph of an integer network; input: uint8 images, not normalized.

    meta: as in `fp32`; the target, one of TARGETS, is added to it.
    """
    g = _IntegerGraph(target)
    x = g.conv(network.stem, g.image(network.table))
    for number, block in enumerate(network.blocks, start=1):
        *expand, depthwise, projection = block.layers
        hidden_order = _order(projection.weight) if expand and target == "any" else UNCHANGED
        y = x
        for layer in expand:
            y = g.conv(layer, y, out_order=hidden_order)
        y = g.conv(depthwise, y, out_order=hidden_order)
        y = g.conv(projection, y, in_order=hidden_order)
        x = y if block.sum is None else g.sum(block.sum, x, y, f"features.{number}.sum")
    x = g.average(g.conv(network.head, x), network.head.output_grid, network.pooled)
    g.classifier(network.classifier, x)
    return g.model(TensorProto.UINT8, len(network.classifier.bias), meta | {"target": target})


class _IntegerGraph(_Graph):
    """A graph in QDQ form in the making.

    The methods that add layers take names of tensors of levels, uint8, and return such names. The
    levels of a layer's output have its name; `<name>.step` is their scale, `<name>.float` are their
    values.
    """

    def __init__(self, target: str):
        """Begin an empty graph; target: one of TARGETS."""
        super().__init__()
        self.target = target
        self.constant("unsigned.zero", np.uint8(0))
        self.constant("signed.zero", np.uint8(ZERO))

    def encode(self, x: str, grid: Grid, name: str) -> str:
        """Add the levels, called `name`, of the float tensor x."""
        return self.node("QuantizeLinear", [x, *self.scale_and_zero(name, grid)], name)

    def decode(self, x: str, grid: Grid) -> str:
        """Add the float values of the levels x, if they are not there yet; return their name."""
        name = f"{x}.float"
        if all(name not in node.output for node in self.nodes):
            self.node("DequantizeLinear", [x, *self.scale_and_zero(x, grid)], name)
        return name

    def scale_and_zero(self, name: str, grid: Grid) -> list[str]:
        """Add the scale of the levels called `name`; return its name and that of the zero point."""
        scale = self.constant(f"{name}.step", np.float32(grid.scale))
        return [scale, "signed.zero" if grid.signed else "unsigned.zero"]

    def image(self, table: torch.Tensor) -> str:
        """Add the levels of the input; table: signed levels per channel and pixel value, (3, 256).

        The table is read as one of 768 entries, at 256 * channel + pixel value.
        """
        first = np.arange(0, 768, 256, dtype=np.int32).reshape(3, 1, 1)
        first = self.constant("table.first", first)
        table = self.constant("table", (table + ZERO).to(torch.uint8).flatten())
        pixels = self.node("Cast", ["images"], "pixels", to=TensorProto.INT32)
        return self.node("Gather", [table, self.node("Add", [pixels, first], "places")], "image")

    def conv(self, layer: IntegerLayer, x: str, out_order=UNCHANGED, in_order=UNCHANGED) -> str:
        """Add a convolution; out_order, in_order: the orders of its channels, see `_arrange`."""
        # A depthwise layer has one input per output, and the image is not padded.
        pad_inputs = layer.groups == 1 and x != "image"
        weight, scale, bias = _arrange(
            layer.weight, layer.weight_scale, layer.bias, out_order, in_order, pad_inputs=pad_inputs
        )
        inputs = [self.decode(x, layer.input_grid), *self.parameters(layer, weight, scale, bias)]
        geometry = _geometry(layer.stride, layer.padding, weight)
        groups = len(weight) if layer.groups > 1 else 1
        y = self.node("Conv", inputs, f"{layer.name}.output", group=groups, **geometry)
        return self.encode(y, layer.output_grid, layer.name)

    def sum(self, total: Sum, x: str, addend: str, name: str) -> str:
        """Add the end of a residual block, called `name`: x + addend."""
        terms = [self.decode(x, total.x_grid), self.decode(addend, total.addend_grid)]
        return self.encode(self.node("Add", terms, f"{name}.output"), total.output_grid, name)

    def average(self, x: str, input_grid: Grid, output_grid: Grid) -> str:
        """Add the average of each map: (n, channels, h, w) to (n, channels, 1, 1)."""
        y = self.node("GlobalAveragePool", [self.decode(x, input_grid)], "average.output")
        return self.encode(y, output_grid, "average")

    def classifier(self, layer: IntegerLayer, x: str) -> None:
        """Add the classifier, whose output, the logits, is the graph's; x: (n, channels, 1, 1)."""
        x = self.node("Flatten", [x], "flat")
        weight = F.pad(layer.weight, (0, -layer.weight.shape[1] % MULTIPLE))  # as x is padded
        scale = layer.weight_scale.float()
        inputs = [self.decode(x, layer.input_grid),
                  *self.parameters(layer, weight, scale, layer.bias)]  # fmt: skip
        self.node("Gemm", inputs, "logits")

    def parameters(self, layer: IntegerLayer, weight, scale, bias) -> list[str]:
        """Add weight and bias of a layer, as levels and scales; return the names of their values.

        weight: int8 (out, in / groups, k, k) or (out, in); scale: of the weight, float32 (out,);
        bias: int32 (out,). These are padded, and in the graph's order; the layer's own are not.
        """
        signed = self.target == "vnni" or layer.groups > 1 or _pairs_fit(weight)
        axis = 0  # of the outputs
        if weight.ndim == 2:
            weight, axis = weight.T, 1  # (in, out), as Gemm multiplies
        zero, dtype = (0, torch.int8) if signed else (ZERO, torch.uint8)
        weight = (weight.to(torch.int16) + zero).to(dtype)
        zeros = torch.full(scale.shape, zero, dtype=dtype)
        bias_scale = np.float32(layer.input_grid.scale) * scale.numpy()
        name = layer.name
        weight = [self.constant(f"{name}.weight", weight),
                  self.constant(f"{name}.weight_scale", scale),
                  self.constant(f"{name}.weight_zero", zeros)]  # fmt: skip
        bias = [self.constant(f"{name}.bias", bias),
                self.constant(f"{name}.bias_scale", bias_scale)]  # fmt: skip
        return [self.node("DequantizeLinear", weight, f"{name}.weight.float", axis=axis),
                self.node("DequantizeLinear", bias, f"{name}.bias.float", axis=0)]  # fmt: skip


def _arrange(
    weight, scale, bias, out_order=UNCHANGED, in_order=UNCHANGED, *, pad_inputs: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a convolution's weight, scale and bias with channels in these orders, then padded.

    weight: int8 (out, in / groups, k, k); scale: of the weight, floats (out,); bias: int32 (out,);
    out_order, in_order: indices (out,), (in / groups,).

    Padding makes out a multiple of MULTIPLE, and with pad_inputs in / groups as well. A channel of
    padding has weights and bias 0, so that its output is 0, and scale 1. The scale that is returned
    is float32.
    """
    weight, scale, bias = weight[out_order][:, in_order], scale[out_order], bias[out_order]
    more_out = -weight.shape[0] % MULTIPLE
    more_in = -weight.shape[1] % MULTIPLE if pad_inputs else 0
    weight = F.pad(weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
    return weight, F.pad(scale.float(), (0, more_out), value=1.0), F.pad(bias, (0, more_out))


def _sides(kernel: torch.Tensor) -> list[torch.Tensor]:
    """Return the positive weights and the negative ones, as magnitudes: int32 (out, columns) each.

    kernel: int8 (out, ...). They are looked at apart, since a pair of products of different signs
    cannot saturate.
    """
    rows = kernel.flatten(1).to(torch.int32)
    return [rows.clamp(min=0), -rows.clamp(max=0)]


def _pairs_fit(kernel: torch.Tensor) -> bool:
    """Return whether the sum of a pair of products with levels, uint8, always fits into 16 bits.

    kernel: int8 (out, in, k, k) or (out, in). A pair is inputs 2i and 2i + 1 of a 1x1 kernel or a
    matrix, where `in` must be even, and any two weights of an output channel of a larger kernel.
    """
    for side in _sides(kernel):
        two = side.unflatten(1, (-1, 2)) if kernel.shape[2:].numel() == 1 else side.topk(2).values
        if two.sum(-1).max() > PAIR:
            return False
    return True


def _order(kernel: torch.Tensor) -> torch.Tensor:
    """Return an order of the inputs of a 1x1 kernel in which pairs fit, if one is found: (in,).

    kernel: int8 (out, in, 1, 1). A greedy matching: the input with the fewest possible partners
    takes the partner that itself has the fewest. If that fails, the order stays as it is.
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
    pairs.sort(key=max)  # the column of padding is the last, and is cut off
    return torch.tensor(pairs).flatten()[:count]


def to_bytes(model: onnx.ModelProto) -> bytes:
    """Return the bytes of the file: the same for the same model."""
    return model.SerializeToString(deterministic=True)
