"""Publish a run: copy its compressed file, its dense network and all its figures to release/.

    python eval.py FILES --split val             first, on both splits: these files are listed
    python eval.py FILES --split test
    python publish.py --run-dir DIR

in:  logs/eval-val.jsonl and logs/eval-test.jsonl, and the files that they measured, among them
     checkpoints/compressed.nnz and all its parents; logs/sweep.csv; the stages' logs (train*.jsonl,
     prune*.jsonl, quantize*.jsonl: a stage that ran twice has two) and charts
out: release/mobilenetv2-cifar10.nnz, baseline.pth, and mobilenetv2-cifar10.onnx if int8.onnx was
     evaluated; release/results.json; the charts

This stage measures nothing, and writes nothing if a file has changed since it was measured.
The stages' logs and charts are taken from the run's folder without a check; the log and chart of
the training stay what they are if the run began with the published baseline.pth. Where it began
with another published file, such as the .nnz, what was published of that file's parents stays, as
before/NAME. A file or chart that the run does not have is deleted from release/. The command of a
.pth is the one recorded in it; a file of a version that recorded none is listed without.
"""

import contextlib
import csv
import dataclasses
import json
import shlex
from pathlib import Path

from lib import checkpoint, config, logs, runtime
from lib.config import UserError, flag, reason
from lib.files import write_bytes, write_json

FINAL, GRAPH, DENSE = "compressed.nnz", "int8.onnx", "baseline.pth"
# What is published of a run's files, and under which names.
BEFORE = "before/"  # begins the names of files and logs that were published earlier
PUBLISHED = {
    FINAL: checkpoint.RELEASE.name, GRAPH: f"{checkpoint.RELEASE.stem}.onnx",
    DENSE: DENSE,
}  # fmt: skip
CHARTS = ("train.png", "prune.png", "quantize.png", "sweep_heatmap.png", "report.png")
ACCURACY = ("correct", "total", "accuracy", "interval", "arithmetic")
COUNTS = ("weights", "live_weights", "nonzeros", "sparsity", "macs")


@dataclasses.dataclass
class Settings:
    run_dir: str = flag(".", "folder that holds checkpoints/, logs/ and plots/")
    release: str | None = flag(None, "folder to publish in; default: release/ beside this script")

    def path(self, name: str) -> Path:
        """Return a file in the run's folder."""
        return Path(self.run_dir) / name


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    files, rows = evaluated(cfg)
    final = cfg.path(f"checkpoints/{FINAL}")
    if FINAL not in files or not final.is_file() or not files[FINAL].file.samefile(final):
        raise UserError(f"{final} is not among the evaluated files")
    release = Path(cfg.release) if cfg.release else checkpoint.RELEASE.parent
    index = release / "results.json"
    earlier = published_before(index)
    chain = ancestry(rows, earlier["files"])
    hashes = {row["sha256"] for row in chain}
    if GRAPH in rows and rows[GRAPH]["parent"] not in hashes:
        raise UserError(f"{files[GRAPH].file} is not the network of {final}")
    if DENSE in rows and rows[DENSE]["sha256"] not in hashes:
        raise UserError(f"{files[DENSE].file} is not in the chain of {final}")
    cells = sweep(cfg.path("logs/sweep.csv"), rows) or of_rows(earlier["sweep"], rows)
    stage_logs = {file.stem: logs.read_log(file) for stage in ("train", "prune", "quantize")
                  for file in sorted(cfg.path("logs").glob(f"{stage}*.jsonl"))}  # fmt: skip
    training = log_of_training(earlier, rows) if "train" not in stage_logs else {}
    if any(name.startswith(BEFORE) for name in rows):
        stage_logs |= {
            BEFORE + name: log for name, log in earlier["logs"].items() if name != "train"
        }
    published = {}
    for name, public in PUBLISHED.items():
        copy(files[name].file if name in files else None, release / public)
        published |= {public: name} if name in files else {}
    for chart in CHARTS:
        if chart != "train.png" or not training:  # else it is there
            copy(cfg.path(f"plots/{chart}"), release / chart)
    # Last: until then, verify.py finds that the files are not those of the index.
    write_json(index, {
        "format": "mobilenetv2-cifar10/results/1", "published": published, "files": rows,
        "logs": training | stage_logs, "sweep": cells,
    })  # fmt: skip
    small, first = chain[0]["bytes"], chain[-1]["bytes"]
    print(
        f"{release / checkpoint.RELEASE.name}: {small:,} bytes, {first / small:.1f} times smaller "
        f"than the {first:,} that its chain began with; {len(rows)} files, {len(cells)} cells"
    )


