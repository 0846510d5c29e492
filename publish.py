"""Publish a run: its compressed file with every figure of it, for those who clone this.

    python eval.py FILES --split val             first, on both splits: these files are listed
    python eval.py FILES --split test
    python publish.py --run-dir DIR

in:  logs/eval-val.jsonl and logs/eval-test.jsonl, and the files that they are of, among them
     checkpoints/compressed.nnz and all its parents; logs/sweep.csv; the stages' logs (train*.jsonl,
     prune*.jsonl, quantize*.jsonl: a stage run twice has two) and charts
out: release/mobilenetv2-cifar10.nnz (and .onnx, if int8.onnx was evaluated), release/results.json,
     the charts

Nothing is measured here, and nothing is written where an accuracy is not of the file that is there.
The stages' logs and charts are taken as they lie in the run's folder.
"""

import csv
import dataclasses
import json
from pathlib import Path

import prune
import quantize
import sparse_compress
import to_int8
import train
from lib import checkpoint, config, metrics, runtime
from lib.config import UserError, flag

STAGES = {"baseline": train, "pruned": prune, "quantized": quantize, "int8": to_int8}
FINAL, GRAPH = "compressed.nnz", "int8.onnx"
CHARTS = ("train.png", "prune.png", "quantize.png", "sweep_heatmap.png", "report.png")
ACCURACY = ("correct", "total", "accuracy", "interval", "arithmetic")
COUNTS = ("weights", "live_weights", "nonzeros", "sparsity", "macs")


@dataclasses.dataclass
class Settings:
    run_dir: str = flag(".", "folder that holds checkpoints/, logs/ and plots/")
    release: str | None = flag(None, "folder to publish in; default: release/ beside this script")

    def path(self, name: str) -> Path:
        return Path(self.run_dir) / name


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    files, rows = {}, {}
    for split in ("val", "test"):
        for figures in logged(cfg.path(f"logs/eval-{split}.jsonl")):
            name = Path(figures["file"]).name
            if name not in files:
                files[name] = source = runtime.load(figures["file"])
                rows[name] = describe(source, figures)
            if files[name].sha256 != figures["sha256"]:
                raise UserError(
                    f"{figures['file']} is not the file that eval.py measured, or another of its "
                    "name is: run eval.py anew"
                )
            rows[name]["accuracy"][split] = {key: figures[key] for key in ACCURACY}
    for name, row in rows.items():
        if len(row["accuracy"]) < 2:
            raise UserError(f"{name} was not evaluated on both splits: run eval.py on the other")
        if files[name].data.get("val_size") not in (None, row["accuracy"]["val"]["total"]):
            raise UserError(f"{name} was evaluated on other validation images than it was made for")
    names = {row["sha256"]: name for name, row in rows.items()}
    for row in rows.values():
        if row["stage"] == "compressed" and row["parent"] in names:  # it keeps no flags of its own
            parent = names[row["parent"]]
            flags = {} if parent == "int8.pth" else {"parent": parent}
            row["command"] = config.command(sparse_compress, flags)
    own = cfg.path(f"checkpoints/{FINAL}")
    if FINAL not in files or not own.is_file() or not files[FINAL].file.samefile(own):
        raise UserError(f"{own} is not among the evaluated files")
    chain = ancestry(rows)
    content = {FINAL: ".nnz", GRAPH: ".onnx"}
    if GRAPH in rows and rows[GRAPH]["parent"] not in {row["sha256"] for row in chain}:
        raise UserError(f"{files[GRAPH].file} is not the network of {own}")

    cells = sweep(cfg.path("logs/sweep.csv"), rows)
    logs = {file.stem: metrics.read_log(file) for stage in ("train", "prune", "quantize")
            for file in sorted(cfg.path("logs").glob(f"{stage}*.jsonl"))}  # fmt: skip

    release = Path(cfg.release) if cfg.release else checkpoint.RELEASE.parent
    stem, index = checkpoint.RELEASE.stem, release / "results.json"
    index.unlink(missing_ok=True)  # written last: until then, nothing is published
    published = {}
    for name, suffix in content.items():
        copy(files[name].file if name in files else None, release / f"{stem}{suffix}")
        published |= {f"{stem}{suffix}": name} if name in files else {}
    for chart in CHARTS:
        copy(cfg.path(f"plots/{chart}"), release / chart)
    results = {
        "format": "mobilenetv2-cifar10/results/1", "published": published, "files": rows,
        "logs": logs, "sweep": cells,
    }  # fmt: skip
    with checkpoint.atomic(index) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    small, first = chain[0]["bytes"], chain[-1]["bytes"]
    print(
        f"{release / checkpoint.RELEASE.name}: {small:,} bytes, {first / small:.1f} times smaller "
        f"than the {first:,} that its chain began with; {len(rows)} files, {len(cells)} cells"
    )


def logged(path: Path) -> list[dict]:
    lines = metrics.read_log(path)
    if not lines:
        raise UserError(f"no figures in {path}: run eval.py on what is to be published first")
    if not all({"file", "sha256", *ACCURACY, *COUNTS} <= set(line) for line in lines):
        raise UserError(f"{path} is not a log of this eval.py: run it anew")
    return lines


def describe(source, figures: dict) -> dict:
    """What is known of a file beside its accuracy."""
    hashes = [a["sha256"] for a in source.ancestors if a.get("sha256")]
    row = {
        "stage": source.stage, "bytes": source.bytes, "sha256": source.sha256,
        "parent": hashes[-1] if hashes else None, "seed": source.seed,
        "quantization": source.quantization,
    }  # fmt: skip
    row |= {key: figures[key] for key in COUNTS}
    made = checkpoint.read(source.file) if source.file.suffix == ".pth" else {}
    row |= {key: made[key] for key in ("code", "environment", "data") if key in made}
    if "config" in made:
        row["command"] = config.command(STAGES[source.stage], source.config)
    return row | {"accuracy": {}}


def ancestry(rows: dict[str, dict]) -> list[dict]:
    """The rows from the compressed file's back to that of the file that its chain began with."""
    known, chain = {row["sha256"]: row for row in rows.values()}, [rows[FINAL]]
    while parent := chain[-1]["parent"]:
        if parent not in known:
            raise UserError(f"the parent of the {chain[-1]['stage']} file was not evaluated")
        chain.append(known[parent])
    return chain


def sweep(path: Path, rows: dict[str, dict]) -> list[dict]:
    """The cells of the grid, with numbers as numbers."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        cells = list(csv.DictReader(file))
    evaluated = {row["sha256"] for row in rows.values()}
    if not all(cell.get("parent_sha256") in evaluated for cell in cells):
        raise UserError(f"{path} is of another network than those evaluated: run sweep.py anew")
    renamed = {"rate": "rd_lambda"}  # columns of older tables
    return [{renamed.get(k, k): number(text) for k, text in cell.items()} for cell in cells]


def number(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):  # TypeError: a torn row has None for what it lacks
            pass
    return text


def copy(source: Path | None, target: Path) -> None:
    """What this run lacks is deleted: an earlier one's would be taken for its own."""
    if source and source.is_file():
        with checkpoint.atomic(target) as file:
            file.write(source.read_bytes())
    else:
        target.unlink(missing_ok=True)


if __name__ == "__main__":
    config.run(main)
