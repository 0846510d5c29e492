"""Count bytes: those of a network's activations while it runs, and those of a file by part."""

from pathlib import Path

from torch import Tensor

from lib import compressed
from lib.checkpoint import Checkpoint
from lib.metrics import is_weight, layers_and_sides
from lib.quantizers import Quantizer
from models.layers import DEPTHWISE, layers, places
from models.mobilenetv2 import MobileNetV2

WEIGHTS, INDICES, REST = "weights: values", "weights: indices", "BN, biases, scales"
# Sections of a .nnz file, as lib.compressed.sections names them; any other holds coded weights.
SECTIONS = {"values": WEIGHTS, "indices": INDICES, "dense": REST, "scales": "scales",
            "biases": "biases", "activation_scales": "activation scales", "metadata": "metadata",
            "frame": "frame"}  # fmt: skip


def activations(settings: dict) -> dict:
    """Count the activation values (not bytes) of one image of 32x32. settings: the network's.

    An activation here is a tensor that a runtime which fuses convolution, batch norm and ReLU6
    writes to memory: the input of a Conv2d or Linear layer, the image included, and its output.
    Batch norm and ReLU6 work in place, and the residual sum is added to the projection's output as
    it is written, so none of them has a tensor of its own; neither has pooling.

    Returns a dict:
    sum_values: all inputs of Conv2d and Linear layers. Each is written once, and they are what a
        scheme quantizes. A residual input is also the input of its block's first layer, so it is
        counted there. The logits are the input of no layer.
    peak_values: the most that is alive at once while layers run one after another: the layer's
        input, its output, and within a residual block the block's input until it is added, once
        if it is the layer's own input. No workspace (im2col), no reuse of the input's memory.
    peak_layer: the first layer at which that happens.
    layers: in order of execution, {"name", "input", "output", "held"}, values each; held is the
        residual input if it is not the layer's own.
    """
    counts, first = [], {}  # first: of each residual block, the count of its first layer
    for layer, before, after in layers_and_sides(settings):
        rows, columns = layer.shape[:2]
        count = {
            "name": layer.name, "output": rows * after**2, "held": 0,
            "input": (rows if layer.role == DEPTHWISE else columns) * before**2,
        }  # fmt: skip
        if layer.block and settings["blocks"][layer.block - 1]["residual"]:
            begin = first.setdefault(layer.block, count)
            count["held"] = 0 if begin is count else begin["input"]
        counts.append(count)
    alive = [x["input"] + x["output"] + x["held"] for x in counts]
    return {
        "sum_values": sum(x["input"] for x in counts), "peak_values": max(alive),
        "peak_layer": counts[alive.index(max(alive))]["name"], "layers": counts,
    }  # fmt: skip


def activation_bytes(model: MobileNetV2, act_bits: int) -> dict:
    """Return the bytes of one image's activations: {"sum_bytes", "peak_bytes", "peak_layer"}, which
    are those of `activations` in bytes.

    A tensor has the bits of the quantizer at its place: lib.quantizers keeps some at 8 bits where
    the others have fewer. act_bits: of tensors without one. (The report's simulation keeps the
    residual input, its sum and the pooled map in fp32; an integer network has to store them at the
    scheme's bits, and so they are counted.)
    """
    order = places(model.settings)

    def bits_at(place: str) -> int:
        if place.endswith(".input"):  # a quantizer there reduces what is stored at the place before
            place = order[order.index(place) - 1]
        quantizer = model.get_submodule(place) if place else None
        return quantizer.bits if isinstance(quantizer, Quantizer) else act_bits

    total, alive = 0, {}
    counts = activations(model.settings)["layers"]
    for layer, count in zip(layers(model.settings), counts, strict=True):
        stored = count["input"] * bits_at(layer.input_place)
        total += stored
        held = bits_at(f"features.{layer.block}.input") if count["held"] else 0
        alive[layer.name] = stored + (
            count["output"] * bits_at(layer.output_place) + count["held"] * held
        )
    peak = max(alive, key=alive.get)
    return {
        "sum_bytes": (total + 7) // 8, "peak_bytes": (alive[peak] + 7) // 8, "peak_layer": peak,
    }  # fmt: skip


def bytes_by_part(source: Checkpoint) -> dict[str, int]:
    """Return the bytes of a file by what they hold; they add up to its size.

    A file of torch or safetensors consists of the network's tensors and the rest: names, settings
    and provenance, the records and alignment of a zip, and what other programs put there.
    """
    if source.stage == "compressed":
        sizes = {}
        for kind, size in compressed.part_sizes(Path(source.file).read_bytes()).items():
            part = SECTIONS.get(kind, f"weights: {kind}")
            sizes[part] = sizes.get(part, 0) + size
        return sizes
    sizes, seen = {WEIGHTS: 0, REST: 0}, set()
    for name, tensor in source.state.items():
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()  # what torch.save writes, once where it is shared
            if storage.data_ptr() not in seen:
                sizes[WEIGHTS if is_weight(name, tensor) else REST] += storage.nbytes()
                seen.add(storage.data_ptr())
    return sizes | {"names, zip": source.bytes - sum(sizes.values())}
