"""Read `.nnz` files of version 2; what versions 2 and 3 share (FORMAT.md, section 4).

It holds a quantized MobileNetV2, entropy-coded: weights by lib/nnz/coder.py, their scales, the
biases and the activation scales by lib/nnz/vectors.py, everything else by lib/nnz/description.py.
The network is one of models/mobilenetv2.py, its batch norms folded, the weights of every layer at 2
to 16 bits (methods ptq and qat of lib/quantizers.py). New files are of version 3: lib/nnz/v3.py.
"""

import hashlib
import math

import numpy as np

from lib.nnz import coder, description, vectors
from lib.nnz.frame import LIMIT, ChecksumMismatch, LimitExceeded, Malformed, Reader, unpack
from models import layers as topology
from models.layers import Layer

MAX_WEIGHTS = 1 << 25  # decoding takes time for each
FREE_WEIGHTS, WEIGHTS_PER_BYTE = 1 << 22, 1 << 12  # ... so the length of CODE limits them too
DEAD = 1  # flag of SIDE: the scales of rows of zeros are 1.0, and left out
BITS_OF_ONE = 0x3F800000  # the float32 1.0
KINDS = {  # of lib/nnz/coder.py, by the role of a layer
    topology.STEM: coder.STEM, topology.EXPAND: coder.EXPAND, topology.DEPTHWISE: coder.DEPTHWISE,
    topology.PROJECT: coder.PROJECT, topology.HEAD: coder.HEAD,
    topology.CLASSIFIER: coder.CLASSIFIER,
}  # fmt: skip


def layers(settings: dict) -> list[Layer]:
    """Return the layers of a network in order, as models/layers.py has them.

    A file need not say the stride of the stem, on which neither names nor shapes depend.
    """
    return topology.layers({"stem_stride": 1} | settings)


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Return (output channels, weights per output channel): the coder's view of a weight."""
    return layer.shape[0], math.prod(layer.shape[1:])


def kinds_and_groups(network: list[Layer]) -> tuple[list[int], list[tuple]]:
    """Return what the coder must know of each layer besides its shape: kinds, channel groups.

    Groups are (group of the rows, group of the columns), None for channels that are no other
    layer's. The columns of the stem are the image's channels, those of a depthwise convolution the
    positions of its kernel.
    """
    groups = [
        (
            None if layer.role == topology.CLASSIFIER else layer.output_group,
            None if layer.role in (topology.STEM, topology.DEPTHWISE) else layer.input_group,
        )
        for layer in network
    ]
    return [KINDS[layer.role] for layer in network], groups


def scale_names(settings: dict, act_bits: int) -> list[str]:
    """Return the names of the tensors that hold the activation scales, in order.

    A block's input has a scale of its own only in a residual block below 8 bits; elsewhere its
    layers read with the scale of the place before.
    """
    if act_bits == 32:
        return []
    without = {
        f"features.{number}.input"
        for number, block in enumerate(settings["blocks"], start=1)
        if not block["residual"] or act_bits >= 8
    }
    places = topology.places({"stem_stride": 1} | settings)
    return [f"{place}.step" for place in places if place not in without]


def bits_of(name: str, scheme: dict) -> int:
    """Return the bits per weight of the layer of this name."""
    return scheme["layer_bits"].get(name, scheme["weight_bits"])


def tensors_of(settings: dict, scheme: dict) -> dict[str, tuple]:
    """Return {name: (type, shape)} of the tensors of a file, in its order."""
    tensors = {}
    for layer in layers(settings):
        stored = "int8" if bits_of(layer.name, scheme) <= 8 else "int16"
        tensors[f"{layer.name}.weight"] = stored, layer.shape
        for part in ("weight_scale", "bias"):
            tensors[f"{layer.name}.{part}"] = "float32", layer.shape[:1]
    return tensors | dict.fromkeys(scale_names(settings, scheme["act_bits"]), ("float32", ()))


