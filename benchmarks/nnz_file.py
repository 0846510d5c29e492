"""Time a whole .nnz file of version 3, encoding and decoding; or damage many and decode them.

    python benchmarks/nnz_file.py checkpoints/compressed.nnz [--turns 3]
    python benchmarks/nnz_file.py --fuzz 100000

Seconds are CPU seconds of plain Python and, if it is installed, numba. The two take alternating
turns, after a first one that compiles or loads the function; the medians are reported. The decoded
tensors are compared with the encoded ones.

--fuzz N: decode N damaged copies of small random files. In half of them, random bytes of the file
are changed, cut out or inserted. In the other half this is done to one section's payload and the
CRCs are corrected, so that the parsers and the coder get to see the damage. Each copy must end in
one of the named errors or, where the damage does not matter (the same text, deflated differently),
in the same network. The number of each error is printed; anything else is a traceback.
"""

import collections
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from lib import config
from lib.config import UserError, flag
from lib.nnz import coder, frame, v2, v3


@dataclass
class Settings:
    files: list[str] = config.files("a .nnz file of version 3")
    turns: int = flag(3, "turns of each side", least=1)
    fuzz: int = flag(0, "number of damaged files to decode; nothing else is done", least=0)


def made_up(seed: int = 0, bits: int = 4, act_bits: int = 8, coarse: bool = False):
    """Return random (meta, tensors) of a network of a few hundred weights, for lib/nnz/v3.py.

    coarse: scales have 3 mantissa bits, biases lie on a grid of 1/8, dead rows have a scale of 1.
    """
    draw = np.random.default_rng(seed)
    blocks, channels = [], 3
    for expand, residual in ((False, False), (True, True), (True, False)):
        out = channels if residual else int(draw.integers(2, 6))
        blocks.append({"hidden": int(draw.integers(3, 9)) if expand else channels, "out": out,
                       "stride": 1, "expand": expand, "residual": residual})  # fmt: skip
        channels = out
    settings = {"stem": 3, "head": 7, "blocks": blocks, "classes": 4, "dropout": 0.2,
                "folded": True, "stem_stride": 2}  # fmt: skip
    scheme = {"method": "qat", "weight_bits": bits, "act_bits": act_bits, "layer_bits": {},
              "weight_scale": "channel"}  # fmt: skip
    network = v2.layers(settings)
    tensors = {}
    for name, (kind, shape) in v2.tensors_of(settings, scheme).items():
        if kind == "float32":
            value = draw.normal(size=shape)
            if coarse and "bias" in name:
                value = np.round(value * 8) / 8 + 0.0
            elif coarse:
                fraction, exponent = np.frexp(value)
                value = np.ldexp(np.round(fraction * 16) / 16, exponent)
            tensors[name] = np.asarray(value, np.float32)
        else:
            top = 2 ** (v2.bits_of(name.removesuffix(".weight"), scheme) - 1) - 1
            levels = np.clip(np.round(draw.laplace(0, top / 3, shape)), -top, top)
            levels[draw.random(shape) < 0.4] = 0
            levels[draw.random(len(levels)) < 0.2] = 0
            tensors[name] = levels.astype(kind)
    for layer in network:
        dead = ~tensors[f"{layer.name}.weight"].reshape(v2.matrix_shape(layer)).any(1)
        if coarse:
            tensors[f"{layer.name}.weight_scale"][dead] = 1
    ancestor = {"bytes": None, "metrics": {}, "sha256": None, "weights": None}
    meta = {
        "settings": settings, "quantization": scheme, "seed": 47, "mean": [0.5, 0.25, 0.1],
        "std": [0.1, 0.2, 1.0], "data": {"classes": ["a", "b", "c", "d"], "val_size": 30},
        "ancestors": [ancestor | {"stage": "pruned", "weights": 5000},
                      ancestor | {"stage": "quantized", "sha256": "0123456789abcdef" * 4}],
    }  # fmt: skip
    return meta, tensors


def sealed(payloads) -> bytes:
    """Return the file of these payloads, with every CRC right."""
    return frame.pack({tag: bytes(payload) for tag, payload in payloads.items()})


def fuzz(count: int, seed: int = 0) -> collections.Counter:
    """Decode `count` damaged files; return how often each error came."""
    draw, outcomes = random.Random(seed), collections.Counter()
    cases = (4, 8, True), (8, 6, False), (2, 32, True), (12, 16, False)
    made = [made_up(i, *case) for i, case in enumerate(cases)]
    networks = [(meta, v3.in_order(meta, tensors)) for meta, tensors in made]
    files = [v3.encode(*network) for network in networks]
    for _ in range(count):
        at = draw.randrange(len(files))
        if draw.random() < 0.5:
            raw = damaged(files[at], draw)
        else:
            payloads = dict(frame.unpack(files[at]))
            tag = draw.choice(list(payloads))
            payloads[tag] = damaged(bytes(payloads[tag]), draw)
            raw = sealed(payloads)
        try:
            meta, tensors = v3.decode(raw)
        except frame.FormatError as error:
            assert type(error) is not frame.FormatError and "\n" not in str(error)
            outcomes[type(error).__name__] += 1
        else:
            assert meta == networks[at][0]
            for name, value in networks[at][1].items():
                assert value.tobytes() == tensors[name].tobytes(), name
            outcomes["the same network"] += 1
    return outcomes


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """Return the bytes with up to three places changed, cut out or inserted."""
    raw = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        at, size = draw.randrange(len(raw) + 1), draw.choice((0, 1, 1, 2, 4, 30))
        new = draw.choice((size, size, draw.randrange(6)))
        fill = draw.choice((None, None, 0, 255))
        raw[at : at + size] = draw.randbytes(new) if fill is None else bytes([fill]) * new
    if draw.random() < 0.3 and raw:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(raw)


def times(path: str, turns: int) -> None:
    """Print the CPU seconds of encoding and decoding a file."""
    raw = Path(path).read_bytes()
    meta, tensors = v3.decode(raw)
    sides = {"plain Python": False} | ({"numba": True} if coder.numba else {})
    rows = {name: [] for name in sides}
    if coder.numba:  # compile, or load
        v3.decode(v3.encode(*made_up()))
    for _ in range(turns):
        for name, compiled in sides.items():
            coder.COMPILED = compiled
            start = time.process_time()
            again = v3.encode(meta, tensors)
            middle = time.process_time()
            _, decoded = v3.decode(again)
            rows[name].append((middle - start, time.process_time() - middle))
            assert again == raw and all(np.array_equal(decoded[k], v) for k, v in tensors.items())
    print(f"{path}: {len(raw):,} bytes; CPU seconds, medians of {turns} alternating turns")
    first = None
    for name, pairs in rows.items():
        row = [statistics.median(column) for column in zip(*pairs, strict=True)]
        first = first or row
        ratio = ", ".join(f"{a / b:.3f}" for a, b in zip(row, first, strict=True))
        print(f"{name:14s} encode {row[0]:.3f}, decode {row[1]:.3f}; ratio to the first: {ratio}")


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    if cfg.fuzz:
        for name, count in fuzz(cfg.fuzz).most_common():
            print(f"{count:9,d}  {name}")
        return
    if len(cfg.files) != 1:
        raise UserError("name one .nnz file")
    try:
        times(cfg.files[0], cfg.turns)
    except (OSError, frame.FormatError) as error:
        raise UserError(f"{cfg.files[0]}: {config.reason(error)}") from None


if __name__ == "__main__":
    config.run(main)
