"""Evaluate any file of any stage: accuracy, bytes on disk, weights, non-zeros, MACs.

    python eval.py checkpoints/pruned.pth checkpoints/compressed.nnz
    python eval.py checkpoints/int8.onnx                       through onnxruntime
    python eval.py ../somewhere/plain_state_dict.pth --split val --json

A file that holds integers (int8.pth, .nnz) runs in integers if its scheme allows that (ptq or qat,
at 8 bits or fewer: lib/integer.py), an .onnx runs in onnxruntime, all others run in floats.

in:  files of any stage, or state dicts of torchvision's MobileNetV2; default: those of the chain
out: a table (or a JSON line per file) on the standard output; logs/eval-<split>.jsonl;
     plots/confusion-<file>-<split>.png; with --results, a table for RESULTS.md
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from lib import checkpoint, config, console, data, devices, logs, measure, plots, runtime, tables
from lib.config import UserError, flag
from lib.files import printable


@dataclasses.dataclass
class Settings(config.AfterTraining):
    files: list[str] = config.files("files to evaluate")
    split: str = flag(
        "test", "images to evaluate on", choices=("val", "test", "train"), heading="evaluation"
    )
    json: bool = flag(False, "print one JSON object per file, for machines")
    layers: bool = flag(False, "print the sparsity of every layer too")
    results: str | None = flag(
        None, "write a table for RESULTS.md, such as results/reference.json", heading="RESULTS.md"
    )
    title: str | None = flag(None, "the table's heading [Files]")
    labels: list[str] = flag([], "what the table calls the files; default: their names")

    def __post_init__(self):
        if (self.labels or self.title) and not self.results:
            raise ValueError("--labels and --title are for a table: give --results")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    files = cfg.files or [p for p in (cfg.in_run(f"checkpoints/{f}") for f in checkpoint.CHAIN)
                          if p.exists()]  # fmt: skip
    if not files:
        raise UserError(f"no files: none named, and none in {cfg.in_run('checkpoints')}")
    if cfg.labels and len(cfg.labels) != len(files):
        raise UserError(f"{len(cfg.labels)} --labels for {len(files)} files")
    config.refuse_replacing(cfg.results, *files)
    # All of them before any long work, so that a file that cannot be read fails at once.
    sources = [runtime.load(file, cfg.assume_downsample) for file in files]
    log = logs.Log(cfg.in_run(f"logs/eval-{cfg.split}.jsonl"), config.identity(cfg), cfg.wandb)
    test_only = cfg.split == "test"  # then a set without training images will do
    sizes = {source.val_size(cfg.val_size) for source in sources}
    if cfg.results and not test_only and len(sizes) > 1:
        raise UserError("--results compares the files, and they have different validation splits: "
                        "give --val-size, or --split test")  # fmt: skip
    images, correct_by_file, rows, names = None, {}, [], chart_names(sources)
    for source in sources:
        val_size = source.val_size(cfg.val_size)
        if images is None or not (test_only or val_size in (None, len(images.val))):
            images = source.images(cfg.data, cfg.val_size, device, test_only)
            correct_by_file = {}
        split = images.split(cfg.split)
        source.check_images(images)
        if not rows and not cfg.json:
            console.say_device(device)
        figures, matrix = measure.figures_of_file(source, split, cfg.split, correct_by_file)
        print(json.dumps(figures) if cfg.json else table(figures, cfg.layers), flush=True)
        rows.append(figures)
        path = cfg.in_run(f"plots/confusion-{next(names)}-{cfg.split}.png")
        title = f"{source.file.name} on {cfg.split} (n={len(split)})"
        plots.confusion(matrix.numpy(), images.classes, path, title)
    log.begin(rows)  # only now: a run that fails keeps the last one's figures for publish.py
    log.close(figures)
    if cfg.results:
        correct = [correct_by_file[row["sha256"]] for row in rows]
        tables.write(Path(cfg.results), results_table(rows, correct, cfg, images))


def chart_names(sources: list) -> Iterator[str]:
    """Yield a name per file for its chart: the stem, and a number where another has that name."""
    given = set()
    for source in sources:
        stem = source.file.name if source.file.suffix == ".onnx" else source.file.stem
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        given.add(name := next(name for name in names if name not in given))
        yield name


def results_table(rows: list[dict], correct: list[Tensor], cfg, images: data.Data) -> dict:
    """Return the figures of all files as a table (lib/tables.py).

    correct: which images each file has right, bool (n,). "smaller", gained and lost are against the
    first file.
    """
    names = cfg.labels or [Path(row["file"]).name for row in rows]
    columns = ["file", "bytes", "smaller", f"correct of {rows[0]['total']:,}",
               "accuracy, 95% interval", "gained, lost", "non-zero weights"]  # fmt: skip
    lines = []
    for name, row, right in zip(names, rows, correct, strict=True):
        low, high = row["interval"]
        moved = measure.change(correct[0], right)
        lines.append([
            name, row["bytes"], f"{rows[0]['bytes'] / row['bytes']:.1f}x", row["correct"],
            f"{row['accuracy']:.2%} ({low:.2%} to {high:.2%})",
            f"+{moved['gained']} -{moved['lost']}" if lines else "", row["nonzeros"],
        ])  # fmt: skip
    about = f"{images.source}, {cfg.split} split, n={rows[0]['total']:,}"
    return tables.table(
        cfg.title or "Files", columns, lines, data=about, device=images.device
    )


def change(f: dict) -> list[str]:
    """Return the line that compares a file's figures with an ancestor's, if there is one."""
    if "change" not in f:
        return []
    c = f["change"]
    return [f"  change     {c['gained']} images gained, {c['lost']} lost against {c['from']}"]


def table(f: dict, layers: bool) -> str:
    """Return the figures of a file (see measure.figures_of_file) as text."""
    low, high = f["interval"]
    scheme, bits = f["quantization"], f["dtype"]
    if scheme:
        bits = f"W{scheme['weight_bits']}A{scheme['act_bits']} {scheme['method']}"
    chain = [*(a["stage"] for a in f["ancestors"]), f["stage"]]
    lines = [
        printable(str(f["file"])),
        f"  accuracy   {f['accuracy']:.2%}  ({f['correct']} of {f['total']} {f['split']} images; "
        f"95% interval {low:.2%} to {high:.2%})",
        *change(f),
        f"  size       {f['bytes']:,} bytes, {bits}",
        f"  ran as     {f['arithmetic']}" + ", on the CPU" * (f["arithmetic"] != runtime.FLOAT),
        f"  weights    {f['weights']:,} in conv and linear layers, {f['live_weights']:,} in live "
        f"channels, {f['nonzeros']:,} non-zero (sparsity {f['sparsity']:.2%})",
        f"  MACs       {f['macs']:,} per image",
        f"  chain      {' > '.join(chain)}",
    ]
    if layers:
        lines += [
            f"  {x['name']:24} {x['weights']:>9,} {x['nonzeros']:>9,}  "
            f"{1 - x['nonzeros'] / x['weights']:8.2%}"
            for x in f["layers"]
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    config.run(main)