def decode(data: bytes, limit: int = LIMIT) -> tuple[dict, dict[str, np.ndarray]]:
    """Return (meta, tensors) of a file, in new, writable arrays.

    meta: settings, quantization, seed, mean, std, data and ancestors as lib/compressed.py has them;
    of the ancestors only their stages, the SHA-256 of one of them, and the number of weights of the
    first. tensors: weights as levels, int8 up to 8 bits, else int16; all others float32.

    Raises a FormatError for any file that is damaged or illegal, or whose tensors would take more
    than `limit` bytes; their size is checked before any of them is allocated.
    """
    payloads = unpack(data, limit, version=2)
    meta, content, matrices = read_levels(payloads, limit)
    return meta, read_tensors(meta, content, matrices, payloads["SIDE"])


def read_levels(
    payloads: dict, limit: int
) -> tuple[dict, tuple[bytes, bytes], list[np.ndarray]]:
    """Return (meta, content, matrices) of the sections NETW and CODE.

    content: (the bytes that the content begins with, the SHA-256 of all of it), as
    description.parse returns them. matrices: the levels of each layer, int32, of the shape that
    `matrix_shape` says. Raises as `decode` does.
    """
    meta, *content = description.parse(payloads["NETW"], limit)
    network, scheme = layers(meta["settings"]), meta["quantization"]
    check_weights(network, len(payloads["CODE"]))
    expected = tensors_of(meta["settings"], scheme)
    if sum(4 * math.prod(shape) for _, shape in expected.values()) > limit:
        raise LimitExceeded(f"the tensors take more than the limit of {limit} bytes")
    try:
        matrices = coder.decode(
            payloads["CODE"], [matrix_shape(layer) for layer in network],
            *kinds_and_groups(network),
        )  # fmt: skip
    except coder.CoderError as error:
        raise Malformed(f"section CODE: {error}") from None
    check_levels(network, matrices, scheme)
    return meta, tuple(content), matrices


