"""sweep.py: cells are real files, measured once, and shared between processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sweep
from lib import checkpoint, config, data, integer, measure, ptq, quantizers, tables
from lib.compaction import compact
from lib.config import UserError
from lib.evaluation import evaluate
from models.mobilenetv2 import MobileNetV2, standard

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def parent(small, tmp_path_factory):
    return saved(small(1), tmp_path_factory.mktemp("parent") / "small.pth")


def saved(model, path):
    cfg = sweep.Settings()
    checkpoint.save(path, "baseline", model, cfg, None, metrics={}, data={"source": "cifar10"})
    return path


def flags(tiny, parent, folder, method="reference"):
    return [f"--data={tiny}", f"--parent={parent}", f"--run-dir={folder}", "--split=test",
            f"--method={method}", "--calibration=16"]  # fmt: skip


def rows(folder):
    with (folder / "logs/sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_cells_are_measured_from_files_and_only_once(tiny, parent, tmp_path, monkeypatch):
    grid = ["--weight-bits=8,2", "--act-bits=32,4"]
    sweep.main([*flags(tiny, parent, tmp_path), *grid])
    first = rows(tmp_path)
    assert [(r["weight_bits"], r["act_bits"]) for r in first] == [
        ("8", "32"), ("8", "4"), ("2", "32"), ("2", "4"),
    ]  # fmt: skip
    for row in first:
        file = tmp_path / f"checkpoints/sweep/w{row['weight_bits']}a{row['act_bits']}.nnz"
        assert file.stat().st_size == int(row["bytes"])
        assert int(row["total"]) == 100
        model = checkpoint.load(parent).build()
        quantizers.quantize_reference(model, int(row["weight_bits"]), int(row["act_bits"]))
        test = data.load(tiny).test
        expected = evaluate(model, test).predictions == test.labels
        known = evaluate(checkpoint.load(parent).build(), test).predictions == test.labels
        assert int(expected.sum()) == int(row["correct"])
        change = {key: int(row[key]) for key in ("gained", "lost")}
        assert change == measure.change(known, expected)
    for chart in ("heatmap", "parallel"):
        assert (tmp_path / f"plots/sweep_{chart}.png").stat().st_size > 0

    with monkeypatch.context() as patch:  # another sweep replaces a file
        patch.setattr(sweep, "write_bytes", lambda path, raw: path.write_bytes(raw[:-1] + b"x"))
        patch.setattr(sweep.checkpoint, "load", lambda path, *a, load=checkpoint.load: (
            load(path, *a) if path.suffix == ".pth" else checkpoint.Checkpoint("", {}, {})
        ))  # fmt: skip
        with pytest.raises(UserError, match="w3a32.nnz was replaced: does another sweep run in"):
            sweep.main([*flags(tiny, parent, tmp_path), "--weight-bits=3", "--act-bits=32"])

    measured = []
    original = sweep.cell
    monkeypatch.setattr(sweep, "cell", lambda *args: measured.append(args[5:7]) or original(*args))
    (tmp_path / "checkpoints/sweep/w2a4.nnz").unlink()
    sweep.main([*flags(tiny, parent, tmp_path), "--weight-bits=8,2,3", "--act-bits=32,4"])
    assert measured == [(2, 4), (3, 32), (3, 4)]
    assert [r["sha256"] for r in rows(tmp_path)][:4] == [r["sha256"] for r in first]


def test_a_lambda_is_named_beside_its_figures(tiny, parent, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(sweep.plots, "heatmap", lambda *args: titles.append(args[2]))
    results = tmp_path / "sweep.json"
    sweep.main([*flags(tiny, parent, tmp_path), "--weight-bits=4", "--act-bits=8", "--method=ptq",
                "--rd-lambda=0.5", f"--results={results}"])  # fmt: skip
    assert titles == [f"ptq quantization of {parent.name} at lambda 0.5, test (n=100)"]
    assert "ptq at lambda 0.5 without training" in tables.read(results)["text"]


def test_the_grid_is_a_table_beside_anothers_figures(
    tiny, parent, tmp_path, monkeypatch, capsys
):
    grid = ["--weight-bits=8,2", "--act-bits=32,4", f"--results={tmp_path}/results/sweep.json"]
    other = tmp_path / "grid.csv"
    other.write_text("weight_bits,activation_bits,size,accuracy\n8,4,1,17.5\n4,4,1,9\n")
    sweep.main([*flags(tiny, parent, tmp_path), *grid, f"--beside={other}", "--title=Bits"])
    table = tables.read(tmp_path / "results/sweep.json")
    cells = {(r["weight_bits"], r["act_bits"]): r for r in rows(tmp_path)}
    shown = {key: f"{100 * float(row['accuracy']):.2f}" for key, row in cells.items()}
    assert table["rows"] == [
        ["8 bits", shown["8", "32"], f"{shown['8', '4']} (17.50)",
         max(int(cells["8", a]["bytes"]) for a in ("32", "4"))],
        ["2 bits", shown["2", "32"], shown["2", "4"],
         max(int(cells["2", a]["bytes"]) for a in ("32", "4"))],
    ]  # fmt: skip
    assert table["title"] == "Bits" and "test split, n=100" in table["data"]
    with monkeypatch.context() as patch:  # the cells are of the earlier code, but for a new one
        patch.setattr(config, "code_version", lambda: "another")
        capsys.readouterr()
        sweep.main([*flags(tiny, parent, tmp_path), *grid])
        assert capsys.readouterr().out.count(f"before, by commit {table['code']})") == 4
        assert tables.read(tmp_path / "results/sweep.json")["code"] == table["code"] != "another"
        grid[1] = "--act-bits=32,4,5"
        sweep.main([*flags(tiny, parent, tmp_path), *grid])
        mixed = tables.read(tmp_path / "results/sweep.json")["code"]
        assert mixed == f"{table['code']} and another"
    other.write_text("weight_bits,accuracy\n8,17.5\n")
    with pytest.raises(UserError, match="--beside .*activation_bits"):
        sweep.main([*flags(tiny, parent, tmp_path), *grid, f"--beside={other}"])


def test_a_cell_that_is_not_what_was_measured_is_measured_again(tiny, parent, tmp_path, capsys):
    grid = ["--weight-bits=8,2", "--act-bits=32"]
    sweep.main([*flags(tiny, parent, tmp_path), *grid])
    first = rows(tmp_path)
    cells = tmp_path / "checkpoints/sweep"
    (cells / "w8a32.nnz").write_bytes((cells / "w2a32.nnz").read_bytes())
    (cells / "w2a32.json").write_text("[]")
    sweep.main([*flags(tiny, parent, tmp_path), *grid])
    assert [r["sha256"] for r in rows(tmp_path)] == [r["sha256"] for r in first]
    found = checkpoint.load(cells / "w8a32.nnz")
    assert found.ancestors[-2]["sha256"] == checkpoint.load(parent).sha256
    assert [a["stage"] for a in found.ancestors] == ["baseline", "quantized"]
    # The parent says nothing of its classes; the cell has those of the images.
    images = checkpoint.load(parent).images(tiny, None, "cpu")
    assert (found.data, found.seed) == (images.provenance(), 47)
    # As many other images, or labels.
    with np.load(tiny) as file:
        arrays = dict(file)
    np.savez(tmp_path / "other.npz", **arrays | {"y_test": arrays["y_test"][::-1]})
    capsys.readouterr()
    for old in (0, 2):
        sweep.main([*flags(tmp_path / "other.npz", parent, tmp_path), *grid])
        assert capsys.readouterr().out.count("(measured before)") == old


def test_cells_of_ptq_are_by_default_and_of_their_calibration(tiny, parent, tmp_path):
    assert sweep.Settings().method == "ptq"
    grid = ["--weight-bits=3", "--act-bits=4"]
    sweep.main([*flags(tiny, parent, tmp_path, "ptq"), *grid])
    (first,) = rows(tmp_path)
    found = checkpoint.load(tmp_path / "checkpoints/sweep/w3a4.nnz")
    assert found.quantization == ptq.make_scheme(3, 4) and found.settings["folded"]
    images = data.sample(data.load(tiny).train, 16, 47)
    smaller, _ = compact(checkpoint.load(parent).build())
    expected, _ = ptq.quantize(smaller, images, found.quantization)
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    levels = quantizers.integer_state(expected.state_dict(), found.quantization)
    theirs = integer.IntegerNetwork(expected, levels)(images)
    assert torch.equal(integer.convert(found)(images), theirs)
    sweep.main([*flags(tiny, parent, tmp_path, "ptq"), *grid])
    assert rows(tmp_path) == [first]
    sweep.main([*flags(tiny, parent, tmp_path, "ptq"), *grid, "--calibration=8"])
    assert rows(tmp_path)[0]["sha256"] != first["sha256"]


def test_a_cell_of_an_older_version_is_measured_again(tiny, parent, tmp_path):
    grid = ["--weight-bits=8", "--act-bits=32"]
    sweep.main([*flags(tiny, parent, tmp_path), *grid])
    record = tmp_path / "checkpoints/sweep/w8a32.json"
    row = json.loads(record.read_text())
    for lacking in (("gained", "lost"), ("code",)):
        record.write_text(json.dumps({k: v for k, v in row.items() if k not in lacking}))
        sweep.main([*flags(tiny, parent, tmp_path), *grid])
        again = json.loads(record.read_text())
        assert again | {"seconds": 0} == row | {"seconds": 0}


def test_another_parent_is_measured_anew(tiny, small, parent, tmp_path):
    grid = ["--weight-bits=8", "--act-bits=32"]
    sweep.main([*flags(tiny, parent, tmp_path), *grid])
    first = rows(tmp_path)
    other = saved(small(2), tmp_path / "other.pth")
    sweep.main([*flags(tiny, other, tmp_path), *grid])
    assert rows(tmp_path)[0]["parent_sha256"] != first[0]["parent_sha256"]


def test_two_processes_share_the_cells_and_wandb_runs_offline(tiny, parent, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "sweep.py",
         *flags(tiny, parent, tmp_path), "--weight-bits=8,4,2", "--act-bits=32", "--wandb"],
        capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("images") == 0 and run.stdout.count("/100 test)") == 3
    assert [r["weight_bits"] for r in rows(tmp_path)] == ["8", "4", "2"]
    assert len(list((tmp_path / "logs/wandb").glob("offline-run-*"))) == 3
    assert run.stderr.count("wandb sync") == 3


# ---- sweeps of W&B -------------------------------------------------------------------------------


def the_yaml():
    from wandb.sdk.launch.sweeps import utils

    return utils.load_sweep_config(str(ROOT / "sweep.yaml"))


def agent(cell: dict, folder, *flags):
    """Run a cell as `wandb agent` does: its command line, its environment; offline."""
    from wandb.sdk.launch.sweeps import utils
    from wandb.sdk.lib import config_util

    yaml, args = the_yaml(), {name: {"value": value} for name, value in cell.items()}
    words = utils.create_sweep_command_args({"args": args}) | {
        "env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [yaml["program"]]
    }  # fmt: skip
    parts = utils.create_sweep_command(yaml["command"])
    command = [word for part in parts for word in words.get(part[2:-1], [part])]
    parameters = folder / "wandb/sweep-abc/config-cell0001.yaml"
    config_util.save_config_file_from_dict(str(parameters), args)
    return subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=ROOT, env=os.environ | {
            "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SWEEP_ID": "abc",
            "WANDB_RUN_ID": "cell0001", "WANDB_SWEEP_PARAM_PATH": str(parameters),
            "WANDB_DIR": str(folder), "WANDB_PROJECT": yaml["project"],
        },
    )  # fmt: skip


def test_an_agents_run_is_the_cell(tiny, parent, tmp_path, run_file):
    given = flags(tiny, parent, tmp_path)
    run = agent({"weight_bits": 8, "activation_bits": 32}, tmp_path, *given)
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "logs/wandb").glob("offline-run-*")
    found, config, summary = run_file(folder)
    assert (found.run_id, found.sweep_id) == ("cell0001", "abc")
    assert (found.display_name, found.run_group) == ("w8a32", "")
    row = json.loads((tmp_path / "checkpoints/sweep/w8a32.json").read_text())
    assert config["weight_bits"] == 8 and config["activation_bits"] == 32
    assert config["method"] == "reference" and config["parent_sha256"] == row["parent_sha256"]
    assert (summary["accuracy"], summary["bytes"]) == (row["accuracy"], row["bytes"])
    # Make takes the table for the whole sweep: one cell is none.
    assert not (tmp_path / "logs/sweep.csv").exists() and not (tmp_path / "plots").exists()
    several = agent({"weight_bits": 8}, tmp_path, *given)
    assert several.returncode == 1 and "error: a W&B agent runs one cell, not 6" in several.stderr


def test_the_yaml_is_the_reports_grid_and_valid():
    yaml = the_yaml()
    parameters = {name: given["values"] for name, given in yaml["parameters"].items()}
    default = sweep.Settings()
    assert parameters == {"weight_bits": default.weight_bits, "activation_bits": default.act_bits}
    assert (ROOT / yaml["program"]).is_file() and yaml["method"] == "grid"
    assert yaml["metric"] == {"name": "accuracy", "goal": "maximize"}
    schema = pytest.importorskip("sweeps.config")  # W&B's: pip install sweeps
    assert schema.schema_violations_from_proposed_config(yaml) == []


def test_runs_of_one_machine_bear_the_configuration_and_the_charts(
    tiny, parent, tmp_path, monkeypatch, run_file
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep.main([*flags(tiny, parent, tmp_path), "--weight-bits=8,2", "--act-bits=32", "--wandb"])
    found = [run_file(f)[1:] for f in (tmp_path / "logs/wandb").glob("offline-run-*")]
    by_bits = {config["weight_bits"]: (config, summary) for config, summary in found}
    (one, first), (other, last) = by_bits[8], by_bits[2]
    for settings, summary, row in zip((one, other), (first, last), rows(tmp_path), strict=True):
        bits = settings["weight_bits"], settings["activation_bits"]
        assert bits == (int(row["weight_bits"]), 32)
        assert [settings[key] for key in ("seed", "calibration", "split")] == [47, 16, "test"]
        assert summary["accuracy"] == float(row["accuracy"])
        assert summary["bytes"] == int(row["bytes"])
    charts = {key.split(".")[0] for key in last if key.endswith("._type")}
    assert charts == {"sweep_heatmap", "sweep_parallel"}
    assert not any(key.endswith("._type") for key in first)


@pytest.mark.parametrize(
    "bad", ["--weight-bits=1", "--act-bits=64", "--weight-bits=", "--act-bits=x", "--method=qat",
            "--calibration=0"]
)
def test_impossible_bits_are_wrong_usage(tiny, parent, tmp_path, bad):
    with pytest.raises(SystemExit) as error:
        sweep.main([*flags(tiny, parent, tmp_path), bad])
    assert error.value.code == 2


def test_lambdas_give_a_curve_of_files(tiny, parent, tmp_path):
    grid = ["--weight-bits=4,3", "--act-bits=8", "--rd-lambda=0,20,400"]
    sweep.main([*flags(tiny, parent, tmp_path, "ptq"), *grid])
    found = rows(tmp_path)
    assert [(r["weight_bits"], r["rd_lambda"]) for r in found] == [
        (bits, value) for bits in "43" for value in ("0.0", "20.0", "400.0")
    ]  # fmt: skip
    for bits in "43":
        names = [f"w{bits}a8.nnz", f"w{bits}a8r20.nnz", f"w{bits}a8r400.nnz"]
        sizes = [(tmp_path / "checkpoints/sweep" / name).stat().st_size for name in names]
        assert [int(r["bytes"]) for r in found if r["weight_bits"] == bits] == sizes
        assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0]
    assert (tmp_path / "plots/sweep_rate.png").stat().st_size > 0


def test_cells_of_other_strides_are_measured_again(tiny, tmp_path):
    plain, grid = tmp_path / "plain.pth", ["--weight-bits=8", "--act-bits=32"]
    torch.manual_seed(0)
    torch.save(MobileNetV2(standard(0.1)).state_dict(), plain)
    for downsample in (4, 8):
        sweep.main([*flags(tiny, plain, tmp_path), *grid, f"--assume-downsample={downsample}"])
        cell = checkpoint.load(tmp_path / "checkpoints/sweep/w8a32.nnz")
        assert cell.settings == standard(0.1, downsample)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rd-lambda=-1", "--rd-lambda must be at least 0"),
        ("--rd-lambda=nan", "--rd-lambda must be a finite number"),
        ("--rd-lambda=0.1", "--rd-lambda is for"),  # 32 bits are in the default grid
    ],
)
def test_impossible_lambdas_are_refused(flag, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main([flag])
    assert stop.value.code == 2 and message in capsys.readouterr().err
