"""A quantized network in a `.nnz` file of version 2 (FORMAT.md, section 4): weights by
lib/coder.py, scales, biases and steps by lib/vectors.py, all else by lib/description.py.

For networks of models/mobilenetv2.py, folded, with every layer's weights at 2 to 16 bits (methods
ptq and qat of lib/quantizers.py). `decode(encode(...))` gives back every tensor bit for bit, and of
the metadata what FORMAT.md names. Knows no torch.
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np

from lib import coder, description, vectors
from lib.container import LIMIT, ChecksumMismatch, LimitExceeded, Malformed, pack, unpack

MAX_WEIGHTS = 1 << 25  # decoding takes time for each
FREE, PER_BYTE = 1 << 22, 1 << 12  # ... so the length of CODE limits them, too
DEAD = 1  # flag of SIDE: the scales of rows of zeros are 1.0, and left out
ONE = 0x3F800000  # the bits of 1.0


class Layer(NamedTuple):
    name: str
    shape: tuple[int, ...]  # of the weight
    kind: int  # of lib/coder.py
    links: tuple  # (row group, column group) of lib/coder.py

    @property
    def matrix(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:])


def layers(settings: dict) -> list[Layer]:
    """The network's Conv2d and Linear layers in order; which of them share channels, and where."""
    channels = settings["stem"]
    found = [Layer("features.0.0", (channels, 3, 3, 3), coder.STEM, ("stem", None))]
    stream = "stem"
    for i, block in enumerate(settings["blocks"], 1):
        hidden, out, conv = block["hidden"], block["out"], f"features.{i}.conv"
        inner, after = stream, stream if block["residual"] else ("stream", i)
        if block["expand"]:
            inner = ("hidden", i)
            shape = hidden, channels, 1, 1
            found.append(Layer(f"{conv}.0.0", shape, coder.EXPAND, (inner, stream)))
        at = int(block["expand"])
        shapes = (hidden, 1, 3, 3), (out, hidden, 1, 1)
        found.append(Layer(f"{conv}.{at}.0", shapes[0], coder.DEPTHWISE, (inner, None)))
        found.append(Layer(f"{conv}.{at + 1}", shapes[1], coder.PROJECT, (after, inner)))
        channels, stream = out, after
    shapes = (settings["head"], channels, 1, 1), (settings["classes"], settings["head"])
    last = f"features.{len(settings['blocks']) + 1}.0"
    found.append(Layer(last, shapes[0], coder.HEAD, ("head", stream)))
    found.append(Layer("classifier.1", shapes[1], coder.CLASSIFIER, (None, "head")))
    return found


def places(settings: dict, act_bits: int) -> list[str]:
    """The tensors that hold the activations' steps, in order."""
    if act_bits == 32:
        return []
    found = ["image", "features.0.2"]
    for i, block in enumerate(settings["blocks"], 1):
        own = ["input"] if block["residual"] and act_bits < 8 else []
        own += [f"conv.{j}.2" for j in range(1 + block["expand"])]
        own += ["addend"] if block["residual"] else []
        found += [f"features.{i}.{place}" for place in [*own, "stream"]]
    found += [f"features.{len(settings['blocks']) + 1}.2", "pooled"]
    return [f"{place}.step" for place in found]


def bits_of(name: str, scheme: dict) -> int:
    return scheme["layer_bits"].get(name, scheme["weight_bits"])


def tensors_of(network: list[Layer], settings: dict, scheme: dict) -> dict[str, tuple]:
    """{name: (type, shape)} of the file's tensors, in its order."""
    found = {}
    for layer in network:
        kind = "int8" if bits_of(layer.name, scheme) <= 8 else "int16"
        found[f"{layer.name}.weight"] = kind, layer.shape
        found[f"{layer.name}.weight_scale"] = found[f"{layer.name}.bias"] = (
            "float32", layer.shape[:1]
        )  # fmt: skip
    steps = places(settings, scheme["act_bits"])
    return found | dict.fromkeys(steps, ("float32", ()))


def encode(meta: dict, tensors: dict[str, np.ndarray], *, compiled: bool | None = None) -> bytes:
    """A file. meta: settings, quantization, seed, mean, std, data, ancestors as lib/nnz.py has
    them; tensors: the state, weights as int8 (int16 over 8 bits) levels. compiled: by numba.

    Raises Malformed or LimitExceeded for what a file of this version cannot hold.
    """
    signed, head, settings = description.pack(meta)
    scheme, network = meta["quantization"], layers(settings)
    expected = tensors_of(network, settings, scheme)
    if {name: (a.dtype.name, a.shape) for name, a in tensors.items()} != expected:
        raise Malformed("the tensors are not those of the network that the settings describe")
    matrices = [tensors[f"{layer.name}.weight"].reshape(layer.matrix) for layer in network]
    _check_levels(network, matrices, scheme)
    code = coder.encode(matrices, *_sides(network), compiled=compiled)
    _check_weights(network, len(code))

    scales, biases = (
        [tensors[f"{layer.name}.{part}"] for layer in network] for part in ("weight_scale", "bias")
    )
    alive = [matrix.any(1) for matrix in matrices]
    ones = all((s[~live].view("<u4") == ONE).all() for s, live in zip(scales, alive, strict=True))
    if ones:
        scales = [s[live] for s, live in zip(scales, alive, strict=True)]
    steps = np.array([tensors[n] for n, (_, shape) in expected.items() if not shape], np.float32)
    groups = [vectors.pack(group, compiled) for group in (scales, biases, [steps])]
    return pack({
        "NETW": head + _digest(signed, expected, tensors),
        "CODE": code,
        "SIDE": bytes([ones * DEAD]) + b"".join(groups),
    })  # fmt: skip


