"""Load any file of the project as a function from images to logits, in the file's arithmetic.

    source = runtime.load("checkpoints/int8.onnx")       # or .pth, .nnz
    run = runtime.network(source)
    logits = run(images)                                 # uint8 (n, 3, 32, 32), not normalized

Floating point: fp32 networks, and quantized.pth, which simulates its integers. Integers, on the CPU
(lib.integer): files that store integers, if their scheme has an integer network. onnxruntime:
.onnx.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from lib import checkpoint, data, graph, integer
from lib.checkpoint import Checkpoint
from lib.config import UserError, reason
from lib.files import write_bytes
from models.layers import layers
from models.mobilenetv2 import MobileNetV2

FLOAT, INTEGER, ONNX = "float32", "integers", "onnxruntime"


class OnnxFile(Checkpoint):
    """An .onnx that this project wrote. Its state is its weights, for counting; it cannot rebuild a
    torch network."""

    graph: bytes
    target: str  # one of graph.TARGETS
    dtype = "int8"

    def refuse_saturation(self) -> None:
        """Raise UserError if onnxruntime would compute something else on this processor."""
        if self.target == "vnni" and saturates():
            raise UserError(f"{self.file} is for processors with VNNI, and this one has none: "
                            "`python to_int8.py --target any` makes one for all")  # fmt: skip

    def build(self, device="cpu"):
        raise UserError(f"{self.file} is a graph: start from the .pth that it was made of")


def load(path: Path | str, downsample: int | None = None) -> Checkpoint:
    """Load a checkpoint, a .nnz or an .onnx of this project (recognized by its suffix).

    downsample: see checkpoint.load. Raises UserError for a file that is missing, damaged or not
    written by this project.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        return checkpoint.load(path, downsample)
    if not path.is_file():
        raise UserError(f"{path} does not exist: `make int8` makes int8.onnx with int8.pth (delete "
                        "that first, if it is there), where activations have 8 bits")  # fmt: skip
    raw = path.read_bytes()
    try:
        model = onnx.load_from_string(raw)
    except Exception:  # protobuf's own, of several kinds
        raise UserError(f"{path} is not an ONNX file, or is damaged") from None
    props = {p.key: p.value for p in model.metadata_props}
    if props.get("format") != graph.FORMAT:
        raise UserError(f"{path} is no ONNX file of ours: its metadata do not say {graph.FORMAT}")
    try:
        meta = json.loads(props[graph.META])
        weights = _weights(model, meta["settings"])
        checkpoint.check_finite(_floats(model), path)
        source = OnnxFile("onnx", meta["settings"], weights, meta["quantization"],
                          data=meta["data"], ancestors=meta["ancestors"], seed=meta["seed"])
        with torch.device("meta"):
            MobileNetV2(source.settings)  # is never built, but described: its MACs are counted
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit its own description: {reason(error)}") from None
    checkpoint.check_fields(source, path)
    source.file, source.bytes, source.graph = path, len(raw), raw
    source.sha256 = hashlib.sha256(raw).hexdigest()
    source.target = meta.get("target", "any")  # files of before there were two
    return source


def _weights(model: onnx.ModelProto, settings: dict) -> dict[str, Tensor]:
    """Return the levels of each layer, in the graph's order of channels, without padding.

    Raises KeyError or ValueError where some are missing.
    """
    arrays = {t.name: t for t in model.graph.initializer}
    weights = {}
    for layer in layers(settings):
        name, shape = layer.name, layer.shape
        levels = numpy_helper.to_array(arrays[f"{name}.weight"])
        levels = torch.from_numpy(levels.astype("int16") - graph.ZERO * (levels.dtype == "uint8"))
        levels = levels.T if len(shape) == 2 else levels
        levels = levels[: shape[0], : shape[1]]
        if levels.shape != shape:
            raise ValueError(f"{name} has {tuple(levels.shape)} weights, not {shape}")
        weights[f"{name}.weight"] = levels
    return weights


