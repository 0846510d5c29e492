"""Check the published network: its hash, that it decodes, and its accuracy on your images.

    python verify.py --data DIR
    python verify.py --data DIR --split test     test images alone do, in any form

in:  release/results.json and the files that it names
out: one line per file and split; exit code 1 if something is not as published

The official test split has 10,000 images. If the published accuracy is on fewer, only the first
ones are compared, and the accuracy on all images is printed too. The .nnz runs in exact integers
and must have as many correct answers on every machine; the kernels of torch and onnxruntime differ
between processors, so the other files may differ by up to a thousandth of the images.
"""

import dataclasses
import json
from pathlib import Path

from lib import checkpoint, config, console, devices, metrics, runtime
from lib.config import UserError, flag
from lib.evaluation import evaluate_function
from lib.files import sha256_of


@dataclasses.dataclass
class Settings:
    data: str | None = flag(None, config.DATA_HELP)
    release: str | None = flag(None, "folder of results.json; default: release/ beside this script")
    split: str = flag(
        "all", "images to evaluate on; val needs the training images, in torchvision's order",
        choices=("all", "val", "test"),
    )  # fmt: skip
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    console.say_device(device)
    folder = Path(cfg.release) if cfg.release else checkpoint.RELEASE.parent
    published = read(folder / "results.json")
    sources = [load_checked(folder / name, digest) for name, (digest, _) in published.items()]
    images = sources[0].images(cfg.data, None, device, test_only=cfg.split == "test")
    wrong = []
    for source in sources:
        network = runtime.network(source, device)
        splits = published[source.file.name][1]
        for name in splits if cfg.split == "all" else [cfg.split]:
            if name not in splits:
                raise UserError(f"no accuracy of {source.file.name} on {name} is published")
            correct, n = splits[name]
            split = getattr(images, name)
            if len(split) < n or (
                name == "val" and source.data.get("train") not in (None, len(images.train))
            ):
                raise UserError(f"{n} {name} images were used; this data set does not have them")
            result = evaluate_function(network, split, note=f"{source.file.name}, {name}")
            now = int((result.predictions[:n] == split.labels[:n].cpu()).sum())
            text = f"{now} of {n} {name} images in {network.arithmetic}, published {correct}"
            if len(split) > n:
                low, high = metrics.wilson(result.correct, result.total)
                text += f"; {result} of all, 95% interval {low:.2%} to {high:.2%}"
            print(f"{source.file.name}: {text}", flush=True)
            allowed = 0 if network.arithmetic == runtime.INTEGER else n // 1000
            wrong += [text] if abs(now - correct) > allowed else []
    if wrong:
        raise UserError(f"not as published: {'; '.join(wrong)}")


def read(path: Path) -> dict[str, tuple[str, dict[str, tuple[int, int]]]]:
    """Read results.json: for each published file its SHA-256 and {split: (correct, total)}.

    Raises UserError if it is missing or damaged.
    """
    try:
        results = json.loads(path.read_text())
        published = {
            file: (str(results["files"][name]["sha256"]), {
                split: (int(row["correct"]), int(row["total"]))
                for split, row in results["files"][name]["accuracy"].items()
                if split in ("val", "test")
            })
            for file, name in results["published"].items()
        }  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: nothing is published there") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {config.reason(error)}") from None
    if not published or not all(splits for _, splits in published.values()):
        raise UserError(f"{path} is damaged: it publishes no file, or one without an accuracy")
    return published


def load_checked(path: Path, digest: str):
    """Load a file whose SHA-256 is `digest`. Raises UserError if it is another or missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing, but results.json names it")
    actual = sha256_of(path)
    if actual != digest:
        raise UserError(f"{path} is not the published file: SHA-256 {actual}, not {digest}")
    source = runtime.load(path)
    print(f"{path}: {source.bytes:,} bytes, of the published SHA-256; decoded", flush=True)
    return source


if __name__ == "__main__":
    config.run(main)
