"""lib/files.py: a file is written whole or not at all, and known by its SHA-256."""

import csv
import hashlib
import json
import os

import pytest

from lib.files import atomic, sha256_of, write_bytes, write_csv, write_json


@pytest.mark.parametrize("call", ["fsync", "chmod"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.pth"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync" if call == "fsync" else "pathlib.Path.chmod", full)
    with pytest.raises(OSError, match="No space left"), atomic(path) as file:
        file.write(b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_reader_sees_the_old_file_until_the_new_is_whole(tmp_path):
    path = tmp_path / "sub" / "x"
    with atomic(path) as file:
        file.write(b"one")
    with atomic(path) as file:
        file.write(b"two")
        file.flush()
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # the umask's, as for any other file


def test_what_is_no_file_is_not_replaced_and_a_link_stays_one(tmp_path):
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is no regular file: .*pipe"):
        write_bytes(pipe, b"x")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    link.symlink_to(target)
    for content in (b"one", b"two"):  # the target is new, then old
        write_bytes(link, content)
        assert link.is_symlink() and target.read_bytes() == content


def test_what_is_written_is_read_back(tmp_path):
    rows = [{"a": 1, "b": 'x, "y"'}, {"a": 0.5, "b": "ü"}]
    write_csv(tmp_path / "new" / "t.csv", ("a", "b"), rows)
    with (tmp_path / "new" / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in row.items()} for row in rows]
    assert (tmp_path / "new" / "t.csv").read_bytes().startswith(b"a,b\n1,")
    write_json(tmp_path / "t.json", rows)
    assert json.loads((tmp_path / "t.json").read_text()) == rows
    write_bytes(tmp_path / "t", b"abc")
    assert sha256_of(tmp_path / "t") == hashlib.sha256(b"abc").hexdigest()


def test_a_table_with_another_column_is_an_error_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="not in fieldnames"):
        write_csv(path, ("a",), [{"a": 1, "b": 2}])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
