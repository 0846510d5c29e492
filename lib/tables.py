"""Tables of measurements: one JSON file per table, which `results.py` turns into RESULTS.md.

    table = tables.table("Speed of a step", ["image side", "ratio"], rows, device=device, data=...)
    tables.write(Path("results/train_step.json"), table)

A table says how it was measured: command, data and number of images, hardware, date, version of the
code. Values are plain numbers and strings, so that a test can compare them with what is published.
"""

import json
import os
import shlex
import sys
from datetime import date
from pathlib import Path

import torch

from lib import devices
from lib.config import UserError, code_version, reason
from lib.files import write_bytes

FORMAT = "mobilenetv2-cifar10/table/1"
KEYS = ("title", "text", "columns", "rows", "command", "data", "hardware", "date", "code")


def table(
    title: str, columns: list[str], rows: list[list], *, device: torch.device, text: str = "",
    data: str = "",
) -> dict:  # fmt: skip
    """Return a table with what is known of this run.

    device: where it was measured. text: what the table shows, in a sentence or two. data: the
    images and how many there are, such as "CIFAR-10, validation split, n=5,000".
    Raises ValueError if a row has another length than `columns`.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"every row must have {len(columns)} values")
    return {
        "format": FORMAT, "title": title, "text": text, "columns": columns, "rows": rows,
        "command": command_line(), "data": data, "hardware": devices.hardware(device),
        "date": date.today().isoformat(), "code": code_version(),
    }  # fmt: skip


def command_line() -> str:
    """Return this process's command line. Absolute paths become relative to the current folder, and
    of those outside it the last part alone stays."""
    words = ["python", *(os.path.relpath(word) if i == 0 else word
                         for i, word in enumerate(sys.argv))]  # fmt: skip
    return shlex.join(_without_folders(word) for word in words)


def _without_folders(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    path, here = Path(value), Path.cwd()
    if not path.is_absolute():
        return word
    return f"{flag}{equals}{path.relative_to(here) if path.is_relative_to(here) else path.name}"


def write(path: Path, content: dict) -> None:
    """Write a table as JSON, one row per line, atomically."""
    head = {key: value for key, value in content.items() if key != "rows"}
    text = json.dumps(head, indent=1)[:-2]
    rows = ",\n  ".join(json.dumps(row) for row in content["rows"])
    write_bytes(path, f'{text},\n "rows": [\n  {rows}\n ]\n}}\n'.encode())


def show(content: dict, path: str | None) -> None:
    """Print a table, and write it if there is a path (a benchmark's --results)."""
    print("\n".join(markdown(content)), content["text"], sep="\n")
    if path:
        write(Path(path), content)


def read(path: Path) -> dict:
    """Read a table. Raises UserError for a file that is not one."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or any(key not in content for key in KEYS):
            raise ValueError("not a table of this project")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {reason(error)}") from None
    return content


def markdown(content: dict) -> list[str]:
    """Return the lines of a table in Markdown: numbers to the right, with thousands separators."""
    rows = [[_shown(value) for value in row] for row in content["rows"]]
    numeric = [
        all(isinstance(row[i], int | float) or row[i] is None for row in content["rows"])
        for i in range(len(content["columns"]))
    ]
    rule = ["---:" if right else "---" for right in numeric]
    return [f"| {' | '.join(cells)} |" for cells in ([*content["columns"]], rule, *rows)]


def _shown(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", r"\|")
