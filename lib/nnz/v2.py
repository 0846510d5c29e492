"""A `.nnz` file of version 2: a quantized MobileNetV2, entropy-coded (FORMAT.md, section 4).

Weights are coded by lib/nnz/coder.py, their scales, the biases and the activation scales by
lib/nnz/vectors.py, everything else by lib/nnz/description.py. The network is one of
models/mobilenetv2.py, its batch norms folded, the weights of every layer at 2 to 16 bits (methods
ptq and qat of lib/quantizers.py). `decode(encode(...))` gives back every tensor, bit for bit, and
of the metadata what FORMAT.md names.
"""

import hashlib
import math

import numpy as np

from lib.nnz import coder, description, vectors
from lib.nnz.frame import LIMIT, ChecksumMismatch, LimitExceeded, Malformed, Reader, pack, unpack
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


def encode(meta: dict, tensors: dict[str, np.ndarray], *, compiled: bool | None = None) -> bytes:
    """Return the bytes of a file.

    meta: settings, quantization, seed, mean, std, data and ancestors as lib/compressed.py has them.
    tensors: the network's state, its weights as levels, int8 up to 8 bits, else int16.
    compiled: as in coder.encode.

    Raises Malformed or LimitExceeded for what a file of this version cannot hold.
    """
    hashed, head, settings = description.pack(meta)
    scheme, network = meta["quantization"], layers(settings)
    expected = tensors_of(settings, scheme)
    if {name: (a.dtype.name, a.shape) for name, a in tensors.items()} != expected:
        raise Malformed("the tensors are not those of the network that the settings describe")
    matrices = [tensors[f"{layer.name}.weight"].reshape(matrix_shape(layer)) for layer in network]
    _check_levels(network, matrices, scheme)
    code = coder.encode(matrices, *kinds_and_groups(network), compiled=compiled)
    _check_weights(network, len(code))

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
    names = scale_names(settings, scheme["act_bits"])
    act_scales = np.array([tensors[name] for name in names], np.float32)
    groups = [vectors.pack(group, compiled) for group in (scales, biases, [act_scales])]
    return pack({
        "NETW": head + _digest(hashed, expected, tensors),
        "CODE": code,
        "SIDE": bytes([DEAD if leave_out else 0]) + b"".join(groups),
    })  # fmt: skip


def decode(
    data: bytes, limit: int = LIMIT, *, compiled: bool | None = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """Return (meta, tensors) as given to `encode`, in new, writable arrays.

    Of the ancestors only their stages come back, the SHA-256 of one of them, and the number of
    weights of the first. compiled: as in coder.decode.

    Raises a FormatError for any file that is damaged or illegal, or whose tensors would take more
    than `limit` bytes; their size is checked before any of them is allocated.
    """
    payloads = unpack(data, limit, version=2)
    meta, hashed, digest = description.parse(payloads["NETW"], limit)
    settings, scheme = meta["settings"], meta["quantization"]
    network = layers(settings)
    _check_weights(network, len(payloads["CODE"]))
    expected = tensors_of(settings, scheme)
    if sum(4 * math.prod(shape) for _, shape in expected.values()) > limit:
        raise LimitExceeded(f"the tensors take more than the limit of {limit} bytes")
    shapes = [matrix_shape(layer) for layer in network]
    try:
        matrices = coder.decode(
            payloads["CODE"], shapes, *kinds_and_groups(network), compiled=compiled
        )
    except coder.CoderError as error:
        raise Malformed(f"section CODE: {error}") from None
    _check_levels(network, matrices, scheme)

    flags, packed = _parse_side(payloads["SIDE"])
    alive = [matrix.any(1) if flags & DEAD else np.ones(len(matrix), bool) for matrix in matrices]
    names = scale_names(settings, scheme["act_bits"])
    sizes = [int(live.sum()) for live in alive], [len(live) for live in alive], [len(names)]
    scales, biases, (act_scales,) = (
        vectors.unpack(*group, size, compiled) for group, size in zip(packed, sizes, strict=True)
    )
    tensors = {}
    for i, layer in enumerate(network):
        stored, shape = expected[f"{layer.name}.weight"]
        tensors[f"{layer.name}.weight"] = matrices[i].astype(stored).reshape(shape)
        scale = np.ones(len(matrices[i]), np.float32)
        scale[alive[i]] = scales[i]
        tensors[f"{layer.name}.weight_scale"], tensors[f"{layer.name}.bias"] = scale, biases[i]
    tensors |= {name: np.array(scale) for name, scale in zip(names, act_scales, strict=True)}
    if _digest(hashed, expected, tensors) != digest:
        raise ChecksumMismatch("the decoded content is not what was encoded (SHA-256)")
    return meta, tensors


def sections(data: bytes, *, compiled: bool | None = None) -> dict[str, int]:
    """Return {part: bytes} of a file; they add up to len(data).

    The parts are those of coder.PARTS, scales, biases, activation_scales, metadata and frame
    (header, section table and SHA-256).
    """
    payloads = unpack(data, version=2)
    meta, _, _ = description.parse(payloads["NETW"], LIMIT)
    network, code = layers(meta["settings"]), payloads["CODE"]
    _check_weights(network, len(code))
    shapes = [matrix_shape(layer) for layer in network]
    sizes = coder.account(code, shapes, *kinds_and_groups(network), compiled=compiled)
    _, packed = _parse_side(payloads["SIDE"])
    parts = "scales", "biases", "activation_scales"
    for part, (coded, low_bits) in zip(parts, packed, strict=True):
        sizes[part] = len(coded) + len(low_bits)
    sizes["metadata"] = len(payloads["NETW"]) - description.SHA_BYTES
    return sizes | {"frame": len(data) - sum(sizes.values())}


def _digest(hashed, expected, tensors):
    """Return the SHA-256 of the content (FORMAT.md, section 4.5)."""
    sha = hashlib.sha256(hashed)
    for name, (stored, _) in expected.items():
        hashed_as = "<i2" if stored.startswith("int") else "<f4"
        sha.update(np.ascontiguousarray(tensors[name], hashed_as).reshape(-1).view(np.uint8))
    return sha.digest()


def _check_levels(network, matrices, scheme):
    for layer, matrix in zip(network, matrices, strict=True):
        largest = 2 ** (bits_of(layer.name, scheme) - 1) - 1
        if matrix.size and max(int(matrix.max()), -int(matrix.min())) > largest:
            raise Malformed(f"{layer.name!r}: a level outside {-largest} to {largest}")


def _check_weights(network, code_bytes):
    weights = sum(math.prod(layer.shape) for layer in network)
    most = min(MAX_WEIGHTS, FREE_WEIGHTS + WEIGHTS_PER_BYTE * code_bytes)
    if weights > most:
        raise LimitExceeded(f"{weights} weights, over the limit of {most} for {code_bytes} bytes")


def _parse_side(payload):
    """Return flags and, for weight scales, biases, activation scales, (coder stream, low bits)."""
    reader = Reader(payload, "SIDE")
    flags = reader.bytes(1)[0]
    if flags & ~DEAD:
        raise Malformed("section SIDE: a reserved flag is set")
    groups = []
    for _ in range(3):
        lengths = reader.varint(), reader.varint()
        groups.append(tuple(bytes(reader.bytes(length)) for length in lengths))
    reader.end()
    return flags, groups
