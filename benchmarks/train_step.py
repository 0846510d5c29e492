"""Compare a training step of this project with one written as in the course report, in one run.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/train_step.py [--data PATH] [--turns 5]

Both train the same network (width 1, 32x32 down to 8x8) on batches of 128 with the same recipe:
crop, flip, AutoAugment, Cutout; label smoothing 0.1; SGD, lr 0.07, Nesterov 0.9, decay 5e-4.

Ours is lib.engine.train_epoch over the images of one turn: images on the device, bf16 autocast,
channels last, fused SGD, totals read once at the end. It augments the images of one turn at once;
training augments 32 steps at once, so the data part is a little slower here than there. On a GPU a
step is recorded in each turn and then replayed (lib/replay.py): give it turns of 50 steps or more;
there the step is shown as a whole, since its parts cannot be told apart.
The report's: PIL images through a DataLoader of 2 workers, fp32, NCHW, torch's SGD with its default
options, `.item()` of loss and accuracy after every step.

The report's side is a separate process, so that the allocator's options that devices.choose sets
for the stages do not apply to it; each side sleeps while the other computes. (Its two workers may
fill their queue in our time, which is in its favour.) Turns alternate, after one of each to warm
up, so that other work on the machine slows both down alike; medians are compared. Without data the
images are random.
"""

import contextlib
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.utils.data import DataLoader

import autoaugment
from benchmarks.augment import Pictures
from lib import config, data, devices, engine, tables
from lib.config import UserError, flag
from models.mobilenetv2 import MobileNetV2, standard

BATCH = 128
PARTS = ("data", "forward, backward", "optimizer", "step")
RECIPE = engine.Recipe(epochs=1, batch_size=BATCH, lr_schedule="constant", label_smoothing=0.1)


@dataclass
class Settings:
    data: str | None = flag(None, "as for train.py; default: random images")
    turns: int = flag(5, "turns of each side, after one to warm up", least=1)
    steps: int = flag(1, "steps per turn", least=1)
    device: str = flag("auto", "auto, cpu, cuda ...")
    results: str | None = flag(None, "write the table for RESULTS.md, such as results/NAME.json")


class Clock:
    """Seconds spent in each part, on a CPU: `with clock("data"):`."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def __call__(self, part: str) -> "Clock":
        self.part = part
        return self

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds[self.part] += time.perf_counter() - self.start

    def per_step(self, total: float, steps: int) -> dict[str, float]:
        """Return the seconds per step of each part, and start again from zero.

        total: seconds of all `steps`; what is neither data nor optimizer is forward and backward.
        """
        self.seconds["step"] = total
        rest = total - self.seconds["data"] - self.seconds["optimizer"]
        self.seconds["forward, backward"] = rest
        result = {part: seconds / steps for part, seconds in self.seconds.items()}
        self.__init__()
        return result


def watch_optimizer(optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """Let the clock measure every step of an optimizer."""
    optimizer.register_step_pre_hook(lambda *_: clock("optimizer").__enter__())
    optimizer.register_step_post_hook(lambda *_: clock.__exit__())


class Ours:
    """This project's side."""

    def __init__(self, cfg: Settings):
        self.device = devices.choose(cfg.device)
        self.clock, self.count, self.turns = Clock(), cfg.steps, 0
        self.split = images(cfg, self.device)
        model = network().to(self.device, memory_format=torch.channels_last)
        self.state = engine.TrainingState.start(model, RECIPE)
        watch_optimizer(self.state.optimizer, self.clock)
        self.augmentation = autoaugment.augmentation("auto")

    def draw(self, *args):  # with `apply`, what the engine needs of an augmentation
        with self.clock("data"):
            return self.augmentation.draw(*args)

    def apply(self, *args):
        with self.clock("data"):
            return self.augmentation.apply(*args)

    def turn(self) -> dict[str, float]:
        size = self.count * BATCH
        first = self.turns * size % (len(self.split) - size + 1)
        part = slice(first, first + size)
        part = data.Split(self.split.images[part], self.split.labels[part])
        self.turns += 1
        start = time.perf_counter()
        totals = engine.train_epoch(self.state, part, RECIPE, self, seed=47, epoch=self.turns)
        totals.tolist()
        return self.clock.per_step(time.perf_counter() - start, self.count)


