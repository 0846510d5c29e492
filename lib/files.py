"""Writing files whole or not at all, the SHA-256 that identifies one, names of files as text."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path | str):
    """Context manager: a binary file that replaces `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part of it. Folders are made as needed; where
    `path` is a link to a file, that file is replaced. Raises OSError for what is no file, such as a
    device or a pipe.
    """
    path = Path(os.path.realpath(path))  # not resolve(), which fails for a link to itself
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()  # this is where a full disk shows
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def state_of(path: Path, kind: str = "") -> Path:
    """Return the file beside `path` that holds the state of unfinished work on it. kind: of
    several such files, which one."""
    return path.with_name(f"{path.name}.{kind}.resume" if kind else f"{path.name}.resume")


def rejected_of(path: Path) -> Path:
    """Return the file beside `path` for a network that took hours and is not what was asked for."""
    return path.with_stem(f"{path.stem}.rejected")


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def printable(text: str) -> str:
    r"""Return the text in one line of valid UTF-8: escapes such as \n for what cannot be printed.

    File names that are not UTF-8 hold surrogates, which no output takes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
