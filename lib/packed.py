"""A quantized network in a `.nnz` file of version 2 (FORMAT.md, section 4): weights by
lib/coder.py, scales, biases and steps by lib/vectors.py, the rest in some 170 bytes.

For networks of models/mobilenetv2.py, folded, with every layer's weights at 2 to 16 bits (methods
ptq and qat of lib/quantizers.py). `decode(encode(...))` gives back every tensor bit for bit, and of
the metadata what FORMAT.md names. Knows no torch.
"""

import hashlib
import json
import math
import zlib
from typing import NamedTuple

import numpy as np

from lib import coder, sparse, vectors
from lib.container import (
    LIMIT,
    MAX_LENGTH,
    ChecksumMismatch,
    LimitExceeded,
    Malformed,
    pack,
    unpack,
)

MAX_WIDTH, MAX_BLOCKS = 65535, 255
MAX_WEIGHTS = 1 << 25  # decoding takes time for each
FREE, PER_BYTE = 1 << 22, 1 << 12  # ... so the length of CODE limits them, too
SHA = 32
TEXT_LIMIT = 1 << 16  # bytes of the JSON
DEAD = 1  # flag of SIDE: the scales of rows of zeros are 1.0, and left out
ONE = 0x3F800000  # the bits of 1.0
# The JSON of a usual network: what a file has in common with it takes next to no bytes.
DICTIONARY = sparse.canonical({
    "ancestors": ["baseline", "pruned", "quantized", "int8"],
    "data": {
        "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                    "truck"],
        "source": "cifar10", "split_seed": 10, "test": 10000, "train": 45000, "val_size": 5000,
    },
    "mean": [0.4914, 0.4822, 0.4465], "parent": 3,
    "quantization": {
        "act_bits": 8, "layer_bits": {}, "method": "ptq", "weight_bits": 8,
        "weight_scale": "channel",
    },
    "seed": 47,
    "settings": {
        "blocks": [
            {"expand": i > 0, "residual": i not in (0, 1, 3, 6, 10, 13, 16),
             "stride": 2 if i in (6, 13) else 1}
            for i in range(17)
        ],
        "classes": 10, "dropout": 0.2, "folded": True, "stem_stride": 1,
    },
    "std": [0.247, 0.243, 0.261], "weights": 2236682,
})  # fmt: skip
KEYS = set(json.loads(DICTIONARY))


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
    signed, head, settings = _pack_description(meta)
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
    meta, signed, digest = _parse_description(payloads["NETW"], limit)
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
    meta, _, _ = _parse_description(payloads["NETW"], LIMIT)
    network, code = layers(meta["settings"]), payloads["CODE"]
    _check_weights(network, len(code))
    shapes = [layer.matrix for layer in network]
    sizes = coder.account(code, shapes, *_sides(network), compiled=compiled)
    _, packed = _side(payloads["SIDE"])
    for part, (stream, low) in zip(("scales", "biases", "steps"), packed, strict=True):
        sizes[part] = len(stream) + len(low)
    sizes["metadata"] = len(payloads["NETW"]) - SHA
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
    read = _Reader(payload, "SIDE")
    flags = read.bytes(1)[0]
    if flags & ~DEAD:
        raise Malformed("section SIDE: a reserved flag is set")
    groups = []
    for _ in range(3):
        lengths = read.number(), read.number()
        groups.append(tuple(bytes(read.bytes(n)) for n in lengths))
    read.end()
    return flags, groups


# ---- the description: JSON, widths, the parent's hash --------------------------------------------


def _pack_description(meta):
    """(what the hash is over, the section but for the hash, settings); all of it checked."""
    settings, widths = _split(meta["settings"])
    hashes = [row["sha256"] for row in meta["ancestors"]]
    known = [i for i, value in enumerate(hashes) if value]
    described = {k: v for k, v in meta.items() if k not in ("ancestors", "settings")} | {
        "settings": settings, "ancestors": [row["stage"] for row in meta["ancestors"]],
        "weights": meta["ancestors"][0]["weights"], "parent": known[-1] if known else None,
    }  # fmt: skip
    text, parent = sparse.canonical(described), hashes[known[-1]] if known else "00" * SHA
    rest = b"".join(map(vectors.varint, widths)) + bytes.fromhex(parent)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    head = deflate.compress(text) + deflate.flush() + rest
    found, signed, _ = _parse_description(head + bytes(SHA), LIMIT)
    names = "settings", "quantization", "seed", "mean", "std", "data"
    if any(found[name] != meta[name] for name in names):
        raise Malformed("the metadata do not survive: not of a network of this version")
    return signed, head, found["settings"]


def _split(settings):
    """Settings without widths, and the widths that do not follow from others."""
    try:
        blocks = settings["blocks"]
        widths = [settings["stem"]]
        for block in blocks:
            widths += [block["hidden"]] * block["expand"] + [block["out"]] * (not block["residual"])
        plain = {k: v for k, v in settings.items() if k not in ("stem", "head")}
        plain["blocks"] = [
            {k: v for k, v in block.items() if k not in ("hidden", "out")} for block in blocks
        ]
        return plain, [*widths, settings["head"]]
    except (KeyError, TypeError, AttributeError):
        raise Malformed("the settings are not those of a network of this version") from None