def read_tensors(
    meta: dict, content: tuple[bytes, bytes], matrices: list[np.ndarray], side: bytes, *,
    padded: bool = False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return the tensors of a file: the levels in `matrices`, the floats in `side`.

    content: as `read_levels` returns it. padded: zeros may follow in `side`. Raises Malformed or
    ChecksumMismatch.
    """
    network, scheme = layers(meta["settings"]), meta["quantization"]
    flags, packed = parse_side(side, padded)
    alive = [matrix.any(1) if flags & DEAD else np.ones(len(matrix), bool) for matrix in matrices]
    names = scale_names(meta["settings"], scheme["act_bits"])
    sizes = [int(live.sum()) for live in alive], [len(live) for live in alive], [len(names)]
    scales, biases, (act_scales,) = (
        vectors.unpack(*vector_set, size)
        for vector_set, size in zip(packed, sizes, strict=True)
    )
    tensors, expected = {}, tensors_of(meta["settings"], scheme)
    for i, layer in enumerate(network):
        stored, shape = expected[f"{layer.name}.weight"]
        tensors[f"{layer.name}.weight"] = matrices[i].astype(stored).reshape(shape)
        scale = np.ones(len(matrices[i]), np.float32)
        scale[alive[i]] = scales[i]
        tensors[f"{layer.name}.weight_scale"], tensors[f"{layer.name}.bias"] = scale, biases[i]
    tensors |= {name: np.array(scale) for name, scale in zip(names, act_scales, strict=True)}
    beginning, expected_sha = content
    if sha_of(beginning, tensors) != expected_sha:
        raise ChecksumMismatch("the decoded content is not what was encoded (SHA-256)")
    return tensors


def part_sizes(data: bytes) -> dict[str, int]:
    """Return {part: bytes} of a file; they add up to len(data).

    The parts are those of coder.PARTS, scales, biases, activation_scales, metadata and frame
    (header, section table and SHA-256).
    """
    payloads = unpack(data, version=2)
    sizes = section_part_sizes(payloads, side_part_sizes(payloads["SIDE"]))
    return sizes | {"frame": len(data) - sum(sizes.values())}


def section_part_sizes(payloads: dict, side: dict[str, int]) -> dict[str, int]:
    """Return {part: bytes} of what the sections hold, the parts of `side` in its place."""
    meta, _, _ = description.parse(payloads["NETW"], LIMIT)
    network, code = layers(meta["settings"]), payloads["CODE"]
    check_weights(network, len(code))
    shapes = [matrix_shape(layer) for layer in network]
    sizes = coder.part_sizes(code, shapes, *kinds_and_groups(network))
    return sizes | side | {"metadata": len(payloads["NETW"]) - description.SHA_BYTES}


def side_part_sizes(side: bytes, padded: bool = False) -> dict[str, int]:
    """Return {part: bytes} of the vectors of floats; padded: as in `read_tensors`."""
    _, packed = parse_side(side, padded)
    parts = "scales", "biases", "activation_scales"
    return {
        part: len(stream) + len(tail) for part, (stream, tail) in zip(parts, packed, strict=True)
    }


def pack_side(meta: dict, matrices: list[np.ndarray], tensors: dict[str, np.ndarray]) -> bytes:
    """Return the bytes of all floats; matrices: the levels of each layer."""
    network = layers(meta["settings"])
    scales, biases = (
        [tensors[f"{layer.name}.{part}"] for layer in network] for part in ("weight_scale", "bias")
    )
    alive = [matrix.any(1) for matrix in matrices]
    leave_out = all(
        (scale[~live].view("<u4") == BITS_OF_ONE).all()
        for scale, live in zip(scales, alive, strict=True)
    )
    if leave_out:
        scales = [scale[live] for scale, live in zip(scales, alive, strict=True)]
    names = scale_names(meta["settings"], meta["quantization"]["act_bits"])
    act_scales = np.array([tensors[name] for name in names], np.float32)
    packed = [vectors.pack(vector_set) for vector_set in (scales, biases, [act_scales])]
    return bytes([DEAD if leave_out else 0]) + b"".join(packed)


def sha_of(beginning: bytes, tensors: dict[str, np.ndarray]) -> bytes:
    """Return the SHA-256 of the content (FORMAT.md, section 4.5).

    beginning: as description.pack returns it. tensors: in the file's order.
    """
    sha = hashlib.sha256(beginning)
    for tensor in tensors.values():
        kind = "<f4" if tensor.dtype == np.float32 else "<i2"
        sha.update(np.ascontiguousarray(tensor, kind).reshape(-1).view(np.uint8))
    return sha.digest()


def check_levels(network: list[Layer], matrices: list[np.ndarray], scheme: dict) -> None:
    """Raise Malformed for a level that the bits of its layer do not have."""
    for layer, matrix in zip(network, matrices, strict=True):
        largest = 2 ** (bits_of(layer.name, scheme) - 1) - 1
        if matrix.size and max(int(matrix.max()), -int(matrix.min())) > largest:
            raise Malformed(f"{layer.name!r}: a level outside {-largest} to {largest}")


def check_weights(network: list[Layer], code_bytes: int) -> None:
    """Raise LimitExceeded for more weights than a section CODE of this length may describe."""
    weights = sum(math.prod(layer.shape) for layer in network)
    most = min(MAX_WEIGHTS, FREE_WEIGHTS + WEIGHTS_PER_BYTE * code_bytes)
    if weights > most:
        raise LimitExceeded(f"{weights} weights, over the limit of {most} for {code_bytes} bytes")


def parse_side(side: bytes, padded: bool = False) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Return (flags, [(stream, tail)]) of weight scales, biases, activation scales.

    padded: zeros may follow. Raises Malformed.
    """
    reader = Reader(side, "SIDE")
    flags = reader.bytes(1)[0]
    if flags & ~DEAD:
        raise Malformed("section SIDE: a reserved flag is set")
    packed = [vectors.split(reader) for _ in range(3)]
    if not padded or any(side[reader.position :]):
        reader.end()
    return flags, packed
