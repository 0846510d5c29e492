"""Networks as ONNX graphs, built node by node: fp32, and the integer network.

Standard operators of opset 17 alone, weights inside, any number of images, the same bytes for the
same network. The integer graph is lib.integer's, with what ONNX says otherwise:

- Activations are uint8: unsigned levels as they are, signed ones with zero point 128. So are
  weights (4-bit levels too are held in 8), also with zero point 128: int8 weights against uint8
  activations, the usual choice, saturate in 16 bits on processors with AVX2 and without VNNI
  (vpmaddubsw adds two products), where onnxruntime's kernels for two uint8 are exact.
- Requantization: QLinearConv multiplies by the ratio of scales in floating point and rounds halves
  to even. A level differs from lib.integer's where a product is within 2^-23 of a half.
- Signed levels end at -128, not at -127.
- The residual addition and the average are DequantizeLinear, Add or GlobalAveragePool,
  QuantizeLinear; onnxruntime makes integer kernels of each three.
- The classifier is MatMulInteger, its int32 bias is added to it; logits = float(acc) * scale.
- The image's levels come from the same table of 768, by Gather.
"""

import json

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lib import quantizers
from lib.integer import Grid, IntegerNetwork, Layer
from models.mobilenetv2 import ConvBNReLU6, InvertedResidual, MobileNetV2

OPSET, IR = 17, 8  # of 2022: old enough for any runtime in use
ZERO = 128  # the zero point of weights and of signed activations
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
        return g("Conv", inputs, name, **_geometry(layer.stride[0], layer.padding[0], layer))

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


def _geometry(stride: int, padding: int, layer) -> dict:
    return {
        "kernel_shape": list(layer.weight.shape[2:]), "strides": [stride] * 2,
        "pads": [padding] * 4, "group": layer.groups,
    }  # fmt: skip


# ---- integers ------------------------------------------------------------------------------------


def int8(network: IntegerNetwork, meta: dict, signed_weights: bool = False) -> onnx.ModelProto:
    """The integer network; its input is uint8, as images come.

    signed_weights: int8 instead of uint8, for comparison.
    """
    g = _Graph()
    zero, kind = (0, np.int8) if signed_weights else (ZERO, np.uint8)
    g.constant("weight.zero", kind(zero))
    for name, point in (("unsigned.zero", 0), ("signed.zero", ZERO)):
        g.constant(name, np.uint8(point))

    def of(name: str, grid: Grid) -> list[str]:
        """Scale and zero point of a tensor."""
        step = g.constant(f"{name}.step", np.float32(grid.step))
        return [step, "signed.zero" if grid.signed else "unsigned.zero"]

    def weight(layer: Layer) -> str:
        levels = (layer.weight.to(torch.int16) + zero).numpy().astype(kind)
        return g.constant(f"{layer.name}.weight", levels)

    def conv(layer: Layer, x: str) -> str:
        scale = (layer.scale / layer.reads.step).float()
        inputs = [x, *of(x, layer.reads), weight(layer),
                  g.constant(f"{layer.name}.weight_scale", scale), "weight.zero",
                  *of(layer.name, layer.writes), g.constant(f"{layer.name}.bias", layer.bias)]
        geometry = _geometry(layer.stride, layer.padding, layer)
        return g("QLinearConv", inputs, layer.name, **geometry)

    def decoded(x: str, grid: Grid, name: str) -> str:
        return g("DequantizeLinear", [x, *of(x, grid)], f"{name}.float")

    def encoded(x: str, grid: Grid, name: str) -> str:
        return g("QuantizeLinear", [x, *of(name, grid)], name)

    first = g.constant("table.first", np.arange(0, 768, 256, dtype=np.int32).reshape(3, 1, 1))
    table = g.constant("table", (network.table + ZERO).to(torch.uint8).flatten())
    places = g("Add", [g("Cast", ["images"], "pixels", to=TensorProto.INT32), first], "places")
    x = conv(network.stem, g("Gather", [table, places], "image"))
    for i, block in enumerate(network.blocks, 1):
        y = x
        for layer in block.layers:
            y = conv(layer, y)
        if block.sum is not None:
            name, total = f"features.{i}.sum", block.sum
            terms = [decoded(x, total.x, f"{name}.x"), decoded(y, total.addend, f"{name}.addend")]
            y = encoded(g("Add", terms, f"{name}.float"), total.writes, name)
        x = y
    x = decoded(conv(network.head, x), network.head.writes, "head")
    x = encoded(g("GlobalAveragePool", [x], "average.float"), network.pooled, "average")
    last, x = network.classifier, g("Flatten", [x], "flat")
    levels = (last.weight.to(torch.int16) + zero).numpy().astype(kind).T
    g.constant(f"{last.name}.weight", levels)
    inputs = [x, f"{last.name}.weight", "unsigned.zero", "weight.zero"]
    acc = g("Add", [g("MatMulInteger", inputs, "products"), g.constant("bias", last.bias)], "acc")
    acc = g("Cast", [acc], "acc.float", to=TensorProto.FLOAT)
    g("Mul", [acc, g.constant("scale", last.scale.float())], "logits")
    return g.model(TensorProto.UINT8, len(last.bias), meta)


def to_bytes(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)
