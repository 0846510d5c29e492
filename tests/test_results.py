"""results.py and lib/tables.py: what is published is what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

import results
from lib import plots, tables
from lib.config import UserError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NAME = results.ORDER["Speed"][0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    words = ["benchmarks/x.py", "--data=/somewhere/cifar10", "--steps", "5"]
    monkeypatch.setattr(sys, "argv", words)
    rows = [["step", 1234567, 0.5, None], ["epoch", 8, 120.25, 3]]
    table = tables.table("Speed", ["what", "images", "ratio", "more"], rows, data="n=5,000",
                         device=CPU)
    tables.write(tmp_path / f"results/{NAME}.json", table)
    (tmp_path / "README.md").write_text(f"a\n<!-- table: {NAME} -->\nold\n<!-- end -->\nb\n")
    return tmp_path


def test_published_tables_are_those_of_the_measurements():
    results.main([f"--folder={ROOT}", "--check"])


def test_tables_come_back_and_say_how_they_were_measured(folder):
    table = tables.read(folder / f"results/{NAME}.json")
    assert table["rows"] == [["step", 1234567, 0.5, None], ["epoch", 8, 120.25, 3]]
    assert table["command"] == "python benchmarks/x.py --data=cifar10 --steps 5"
    assert table["hardware"] and table["date"] and table["code"] and table["data"] == "n=5,000"


def test_tables_are_shown_in_both_files(folder):
    results.main([f"--folder={folder}"])
    shown = ["| what | images | ratio | more |", "| --- | ---: | ---: | ---: |",
             "| step | 1,234,567 | 0.50 |  |", "| epoch | 8 | 120.2 | 3 |"]  # fmt: skip
    readme = (folder / "README.md").read_text().splitlines()
    assert readme == ["a", f"<!-- table: {NAME} -->", *shown, "<!-- end -->", "b"]
    page = (folder / "RESULTS.md").read_text()
    assert "\n".join(shown) in page and "`python benchmarks/x.py --data=cifar10 --steps 5`" in page
    results.main([f"--folder={folder}", "--check"])


def test_a_name_may_hold_what_ends_a_cell():
    table = {"columns": ["file"], "rows": [["a|b.pth"]]}
    assert tables.markdown(table)[-1] == r"| a\|b.pth |"


def test_figures_that_were_typed_by_hand_are_noticed(folder):
    results.main([f"--folder={folder}"])
    page = folder / "RESULTS.md"
    page.write_text(page.read_text().replace("1,234,567", "1,234,568"))
    with pytest.raises(UserError, match="RESULTS.md: not what results/ says"):
        results.main([f"--folder={folder}", "--check"])
    assert "1,234,568" in page.read_text()  # a check writes nothing


def test_unknown_and_damaged_tables_are_refused(folder):
    path = folder / f"results/{NAME}.json"
    text = path.read_text()
    (folder / "results/other.json").write_text(text)
    with pytest.raises(UserError, match=r"results/other.json has no place in ORDER"):
        results.main([f"--folder={folder}"])
    (folder / "results/other.json").unlink()
    other = json.loads(text) | {"format": 3}
    for broken in ("{", "[]", json.dumps({"format": tables.FORMAT}), json.dumps(other)):
        path.write_text(broken)
        with pytest.raises(UserError, match=NAME):
            results.main([f"--folder={folder}"])
    path.unlink()
    with pytest.raises(UserError, match=f"README.md shows the table {NAME}, and results/ has none"):
        results.main([f"--folder={folder}"])
    with pytest.raises(ValueError, match="every row must have 2 values"):
        tables.table("x", ["a", "b"], [[1]], device=CPU)


def test_a_table_without_its_end_does_not_swallow_the_text_behind_it(folder):
    readme = folder / "README.md"
    text = readme.read_text().replace("<!-- end -->", "<!-- end --> ")
    readme.write_text(text)
    with pytest.raises(UserError, match=f"no line `<!-- end -->` follows the table {NAME}"):
        results.main([f"--folder={folder}"])
    assert readme.read_text() == text


def test_files_are_drawn_from_their_tables(folder, monkeypatch):
    columns = ["file", "bytes", "smaller", "correct of 1,000", "note"]
    rows = [["dense", 9000, "1x", 900, ""], ["small", 90, "100x", 890, ""]]
    table = tables.table("x", columns, rows, device=CPU)
    tables.write(folder / "results/reference.json", table)
    rows = [rows[0], ["PTQ at lambda 0.3", 60, "150x", 880, ""],
            ["QAT at lambda 0.3", 59, "152x", 890, ""]]
    tables.write(folder / "results/curve.json", tables.table("y", columns, rows, device=CPU))
    drawn = []
    monkeypatch.setattr(plots, "size_curve", lambda *args: drawn.append(args))
    results.main([f"--folder={folder}"])
    assert (folder / "results/files.png").stat().st_size > 10_000
    assert "![y](results/curve.png)" in (folder / "RESULTS.md").read_text()
    ((points, path, title, heights),) = drawn
    assert heights == {"dense": 0.9}
    assert title == "y" and path == folder / "results/curve.png"
    assert [[point[key] for key in ("group", "label", "bytes", "correct", "total")]
            for point in points] == [["PTQ", "0.3", 60, 880, 1000], ["QAT", "0.3", 59, 890, 1000]]


def test_the_command_of_a_table_has_no_foreign_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [
        f"{tmp_path}/eval.py", f"{tmp_path}/runs/a b/x.nnz", "--data=/home/me/cifar10", "y.nnz",
    ])  # fmt: skip
    assert tables.command_line() == "python eval.py 'runs/a b/x.nnz' --data=cifar10 y.nnz"
