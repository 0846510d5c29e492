"""Measure a grid of weight bits x activation bits: one real file and its accuracy per cell.

    python sweep.py                                            the report's 6 x 6
    python sweep.py --weight-bits 8,4 --act-bits 8 --wandb
    python sweep.py --weight-bits 4,3 --act-bits 8 --rd-lambda 0,0.2,0.4    accuracy against bytes
    torchrun --nproc-per-node 2 sweep.py                       the processes share the cells
    wandb sweep sweep.yaml                                     W&B's agents share them: see there
    python sweep.py --split test --results results/sweep.json --beside grid.csv    for RESULTS.md

in:  checkpoints/pruned.pth, or any fp32 network
out: checkpoints/sweep/w8a8.nnz ... (each decoded again before it is evaluated), logs/sweep.csv,
     plots/sweep_heatmap.png, plots/sweep_parallel.png (of the first lambda), plots/sweep_rate.png
     (if there are several lambdas)

A cell that was measured before in the same way, from the same parent and on the same images, is not
measured again. All cells are evaluated in floats, since those of more than 8 bits cannot run in
integers: eval.py, which takes integers where it can, may count a few answers differently. With
--wandb each cell is a W&B run, of which the last one shows the charts. Under an agent of W&B, this
script measures one cell, logs it into the agent's run, and writes no CSV or chart.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import os
import time
from datetime import date
from pathlib import Path

from lib import (
    checkpoint,
    compressed,
    config,
    console,
    data,
    devices,
    logs,
    measure,
    plots,
    processes,
    ptq,
    quantizers,
    tables,
)
from lib.compaction import compact
from lib.config import UserError, flag, reason
from lib.files import sha256_of, write_bytes, write_csv
from lib.rate import BITS_PER_KILOBYTE

# gained, lost: images that only this file, only the parent classifies correctly.
COLUMNS = (
    "weight_bits", "act_bits", "rd_lambda", "method", "split", "correct", "total", "accuracy",
    "gained", "lost", "bytes", "seconds", "calibration", "seed", "sha256", "parent_sha256",
)  # fmt: skip
MEASURED = ("hardware", "date", "code")  # how a cell was measured, as lib.tables says it
TITLE = "Accuracy at every pair of bit-widths"


@dataclasses.dataclass
class Settings(config.AfterTraining):
    parent: str | None = flag(None, "fp32 network; default: checkpoints/pruned.pth")
    out: str | None = flag(None, "CSV; default: logs/sweep.csv")
    method: str = flag("ptq", "as in quantize.py", choices=("ptq", "reference"))
    weight_bits: list[int] = flag(
        [32, 16, 12, 8, 6, 4], "rows of the grid; 32 is off", also="weight_bits"
    )  # fmt: skip
    act_bits: list[int] = flag(
        [32, 16, 12, 8, 6, 4], "columns of the grid; 32 is off", also="activation_bits"
    )  # fmt: skip
    rd_lambda: list[float] = flag(
        [0.0], "as in quantize.py; every cell of the grid has each; over 0 for --weight-bits of 2 "
        "to 8 alone", least=0,
    )  # fmt: skip
    calibration: int = flag(
        1024, "training images for ptq, used without their labels", least=1
    )
    split: str = flag("val", "images to evaluate on", choices=("val", "test"))
    results: str | None = flag(
        None, "also write the grid, of the first lambda, as a table for RESULTS.md",
        heading="RESULTS.md",
    )  # fmt: skip
    title: str | None = flag(None, f"with --results: the table's heading [{TITLE}]")
    beside: str | None = flag(
        None, "with --results: a CSV of weight_bits, activation_bits and accuracy in percent, as "
        "the report has it (not as sweep.csv); its accuracies stand in brackets"
    )  # fmt: skip

    def __post_init__(self):
        if any(self.rd_lambda) and (self.method == "reference" or max(self.weight_bits) > 8):
            raise ValueError("--rd-lambda is for --method ptq and weights of 2 to 8 bits")
        if (self.beside or self.title) and not self.results:
            raise ValueError("--beside and --title are for a table: give --results")
        for bits in (*self.weight_bits, *self.act_bits):
            if bits not in quantizers.BITS:
                raise ValueError(f"{bits} bits: must be 2 to 16, or 32 for off")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device, share=True)
    processes.start(device, share=True)
    world, rank_of_process = processes.world_and_rank()
    file = cfg.path(cfg.parent, "checkpoints/pruned.pth")
    folder, out = cfg.in_run("checkpoints/sweep"), cfg.path(cfg.out, "logs/sweep.csv")
    config.refuse_replacing(out, file, cfg.beside)
    config.refuse_replacing(cfg.results, file, cfg.beside)
    parent = checkpoint.load(file, cfg.assume_downsample)
    parent.refuse_quantized()
    with processes.main_first():
        images = parent.images(cfg.data, cfg.val_size, device)
    split = images.split(cfg.split)
    others = read_beside(Path(cfg.beside)) if cfg.beside else {}
    console.say_device(device)
    known = {}  # by SHA-256: which images the parent gets right, once it is measured
    grid = [
        (weight_bits, act_bits, rd_lambda) for weight_bits in dict.fromkeys(cfg.weight_bits)
        for act_bits in dict.fromkeys(cfg.act_bits) for rd_lambda in dict.fromkeys(cfg.rd_lambda)
    ]  # fmt: skip
    agent = cfg.wandb and "WANDB_SWEEP_ID" in os.environ
    if agent and len(grid) > 1:
        raise UserError(f"a W&B agent runs one cell, not {len(grid)}: see sweep.yaml")

    for number, (weight_bits, act_bits, rd_lambda) in enumerate(grid):
        if number % world != rank_of_process:
            continue
        path = folder / name_of(weight_bits, act_bits, rd_lambda)
        row = finished(path, cfg, parent, images)
        old = ""
        if row:
            other = row["code"] != config.code_version()
            old = " (measured before" + f", by commit {row['code']}" * other + ")"
        if not row:
            if not known:
                measure.figures_of_file(parent, split, cfg.split, known)
            row = cell(path, cfg, parent, images, known, weight_bits, act_bits, rd_lambda)
        print(
            f"[{number + 1}/{len(grid)}] {path.stem.upper()}: {row['accuracy']:.2%} "
            f"({row['correct']}/{row['total']} {cfg.split}), +{row['gained']} -{row['lost']}, "
            f"{row['bytes']:,} bytes{old}",
            flush=True,
        )
    processes.wait()
    if processes.is_main():
        rows = [finished(folder / name_of(*bits), cfg, parent, images) for bits in grid]
        if None in rows:
            raise UserError(f"files in {folder} were replaced: does another sweep run there?")
        charts = []
        if not agent:
            # Once all cells are there: make takes it for done.
            write_csv(out, COLUMNS, [{column: row[column] for column in COLUMNS} for row in rows])
            charts = draw(cfg, rows, parent)
            if cfg.results:
                table = table_of(cfg, rows, parent, images, others)
                tables.write(Path(cfg.results), table)
        if cfg.wandb:
            log_wandb(cfg, rows, charts, agent)
        if not agent:
            print(f"{out}: {len(rows)} cells")
    processes.stop()


def draw(cfg, rows: list[dict], parent) -> list[Path]:
    """Draw the charts of a sweep; return their files."""
    names = ("heatmap", "parallel", "rate")
    heatmap, parallel, rate = (cfg.in_run(f"plots/sweep_{name}.png") for name in names)
    n = rows[0]["total"]
    title, on = f"{cfg.method} quantization of {parent.file.name}", f", {cfg.split} (n={n})"
    first = [row for row in rows if row["rd_lambda"] == cfg.rd_lambda[0]]
    of_first = title + at_lambda(cfg.rd_lambda[0]) + on
    plots.heatmap(first, heatmap, of_first)
    plots.parallel_coordinates(first, parallel, of_first)
    if len(rows) == len(first):
        return [heatmap, parallel]
    plots.accuracy_bytes(rows, rate, title + on)
    return [heatmap, parallel, rate]


def at_lambda(rd_lambda: float) -> str:
    """Return the words for a lambda, none for 0."""
    return f" at lambda {rd_lambda:g}" * (rd_lambda > 0)


def read_beside(path: Path) -> dict[tuple[int, int], float]:
    """Return {(weight bits, activation bits): accuracy in percent} of a CSV of another program.

    Raises UserError for a file that has not these three columns, or other than numbers in them.
    """
    try:
        with path.open(newline="") as file:
            return {
                (int(row["weight_bits"]), int(row["activation_bits"])): float(row["accuracy"])
                for row in csv.DictReader(file)
            }
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"--beside {path}: {reason(error)}") from None


def table_of(cfg, rows: list[dict], parent, images, others: dict) -> dict:
    """Return the grid of the first lambda as a table, a row per weight bits; see lib.tables.

    others: what `read_beside` returns.
    """
    widths = [list(dict.fromkeys(bits)) for bits in (cfg.weight_bits, cfg.act_bits)]
    cells = {
        (row["weight_bits"], row["act_bits"]): row
        for row in rows if row["rd_lambda"] == cfg.rd_lambda[0]
    }  # fmt: skip

    def text(pair: tuple[int, int]) -> str:
        other = f" ({others[pair]:.2f})" if pair in others else ""
        return f"{100 * cells[pair]['accuracy']:.2f}{other}"

    lines = [
        [f"{weight_bits} bits", *(text((weight_bits, act_bits)) for act_bits in widths[1]),
         max(cells[weight_bits, act_bits]["bytes"] for act_bits in widths[1])]
        for weight_bits in widths[0]
    ]  # fmt: skip
    method = cfg.method + at_lambda(cfg.rd_lambda[0])
    about = f"Accuracy in %, {method} without training, of {parent.file.name} "
    about += f"({parent.sha256[:12]}); each cell is a file that was decoded again."
    if others:
        about += f" In brackets: the accuracy in {Path(cfg.beside).name}."
    table = tables.table(
        cfg.title or TITLE,
        ["weights", *(f"activations {bits}" for bits in widths[1]), "bytes, at most"], lines,
        data=f"{images.source}, {cfg.split} split, n={rows[0]['total']:,}", device=images.device,
        text=about,
    )  # fmt: skip
    # Not those of now: cells may have been measured before.
    return table | {
        key: " and ".join(dict.fromkeys(row[key] for row in cells.values())) for key in MEASURED
    }


def name_of(weight_bits: int, act_bits: int, rd_lambda: float) -> str:
    """Return the name of a cell's file, such as w4a8.nnz or, with a lambda of 0.3, w4a8r0.3.nnz."""
    return f"w{weight_bits}a{act_bits}" + (f"r{rd_lambda:.12g}" if rd_lambda else "") + ".nnz"


