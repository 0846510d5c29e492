"""Section NETW of `.nnz` files: a description of the network (FORMAT.md, section 4.1).

It holds JSON, deflated with a preset dictionary; the widths that do not follow from other widths;
the SHA-256 of an ancestor's file and of the content.
"""

import json
import zlib

from lib.nnz import frame
from lib.nnz.frame import LIMIT, MAX_LENGTH, Malformed, Reader, varint

MAX_WIDTH, MAX_BLOCKS, MAX_SEED = 65535, 255, 2**32 - 1
SHA_BYTES = 32  # of a SHA-256
TEXT_LIMIT = 1 << 16  # bytes of the JSON
# The JSON of a usual network, which primes deflate: what a file shares with it takes few bytes.
DICTIONARY = frame.canonical({
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


def pack(meta: dict) -> tuple[bytes, bytes, dict]:
    """Return (beginning, section, settings) of a network.

    meta: as lib/nnz/v2.py has it. beginning: the first bytes of the content; the section ends
    with the content's SHA-256. section: without that. Raises Malformed or LimitExceeded for a
    network that has no description.
    """
    settings, widths = _split(meta["settings"])
    hashes = [row["sha256"] for row in meta["ancestors"]]
    known = [i for i, value in enumerate(hashes) if value]
    described = {k: v for k, v in meta.items() if k not in ("ancestors", "settings")} | {
        "settings": settings, "ancestors": [row["stage"] for row in meta["ancestors"]],
        "weights": meta["ancestors"][0]["weights"], "parent": known[-1] if known else None,
    }  # fmt: skip
    text, parent = frame.canonical(described), hashes[known[-1]] if known else "00" * SHA_BYTES
    rest = b"".join(map(varint, widths)) + bytes.fromhex(parent)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    section = deflate.compress(text) + deflate.flush() + rest
    again, beginning, _ = parse(section + bytes(SHA_BYTES), LIMIT)
    names = "settings", "quantization", "seed", "mean", "std", "data"
    if any(again[name] != meta[name] for name in names):
        raise Malformed("the metadata do not survive: not of a network of this version")
    return beginning, section, again["settings"]


def _split(settings):
    """Return the settings without widths, and those widths that do not follow from others."""
    try:
        blocks = settings["blocks"]
        widths = [settings["stem"]]
        for block in blocks:
            if block["expand"]:
                widths.append(block["hidden"])
            if not block["residual"]:
                widths.append(block["out"])
        plain = {k: v for k, v in settings.items() if k not in ("stem", "head")}
        plain["blocks"] = [
            {k: v for k, v in block.items() if k not in ("hidden", "out")} for block in blocks
        ]
        widths.append(settings["head"])
        if not all(type(width) is int and 1 <= width <= MAX_WIDTH for width in widths):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise Malformed("the settings are not those of a network of this version") from None
    return plain, widths


def parse(payload: bytes, limit: int) -> tuple[dict, bytes, bytes]:
    """Return (meta, beginning, the content's SHA-256) of the section; see `pack`.

    limit: of the inflated JSON, in bytes. Raises a FormatError for a section that is not legal.
    """
    text, rest = inflate(payload, min(limit, TEXT_LIMIT))
    described = frame.parse_canonical(text, "NETW")
    if type(described) is not dict or set(described) != KEYS:
        raise Malformed("section NETW: the keys are not " + " ".join(sorted(KEYS)))
    check(described)
    reader, settings = Reader(rest, "NETW"), described["settings"]
    settings["stem"] = channels = _width(reader)
    for block in settings["blocks"]:
        block["hidden"] = _width(reader) if block["expand"] else channels
        block["out"] = channels = channels if block["residual"] else _width(reader)
    settings["head"] = _width(reader)
    parent_sha = bytes(reader.bytes(SHA_BYTES)).hex()
    beginning = text + bytes(rest[: reader.position])
    sha = bytes(reader.bytes(SHA_BYTES))
    reader.end()
    parent = described["parent"]
    if parent is None and parent_sha != "00" * SHA_BYTES:
        raise Malformed("section NETW: a hash of no ancestor")
    meta = {k: described[k] for k in ("settings", "quantization", "seed", "mean", "std", "data")}
    meta["ancestors"] = [
        {"stage": stage, "sha256": parent_sha if i == parent else None, "bytes": None,
         "weights": None if i else described["weights"], "metrics": {}}
        for i, stage in enumerate(described["ancestors"])
    ]  # fmt: skip
    return meta, beginning, sha


def _width(reader):
    width = reader.varint()
    if not 1 <= width <= MAX_WIDTH:
        raise Malformed(f"section {reader.section}: a width outside 1 to {MAX_WIDTH}")
    return width


def inflate(payload: bytes, limit: int) -> tuple[bytes, bytes]:
    """Return (the JSON, the bytes after its deflate stream) of the section.

    Raises Malformed or LimitExceeded, as frame.inflate does.
    """
    stream = zlib.decompressobj(-15, zdict=DICTIONARY)
    return frame.inflate(stream, payload, limit, "NETW"), stream.unused_data


def check(described: dict) -> None:
    """Raise Malformed unless the values of the JSON are legal."""

    def ensure(legal, what):
        if not legal:
            raise Malformed(f"section NETW: {what}")

    def is_integer(value, low, high):
        return type(value) is int and low <= value <= high

    settings, scheme = described["settings"], described["quantization"]
    stages, parent = described["ancestors"], described["parent"]
    ensure(type(settings) is dict and type(scheme) is dict, "no settings, or no quantization")
    blocks = settings.get("blocks")
    ensure(type(blocks) is list and 1 <= len(blocks) <= MAX_BLOCKS, "1 to 255 blocks")
    ensure(settings.get("folded") is True, "not folded")
    ensure(is_integer(settings.get("classes"), 1, MAX_WIDTH), "classes: 1 to 65535")
    ensure(not {"stem", "head"} & set(settings), "a width in the settings")
    for block in blocks:
        ensure(type(block) is dict and set(block) == {"expand", "residual", "stride"}, "a block")
        ensure(type(block["expand"]) is type(block["residual"]) is bool, "a block's flag")
        ensure(is_integer(block["stride"], 1, 255), "a stride: 1 to 255")
        ensure(block["stride"] == 1 or not block["residual"], "a residual block's stride: 1")
    ensure(is_integer(settings.get("stem_stride", 1), 1, 255), "stem_stride: 1 to 255")
    dropout = settings.get("dropout", 0)
    ensure(type(dropout) in (int, float) and 0 <= dropout < 1, "dropout: a number in [0, 1)")
    ensure(scheme.get("method") in ("ptq", "qat"), "the method must be ptq or qat")
    layer_bits = scheme.get("layer_bits")
    ensure(type(layer_bits) is dict, "no layer_bits")
    for bits in (scheme.get("weight_bits"), *layer_bits.values()):
        ensure(is_integer(bits, 2, 16), "weights: 2 to 16 bits")
    act_bits = scheme.get("act_bits")
    last_act_bits = scheme.get("last_act_bits", act_bits)
    for bits in (act_bits, last_act_bits):
        legal = is_integer(bits, 2, 16) or is_integer(bits, 32, 32)
        ensure(legal, "activations: 2 to 16 bits, or 32")
    ensure(last_act_bits != 32 or act_bits == 32, "last_act_bits 32, but act_bits is not")
    ensure(type(stages) is list and stages and all(type(s) is str for s in stages), "ancestors")
    ensure(parent is None or is_integer(parent, 0, len(stages) - 1), "parent")
    ensure(is_integer(described["weights"], 1, MAX_LENGTH), "weights")
    ensure(described["seed"] is None or is_integer(described["seed"], 0, MAX_SEED), "seed")
    ensure(type(described["data"]) is dict, "data")
    for name in ("mean", "std"):
        numbers = described[name]
        ensure(type(numbers) is list and [type(x) for x in numbers] == [float] * 3, name)
    ensure(min(described["std"]) > 0, "std: over 0")
