"""Check the published network: its hash, that it decodes, and its accuracy on the images at hand.

    python verify.py --data DIR

in:  release/results.json and the files that it names
out: a line a file and a split; exit code 1 where something is not as published

The official test split has 10,000 images; where fewer were published, the first ones are compared,
and the accuracy on all that are at hand is printed beside. The .nnz runs in exact integers and has
to get the same images right everywhere; onnxruntime has kernels for each processor, so for the
.onnx a thousandth of the images may differ.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from lib import checkpoint, config, engine, metrics, runtime
from lib.config import UserError, flag


@dataclasses.dataclass
class Settings:
    data: str | None = flag(
        None, "cifar10.npz, a folder with the data, or `synthetic`; default: download to ./data"
    )
    release: str | None = flag(None, "folder of results.json; default: release/ beside this script")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = config.device(cfg.device)
    folder = Path(cfg.release) if cfg.release else checkpoint.RELEASE.parent
    published = read(folder / "results.json")
    for path, row in published.items():
        source = whole(path, row)
        print(f"{path}: {source.bytes:,} bytes, of the published SHA-256; decoded")
    wrong = []
    for path, row in published.items():
        source = runtime.load(path)
        images = source.images(cfg.data, None, device)
        network = runtime.network(source, device)
        for name, expected in row["accuracy"].items():
            split, n = getattr(images, name), expected["total"]
            if len(split) < n:
                raise UserError(f"{n} {name} images were used, only {len(split)} are at hand")
            result = engine.count(network, split, note=f"{path.name}, {name}")
            right = result.predictions[:n] == split.labels[:n].cpu()
            correct = int(right.sum())
            allowed = n // 1000 if network.arithmetic == runtime.ONNX else 0
            good = abs(correct - expected["correct"]) <= allowed
            text = f"{path.name}: {correct} of {n} {name} images in {network.arithmetic}, "
            text += f"published {expected['correct']}"
            if len(split) > n:
                low, high = metrics.wilson(result.correct, result.total)
                text += f"; {result} of all, 95% interval {low:.2%} to {high:.2%}"
            print(text, flush=True)
            wrong += [] if good else [text]
    if wrong:
        raise UserError(f"not as published: {'; '.join(wrong)}")


def read(path: Path) -> dict[Path, dict]:
    """The published files and what is said of each."""
    try:
        results = json.loads(path.read_text())
        return {path.parent / file: results["files"][name]
                for file, name in results["published"].items()}  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: nothing is published there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {config.reason(error)}") from None


def whole(path: Path, row: dict):
    """The file decoded, once its bytes are the published ones."""
    if not path.is_file():
        raise UserError(f"{path} is missing, results.json names it")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != row["sha256"]:
        raise UserError(f"{path} is not the published file: SHA-256 {found}, not {row['sha256']}")
    return runtime.load(path)


if __name__ == "__main__":
    config.run(main)
