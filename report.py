"""Compare the files of the chain: size, accuracy, compression ratios, and what the bytes store.

    python report.py --data DIR      figures 9 and 10 of the course report, for these files
    python report.py --status        which file of the chain is missing or stale, and why

in:  the files of the chain that are in checkpoints/; ratios are against the first of them
out: tables on the standard output, logs/report.jsonl (one line per file), plots/report.png (size
     and accuracy), plots/storage.png (what the bytes are), plots/confusion-<file>-<split>.png
"""

import csv
import dataclasses
import sys
from datetime import datetime
from pathlib import Path

import torch

from lib import checkpoint, config, console, data, devices, logs, measure, memory, plots
from lib.config import UserError, flag, reason
from lib.files import printable, sha256_of


@dataclasses.dataclass
class Settings(config.AfterTraining):
    split: str = flag(
        "test", "images to evaluate on", choices=("val", "test", "train"), heading="evaluation"
    )
    status: bool = flag(False, "only list which files are there or stale; evaluate nothing")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    folder = cfg.in_run("checkpoints")
    if cfg.status:
        print(aligned(status(folder, cfg.assume_downsample), "lllrl"))
        return
    files = [folder / name for name in checkpoint.CHAIN if (folder / name).is_file()]
    if not files:
        raise UserError(f"no files of the chain in {folder}: `make all` makes them")
    # All of them before any long work, so that a file that cannot be read fails at once.
    sources = [checkpoint.load(file, cfg.assume_downsample) for file in files]
    say_stale(sources, cfg.assume_downsample)
    images = images_of(sources, cfg)
    split = images.split(cfg.split)
    console.say_device(split.images.device)
    rows = []
    for source in sources:
        row, confusion = measured(source, split, cfg.split)
        rows.append(row | against(rows[0] if rows else row, row))
        plots.confusion(
            confusion.numpy(), images.classes,
            cfg.in_run(f"plots/confusion-{source.file.stem}-{cfg.split}.png"),
            f"{source.file.name} on {cfg.split}",
        )  # fmt: skip

    smallest = min(rows, key=lambda row: row["bytes"])
    n = f"{len(split):,} {cfg.split} images of {images.source}"
    plots.stages(
        [row | {"stage": row["name"]} for row in rows], cfg.in_run("plots/report.png"),
        f"Size and accuracy after every stage ({cfg.split} split of {images.source})",
    )  # fmt: skip
    plots.storage(
        [(row["name"], row["parts"]) for row in rows], cfg.in_run("plots/storage.png"),
        "What the bytes of every file are",
    )  # fmt: skip
    charts = [cfg.in_run(f"plots/{name}.png") for name in ("report", "storage")]
    log = logs.Log(cfg.in_run("logs/report.jsonl"), config.identity(cfg), cfg.wandb)
    log.begin(rows)
    log.close(smallest["ratios"], charts)
    print(f"{folder}, accuracy on {n}\n\n{stage_table(rows)}\n")
    print(ratio_table(rows[0], smallest), end="\n\n")
    for path in sorted(cfg.in_run("plots").glob("*.png")):
        print(path)


def say_stale(sources, downsample: int | None) -> None:
    """Print a line on the standard error for each file that is not of those before it."""
    hashes, stale = {source.file.name: source.sha256 for source in sources}, set()
    for source in sources:
        note = freshness(source, hashes, stale, downsample)
        if note.startswith("stale"):
            stale.add(source.file.name)
            print(f"report.py: {source.file.name} is {note}", file=sys.stderr)


def images_of(sources, cfg) -> data.Data:
    """Return the data set that all files are evaluated on. Raises UserError unless all of them were
    trained on it."""
    sizes = {source.val_size(cfg.val_size) for source in sources} - {None}
    if len(sizes) > 1 and cfg.split != "test":
        raise UserError(f"the files were made with different --val-size {sorted(sizes)}: give one")
    device, test_only = devices.choose(cfg.device), cfg.split == "test"
    images = sources[0].images(cfg.data, min(sizes, default=None), device, test_only)
    for source in sources[1:]:
        source.check_images(images)
    return images


def measured(source, split, split_name: str) -> tuple[dict, torch.Tensor]:
    """Return the figures of one file, none of which depend on another file, and its confusion
    matrix."""
    row, confusion = measure.figures_of_file(source, split, split_name)
    parts = memory.bytes_by_part(source)
    bits = source.quantization["act_bits"] if source.quantization else 32
    row |= {
        "name": source.file.name, "parts": parts, "act_bits": bits,
        "weight_bytes": sum(size for part, size in parts.items() if part.startswith("weights: ")),
    }  # fmt: skip
    activations = memory.activation_bytes(source.build(), bits)
    row |= {f"act_{key}": value for key, value in activations.items()}
    return row, confusion


RATIOS = {  # what is compared: its name and what it is; activations are those of one image
    "bytes": ("model", "the whole file"),
    "weight_bytes": ("weights", "of conv and linear layers, with their indices"),
    "act_sum_bytes": ("activations", "all inputs of conv and linear layers"),
    "act_peak_bytes": ("peak", "the most activations in memory at once"),
}


def against(first: dict, row: dict) -> dict:
    """Return how many times smaller a file is than the first, and by how many percentage points
    its accuracy differs."""
    ratios = {name: first[key] / max(row[key], 1) for key, (name, _) in RATIOS.items()}
    return {"change": 100 * (row["accuracy"] - first["accuracy"]), "ratios": ratios}


