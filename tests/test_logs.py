"""lib/logs.py: logs that hold one whole run, and what W&B gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lib import logs
from lib.config import UserError


def test_log_holds_one_whole_run(tmp_path):
    path = tmp_path / "logs/x.jsonl"
    first = logs.Log(path, {})
    first.begin([])
    lines = [{"epoch": i, "loss": 0.1 * i, "note": "é"} for i in range(4)]
    for line in lines:
        first(line)
    assert logs.read_log(path) == lines
    # Killed after two epochs were safe: the resumed run's past replaces what was written.
    second = logs.Log(path, {})
    second.begin(lines[:2])
    second({"epoch": 2, "loss": 9.0})
    second.close({})
    assert logs.read_log(path) == [*lines[:2], {"epoch": 2, "loss": 9.0}]
    # A new run starts anew.
    logs.Log(path, {}).begin([])
    assert logs.read_log(path) == []


def test_log_lines_are_there_as_soon_as_they_are_logged(tmp_path):
    log = logs.Log(tmp_path / "x.jsonl", {})
    log.begin([])
    for i in range(3):
        log({"epoch": i})
        assert [json.loads(x) for x in log.path.read_text().splitlines()][-1] == {"epoch": i}


def test_no_log_is_an_empty_one(tmp_path):
    assert logs.read_log(tmp_path / "none.jsonl") == []


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = logs.Log(tmp_path / "logs/x.jsonl", {}, wandb=True)
    log.begin([{"epoch": 0}])
    log({"epoch": 1})
    log.close({"a": 1})
    assert not list(tmp_path.iterdir())


# ---- W&B -----------------------------------------------------------------------------------------


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A machine without a key."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [({}, None, "offline"), ({"WANDB_API_KEY": "k"}, None, "online"),
     ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
     ({"WANDB_MODE": "disabled"}, None, "disabled"),
     ({}, "machine api.wandb.ai\n  login user\n  password k\n", "online"),
     ({}, "machine example.org\n", "offline")],
)  # fmt: skip
def test_wandb_is_online_only_with_a_key(nobody, monkeypatch, environment, netrc, mode):
    import wandb

    options = {}
    monkeypatch.setattr(wandb, "init", lambda **kwargs: options.update(kwargs))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (nobody / ".netrc").write_text(netrc)
    logs.start_wandb(nobody / "logs", name="x")
    assert options["mode"] == mode and options["name"] == "x"


def test_wandb_offline_run(nobody, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = logs.Log(tmp_path / "logs/train.jsonl", {"lr": 0.1}, wandb=True)
    log.begin([{"epoch": 1, "loss": 2.0, "note": "past"}])
    log({"epoch": 2, "loss": 1.0})
    log.close({"val_correct": 7})
    runs = list((tmp_path / "logs/wandb").glob("offline-run-*"))
    assert len(runs) == 1 and list(runs[0].glob("*.wandb"))
    assert f"the run is offline: wandb sync {runs[0]}" in capfd.readouterr().err.replace("\n", "")
    assert [line["epoch"] for line in logs.read_log(log.path)] == [1, 2]


def test_wandb_without_a_network_goes_on_offline(nobody, tmp_path):
    """Two runs of one process: the second does not wait for the network again."""
    code = """if True:
        from pathlib import Path
        from lib import logs
        for number in (1, 2):
            log = logs.Log(Path(f"logs/{number}.jsonl"), {"lr": 0.1}, wandb=True)
            log.begin([])
            log({"epoch": 1})
            log.close({})
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=80,
        env=env | {"WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": "http://127.0.0.1:9",
                   "WANDB_INIT_TIMEOUT": "2", "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout == ""
    first, *rest = run.stderr.splitlines()
    assert first.startswith("W&B: going on offline: ") and "127.0.0.1" in first
    runs = sorted(tmp_path.glob("logs/wandb/offline-run-*"))
    assert len(runs) == 2 == len(rest)
    assert all(line.startswith("W&B: the run is offline: wandb sync ") for line in rest)
    assert sorted(tmp_path / line.split()[-1] for line in rest) == runs


def test_a_wandb_mode_that_is_none_is_one_line(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="W&B does not start, WANDB_MODE=sometimes: "):
        logs.start_wandb(nobody / "logs")


def test_a_missing_wandb_is_one_line(nobody, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        logs.start_wandb(nobody / "logs")


def test_charts_are_images_of_the_run(nobody, tmp_path, monkeypatch, run_file):
    monkeypatch.setenv("WANDB_MODE", "offline")
    chart = tmp_path / "plots/train.png"
    chart.parent.mkdir()
    Image.new("RGB", (4, 4)).save(chart)
    log = logs.Log(tmp_path / "logs/train.jsonl", {"lr": 0.1}, wandb=True)
    log.begin([])
    log.close({"val_correct": 7}, [chart, tmp_path / "plots/none.png"])
    (folder,) = (tmp_path / "logs/wandb").glob("offline-run-*")
    _, config, summary = run_file(folder)
    assert config["lr"] == 0.1 and summary["val_correct"] == 7
    assert summary["train._type"] == "image-file" and "none._type" not in summary
    assert (folder / "files" / summary["train.path"]).read_bytes() == chart.read_bytes()


def test_a_timeout_that_is_no_number_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "60s")
    with pytest.raises(UserError, match="WANDB_INIT_TIMEOUT, in seconds: .*60s"):
        logs.start_wandb(tmp_path / "logs")
