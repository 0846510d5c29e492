"""Images per second of the whole input pipeline: lib.data.batches, and torchvision on PIL images.

    python benchmarks/augment.py [--data PATH] [--rounds 5]

Both give shuffled, normalized float32 batches of 128 on the CPU with the same augmentation: crop,
flip, AutoAugment, Cutout. Ours runs in this process, once with 1 thread and once with torch's
default; torchvision's is a DataLoader with 2 persistent workers. Rounds alternate, after one of
each to warm up, so that other work on the machine slows all down alike; medians are compared.
Without data the images are random.

If others use the cores, our many short kernels wait for each other's threads: 1 thread, or
OMP_WAIT_POLICY=PASSIVE in the environment, is then several times faster than the default.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import autoaugment
from lib import augment, config, data, tables
from lib.config import flag

BATCH = 128


@dataclass
class Settings:
    data: str | None = flag(None, "as for train.py; default: random images")
    rounds: int = flag(5, "rounds of each pipeline", least=1)
    ours: int = flag(16384, "images per round of ours", least=1)
    theirs: int = flag(4096, "images per round of torchvision's, which is slower", least=1)
    results: str | None = flag(None, "write the table for RESULTS.md, such as results/NAME.json")


class Pictures(Dataset):
    """The usual CIFAR-10 augmentation, one image at a time, by torchvision on PIL images."""

    def __init__(self, split: data.Split):
        self.arrays = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        policy = transforms.AutoAugmentPolicy.CIFAR10
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.AutoAugment(policy, fill=[128] * 3),
            transforms.ToTensor(),
            transforms.Normalize(data.MEAN, data.STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = self.transform(Image.fromarray(self.arrays[index]))
        y, x = torch.randint(augment.SIDE, (2,)).tolist()
        image[:, max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0
        return image, self.labels[index]


def images_per_second(batches) -> float:
    """Time a loop over batches of (images, labels)."""
    start, images = time.perf_counter(), 0
    for batch, _ in batches:
        images += len(batch)
    return images / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    if cfg.data is None:
        n = max(cfg.ours, cfg.theirs)
        images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
        split = data.Split(images, torch.zeros(n, dtype=torch.int64))
    else:
        split = data.load(cfg.data).train
    ours = data.Split(split.images[: cfg.ours], split.labels[: cfg.ours])
    theirs = Pictures(data.Split(split.images[: cfg.theirs], split.labels[: cfg.theirs]))
    loader = DataLoader(theirs, BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    recipe, threads = autoaugment.augmentation("auto"), torch.get_num_threads()

    def run_ours(count: int, seed: int) -> float:
        torch.set_num_threads(count)
        return images_per_second(data.batches(ours, BATCH, recipe, seed=seed, epoch=0))

    rows = []
    for seed in range(cfg.rounds + 1):
        rows.append((run_ours(1, seed), run_ours(threads, seed), images_per_second(loader)))
    names = ("ours, 1 thread", f"ours, {threads} threads", "PIL, 2 workers")
    baseline = statistics.median([row[2] for row in rows[1:]])
    lines = []
    for name, speeds in zip(names, zip(*rows[1:], strict=True), strict=True):
        middle = statistics.median(speeds)
        lines.append([name, round(middle), f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                      f"{middle / baseline:.1f}x"])  # fmt: skip
    table = tables.table(
        "The input pipeline", ["", "images per second", "round by round", "ratio"], lines,
        device=torch.device("cpu"),
        text=f"Crop, flip, AutoAugment, Cutout; medians of {cfg.rounds} alternating rounds.",
    )
    tables.show(table, cfg.results)


if __name__ == "__main__":
    config.run(main)