def decode(
    data: bytes, limit: int = LIMIT, *, compiled: bool | None = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta, tensors) as given to `encode`; of each ancestor the stage, of one the SHA-256, and of
    the first the number of weights. New, writable arrays.

    Raises a FormatError for any file that is damaged or illegal, or whose tensors would take more
    than `limit` bytes: that is known, and checked, before any of them is allocated.
    """
    payloads = unpack(data, limit, version=2)
    meta, signed, digest = description.parse(payloads["NETW"], limit)
    settings, scheme = meta["settings"], meta["quantization"]
    network = layers(settings)
    _check_weights(network, len(payloads["CODE"]))
    expected = tensors_of(network, settings, scheme)
    if sum(4 * math.prod(shape) for _, shape in expected.values()) > limit:
        raise LimitExceeded(f"the tensors take more than the limit of {limit} bytes")
    shapes = [layer.matrix for layer in network]
    try:
        matrices = coder.decode(payloads["CODE"], shapes, *_sides(network), compiled=compiled)
    except coder.CoderError as error:
        raise Malformed(f"section CODE: {error}") from None
    _check_levels(network, matrices, scheme)

    flags, packed = _side(payloads["SIDE"])
    alive = [matrix.any(1) if flags & DEAD else np.ones(len(matrix), bool) for matrix in matrices]
    steps = [name for name, (_, shape) in expected.items() if not shape]
    sizes = [int(live.sum()) for live in alive], [len(live) for live in alive], [len(steps)]
    scales, biases, (found,) = (
        vectors.unpack(*group, size, compiled) for group, size in zip(packed, sizes, strict=True)
    )
    tensors = {}
    for i, layer in enumerate(network):
        kind, shape = expected[f"{layer.name}.weight"]
        tensors[f"{layer.name}.weight"] = matrices[i].astype(kind).reshape(shape)
        scale = np.ones(len(matrices[i]), np.float32)
        scale[alive[i]] = scales[i]
        tensors[f"{layer.name}.weight_scale"], tensors[f"{layer.name}.bias"] = scale, biases[i]
    tensors |= {name: np.array(step) for name, step in zip(steps, found, strict=True)}
    if _digest(signed, expected, tensors) != digest:
        raise ChecksumMismatch("the decoded content is not what was encoded (SHA-256)")
    return meta, tensors


def sections(data: bytes, *, compiled: bool | None = None) -> dict[str, int]:
    """Bytes by kind; they add up to len(data). The frame is header, section table and SHA-256."""
    payloads = unpack(data, version=2)
    meta, _, _ = description.parse(payloads["NETW"], LIMIT)
    network, code = layers(meta["settings"]), payloads["CODE"]
    _check_weights(network, len(code))
    shapes = [layer.matrix for layer in network]
    sizes = coder.account(code, shapes, *_sides(network), compiled=compiled)
    _, packed = _side(payloads["SIDE"])
    for part, (stream, low) in zip(("scales", "biases", "steps"), packed, strict=True):
        sizes[part] = len(stream) + len(low)
    sizes["metadata"] = len(payloads["NETW"]) - description.SHA
    return sizes | {"frame": len(data) - sum(sizes.values())}


def _sides(network):
    return [layer.kind for layer in network], [layer.links for layer in network]


def _digest(signed, expected, tensors):
    sha = hashlib.sha256(signed)
    for name, (kind, _) in expected.items():
        stored = "<i2" if kind.startswith("int") else "<f4"
        sha.update(np.ascontiguousarray(tensors[name], stored).reshape(-1).view(np.uint8))
    return sha.digest()


def _check_levels(network, matrices, scheme):
    for layer, matrix in zip(network, matrices, strict=True):
        top = 2 ** (bits_of(layer.name, scheme) - 1) - 1
        if matrix.size and max(int(matrix.max()), -int(matrix.min())) > top:
            raise Malformed(f"{layer.name!r}: a level outside {-top} to {top}")


def _check_weights(network, code_bytes):
    weights = sum(math.prod(layer.shape) for layer in network)
    most = min(MAX_WEIGHTS, FREE + PER_BYTE * code_bytes)
    if weights > most:
        raise LimitExceeded(f"{weights} weights, over the limit of {most} for {code_bytes} bytes")


def _side(payload):
    """Flags, and of scales, biases and steps each (stream, low bits)."""
    read = description.Reader(payload, "SIDE")
    flags = read.bytes(1)[0]
    if flags & ~DEAD:
        raise Malformed("section SIDE: a reserved flag is set")
    groups = []
    for _ in range(3):
        lengths = read.number(), read.number()
        groups.append(tuple(bytes(read.bytes(n)) for n in lengths))
    read.end()
    return flags, groups
