"""Bytes and seconds of lib/nnz/coder.py, beside entropy, lzma and NNCodec, on the same integers.

    python benchmarks/coder.py [--reference ../shared/reference] [--turns 3]
    python benchmarks/coder.py --nncodec [--environment DIR]
    python benchmarks/coder.py --scale 25

The integers: the reference report's int8 weights that are left after exact compaction; the same
network's weights again at 4, 3 and 2 bits, one scale a row; and made-up matrices, dense and sparse.
Entropy is the zero-order one of each tensor, the counts that it needs not counted: for a tensor of
many symbols and few cells no coder can reach it. lzma is `-9e` over the bytes of all tensors.

--nncodec: Fraunhofer's implementation of ISO/IEC 15938-17 (deepCABAC) in an environment of its own
(a temporary one, or DIR, which is kept and used again), through its public functions. Turns of each
side alternate, each in a process that sleeps while the other computes; medians count. Seconds are
of that process on a CPU, not of the clock, so that neighbours on the machine disturb less.

--scale N: our seconds and peak memory a million weights, of one square layer, 1 to N million, 80%
zeros; it needs numba (plain Python takes about 6 seconds a million).
"""

import json
import lzma
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from lib import config
from lib.config import UserError, flag
from lib.nnz import coder, v2

NNCODEC = "nncodec==2.1.3"
# The side of NNCodec: reads layers.npz; each line in is a turn, each line out its figures.
THEIRS = """
import sys, json, time, numpy as np
from nncodec.nn import encode, decode
layers = dict(np.load("layers.npz"))
print("ready", flush=True)
for _ in sys.stdin:
    start = time.process_time()
    raw = encode(layers, {"use_dq": False, "verbose": False, "results": "."})
    middle = time.process_time()
    found = decode(raw)
    end = time.process_time()
    same = all(np.array_equal(found[name], layers[name]) for name in layers)
    print(json.dumps([len(raw), middle - start, end - middle, same]), flush=True)
"""


@dataclass
class Settings:
    reference: str = flag("../shared/reference", "folder with pruned.pth and int8.pth")
    turns: int = flag(3, "of each side, for the times")
    nncodec: bool = flag(False, f"also {NNCODEC}, installed in an environment of its own")
    environment: str | None = flag(None, "folder of that environment; default: a temporary one")
    scale: int = flag(0, "only: up to so many million weights")


def reference(folder: str):
    """(levels, weights, kinds, links) of the report's network after compaction, in its order."""
    import torch

    from lib import checkpoint
    from lib.compaction import compact, take
    from lib.metrics import weight_layers

    small, kept = compact(checkpoint.load(Path(folder) / "pruned.pth").build("cpu"))
    report = checkpoint.read(Path(folder) / "int8.pth")
    levels, weights = [], []
    for name, layer in weight_layers(small).items():
        key = f"{name}.original_layer.weight"
        level = torch.round(layer.weight.detach() / report["scales"][key])
        if not torch.equal(
            level.to(torch.int8), take(report["int8_weights"][key], kept[name + ".weight"])
        ):
            raise UserError(f"{name}: pruned.pth and int8.pth are not of one network")
        levels.append(level.flatten(1).numpy().astype(np.int32))
        weights.append(layer.weight.detach().flatten(1).numpy())
    network = v2.layers(small.settings)
    return levels, weights, *v2.kinds_and_groups(network)


def requantized(weights, bits):
    """One scale a row, from its largest magnitude, to nearest; zeros stay zeros."""
    top = 2 ** (bits - 1) - 1
    scales = [np.abs(w).max(1, keepdims=True) / top for w in weights]
    return [
        np.round(w / np.where(s > 0, s, 1)).astype(np.int32)
        for w, s in zip(weights, scales, strict=True)
    ]


def made_up():
    rng = np.random.default_rng(47)
    for name, draw in (("Gauss", rng.standard_normal), ("Laplace", rng.laplace)):
        for bits in (16, 8, 4, 3, 2):
            x = draw(size=(256, 256))
            scaled = x / np.abs(x).max() * (2 ** (bits - 1) - 1)
            yield f"{name}, dense, {bits} bits", np.round(scaled).astype(np.int32)
    for share in (0.01, 0.001):
        x = rng.integers(-127, 128, (1000, 1000)) * (rng.random((1000, 1000)) < share)
        yield f"uniform, {1 - share:.1%} zeros, 8 bits", x.astype(np.int32)


def entropy(layer) -> float:
    counts = np.unique(layer, return_counts=True)[1]
    return float(-np.sum(counts * np.log2(counts / layer.size))) / 8


