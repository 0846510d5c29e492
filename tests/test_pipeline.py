"""The stages end to end, as a user runs them: through make, on a tiny set."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from lib import checkpoint

MAKE = [
    f"PYTHON={sys.executable}",
    "TRAIN_FLAGS=--epochs 1 --batch-size 32 --width 0.1 --downsample 8",
    "PRUNE_FLAGS=--rounds 1 --target 0.8 --epochs 1 --batch-size 32 --max-drop 100",
    "QUANTIZE_FLAGS=--calibration 32",
    "SWEEP_FLAGS=--weight-bits 8,2 --act-bits 8 --method reference",
]


def make(*arguments):
    # A make of its own, not one under the make that runs the tests.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    env = {k: v for k, v in os.environ.items() if k not in outer} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["make", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env
    )


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = make("all", f"RUN={folder}", f"DATA={tiny}", *MAKE)
    assert run.returncode == 0, run.stderr
    return folder, run


def test_all_ends_with_the_table_and_the_plots(finished):
    folder, run = finished
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "baseline.pth", "compressed.nnz", "int8.onnx", "int8.pth", "pruned.pth", "quantized.pth",
        "sweep",
    ]  # fmt: skip
    plots = {p.name for p in (folder / "plots").glob("*.png")}
    assert {"train.png", "prune.png", "sparsity.png", "sweep_heatmap.png", "sweep_parallel.png",
            "storage.png", "report.png", "confusion-compressed-test.png"} <= plots  # fmt: skip
    end = run.stdout[run.stdout.index("report.py") :]
    assert all(name in end for name in plots)
    for name in ("baseline.pth", "compressed.nnz"):
        assert f"{(folder / 'checkpoints' / name).stat().st_size:,}" in end
    assert (folder / "logs/train.log").read_text().count("epoch 1/1") == 1


def test_each_file_names_its_ancestors_and_the_last_decodes_to_the_same_network(finished):
    folder, _ = finished
    chain = ("baseline.pth", "pruned.pth", "quantized.pth", "int8.pth", "compressed.nnz")
    files = [checkpoint.load(folder / "checkpoints" / name) for name in chain]
    for parent, child in zip(files, files[1:], strict=False):
        assert child.ancestors[-1]["sha256"] == parent.sha256
        assert len(child.ancestors) == len(parent.ancestors) + 1
    image = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = [f.build()(image) for f in files[2:]]
        # In fp32, sums in another order may round a level otherwise.
        exact = [f.build().double()(image.double()) for f in files[2:4]]
    # Exactly: what int8.pth lacks, and in what order its channels lie, no integer depends on.
    assert torch.allclose(*exact, atol=1e-5) and torch.equal(logits[1], logits[2])
    assert files[-1].bytes < files[3].bytes < files[2].bytes


def test_nothing_is_made_twice_and_only_what_follows_is_remade(finished, tiny):
    folder, _ = finished
    files = {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").glob("*.*")}
    targets = ("train", "prune", "quantize", "int8", "compress")
    assert make(*targets, f"RUN={folder}", f"DATA={tiny}", *MAKE).returncode == 0
    assert files == {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").glob("*.*")}
    time.sleep(0.01)
    os.utime(folder / "checkpoints/quantized.pth")
    assert make(*targets, f"RUN={folder}", f"DATA={tiny}", *MAKE).returncode == 0
    changed = {p.name for p in files if p.stat().st_mtime_ns != files[p]}
    # quantized.pth, int8.pth and what hangs on them
    assert changed == {"quantized.pth", "int8.pth", "int8.onnx", "compressed.nnz"}


def test_a_failing_stage_fails_make_and_leaves_nothing(tiny, tmp_path):
    run = make("train", f"RUN={tmp_path}", f"DATA={tiny}", f"PYTHON={sys.executable}",
               "TRAIN_FLAGS=--batch-size 100000")  # fmt: skip
    assert run.returncode != 0
    assert "train.py: error: --batch-size" in run.stderr
    assert not (tmp_path / "checkpoints/baseline.pth").exists()


def test_a_failing_stage_fails_a_make_that_has_no_shellflags(tmp_path):
    # GNU make 3.81, which macOS has, ignores .SHELLFLAGS: this is what it runs.
    run = make("train", f"RUN={tmp_path}", "DATA=/nowhere", f"PYTHON={sys.executable}",
               ".SHELLFLAGS=-c")  # fmt: skip
    assert run.returncode != 0 and "train.py: error: no data at /nowhere" in run.stderr


def test_eval_json_status_and_help(finished, tiny):
    folder, _ = finished
    file = folder / "checkpoints/compressed.nnz"
    run = make("eval", f"FILES={file}", f"RUN={folder}", f"DATA={tiny}", "SPLIT=val",
               "EVAL_FLAGS=--json", f"PYTHON={sys.executable}")  # fmt: skip
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["bytes"] == file.stat().st_size and figures["total"] == 30
    status = make("status", f"RUN={folder}", f"PYTHON={sys.executable}")
    assert status.returncode == 0 and "compressed.nnz" in status.stdout
    text = make("help").stdout
    assert all(f"make {t} " in text for t in ("demo", "all", "train", "sweep", "status", "clean"))


def test_clean_keeps_what_took_hours(finished, tiny):
    folder, _ = finished
    state = folder / "checkpoints/baseline.pth.resume"
    state.touch()
    assert make("clean", f"RUN={folder}").returncode == 0
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"baseline.pth", state.name}