def cell(
    path: Path, cfg, parent, images, known, weight_bits: int, act_bits: int, rd_lambda: float
) -> dict:
    """Quantize, write the file, read it back and evaluate what was read; return the table's row."""
    began = time.monotonic()
    split = getattr(images, cfg.split)
    model = parent.build(split.images.device)
    if cfg.method == "reference":
        scheme = quantizers.quantize_reference(model, weight_bits, act_bits)
    else:
        scheme = ptq.make_scheme(weight_bits, act_bits)
        sample = data.sample(images.train, cfg.calibration, cfg.seed)
        small, _ = compact(model)
        model, _ = ptq.quantize(small, sample, scheme, lambda_per_bit=rd_lambda / BITS_PER_KILOBYTE)
    child = parent.child(model, scheme, images.provenance(), cfg.seed)
    raw = compressed.encode(child)
    write_bytes(path, raw)
    # As floats: one arithmetic for all cells, of which those over 8 bits have no integers.
    source = checkpoint.load(path)
    if source.sha256 != hashlib.sha256(raw).hexdigest():
        raise UserError(f"{path} was replaced: does another sweep run in this folder?")
    figures, _ = measure.figures_of_file(source, split, cfg.split, dict(known), integers=False)
    row = {
        "weight_bits": weight_bits, "act_bits": act_bits, "rd_lambda": rd_lambda,
        "method": cfg.method, "calibration": cfg.calibration, "seed": cfg.seed,
        "seconds": round(time.monotonic() - began, 1), "parent_sha256": parent.sha256,
        "assume_downsample": cfg.assume_downsample, "data": about_images(images, cfg.split),
        **{key: figures[key] for key in COLUMNS if key in figures},
        **{key: figures["change"][key] for key in ("gained", "lost")},
        "hardware": devices.hardware(split.images.device), "date": date.today().isoformat(),
        "code": config.code_version(),
    }  # fmt: skip
    write_bytes(path.with_suffix(".json"), json.dumps(row).encode())
    return row