def stage_table(rows: list[dict]) -> str:
    """Return the table of all files as text, one line per file."""
    head = ("file", "bytes", "ratio", "correct", "accuracy", "95% interval", "points", "live",
            "non-zero", "sparsity", "MACs", "bits")  # fmt: skip
    lines = [head]
    for row in rows:
        low, high = row["interval"]
        scheme = row["quantization"]
        lines.append((
            row["name"], f"{row['bytes']:,}", f"{row['ratios']['model']:.2f}x",
            f"{row['correct']}/{row['total']}", f"{row['accuracy']:.2%}",
            f"{100 * low:.2f} to {100 * high:.2f}", f"{row['change']:+.2f}",
            f"{row['live_weights']:,}", f"{row['nonzeros']:,}", f"{row['sparsity']:.2%}",
            f"{row['macs'] / 1e6:.1f} M",
            f"W{scheme['weight_bits']}A{scheme['act_bits']}" if scheme else "fp32",
        ))  # fmt: skip
    return aligned(lines, "lrrrrrrrrrrl")


def ratio_table(first: dict, last: dict) -> str:
    """Return the ratios between two files as text, with the bytes behind them."""
    lines = [("bytes", first["name"], last["name"], "ratio", "")]
    for key, (name, note) in RATIOS.items():
        at = f", in {last['act_peak_layer']}" if key == "act_peak_bytes" else ""
        ratio = f"{last['ratios'][name]:.1f}x"
        lines.append((name, f"{first[key]:,}", f"{last[key]:,}", ratio, note + at))
    return aligned(lines, "lrrrl")


def aligned(rows, sides: str) -> str:
    """Return rows of text in aligned columns; sides: l or r for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    )


# ---- status --------------------------------------------------------------------------------------


def status(folder: Path, downsample: int | None = None) -> list[tuple[str, ...]]:
    """Return a row per file of the chain: name, stage, date, bytes, and whether it is current.

    downsample: see checkpoint.load.
    """
    paths = [folder / name for name in checkpoint.CHAIN]
    hashes = {p.name: sha256_of(p) for p in paths if p.is_file()}
    rows, stale, now = [], set(), config.code_version()
    for path in paths:
        stage = date = size = "-"
        notes = ["missing"]
        if path.is_file():
            date = f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
            size = f"{path.stat().st_size:,}"
            try:
                source = checkpoint.load(path, downsample)
                stage, notes = source.stage, [freshness(source, hashes, stale, downsample)]
                if source.code not in (None, now):  # worth knowing, but no fault
                    notes.append(f"made by code {source.code}, this is {now}")
            except UserError as error:
                notes = [f"unreadable: {error}"]
            if not notes[0].startswith("up to date"):
                stale.add(path.name)
        notes = printable("; ".join(notes + unfinished(path)))
        rows.append((path.name, stage, date, size, notes))
    return [*rows, sweep_status(folder.parent / "logs/sweep.csv", hashes, stale)]


def sweep_status(path: Path, hashes: dict[str, str], stale: set[str]) -> tuple[str, ...]:
    """Return the row of the sweep's table. hashes, stale: as for `freshness`."""
    if not path.is_file():
        return (path.name, "-", "-", "-", "missing")
    try:
        with path.open(newline="") as file:
            parents = {row.get("parent_sha256") for row in csv.DictReader(file)}
    except ValueError as error:  # not UTF-8
        return (path.name, "-", "-", "-", f"damaged: {reason(error)}")
    date = f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    same = next((name for name, value in hashes.items() if parents == {value}), None)
    note = up_to_date(same, stale) if same else "stale: measured on another parent"
    return (path.name, "sweep", date, f"{path.stat().st_size:,}", note)


def up_to_date(parent: str, stale: set[str]) -> str:
    """Say what a file is that was made of `parent`. stale: as for `freshness`."""
    return f"stale: {parent} is not up to date" if parent in stale else f"up to date with {parent}"


def freshness(
    source, hashes: dict[str, str], stale: set[str], downsample: int | None = None
) -> str:
    """Say whether a file's recorded parent is still there, in the chain or where --parent said, and
    is up to date itself.

    hashes: SHA-256 of the chain's files by name; stale: the names of those that are not up to date.
    downsample: see checkpoint.load.
    """
    if not source.ancestors:
        return "up to date: the start of a chain"
    parent, given = source.ancestors[-1], source.config.get("parent")
    if parent["sha256"] is None:  # a cell of sweep.py, whose parent was never a file
        return "parent unknown: this file records no hash"
    same = next((name for name, value in hashes.items() if value == parent["sha256"]), None)
    if same:
        return up_to_date(same, stale)
    if given and Path(given).is_file():
        hashes = hashes | {given: sha256_of(given)}
        if hashes[given] == parent["sha256"]:  # it may have a parent of its own
            note = freshness(checkpoint.load(given, downsample), hashes, stale, downsample)
            return up_to_date(given, set() if note.startswith("up to date") else {given})
    of_stage = {Path(name).stem: name for name in checkpoint.CHAIN}
    name = given or of_stage.get(parent["stage"], parent["stage"])
    now = f"changed: {name} is now {hashes[name][:8]}" if name in hashes else f"missing: no {name}"
    return f"stale: parent {now}, was made from {parent['sha256'][:8]}"


def unfinished(path: Path) -> list[str]:
    """Return the interrupted runs whose state lies beside a file, and how far they came."""
    notes = []
    for file in sorted(path.parent.glob(f"{path.name}*.resume")):
        try:
            state = checkpoint.read(file)
        except UserError:
            notes.append(f"{file.name} is damaged")
            continue
        reached = f"epoch {len(state.get('history', []))}"
        if "rounds" in state:  # prune.py's; round 0 is the parent
            reached = f"round {len(state['rounds']) - 1}"
        elif "attempts" in state:  # quantize.py's
            reached = "the end of ptq"
        notes.append(f"unfinished: {file.name} at {reached}")
    return notes


if __name__ == "__main__":
    config.run(main)
