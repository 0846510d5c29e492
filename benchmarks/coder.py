"""Compare lib/nnz/coder.py with entropy, lzma and NNCodec on the same integers: bytes and seconds.

    python benchmarks/coder.py --reference DIR [--turns 3]
    python benchmarks/coder.py --reference DIR --nncodec [--environment DIR]
    python benchmarks/coder.py --scale 25

The integers are the course report's int8 weights that are left after exact compaction; the
weights of the same network at 4, 3 and 2 bits with one scale per row; and random matrices, dense
and sparse. Entropy is the zero-order entropy of each tensor, without the bytes for its symbol
counts: no coder can reach it for a tensor of many symbols and few cells. lzma is `-9e` over the
bytes of all tensors.

--nncodec: also Fraunhofer's implementation of ISO/IEC 15938-17 (deepCABAC), installed in a separate
environment (a temporary one, or DIR, which is kept and used again) and called through its public
functions. The two sides take alternating turns, each in a process that sleeps while the other
computes; the medians are reported. Seconds are CPU seconds of that process, so that other load on
the machine matters less.

--scale N: only our seconds and peak memory per million weights, for one square layer of 1 to N
million weights, 80% of them zero. It needs numba (plain Python takes about 6 seconds per million).
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
# The process of NNCodec: reads layers.npz; a line in asks for a turn, a line out has its figures.
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
    reference: str | None = flag(None, "folder with the report's pruned.pth and int8.pth; needed")
    turns: int = flag(3, "turns of each side, for the times", least=1)
    nncodec: bool = flag(False, f"also {NNCODEC}, installed in an environment of its own")
    environment: str | None = flag(None, "folder of that environment; default: a temporary one")
    scale: int = flag(0, "only: up to so many million weights", least=0)

    def __post_init__(self):
        if not self.reference and not self.scale:
            raise ValueError("--reference is needed")


def reference(folder: str):
    """Return (levels, weights, kinds, groups) of the report's network after compaction.

    Levels and weights are lists of matrices (output channels, inputs); kinds and groups as
    coder.encode takes them.
    """
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
    """Return the levels of weight matrices, rounded to nearest with one scale per row.

    The scale maps the largest magnitude of a row to the largest level; zeros stay zeros.
    """
    largest = 2 ** (bits - 1) - 1
    scales = [np.abs(w).max(1, keepdims=True) / largest for w in weights]
    return [
        np.round(w / np.where(s > 0, s, 1)).astype(np.int32)
        for w, s in zip(weights, scales, strict=True)
    ]


def made_up():
    """Yield (name, matrix of levels) of random matrices."""
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
    """Return the zero-order entropy of a matrix, in bytes."""
    counts = np.unique(layer, return_counts=True)[1]
    return float(-np.sum(counts * np.log2(counts / layer.size))) / 8


def compressed_lzma(layers) -> int:
    """Return the bytes that lzma takes for all layers together."""
    wide = max(np.abs(layer).max() for layer in layers) > 127
    data = b"".join(layer.astype(np.int16 if wide else np.int8).tobytes() for layer in layers)
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def our_turn(layers, kinds, groups, compiled):
    """Return (bytes, CPU seconds of encoding, of decoding); the round trip is checked."""
    start = time.process_time()
    raw = coder.encode(layers, kinds, groups, compiled=compiled)
    middle = time.process_time()
    decoded = coder.decode(raw, [x.shape for x in layers], kinds, groups, compiled=compiled)
    end = time.process_time()
    assert all(np.array_equal(a, b) for a, b in zip(layers, decoded, strict=True))
    return len(raw), middle - start, end - middle


class NNCodec:
    """A process that runs NNCodec, which it installs if it has to; asleep between turns."""

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
        for text in self.process.stdout:  # NNCodec itself prints to it, too
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


def times(cfg, folder, layers, kinds, groups):
    """Print bytes and seconds of each side, medians of alternating turns."""
    sides = {"ours, plain Python": lambda: our_turn(layers, kinds, groups, False)}
    if coder.numba:
        our_turn(layers[:1], kinds[:1], None, True)  # compile, or load
        sides["ours, numba"] = lambda: our_turn(layers, kinds, groups, True)
    theirs = NNCodec(folder, layers) if cfg.nncodec else None
    if theirs:
        sides["NNCodec 2.1.3"] = theirs.turn
        theirs.turn()
    results = {name: [] for name in sides}
    for _ in range(cfg.turns):
        for name, turn in sides.items():
            results[name].append(turn())
    if theirs:
        theirs.close()
    head = "the reference, same integers back"
    print(f"\n{head:36s}{'bytes':>9s}{'encode s':>10s}{'decode s':>10s}   ratios to the first")
    first = None
    for name, rows in results.items():
        row = [statistics.median(column) for column in zip(*rows, strict=True)]
        first = first or row
        ratios = " ".join(f"{a / b:.3f}" for a, b in zip(row, first, strict=True))
        print(f"{name:36s}{row[0]:9,.0f}{row[1]:10.3f}{row[2]:10.3f}   {ratios}")
    print(f"medians of {cfg.turns} alternating turns")


def scaling(cfg):
    """Print seconds and memory per million weights."""
    if not coder.numba:
        raise UserError("--scale needs numba")
    our_turn([np.ones((2, 2), np.int8)], [1], None, True)
    print(f"{'million weights':>16s}{'bytes':>12s}{'encode':>9s}{'decode':>9s}"
          "   seconds per million; peak bytes per weight, int8 input included")  # fmt: skip
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
    levels, weights, kinds, groups = reference(cfg.reference)
    inputs = [("the reference's int8", levels, kinds, groups)]
    inputs += [
        (f"the same at {b} bits", requantized(weights, b), kinds, groups) for b in (4, 3, 2)
    ]
    inputs += [(name, [layer], [coder.EXPAND], None) for name, layer in made_up()]
    print(f"{'bytes':36s}{'ours':>9s}{'entropy':>9s}{'lzma -9e':>9s}   ours to each")
    for name, layers, of_kind, of_group in inputs:
        raw = coder.encode(layers, of_kind, of_group)
        ideal, by_lzma = sum(map(entropy, layers)), compressed_lzma(layers)
        print(f"{name:36s}{len(raw):9,d}{ideal:9,.0f}{by_lzma:9,d}"
              f"{len(raw) / ideal:9.3f}{len(raw) / by_lzma:7.3f}", flush=True)  # fmt: skip
        if layers is levels:
            parts = coder.part_sizes(raw, [x.shape for x in layers], of_kind, of_group)
            print("    " + ", ".join(f"{part} {n:,}" for part, n in parts.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.environment or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        times(cfg, folder, levels, kinds, groups)
    return None


if __name__ == "__main__":
    config.run(main)
