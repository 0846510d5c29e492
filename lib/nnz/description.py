"""Section NETW of a `.nnz` file of version 2: what network it is (FORMAT.md, section 4.1).

JSON, deflated with a preset dictionary; the widths that do not follow from others; two hashes.
Knows no torch.
"""

import json
import zlib

from lib import container, sparse, vectors
from lib.container import LIMIT, MAX_LENGTH, Malformed

MAX_WIDTH, MAX_BLOCKS = 65535, 255
SHA = 32
TEXT_LIMIT = 1 << 16  # bytes of the JSON
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


def pack(meta: dict) -> tuple[bytes, bytes, dict]:
    """(what the hash is over, the section but for the hash, settings); all of it checked.

    meta: as lib/packed.py has it. Raises Malformed or LimitExceeded for what has no description.
    """
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
    found, signed, _ = parse(head + bytes(SHA), LIMIT)
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


def parse(payload: bytes, limit: int) -> tuple[dict, bytes, bytes]:
    """(meta, what the hash is over, the hash) of the section, all of it checked: raises a
    FormatError for any that is not legal."""
    text, rest = inflate(payload, min(limit, TEXT_LIMIT))
    found = sparse.parse_canonical(text, "NETW")
    if type(found) is not dict or set(found) != KEYS:
        raise Malformed("section NETW: the keys are not " + " ".join(sorted(KEYS)))
    check(found)
    read, settings = Reader(rest, "NETW"), found["settings"]
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


def inflate(payload, limit):
    """(text, the bytes behind it) of a raw deflate stream with the dictionary."""
    stream = zlib.decompressobj(-15, zdict=DICTIONARY)
    return container.inflate(stream, payload, limit, "NETW"), stream.unused_data


def check(found: dict) -> None:
    """Raise Malformed unless the JSON's values are legal."""
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


class Reader:
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
