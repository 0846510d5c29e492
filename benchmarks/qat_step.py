"""Compare a step of quantization-aware training with a plain training step of the same network.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/qat_step.py --parent FILE [--data PATH] [--turns 5]

Both train the compacted network on the same batches with lib.engine's own epoch, without
augmentation. Plain: batch norm and SGD, as in prune.py. QAT: batch norm folded, every weight and
activation below 8 bits fake-quantized with learned scales (W4A4 by default), AdamW, pruned weights
held at zero, as in quantize.py --method qat. The forward pass of the fp32 teacher is part of both
steps or of neither: both ratios are printed. Turns of the four alternate, after one of each to warm
up, so that other load on the machine disturbs all alike; medians are printed. Without data the
images are random. On a GPU, give it turns of 50 steps or more: each is recorded in its fourth step
and then replayed (lib/replay.py).
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import autoaugment
from benchmarks.train_step import images
from lib import checkpoint, config, data, devices, engine, pruning, ptq, qat, tables
from lib.compaction import compact
from lib.config import flag

BATCH = 128


@dataclass
class Settings:
    parent: str | None = flag(None, "an fp32 network, pruned or not", needed=True)
    data: str | None = flag(None, "as for train.py; default: random images")
    weight_bits: int = flag(4, "weight bits of QAT", least=2, most=16)
    act_bits: int = flag(4, "activation bits of QAT", least=2, most=16)
    turns: int = flag(5, "turns of each side, after one to warm up", least=1)
    steps: int = flag(1, "steps per turn", least=1)
    amp: bool = flag(True, "bf16 autocast, as the stages do (where the processor has it)")
    device: str = flag("auto", "auto, cpu, cuda ...")
    results: str | None = flag(None, "write the table for RESULTS.md, such as results/NAME.json")


class Side:
    """A network, how it is trained, and the next images that it sees."""

    def __init__(self, cfg: Settings, model, optimizer: str, teacher, split: data.Split):
        self.teacher, self.split = teacher, split
        self.recipe = engine.Recipe(
            epochs=1, batch_size=BATCH, lr=1e-4, lr_schedule="constant", optimizer=optimizer,
            amp=cfg.amp, distill=0.5 if teacher else 0.0, decay_norm=optimizer == "sgd",
        )  # fmt: skip
        self.state = engine.TrainingState.start(model, self.recipe)
        self.mask, self.count, self.turns = pruning.Mask(model), cfg.steps, 0

    def turn(self) -> float:
        """Train for one turn; return the seconds per step."""
        size = self.count * BATCH
        first = self.turns * size % (len(self.split) - size + 1)
        part = slice(first, first + size)
        part = data.Split(self.split.images[part], self.split.labels[part])
        self.turns += 1
        start = time.perf_counter()
        engine.train_epoch(
            self.state, part, self.recipe, autoaugment.augmentation("none"), seed=47,
            epoch=self.turns, teacher=self.teacher, after_step=self.mask.apply,
        ).tolist()  # fmt: skip
        return (time.perf_counter() - start) / self.count


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    split = images(cfg, device)
    teacher, _ = compact(checkpoint.load(cfg.parent).build(device))
    scheme = ptq.make_scheme(cfg.weight_bits, cfg.act_bits, method="qat")
    sample = data.sample(split, 128, 47)  # few: quality does not matter here

    def sides(teacher_of):
        plain, _ = compact(teacher)
        quantized, latent = ptq.quantize(teacher, sample, scheme)
        qat.begin(quantized, scheme, latent)
        return (Side(cfg, plain, "sgd", teacher_of, split),
                Side(cfg, quantized, "adam", teacher_of, split))  # fmt: skip

    pairs = {"without a teacher": sides(None), "teacher in both": sides(teacher)}
    seconds = {name: [] for name in pairs}
    for number in range(cfg.turns + 1):
        for name, pair in pairs.items():
            times = [side.turn() for side in pair]
            if number:
                seconds[name].append(times)
    lines = []
    for name, rows in seconds.items():
        a, b = (statistics.median(side) for side in zip(*rows, strict=True))
        ratios = sorted(quantized / plain for plain, quantized in rows)
        lines.append([name, f"{1000 * a:.1f}", f"{1000 * b:.1f}", f"{b / a:.2f}x",
                      f"{ratios[0]:.2f} to {ratios[-1]:.2f}"])  # fmt: skip
    table = tables.table(
        "A step of quantization-aware training against a plain one",
        ["milliseconds per step", "plain", "QAT", "ratio", "turn by turn"], lines, device=device,
        text=f"W{cfg.weight_bits}A{cfg.act_bits}, batch {BATCH}, {'amp' if cfg.amp else 'fp32'}; "
        f"medians of {cfg.turns} alternating turns of {cfg.steps} steps, {device}.",
    )  # fmt: skip
    tables.show(table, cfg.results)


if __name__ == "__main__":
    config.run(main)