def evaluated(cfg) -> tuple[dict, dict[str, dict]]:
    """Return the files that eval.py measured on both splits, and what is published of each.

    Both are by file name. Raises UserError if a file has changed since, or lacks a split.
    """
    files, rows = {}, {}
    for split in ("val", "test"):
        for figures in logged(cfg.path(f"logs/eval-{split}.jsonl")):
            name = Path(figures["file"]).name
            if name not in files:
                files[name] = source = runtime.load(figures["file"])
                if name in PUBLISHED and source.stage == "baseline" and not source.code:
                    raise UserError(f"{figures['file']} is a plain state dict, which does not say "
                                    "its strides: that is not published")  # fmt: skip
                rows[name] = describe(source, figures)
            if files[name].sha256 != figures["sha256"]:
                raise UserError(
                    f"{figures['file']} is not the file that eval.py measured, or another of its "
                    "name is: run eval.py again"
                )
            rows[name]["accuracy"][split] = {key: figures[key] for key in ACCURACY}
    names = {row["sha256"]: name for name, row in rows.items()}
    for name, row in rows.items():
        if len(row["accuracy"]) < 2:
            raise UserError(f"{name} was not evaluated on both splits: run eval.py on the other")
        if files[name].data.get("val_size") not in (None, row["accuracy"]["val"]["total"]):
            raise UserError(f"{name} was evaluated on other validation images than it was made for")
        if row["stage"] == "compressed" and row["parent"] in names:  # a .nnz records no command
            parent = names[row["parent"]]
            parent_flag = "" if parent == "int8.pth" else f" --parent {shlex.quote(parent)}"
            row["command"] = f"python sparse_compress.py{parent_flag}"
    return files, rows


def logged(path: Path) -> list[dict]:
    """Return the lines of eval.py's log. Raises UserError if there are none, or others."""
    lines = logs.read_log(path)
    if not lines:
        raise UserError(f"no figures in {path}: run eval.py on what is to be published first")
    if not all({"file", "sha256", *ACCURACY, *COUNTS} <= set(line) for line in lines):
        raise UserError(f"{path} is not a log of this eval.py: run it again")
    return lines


def describe(source, figures: dict) -> dict:
    """Return what is published of a file, with a place for its accuracies."""
    hashes = [a["sha256"] for a in source.ancestors if a.get("sha256")]
    row = {
        "stage": source.stage, "bytes": source.bytes, "sha256": source.sha256,
        "parent": hashes[-1] if hashes else None, "seed": source.seed,
        "quantization": source.quantization,
    }  # fmt: skip
    row |= {key: figures[key] for key in COUNTS}
    if source.file.suffix == ".pth":
        recorded = {key: getattr(source, key) for key in ("code", "environment", "data", "command")}
        row |= {key: value for key, value in recorded.items() if value}
    return row | {"accuracy": {}}


def published_before(index: Path) -> dict:
    """Return what is published: files, logs and cells of the sweep; nothing if that is missing or
    damaged."""
    old = None
    with contextlib.suppress(OSError, ValueError):
        old = json.loads(index.read_text())
    match old:
        case {"files": dict(files), "logs": dict(stage_logs), "sweep": list(cells)} if all(
            isinstance(row, dict) and "sha256" in row for row in files.values()
        ):
            return {"files": files, "logs": stage_logs, "sweep": cells}
    return {"files": {}, "logs": {}, "sweep": []}


def ancestry(rows: dict[str, dict], earlier: dict[str, dict]) -> list[dict]:
    """Return the rows of the compressed file, of its parent, and so on to the first of its chain.

    earlier: rows that are published, by file name; those of the chain that are not among `rows` are
    put there. Raises UserError if one is missing.
    """
    by_hash, chain = {row["sha256"]: row for row in rows.values()}, [rows[FINAL]]
    names = {row["sha256"]: name for name, row in earlier.items()}
    while parent := chain[-1]["parent"]:
        if parent not in by_hash and parent in names:
            by_hash[parent] = rows[BEFORE + names[parent]] = earlier[names[parent]]
        if parent not in by_hash:
            raise UserError(f"the parent of the {chain[-1]['stage']} file was not evaluated")
        chain.append(by_hash[parent])
    return chain


def log_of_training(earlier: dict, rows: dict[str, dict]) -> dict[str, list]:
    """Return {"train": the log} of the published dense network if it is that of this run, too.

    Such a run began with that file, and has no training of its own. earlier: what is published.
    """
    same = rows.get(DENSE, {}).get("sha256") == earlier["files"].get(DENSE, {}).get("sha256", "")
    return {"train": earlier["logs"]["train"]} if same and "train" in earlier["logs"] else {}


def sweep(path: Path, rows: dict[str, dict]) -> list[dict]:
    """Return the cells of the sweep's table, with numbers as numbers.

    Raises UserError if their parent is not among the rows.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            cells = list(csv.DictReader(file))
    except ValueError as error:  # not UTF-8
        raise UserError(f"{path} is damaged: {reason(error)}") from None
    if cells and not of_rows(cells, rows):
        raise UserError(f"{path} is of another network than those evaluated: run sweep.py again")
    return [{name: number(text) for name, text in cell.items()} for cell in cells]


def of_rows(cells: list[dict], rows: dict[str, dict]) -> list[dict]:
    """Return the cells of a sweep if the networks of all are among the rows, else none."""
    known = {row["sha256"] for row in rows.values()}
    return cells if all(cell.get("parent_sha256") in known for cell in cells) else []


def number(text: str):
    """Convert a text to int or float if possible."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):  # TypeError: a torn row has None for what it lacks
            pass
    return text


def copy(source: Path | None, target: Path) -> None:
    """Copy a file atomically; without a source, delete the target.

    The target of an earlier run would be taken for one of this run.
    """
    if source and source.is_file():
        write_bytes(target, source.read_bytes())
    else:
        target.unlink(missing_ok=True)


if __name__ == "__main__":
    config.run(main)
