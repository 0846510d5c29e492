"""Writing files whole or not at all, and the SHA-256 that identifies one."""

import csv
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path


class atomic:  # noqa: N801 - used as a function
    """Context manager: a binary file that replaces `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part of it. Folders are made as needed.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        self.temporary, self.file = Path(name), os.fdopen(handle, "wb")
        return self.file

    def __exit__(self, kind, *_):
        try:
            with self.file:
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                umask = os.umask(0)
                os.umask(umask)
                self.temporary.chmod(0o666 & ~umask)  # mkstemp's files are private
                self.temporary.replace(self.path)
        finally:  # flushing is where a full disk shows
            self.temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as file:
        file.write(content)


def write_json(path: Path | str, content) -> None:
    """Write an indented JSON file atomically."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_csv(path: Path | str, columns: tuple[str, ...], rows: list[dict]) -> None:
    """Write a CSV file with a header line atomically; each row has exactly these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
