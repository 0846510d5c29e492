"""sensitivity.py: one row per layer, of that layer alone; a killed run goes on."""

import csv

import pytest

import sensitivity
import train
from lib import checkpoint, config, plots
from lib.compaction import compact
from lib.config import UserError
from lib.evaluation import evaluate
from lib.metrics import layer_counts


@pytest.fixture
def parent(small, tmp_path):
    file = tmp_path / "parent.pth"
    return checkpoint.save(file, "pruned", small(1), train.Settings(), None, metrics={}, data={})


def run(tiny, parent, folder, *flags) -> list[dict]:
    sensitivity.main([f"--parent={parent.file}", f"--data={tiny}", f"--run-dir={folder}",
                      "--weight-bits=16,2", "--calibration=64", "--val-size=60",
                      *flags])  # fmt: skip
    with (folder / "logs/sensitivity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_of_each_layer_alone_and_a_torn_log_is_continued(
    tiny, parent, tmp_path, monkeypatch
):
    monkeypatch.setattr(plots, "DPI", 20)
    rows = run(tiny, parent, tmp_path)
    layers = layer_counts(compact(parent.build())[0])
    assert [(r["layer"], int(r["weight_bits"])) for r in rows] == [
        (name, bits) for name, _, _ in layers for bits in (16, 2)
    ]
    before = evaluate(parent.build(), parent.images(tiny, 60, "cpu").val)
    for row in rows:
        moved = int(row["gained"]) - int(row["lost"])
        assert int(row["total"]) == 60 and int(row["correct"]) == before.correct + moved
    fine, coarse = ([r for r in rows if r["weight_bits"] == bits] for bits in ("16", "2"))
    assert all(float(r["loss"]) == pytest.approx(before.loss, rel=1e-2) for r in fine)
    assert any(float(r["loss"]) != pytest.approx(before.loss, rel=1e-2) for r in coarse)

    log = tmp_path / "logs/sensitivity.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-3]) + lines[-3][:40])  # killed while it wrote
    calls = []
    monkeypatch.setattr(sensitivity, "evaluate", lambda *a: calls.append(a) or evaluate(*a))
    assert run(tiny, parent, tmp_path) == rows
    assert len(calls) == 1 + 3  # the parent and what was missing

    # Other bits take what there is of theirs, also from a run that was interrupted.
    log.write_text("".join(lines[:-3]))
    calls.clear()
    only = run(tiny, parent, tmp_path, "--weight-bits=2")
    assert only == [r for r in rows if r["weight_bits"] == "2"] and len(calls) == 1 + 3
    assert run(tiny, parent, tmp_path) == rows and len(calls) == 1 + 3 + 1
    # What another version has measured is measured again.
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(config, "code_version", lambda: "another")
        assert run(tiny, parent, tmp_path, "--weight-bits=2") == only
    assert len(calls) == 1 + len(only)
    # What other settings have measured is not thrown away half done, but is once it is done.
    log.write_text("".join(lines[:-3]))
    with pytest.raises(UserError, match="another run .calibration was 64, is 32.*--no-resume"):
        run(tiny, parent, tmp_path, "--calibration=32")
    assert log.read_text() == "".join(lines[:-3])
    log.write_text("".join(lines))
    assert len(run(tiny, parent, tmp_path, "--calibration=32", "--weight-bits=2")) == len(only)