def finished(path: Path, cfg, parent, images) -> dict | None:
    """Return the row of a cell that was measured before in the same way; None if there is none."""
    record = path.with_suffix(".json")
    if not record.is_file() or not path.is_file():
        return None
    wanted = {
        "parent_sha256": parent.sha256, "method": cfg.method, "split": cfg.split,
        "calibration": cfg.calibration, "seed": cfg.seed,
        "assume_downsample": cfg.assume_downsample, "data": about_images(images, cfg.split),
        "sha256": sha256_of(path),
    }  # fmt: skip
    try:
        row = json.loads(record.read_text())
        known = {*COLUMNS, *MEASURED} <= set(row)  # else of an earlier version
        return row if wanted.items() <= row.items() and known else None
    except (ValueError, AttributeError):  # not ours: measure it again
        return None


@functools.lru_cache(maxsize=1)  # it takes part of a second, and every cell asks
def about_images(images, split_name: str) -> dict:
    """Return what identifies the images that a cell is calibrated and evaluated on."""
    sha, split = hashlib.sha256(), getattr(images, split_name)
    for tensor in (images.train.images, split.images, split.labels):
        sha.update(tensor.cpu().contiguous().numpy())
    return images.provenance() | {"sha256": sha.hexdigest()}


def log_wandb(cfg, rows: list[dict], charts: list[Path], agent: bool) -> None:
    """Log one W&B run per cell, for a parallel coordinates panel; the last one shows the charts.

    agent: the one run is an agent's, whose environment names it; otherwise they are in one group.
    """
    of_all = {k: v for k, v in config.identity(cfg).items()
              if k not in ("weight_bits", "act_bits", "rd_lambda")}  # fmt: skip
    settings = hashlib.sha256(json.dumps(of_all, sort_keys=True).encode()).hexdigest()[:8]
    group = f"sweep-{cfg.method}-{cfg.split}-{rows[0]['parent_sha256'][:8]}-{settings}"
    for row in rows:
        name = name_of(row["weight_bits"], row["act_bits"], row["rd_lambda"]).removesuffix(".nnz")
        # The id is fixed: a repeated sweep updates its runs.
        fixed = {} if agent else {"group": group, "id": f"{group}-{name}", "resume": "allow"}
        run = logs.start_wandb(
            cfg.in_run("logs"), name=name, **fixed,
            config=of_all | {
                "weight_bits": row["weight_bits"], "activation_bits": row["act_bits"],
                **{key: row[key] for key in ("rd_lambda", "total", "parent_sha256")},
            },
        )  # fmt: skip
        run.log({"accuracy": row["accuracy"], "bytes": row["bytes"]})
        logs.log_charts(run, charts if row is rows[-1] else [])
        logs.finish_wandb(run)


if __name__ == "__main__":
    config.run(main)