def _floats(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Return the graph's scales and its other floating-point constants."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {n: torch.from_numpy(a.copy()) for n, a in arrays.items() if a.dtype.kind == "f"}


def export(source: Checkpoint, path: Path, target: str = "any") -> OnnxFile:
    """Write the integer network of a checkpoint as ONNX, read it back and return that.

    target: one of graph.TARGETS. Raises UserError for a scheme that has no such graph.
    """
    meta = {
        "settings": source.settings, "quantization": source.quantization, "seed": source.seed,
        "data": source.data, "ancestors": source.lineage(),
    }  # fmt: skip
    if why := why_no_onnx(source.quantization):
        raise UserError(f"no {path} from {source.file}: {why}")
    raw = graph.to_bytes(graph.int8(_integer_network(source), meta, target))
    write_bytes(path, raw)
    return load(path)


def why_no_onnx(scheme: dict | None) -> str | None:
    """Return why a scheme has no ONNX graph of integers; None if it has one."""
    if why := integer.why_no_integer_network(scheme):
        return why
    bits = min(scheme["act_bits"], scheme.get("last_act_bits", 8))
    return None if bits == 8 else f"its activations have {bits} bits, and ONNX's integers have 8"


def network(source: Checkpoint, device="cpu", *, integers=True) -> Callable:
    """Return a function from images, uint8 on any device, to logits, float32.

    Its `arithmetic` is FLOAT, INTEGER or ONNX. integers: False runs all files but .onnx as float
    networks.
    """
    if isinstance(source, OnnxFile):
        source.refuse_saturation()
        return _Session(source.graph, source.file)
    has_integers = integer.why_no_integer_network(source.quantization) is None
    if integers and holds_integers(source) and has_integers:
        return _Integers(source)
    return _Float(source, device)


def _integer_network(source: Checkpoint) -> integer.IntegerNetwork:
    try:
        return integer.convert(source)
    except ValueError as error:
        raise UserError(f"{source.file}: {reason(error)}") from None


def holds_integers(source: Checkpoint) -> bool:
    """Return whether a file stores its weights as int8."""
    return any(t.dtype == torch.int8 for t in source.state.values())


class _Float:
    arithmetic = FLOAT

    def __init__(self, source: Checkpoint, device):
        self.model = source.build(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(data.normalize(images)).float()


class _Integers:
    arithmetic = INTEGER

    def __init__(self, source: Checkpoint):
        self.network = _integer_network(source)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images).to(images.device)


class _Session:
    arithmetic = ONNX

    def __init__(self, raw: bytes, name):
        self.session, self.name = session(raw, torch.get_num_threads(), name), name

    def __call__(self, images: Tensor) -> Tensor:
        try:
            (logits,) = self.session.run(None, {"images": images.cpu().contiguous().numpy()})
        except Exception as error:  # onnxruntime's own, of many kinds
            raise UserError(f"onnxruntime cannot run {self.name}: {reason(error)}") from None
        return torch.from_numpy(logits).to(images.device)


def session(raw: bytes, threads: int, name="the graph", optimized: Path | None = None):
    """Return an InferenceSession of onnxruntime on the CPU.

    optimized: where to write the graph as it runs it. Raises UserError for a graph that it refuses.
    """
    import onnxruntime  # slow to import, and most stages do not need it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    # Waiting threads sleep, as OMP_WAIT_POLICY=PASSIVE does for torch: cores may be shared.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, of many kinds
        raise UserError(f"onnxruntime does not take {name}: {reason(error)}") from None


@functools.cache
def saturates() -> bool:
    """Return whether onnxruntime's sums of uint8 times int8 saturate here: see lib/graph.py."""
    weight = numpy_helper.from_array(np.full((16, 16), 127, np.int8), "weight")
    levels = helper.make_tensor_value_info("levels", TensorProto.UINT8, [16, 16])
    sums = helper.make_tensor_value_info("sums", TensorProto.INT32, [16, 16])
    node = helper.make_node("MatMulInteger", ["levels", "weight"], ["sums"])
    model = helper.make_model(
        helper.make_graph([node], "saturates", [levels], [sums], [weight]),
        opset_imports=[helper.make_opsetid("", graph.OPSET)], ir_version=graph.IR,
    )  # fmt: skip
    largest = {"levels": np.full((16, 16), 255, np.uint8)}
    (result,) = session(model.SerializeToString(), 1).run(None, largest)
    return bool((result != 16 * 255 * 127).any())
