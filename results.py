"""Write RESULTS.md, and the tables in README.md, from the measurements in results/*.json.

    python results.py              write RESULTS.md and the tables of README.md
    python results.py --check      write nothing; fail if they are not what the JSON says

in:  results/*.json, which stages and benchmarks write (--results FILE); RESULTS.md's order is ORDER
out: RESULTS.md; README.md between lines `<!-- table: NAME -->` and `<!-- end -->`;
     results/files.png, size and accuracy; results/curve.png, of one network at many lambdas
"""

import dataclasses
from pathlib import Path

from lib import config, plots, tables
from lib.config import UserError, flag
from lib.files import write_bytes

# Section: its tables, in the order in which RESULTS.md shows them.
ORDER = {
    "The reference report's network": ["reference", "curve", "reference_sweep"],
    "Our own network": ["release", "sweep"],
    "Training recipe": ["recipe_pilot"],
    "Speed": ["bench", "bench_avx2", "train_step", "cuda_graph", "qat_step", "compaction",
              "augment"],
    "Rate-distortion quantization": ["price"],
}
# Tables of files, written by eval.py, that results/files.png shows, and whose network is in them.
FILES = {"reference": "the report's network:", "release": "our own network:"}
# A table of files, "GROUP at lambda X" each but for what they were made from, in results/curve.png.
CURVE = "curve"
# Charts of the published chain, in release/: what they show.
CHARTS = {
    "train.png": "Training: loss, accuracy and learning rate by epoch.",
    "prune.png": "Pruning: accuracy against sparsity, by round.",
    "quantize.png": "Quantization-aware training: loss, accuracy and learning rate by epoch.",
    "sweep_heatmap.png": "Accuracy at every pair of bit-widths.",
    "report.png": "Bytes and accuracy of every file of the chain.",
}


@dataclasses.dataclass
class Settings:
    folder: str = flag(".", "the project's folder: results/, RESULTS.md and README.md")
    check: bool = flag(False, "only say whether the files are up to date")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    folder = Path(cfg.folder)
    known = {path.stem: tables.read(path) for path in sorted((folder / "results").glob("*.json"))}
    readme = folder / "README.md"
    texts = {folder / "RESULTS.md": page(known, folder), readme: filled(readme.read_text(), known)}
    stale = [p for p, text in texts.items() if not p.is_file() or p.read_text() != text]
    if cfg.check and stale:
        raise UserError(f"{', '.join(map(str, stale))}: not what results/ says; `make results`")
    for path in stale:
        write_bytes(path, texts[path].encode())
    if not cfg.check:
        draw(known, folder / "results")
    print(f"{len(known)} tables; {', '.join(p.name for p in stale) or 'nothing'} written")


def page(measured: dict[str, dict], folder: Path) -> str:
    """Return the text of RESULTS.md, which lies in `folder`. Raises UserError for a table missing
    from ORDER."""
    known = [name for names in ORDER.values() for name in names]
    unknown = sorted(set(measured) - set(known))
    if unknown:
        raise UserError(f"results/{unknown[0]}.json has no place in ORDER of results.py")
    lines = [
        "# Results", "",
        "Every table here was written by `make results` from a file in [results/](results). A",
        "stage or a benchmark wrote that file; where a table names two commits, the named row",
        "was measured later and put in. The commit is that of the measurement: a network may",
        "be older, as README.md says of some. A `+` after it: with changes that were not",
        "committed. Accuracy: correct answers over a whole split. In tables of files it is that",
        "of the file, read back from disk; in those of training recipes and of the parts of",
        "rate-distortion quantization, that of the network in memory.", "",
    ]  # fmt: skip
    for section, names in ORDER.items():
        present = [name for name in names if name in measured]
        if present:
            lines += [f"## {section}", ""]
        for name in present:
            lines += described(name, measured[name])
            if name == CURVE:
                title = measured[name]["title"]
                lines += [f"![{title}](results/curve.png)", ""]
    lines += ["## Charts of the published chain", ""]
    for chart, caption in CHARTS.items():
        if (folder / "release" / chart).is_file():
            lines += [caption, "", f"![{caption}](release/{chart})", ""]
    return "\n".join(lines[:-1]) + "\n"


def draw(measured: dict[str, dict], folder: Path) -> None:
    """Draw size and accuracy of the files in the tables of FILES and of CURVE, if there are any."""
    rows = [
        file | {"group": group, "stage": f"{group}\n{file['name']}"}
        for name, group in FILES.items() if name in measured for file in files_of(measured[name])
    ]  # fmt: skip
    if rows:
        plots.stages(rows, folder / "files.png", "Bytes on disk and accuracy on the test split")
    if CURVE in measured:
        rows, heights = [], {}
        for file in files_of(measured[CURVE]):
            group, at, label = file["name"].partition(" at lambda ")
            if at:
                rows.append(file | {"group": group, "label": label})
            else:
                heights[group] = file["correct"] / file["total"]
        plots.size_curve(rows, folder / "curve.png", measured[CURVE]["title"], heights)


def files_of(table: dict) -> list[dict]:
    """Return the files of a table that eval.py wrote: name, bytes, correct and total of each."""
    files = []
    for row in table["rows"]:
        cells = dict(zip(table["columns"], row, strict=True))
        (column,) = (c for c in cells if c.startswith("correct of "))
        total = int(column.removeprefix("correct of ").replace(",", ""))
        files.append({"name": cells["file"], "bytes": cells["bytes"], "correct": cells[column],
                      "total": total})  # fmt: skip
    return files


def described(name: str, table: dict) -> list[str]:
    """Return a table's heading, text, rows, and how it was measured."""
    how = [table["data"], table["hardware"], table["date"], f"commit {table['code']}",
           f"[results/{name}.json](results/{name}.json)"]  # fmt: skip
    text = [table["text"], ""] if table["text"] else []
    return [
        f"### {table['title']}", "", *text, *tables.markdown(table), "",
        f"`{table['command']}`", "", "; ".join(part for part in how if part) + ".", "",
    ]  # fmt: skip


def filled(text: str, measured: dict[str, dict]) -> str:
    """Return README's text with its marked tables replaced by those of the measurements."""
    lines, inside = [], False
    for line in text.splitlines():
        inside = inside and line != "<!-- end -->"
        if not inside:
            lines.append(line)
        if line.startswith("<!-- table: "):
            name = line.removeprefix("<!-- table: ").removesuffix(" -->")
            if name not in measured:
                raise UserError(f"README.md shows the table {name}, and results/ has none")
            lines += tables.markdown(measured[name])
            inside = True
    if inside:
        raise UserError(f"README.md: no line `<!-- end -->` follows the table {name}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    config.run(main)