def compressed_lzma(layers) -> int:
    wide = max(np.abs(layer).max() for layer in layers) > 127
    data = b"".join(layer.astype(np.int16 if wide else np.int8).tobytes() for layer in layers)
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def our_turn(layers, kinds, links, compiled):
    """Bytes, seconds of encode and decode; the round trip is checked."""
    start = time.process_time()
    raw = coder.encode(layers, kinds, links, compiled=compiled)
    middle = time.process_time()
    found = coder.decode(raw, [x.shape for x in layers], kinds, links, compiled=compiled)
    end = time.process_time()
    assert all(np.array_equal(a, b) for a, b in zip(layers, found, strict=True))
    return len(raw), middle - start, end - middle


class NNCodec:
    """Its process: installed where it must be, asleep between turns."""

    def __init__(self, folder: Path, layers):
        python = folder / "environment" / "bin" / "python"
        if not python.exists():
            print(f"installing {NNCODEC}, with what it needs, into {python.parents[1]}", flush=True)
            venv.create(python.parents[1], with_pip=True)
            command = [python, "-m", "pip", "install", "--quiet", NNCODEC]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{NNCODEC} cannot be installed: {done.stderr.strip()[-500:]}")
        np.savez(folder / "layers.npz", **{str(i): layer for i, layer in enumerate(layers)})
        self.process = subprocess.Popen(
            [python, "-c", THEIRS], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.line("ready")

    def line(self, start):
        for text in self.process.stdout:  # it prints of its own, too
            if text.startswith(start):
                return text
        raise UserError("NNCodec ended early")

    def turn(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        size, encoding, decoding, same = json.loads(self.line("["))
        if not same:
            raise UserError("NNCodec did not return the same integers")
        return size, encoding, decoding

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def times(cfg, folder, layers, kinds, links):
    sides = {"ours, plain Python": lambda: our_turn(layers, kinds, links, False)}
    if coder.numba:
        our_turn(layers[:1], kinds[:1], None, True)  # compile, or load
        sides["ours, numba"] = lambda: our_turn(layers, kinds, links, True)
    theirs = NNCodec(folder, layers) if cfg.nncodec else None
    if theirs:
        sides["NNCodec 2.1.3"] = theirs.turn
        theirs.turn()
    found = {name: [] for name in sides}
    for _ in range(cfg.turns):
        for name, turn in sides.items():
            found[name].append(turn())
    if theirs:
        theirs.close()
    head = "the reference, same integers back"
    print(f"\n{head:36s}{'bytes':>9s}{'encode s':>10s}{'decode s':>10s}   ratios to the first")
    first = None
    for name, rows in found.items():
        row = [statistics.median(column) for column in zip(*rows, strict=True)]
        first = first or row
        ratios = " ".join(f"{a / b:.3f}" for a, b in zip(row, first, strict=True))
        print(f"{name:36s}{row[0]:9,.0f}{row[1]:10.3f}{row[2]:10.3f}   {ratios}")
    print(f"medians of {cfg.turns} alternating turns")


def scaling(cfg):
    if not coder.numba:
        raise UserError("--scale needs numba")
    our_turn([np.ones((2, 2), np.int8)], [1], None, True)
    print(f"{'million weights':>16s}{'bytes':>12s}{'encode':>9s}{'decode':>9s}   seconds a million;"
          " peak bytes a weight, int8 input included")  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = np.random.default_rng(47)
    for million in [m for m in (1, 2, 5, 10, 25, 50, 100) if m <= cfg.scale]:
        n = int((million * 1e6) ** 0.5)
        layer = np.zeros((n, n), np.int8)
        for row in layer:  # a row at a time: what is measured is not this
            row[:] = rng.laplace(0, 20, n).clip(-127, 127) * (rng.random(n) < 0.2)
        size, encoding, decoding = our_turn([layer], [1], None, True)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / n**2
        print(f"{n * n / 1e6:16.2f}{size:12,d}{encoding / million:9.3f}{decoding / million:9.3f}"
              f"{peak:12.1f}", flush=True)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    if cfg.scale:
        return scaling(cfg)
    levels, weights, kinds, links = reference(cfg.reference)
    inputs = [("the reference's int8", levels, kinds, links)]
    inputs += [
        (f"the same at {b} bits a row", requantized(weights, b), kinds, links) for b in (4, 3, 2)
    ]
    inputs += [(name, [layer], [coder.EXPAND], None) for name, layer in made_up()]
    print(f"{'bytes':36s}{'ours':>9s}{'entropy':>9s}{'lzma -9e':>9s}   ours to each")
    for name, layers, of_kind, linked in inputs:
        raw = coder.encode(layers, of_kind, linked)
        ideal, packed = sum(map(entropy, layers)), compressed_lzma(layers)
        print(f"{name:36s}{len(raw):9,d}{ideal:9,.0f}{packed:9,d}"
              f"{len(raw) / ideal:9.3f}{len(raw) / packed:7.3f}", flush=True)  # fmt: skip
        if layers is levels:
            parts = coder.account(raw, [x.shape for x in layers], of_kind, linked)
            print("    " + ", ".join(f"{part} {n:,}" for part, n in parts.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.environment or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        times(cfg, folder, levels, kinds, links)
    return None


if __name__ == "__main__":
    config.run(main)