class Theirs:
    """The course report's side."""

    def __init__(self, cfg: Settings):
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if cfg.device == "auto" else cfg.device)
        self.clock, self.count = Clock(), cfg.steps
        pictures = Pictures(images(cfg, "cpu"))
        self.loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=2, drop_last=True)
        self.batches = iter(self.loader)
        self.model = network().to(self.device).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=RECIPE.lr, momentum=engine.MOMENTUM, nesterov=True,
            weight_decay=RECIPE.weight_decay,
        )  # fmt: skip
        watch_optimizer(self.optimizer, self.clock)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=RECIPE.label_smoothing)

    def next(self):
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)

    def turn(self) -> dict[str, float]:
        running_loss = correct = 0
        start = time.perf_counter()
        for _ in range(self.count):
            with self.clock("data"):
                inputs, targets = (t.to(self.device) for t in self.next())
            self.optimizer.zero_grad()
            outputs = self.model(inputs)
            loss = self.criterion(outputs, targets)
            loss.backward()
            self.optimizer.step()
            running_loss += loss.item()
            correct += outputs.max(1)[1].eq(targets).sum().item()
        return self.clock.per_step(time.perf_counter() - start, self.count)


def network() -> MobileNetV2:
    torch.manual_seed(47)
    return MobileNetV2(standard())


def images(cfg: Settings, device) -> data.Split:
    """Return the images of --data, or random ones: enough for a turn."""
    needed = cfg.steps * BATCH
    if cfg.data:
        split = data.load(cfg.data, device=device).train
        if len(split) < needed:
            raise UserError(f"a turn takes {needed:,} images, and there are {len(split):,}")
        return split
    generator, count = torch.Generator().manual_seed(0), max(4096, needed)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return data.Split(pixels.to(device), labels.to(device))


def serve(pipe, cfg: Settings) -> None:
    """Run the report's side in its process: a turn for each message."""
    side = Theirs(cfg)
    pipe.send(torch.get_num_threads())
    with contextlib.suppress(EOFError):  # the other side failed
        while pipe.recv():
            pipe.send(side.turn())


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    ours = Ours(cfg)
    context = multiprocessing.get_context("spawn")  # a fresh process, not a copy of this one
    pipe, end = context.Pipe()
    process = context.Process(target=serve, args=(end, cfg))
    process.start()
    end.close()
    threads = pipe.recv()

    def theirs() -> dict[str, float]:
        pipe.send(True)
        return pipe.recv()

    try:
        turns = [(ours.turn(), theirs()) for _ in range(cfg.turns + 1)][1:]
        pipe.send(False)
    finally:
        pipe.close()  # the other process ends, also where this one failed
    process.join()

    middle = [{part: statistics.median(row[side][part] for row in turns) for part in PARTS}
              for side in (0, 1)]  # fmt: skip
    rows = []
    for part in PARTS if ours.device.type == "cpu" else ["step"]:
        a, b = (m[part] for m in middle)
        rows.append([part, f"{1000 * a:.1f}", f"{1000 * b:.1f}", f"{b / a:.1f}x"])
    ratios = sorted(b["step"] / a["step"] for a, b in turns)
    table = tables.table(
        "A training step against one as the report writes it",
        ["milliseconds per step", "ours", "report", "ratio"], rows, device=ours.device,
        text=f"Batch {BATCH}, the report's recipe; medians of {cfg.turns} alternating turns of "
        f"{cfg.steps} step{'s'[: cfg.steps > 1]}, {ours.device}; turn by turn {ratios[0]:.1f} to "
        f"{ratios[-1]:.1f}. The report's side has {threads} threads and 2 loading processes.",
    )  # fmt: skip
    tables.show(table, cfg.results)


if __name__ == "__main__":
    config.run(main)
