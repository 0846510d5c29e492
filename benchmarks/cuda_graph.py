"""Compare training on a GPU with CUDA graphs (lib/replay.py) and without, in one run.

    python benchmarks/cuda_graph.py [--results results/cuda_graph.json]

The network (width 1, 32x32 down to 8x8), the batch and the augmentation are those of train.py; the
images are random. For each side in pixels that images have in training, turns with and without
graphs alternate, after one of each to warm up; medians are compared. Both begin with the same
weights and see the same images.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import autoaugment
from lib import config, data, devices, engine, replay, tables
from lib.config import UserError, flag
from models.mobilenetv2 import MobileNetV2, standard

BATCH = 128
SIDES = (16, 24, 32)


@dataclass
class Settings:
    steps: int = flag(350, "steps per turn", over=replay.WARM_UP)
    turns: int = flag(3, "turns of each, after one to warm up", least=1)
    device: str = flag("cuda", "cuda, cuda:1 ...")
    results: str | None = flag(None, "write the table for RESULTS.md, such as results/NAME.json")


class Training:
    """A network in training; graph: whether its steps are recorded."""

    def __init__(self, split: data.Split, side: int, graph: bool):
        torch.manual_seed(47)
        self.split, self.turns = split, 0
        # In the first of two epochs, images have the side that they start with.
        self.recipe = engine.Recipe(
            2, BATCH, lr=0.01, lr_schedule="constant", start_side=side, cuda_graph=graph
        )
        model = MobileNetV2(standard(dropout=0.0)).to(split.images.device)
        model = model.to(memory_format=torch.channels_last)
        self.state = engine.TrainingState.start(model, self.recipe)

    def turn(self) -> tuple[float, float]:
        """Train for a turn; return its seconds and its mean loss."""
        self.turns += 1
        start = time.perf_counter()
        totals = engine.train_epoch(
            self.state, self.split, self.recipe, autoaugment.augmentation("auto"),
            seed=self.turns, epoch=0,
        )  # fmt: skip
        loss = totals.tolist()[0] / len(self.split)  # this waits for the GPU
        return time.perf_counter() - start, loss


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    if device.type != "cuda":
        raise UserError(f"CUDA graphs need a GPU, not {device}")
    generator = torch.Generator().manual_seed(0)
    count = cfg.steps * BATCH
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    split = data.Split(pixels.to(device), labels.to(device))
    rows = []
    for side in SIDES:
        pair = [Training(split, side, graph) for graph in (False, True)]
        turns = [[training.turn() for training in pair] for _ in range(cfg.turns + 1)][1:]
        plain, graph = (
            statistics.median(count / turn[i][0] for turn in turns) for i in range(len(pair))
        )
        differences = [abs(a[1] - b[1]) for a, b in turns]
        rows.append([f"{side}x{side}", round(plain), round(graph), f"{graph / plain:.1f}x",
                     f"{max(differences):.1g}"])  # fmt: skip
    table = tables.table(
        "Training on a GPU, its steps launched one by one and as CUDA graphs",
        ["images", "images per second", "with graphs", "ratio", "largest difference of the loss"],
        rows, device=device,
        text=f"Batch {BATCH}, bf16, AutoAugment; medians of {cfg.turns} alternating turns of "
        f"{cfg.steps} steps.",
    )  # fmt: skip
    tables.show(table, cfg.results)


if __name__ == "__main__":
    config.run(main)