def _parse_description(payload, limit):
    """(meta, what the hash is over, the hash) of section NETW, all of it checked."""
    text, rest = _inflate(payload, min(limit, TEXT_LIMIT))
    found = sparse.parse_canonical(text, "NETW")
    if type(found) is not dict or set(found) != KEYS:
        raise Malformed("section NETW: the keys are not " + " ".join(sorted(KEYS)))
    _check_description(found)
    read, settings = _Reader(rest, "NETW"), found["settings"]
    settings["stem"] = channels = read.width()
    for block in settings["blocks"]:
        block["hidden"] = read.width() if block["expand"] else channels
        block["out"] = channels = channels if block["residual"] else read.width()
    settings["head"] = read.width()
    parent = bytes(read.bytes(SHA)).hex()
    signed = text + bytes(rest[: read.at])
    digest = bytes(read.bytes(SHA))
    read.end()
    at = found["parent"]
    if at is None and parent != "00" * SHA:
        raise Malformed("section NETW: a hash of no ancestor")
    meta = {k: found[k] for k in ("settings", "quantization", "seed", "mean", "std", "data")}
    meta["ancestors"] = [
        {"stage": stage, "sha256": parent if i == at else None, "bytes": None,
         "weights": None if i else found["weights"], "metrics": {}}
        for i, stage in enumerate(found["ancestors"])
    ]  # fmt: skip
    return meta, signed, digest


def _inflate(payload, limit):
    """(text, the bytes behind it) of a raw deflate stream with the dictionary."""
    stream = zlib.decompressobj(-15, zdict=DICTIONARY)
    try:
        text = stream.decompress(payload, limit + 1)
    except zlib.error as error:
        raise Malformed(f"section NETW is not a deflate stream: {error}") from None
    if len(text) > limit:
        raise LimitExceeded(f"section NETW inflates to more than {limit} bytes")
    if not stream.eof:
        raise Malformed("section NETW is not a whole deflate stream")
    return text, stream.unused_data


def _check_description(found):
    def ensure(legal, what):
        if not legal:
            raise Malformed(f"section NETW: {what}")

    def number(value, low, high):
        return type(value) is int and low <= value <= high

    settings, scheme, stages = found["settings"], found["quantization"], found["ancestors"]
    ensure(type(settings) is dict and type(scheme) is dict, "no settings, or no quantization")
    blocks = settings.get("blocks")
    ensure(type(blocks) is list and 1 <= len(blocks) <= MAX_BLOCKS, "1 to 255 blocks")
    ensure(settings.get("folded") is True, "not folded")
    ensure(number(settings.get("classes"), 1, MAX_WIDTH), "classes: 1 to 65535")
    ensure(not {"stem", "head"} & set(settings), "a width in the settings")
    for block in blocks:
        ensure(type(block) is dict and set(block) == {"expand", "residual", "stride"}, "a block")
        ensure(type(block["expand"]) is type(block["residual"]) is bool, "a block's flag")
        ensure(number(block["stride"], 1, 255), "a stride: 1 to 255")
    ensure(scheme.get("method") in ("ptq", "qat"), "the method must be ptq or qat")
    own = scheme.get("layer_bits")
    ensure(type(own) is dict, "no layer_bits")
    for bits in (scheme.get("weight_bits"), *own.values()):
        ensure(number(bits, 2, 16), "weights: 2 to 16 bits")
    act_bits = scheme.get("act_bits")
    for bits in (act_bits, scheme.get("last_act_bits", act_bits)):
        ensure(number(bits, 2, 16) or bits == 32, "activations: 2 to 16 bits, or 32")
    ensure(type(stages) is list and stages and all(type(s) is str for s in stages), "ancestors")
    ensure(found["parent"] is None or number(found["parent"], 0, len(stages) - 1), "parent")
    ensure(number(found["weights"], 0, MAX_LENGTH), "weights")
    ensure(found["seed"] is None or type(found["seed"]) is int, "seed")
    ensure(type(found["data"]) is dict, "data")
    for name in ("mean", "std"):
        ensure(type(found[name]) is list and all(type(x) is float for x in found[name]), name)


class _Reader:
    """Bytes and varints of a section, in order."""

    def __init__(self, raw, section):
        self.raw, self.section, self.at = raw, section, 0

    def bytes(self, count):
        if count > len(self.raw) - self.at:
            raise Malformed(f"section {self.section} ends early")
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self):
        """A varint of at most 32 bits, and no longer than it needs."""
        value = 0
        for shift in range(0, 35, 7):
            (byte,) = self.bytes(1)
            value |= (byte & 127) << shift
            if byte < 128:
                if (byte or not shift) and value >> 32 == 0:
                    return value
                break
        raise Malformed(f"section {self.section}: an illegal number")

    def width(self):
        value = self.number()
        if not 1 <= value <= MAX_WIDTH:
            raise Malformed(f"section {self.section}: a width outside 1 to {MAX_WIDTH}")
        return value

    def end(self):
        if self.at != len(self.raw):
            raise Malformed(f"section {self.section}: {len(self.raw) - self.at} bytes too many")
