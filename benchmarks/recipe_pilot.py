"""Compare candidates for the training recipe: short runs at half width on images of 16x16 pixels.

    python benchmarks/recipe_pilot.py --data DIR [--epochs 2] [--seeds 47,48] [--workers 2]

Each candidate changes one setting of BASE and is trained once per seed, with the strides of the
full network (a final map of 4x4 for 16x16 pixels). Images are augmented at 32x32 and then averaged
to 16x16, in training and in validation, so a run costs a tenth of a full run of as many epochs.
Accuracy is on the validation split. Every worker is a process with one thread.
"""

import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from autoaugment import augmentation
from lib import config, data, devices, engine, tables
from lib.config import flag
from lib.evaluation import evaluate
from models.mobilenetv2 import MobileNetV2, standard

SIDE = 16  # pixels
WIDTH = 0.5
BASE = {
    "augment": "cutout", "batch_size": 128, "lr": 0.1, "lr_schedule": "linear",
    "warmup_epochs": 0.5, "weight_decay": 5e-4, "decay_norm": False, "label_smoothing": 0.0,
    "flip": "random",
}  # fmt: skip
CANDIDATES = {
    "base": {},
    "alternating flip": {"flip": "alternate"},
    "lr 0.2": {"lr": 0.2},
    "batch 64": {"batch_size": 64},
    "label smoothing 0.1": {"label_smoothing": 0.1},
}


@dataclass
class Settings:
    data: str | None = flag(None, "as for train.py")
    epochs: int = flag(2, "epochs per run", least=1)
    seeds: list[int] = flag([47, 48], "one run per candidate and seed")
    workers: int = flag(2, "runs at the same time", least=1)
    results: str | None = flag(None, "write the table for RESULTS.md, such as results/NAME.json")


class Small:
    """An augmentation of 32x32 images that scales its results down (see lib.engine.fit)."""

    def __init__(self, level: str):
        self.full = augmentation(level)

    def draw(self, *args):
        """Draw what the augmentation of full size draws."""
        return self.full.draw(*args)

    def apply(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Return uint8 (n, 3, SIDE, SIDE) from uint8 (n, 3, 32, 32)."""
        return shrink(self.full.apply(images, params))


def shrink(images: Tensor) -> Tensor:
    """Average squares of pixels, rounded: uint8 (n, 3, 32, 32) to uint8 (n, 3, SIDE, SIDE)."""
    return F.avg_pool2d(images.float(), 32 // SIDE).round_().byte()


def run(source: str, epochs: int, seed: int, settings: dict) -> dict:
    """Train one network; return its settings and its figures on the validation split."""
    torch.set_num_threads(1)
    devices.choose("cpu")
    images = data.load(source)
    images.val.images = shrink(images.val.images)
    settings = BASE | settings
    recipe = {k: v for k, v in settings.items() if k != "augment"}
    torch.manual_seed(seed)
    model = MobileNetV2(standard(WIDTH, dropout=0.0)).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        history, _ = engine.fit(
            model, images, engine.Recipe(epochs, **recipe), Small(settings["augment"]), seed,
            Path(folder) / "state", identity={},
        )  # fmt: skip
    result = evaluate(model, images.val)
    return {
        "seed": seed, "epochs": epochs, "settings": settings, "source": images.source,
        "correct": result.correct, "total": result.total,
        "train_accuracy": history[-1]["train_accuracy"],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    jobs = {}
    with ProcessPoolExecutor(cfg.workers, mp_context=get_context("spawn")) as pool:
        for seed in cfg.seeds:
            for name, change in CANDIDATES.items():
                jobs[name, seed] = pool.submit(run, cfg.data, cfg.epochs, seed, change)
        runs = [{"candidate": name} | job.result() for (name, _), job in jobs.items()]
    tables.show(table_of(runs), cfg.results)


def table_of(runs: list[dict]) -> dict:
    """One row per candidate: correct answers by seed, their mean, and its distance from BASE's."""
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    correct = {(run["candidate"], run["seed"]): run["correct"] for run in runs}
    means = {
        name: statistics.mean(correct[name, seed] for seed in seeds) for name in CANDIDATES
    }
    rows = [
        [name, *(correct[name, seed] for seed in seeds), means[name], means[name] - means["base"]]
        for name in CANDIDATES
    ]
    base = ", ".join(f"{key} {value}" for key, value in BASE.items())
    return tables.table(
        "Candidates for the training recipe",
        ["change", *(f"correct, seed {seed}" for seed in seeds), "mean", "against base"], rows,
        text=f"Each run: {runs[0]['epochs']} epochs at width {WIDTH} on images of {SIDE}x{SIDE} "
        f"pixels. Base: {base}. The spread between the seeds of a row is the noise.",
        data=f"{runs[0]['source']}, validation split, n={runs[0]['total']:,}",
        device=torch.device("cpu"),
    )  # fmt: skip


if __name__ == "__main__":
    config.run(main)
