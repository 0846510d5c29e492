"""Publish a run: its compressed file with every figure of it, for those who clone this.

    python eval.py FILES --split val             first, on both splits: these files are listed
    python eval.py FILES --split test
    python publish.py --run-dir DIR

in:  logs/eval-val.jsonl and logs/eval-test.jsonl, and the files that they are of, among them
     checkpoints/compressed.nnz; what the stages logged, logs/sweep.csv
out: release/mobilenetv2-cifar10.nnz (and .onnx, if int8.onnx was evaluated), release/results.json,
     the charts of the stages

Nothing is measured here, and nothing is written where a figure is not of the file that is there.
"""

import csv
import dataclasses
import importlib
import json
from pathlib import Path

from lib import checkpoint, config, metrics, runtime
from lib.config import UserError, flag

STAGES = {
    "baseline": "train", "pruned": "prune", "quantized": "quantize", "int8": "to_int8",
    "compressed": "sparse_compress",
}  # fmt: skip
PUBLISHED = {"compressed.nnz": ".nnz", "int8.onnx": ".onnx"}
CHARTS = ("train", "prune", "quantize", "sweep_heatmap", "report")


@dataclasses.dataclass
class Settings:
    run_dir: str = flag(".", "folder that holds checkpoints/, logs/ and plots/")
    out: str | None = flag(None, "folder to publish in; default: release/ beside this script")

    def path(self, name: str) -> Path:
        return Path(self.run_dir) / name


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    files, rows = {}, {}
    for split in ("val", "test"):
        for figures in logged(cfg.path(f"logs/eval-{split}.jsonl"), split):
            source = runtime.load(figures["file"])
            name = source.file.name
            if source.sha256 != figures["sha256"]:
                raise UserError(f"{source.file} is not the file that eval.py measured: run it anew")
            if files.setdefault(name, source).sha256 != source.sha256:
                raise UserError(f"two files are called {name}: give them names of their own")
            row = rows.setdefault(name, describe(source, figures))
            row["accuracy"][split] = {
                k: figures[k] for k in ("correct", "total", "accuracy", "interval", "arithmetic")
            }
    for name, row in rows.items():
        if len(row["accuracy"]) < 2:
            raise UserError(f"{name} was not evaluated on both splits: run eval.py on the other")
    final = "compressed.nnz"
    if final not in files or files[final].sha256 != sha256(cfg.path(f"checkpoints/{final}")):
        raise UserError(f"{cfg.path(f'checkpoints/{final}')} is not among the evaluated files")

    out = Path(cfg.out) if cfg.out else checkpoint.RELEASE.parent
    stem, small, first = checkpoint.RELEASE.stem, rows[final], first_of(rows, rows[final])
    results = {
        "format": "mobilenetv2-cifar10/results/1",
        "published": {stem + PUBLISHED[name]: name for name in rows if name in PUBLISHED},
        "files": rows,
        "logs": {stage: metrics.read_log(cfg.path(f"logs/{stage}.jsonl"))
                 for stage in ("train", "prune", "quantize")},
        "sweep": sweep(cfg.path("logs/sweep.csv")),
    }  # fmt: skip
    for published, name in results["published"].items():
        write(out / published, files[name].file.read_bytes())
    charts = [cfg.path(f"plots/{name}.png") for name in CHARTS]
    for chart in filter(Path.is_file, charts):
        write(out / chart.name, chart.read_bytes())
    write(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(
        f"{out / checkpoint.RELEASE.name}: {small['bytes']:,} bytes, "
        f"{first['bytes'] / small['bytes']:.1f} times smaller than the file that its chain began "
        f"with; {len(rows)} files, {len(results['sweep'])} cells of the grid"
    )


def logged(path: Path, split: str) -> list[dict]:
    lines = metrics.read_log(path)
    if not lines:
        raise UserError(f"no figures in {path}: `make eval SPLIT={split}` writes it")
    return lines


def describe(source, figures: dict) -> dict:
    """What is known of a file beside its accuracy."""
    row = {
        "stage": source.stage, "bytes": source.bytes, "sha256": source.sha256,
        "parent": source.ancestors[-1]["sha256"] if source.ancestors else None,
        "seed": source.seed, "quantization": source.quantization,
    }  # fmt: skip
    row |= {k: figures[k] for k in ("weights", "live_weights", "nonzeros", "sparsity", "macs")}
    if source.file.suffix == ".pth":
        made = checkpoint.read(source.file)
        row |= {k: made[k] for k in ("code", "environment", "data") if k in made}
    if source.stage in STAGES:
        script = STAGES[source.stage]
        settings = importlib.import_module(script).Settings
        row["command"] = config.command(f"{script}.py", settings, source.config)
    return row | {"accuracy": {}}


def first_of(rows: dict, row: dict) -> dict:
    """The row of the file that the chain began with, by the parents' hashes."""
    known = {r["sha256"]: r for r in rows.values()}
    while row["parent"]:
        if row["parent"] not in known:
            raise UserError(f"the parent of the {row['stage']} file was not evaluated: name it too")
        row = known[row["parent"]]
    return row


def sweep(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sha256(path: Path) -> str | None:
    return checkpoint.load(path).sha256 if path.is_file() else None


def write(path: Path, content: bytes) -> None:
    with checkpoint.atomic(path) as file:
        file.write(content)


if __name__ == "__main__":
    config.run(main)
