"""Compare the forward pass of a pruned network with that of its compacted form, in one run.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/compaction.py --parent FILE [--data PATH]

fp32, channels last, eval mode, one process. Turns alternate, after one of each to warm up, so that
other load on the machine disturbs both alike; medians are printed. Also printed: MACs and weights
of both, the largest difference between logits divided by the largest logit, and how many of the
test images get the same prediction from both. Without data the images are random.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from lib import checkpoint, config, data, devices, metrics, tables
from lib.compaction import compact
from lib.config import UserError, flag


@dataclass
class Settings:
    parent: str | None = flag(None, "the pruned network", needed=True)
    data: str | None = flag(None, "as for train.py; default: random images")
    images: int = flag(1000, "images whose logits are compared", least=1)
    batch: list[int] = flag([1, 128], "batch sizes to time", least=1)
    turns: int = flag(15, "turns of each network, after one to warm up", least=1)
    device: str = flag("auto", "auto, cpu, cuda ...")
    results: str | None = flag(None, "write the table for RESULTS.md, such as results/NAME.json")


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    source = checkpoint.load(cfg.parent)
    if source.quantization:
        raise UserError(f"{source.file} is quantized: compaction is of fp32 networks")
    dense = source.build(device)
    small, _ = compact(dense)
    x = images(cfg, device)

    rows = []
    for name, count in (("MACs per image", macs), ("weights", weights)):
        a, b = count(dense), count(small)
        rows.append([name, a, b, f"{a / b:.1f}x", ""])
    for size in cfg.batch:
        batch = x[torch.arange(size) % len(x)].to(memory_format=torch.channels_last)
        turns = [(turn(dense, batch), turn(small, batch)) for _ in range(cfg.turns + 1)][1:]
        a, b = (statistics.median(side) for side in zip(*turns, strict=True))
        ratios = sorted(one / other for one, other in turns)
        rows.append([f"ms per pass, batch {size}", 1e3 * a, 1e3 * b, f"{a / b:.1f}x",
                     f"{ratios[0]:.1f} to {ratios[-1]:.1f}"])  # fmt: skip
    of_dense, of_small = logits(dense, x), logits(small, x)
    difference = (of_dense - of_small).abs().max() / of_dense.abs().max()
    same = int((of_dense.argmax(1) == of_small.argmax(1)).sum())
    kind = "test" if cfg.data else "random"
    table = tables.table(
        f"Compaction of {source.file.name}",
        ["", "dense", "compacted", "ratio", "turn by turn"], rows, device=device,
        text=f"Logits within {difference:.1e} of the largest; the same prediction for {same} of "
        f"{len(x)} {kind} images. fp32, medians of {cfg.turns} alternating turns, {device}.",
    )  # fmt: skip
    tables.show(table, cfg.results)


def turn(model: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    model(x).sum().item()  # waits for the device
    return time.perf_counter() - start


def logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(128)])


def macs(model: nn.Module) -> int:
    return metrics.macs(model.settings)


def weights(model: nn.Module) -> int:
    return sum(count for _, count, _ in metrics.layer_counts(model))


def images(cfg: Settings, device) -> Tensor:
    if cfg.data:
        return data.normalize(data.load(cfg.data, device=device).test.images[: cfg.images])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (cfg.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return data.normalize(pixels.to(device))


if __name__ == "__main__":
    config.run(main)
