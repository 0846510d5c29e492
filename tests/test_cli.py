"""The command line that all stages share: flags, exit codes, what is written and what is not."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import quantize
import sparse_compress
import to_int8
import train
from lib import checkpoint, compressed, config, data, measure, ptq, runtime, tables
from lib.evaluation import evaluate, evaluate_function
from lib.files import sha256_of
from models.mobilenetv2 import MobileNetV2, standard

ROOT = Path(__file__).parent.parent
STAGES = sorted(p.stem for p in ROOT.glob("*.py"))


def call(stage: str, *flags, monkeypatch, capfd) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a stage, in this process, through config.run."""
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as caught:
        config.run(importlib.import_module(stage).main)
    out, err = capfd.readouterr()
    if isinstance(caught.value.code, str):  # Python prints it, and exits with 1
        return 1, out, err + caught.value.code + "\n"
    return caught.value.code, out, err


@pytest.fixture
def run(monkeypatch, capfd):
    return lambda stage, *flags: call(stage, *flags, monkeypatch=monkeypatch, capfd=capfd)


@pytest.fixture(scope="module")
def chain(tiny, small, tmp_path_factory):
    """A run's folder with every file of the chain but the baseline, of a random network."""
    folder = tmp_path_factory.mktemp("chain")
    model = small(0)
    cfg = train.Settings()
    checkpoint.save(
        folder / "checkpoints/pruned.pth", "pruned", model, cfg, None, metrics={},
        data={"source": "cifar10", "val_size": 50},
    )  # fmt: skip
    common = [f"--data={tiny}", f"--run-dir={folder}"]
    quantize.main([*common, "--weight-bits=4", "--calibration=32"])
    to_int8.main(common)
    sparse_compress.main(common)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def one_line(stage: str, err: str) -> bool:
    return err.startswith(f"{stage}.py: error: ") and err.count("\n") == 1


# ---- every stage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_help_and_wrong_usage(run, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(stage, "--help")
    assert code == 0 and err == ""
    module = importlib.import_module(stage)
    assert module.__doc__.splitlines()[0] in out  # the docstring, with the command
    assert f"python {stage}.py" in module.__doc__
    for flags in (["--no-such-flag"], ["--run-di=x"]):  # abbreviations neither
        code, out, err = run(stage, *flags)
        assert code == 2 and out == "" and "unrecognized arguments" in err
    assert files(tmp_path) == []


@pytest.mark.parametrize("stage", STAGES)
def test_shared_flags_have_the_same_names_everywhere(stage):
    fields = vars(importlib.import_module(stage).Settings)["__dataclass_fields__"]
    for name, field in config.FineTuning.__dataclass_fields__.items():
        if name in fields:
            assert fields[name].type == field.type and fields[name].default == field.default
    assert all(field.metadata.get("help") for field in fields.values())


@pytest.mark.parametrize(("stage", "parent"), [
    ("quantize", "pruned.pth"), ("to_int8", "quantized.pth"), ("sparse_compress", "int8.pth"),
])  # fmt: skip
def test_defaults_are_the_chain_and_a_missing_parent_is_one_line(run, tmp_path, stage, parent):
    code, out, err = run(stage, f"--run-dir={tmp_path}")
    assert (code, out) == (1, "") and one_line(stage, err)
    assert f"{tmp_path}/checkpoints/{parent} does not exist: `make" in err
    assert files(tmp_path) == []


@pytest.mark.parametrize(("stage", "flags", "what"), [
    ("quantize", ["--weight-bits=33"], "invalid choice: 33"),
    ("quantize", ["--parent="], "--parent needs a value"),
    ("train", ["--run-dir", ""], "--run-dir needs a value"),
    ("quantize", ["--seed=20261126093000"], "--seed must be at least 0 and at most 4294967295"),
    ("quantize", ["--act-bits=1"], "invalid choice: 1"),
    ("quantize", ["--weight-bits=8.5"], "invalid int value"),
    ("quantize", ["--method=magic"], "invalid choice: 'magic'"),
    ("quantize", ["--weight-scale=row"], "invalid choice: 'row'"),
    ("quantize", ["--layer-bits=first=1"], "first at 1 bits: 2 to 16, or 32 for off"),
    ("train", ["--width=1e300"], "--width must be over 0 and at most 40"),
    ("sparse_compress", ["--decompress=x.nnz", "--out=x.onnx"], "--out is a .pth file; --onnx"),
    ("quantize", ["--layer-bits=first=8,"], "an item between commas is empty"),
    ("quantize", ["--layer-bits=last=8,features.0.0=x"], "features.0.0 at x bits"),
    ("quantize", ["--weight-scale=tensor", "--method=qat"], "tensor is for --method ptq"),
    ("quantize", ["--weight-scale=tensor", "--method=reference"], "tensor is for --method ptq"),
    ("quantize", ["--method=reference", "--layer-bits=first=8"], "not for --method reference"),
    ("quantize", ["--method=reference", "--layer-bits=x"], "not for --method reference"),
    ("quantize", ["--calibration=0"], "--calibration must be at least 1 and at most 50000"),
    ("quantize", ["--calibration=50001"], "--calibration must be at least 1 and at most 50000"),
    ("quantize", ["--epochs=0"], "--epochs must be at least 1"),
    ("quantize", ["--batch-size=0"], "--batch-size must be at least 1"),
    ("quantize", ["--distill=1.5"], "--distill must be at least 0 and at most 1"),
    ("quantize", ["--ema=1"], "--ema must be at least 0 and under 1"),
    ("quantize", ["--ema=-0.1"], "--ema must be at least 0 and under 1"),
    ("quantize", ["--max-drop=100"], "--max-drop must be at least 0 and under 100"),
    ("quantize", ["--max-bytes=0"], "--max-bytes must be at least 1"),
    ("quantize", ["--rd-lambda=inf"], "--rd-lambda must be a finite number"),
    ("sweep", ["--rd-lambda=0,-1"], "--rd-lambda must be at least 0"),
    ("sweep", ["--act-bits="], "--act-bits needs at least one value"),
    ("sensitivity", ["--weight-bits=4,32"], "--weight-bits must be at least 2 and at most 16"),
    ("bench", ["--threads=1,0"], "--threads must be at least 1"),
    ("prune", ["--max-drop=nan"], "--max-drop must be a finite number"),
    ("prune", ["--max-drop=-5"], "--max-drop must be at least 0 and at most 100"),
    ("prune", ["--target=1"], "--target must be over 0 and under 1"),
    ("prune", ["--last-epochs=0"], "--last-epochs must be at least 1"),
    ("quantize", ["--temperature=0"], "--temperature must be over 0"),
    ("quantize", ["--views=-1"], "--views must be at least 0"),
    ("quantize", ["--views=2"], "--views is for --method qat"),
    ("quantize", ["--epochs=14"], "--epochs is for --method qat"),
    ("quantize", ["--method=qat", "--views=2", "--distill=0"], "--views need a --distill over 0"),
    ("prune", ["--prune-fraction=0.3"], "--prune-fraction is not for --schedule cubic"),
    ("prune", ["--schedule=geometric", "--target=0.9"], "--target is not for --schedule geometric"),
    ("quantize", ["--keep=last"], "--keep last is for --method qat without --max-bytes and"),
    ("prune", ["--views=2", "--distill=0"], "--teacher and --views need a --distill over 0"),
    ("sparse_compress", ["--parent=a", "--decompress=b", "--out=c"], "give one of them"),
    ("sparse_compress", ["--decompress=b", "--out=c", "--wandb"], "is not for --decompress"),
    ("eval", ["x.pth", "--title=X"], "--labels and --title are for a table: give --results"),
    ("sweep", ["--title=X"], "--beside and --title are for a table: give --results"),
    ("prune", ["--rounds=-1"], "--rounds must be at least 0"),
    ("prune", ["--rounds=0", "--teacher=x.pth"], "--teacher is for --rounds over 0"),
    ("quantize", ["--lr=nan"], "--lr must be a finite number"),
    ("train", ["--epochs"], "expected one argument"),
    ("train", ["--epochs=0"], "--epochs must be at least 1"),
    ("train", ["--batch-size=-128"], "--batch-size must be at least 1"),
    ("train", ["--label-smoothing=2"], "--label-smoothing must be at least 0 and at most 1"),
    ("train", ["--ema=1"], "--ema must be at least 0 and under 1"),
    ("train", ["--lr=fast"], "invalid float value"),
    ("train", ["--amp=yes"], "ignored explicit argument"),
    ("train", ["--downsample=5"], "invalid choice: 5"),
    ("train", ["surplus"], "unrecognized arguments"),
    ("eval", ["--split=all"], "invalid choice: 'all'"),
    ("train", ["--lr=-0.1"], "--lr must be over 0"),
    ("train", ["--width=0"], "--width must be over 0"), ("train", ["--dropout=1"], "--dropout"),
    ("train", ["--warmup-epochs=-1"], "--warmup-epochs must be"),
    ("train", ["--epochs=3", "--warmup-epochs=3"], "--warmup-epochs must be"),
    ("prune", ["--weight-decay=-1"], "--weight-decay must be at least 0"),
    ("train", ["--flip=alternate", "--augment=none"], "needs an --augment that flips"),
    ("bench", ["--title=x"], "--title is for a table: give --results"),
])  # fmt: skip
def test_wrong_values(run, stage, flags, what):
    code, out, err = run(stage, *flags)
    assert (code, out) == (2, "") and what in err and "Traceback" not in err


def test_flags_are_read_as_declared():
    cfg = config.parse(train.Settings, "", ["--no-amp", "--epochs=3", "--ema=0.5", "--seed=1"])
    assert (cfg.amp, cfg.epochs, cfg.ema, cfg.seed, cfg.resume) == (False, 3, 0.5, 1, True)
    assert config.parse(train.Settings, "", []) == train.Settings()
    assert evaluation.Settings().files == [] and evaluation.Settings().files is not (
        evaluation.Settings().files
    )


def test_help_is_in_groups(run):
    _, out, _ = run("train", "--help")
    headings = [line for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[-5:] == [
        "files and data:", "recipe:", "augmentation:", "network:", "run and machine:"
    ]  # fmt: skip
    flags = ("files and data:", "--out FILE", "--data PATH", "recipe:", "--lr X", "network:",
             "--width X", "run and machine:", "--amp, --no-amp", "--seed N")  # fmt: skip
    shown = out[out.index("\nfiles and data:") :]
    places = [shown.index(text) for text in flags]
    assert places == sorted(places)


# ---- exit codes ----------------------------------------------------------------------------------


def test_what_a_file_says_comes_in_one_line(run, chain, tiny, tmp_path):
    """Also where it holds ends of lines, and codes for a terminal."""
    content = checkpoint.read(chain / "checkpoints/pruned.pth")
    odd = "x\n  accuracy   99.99%\x1b[31m"
    checkpoint.write(tmp_path / "a.pth", content | {"stage": odd})
    checkpoint.write(tmp_path / "b.pth", content | {"data": {"source": odd}})
    common = (f"--data={tiny}", f"--run-dir={tmp_path}")
    for name, what in (("a.pth", "its stage is no text"), ("b.pth", r"was trained on x\n  acc")):
        code, out, err = run("eval", tmp_path / name, *common)
        assert (code, out) == (1, "") and one_line("eval", err) and what in err
        assert "\x1b" not in err


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("error", "code", "text"), [
    (config.UserError("no"), "x.py: error: no", ""),
    (FileNotFoundError(2, "No such file", "a"), "x.py: error: [Errno 2] No such file: 'a'", ""),
    (TimeoutError(), "x.py: error: TimeoutError", ""),
    (MemoryError(), "x.py: error: MemoryError", ""),
    (torch.OutOfMemoryError("CUDA out of memory\ndetails"), "x.py: error: CUDA out of memory", ""),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
     "x.py: error: not enough memory: you tried 9 bytes", ""),
    (KeyboardInterrupt(), 130, "x.py: interrupted\n"),
])  # fmt: skip
def test_exit_codes(monkeypatch, capfd, error, code, text):
    monkeypatch.setattr(sys, "argv", ["some/where/x.py"])
    with pytest.raises(SystemExit) as caught:
        config.run(raising(error))
    assert caught.value.code == code and capfd.readouterr().err == text


def test_a_reader_that_goes_away_is_an_error_unless_all_is_done(tmp_path):
    program = tmp_path / "x.py"
    for printed, code in (("print('x' * 9, flush=True)", 141), ("print('x')", 0)):
        program.write_text(
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.stdin.read()\n"
            f"from lib import config\nconfig.run(lambda: {printed})"
        )
        process = subprocess.Popen(
            [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": ""},
        )  # fmt: skip
        process.stdout.close()
        process.stdin.close()  # only now it goes on
        assert (process.stderr.read(), process.wait()) == (b"", code)
        process.stderr.close()


def test_the_code_is_that_of_the_start(monkeypatch):
    started = config.code_version()
    monkeypatch.setattr(subprocess, "run", None)  # a commit later, git is not asked again
    assert config.code_version() == started


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        config.run(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        config.run(lambda: torch.zeros(2) @ torch.zeros(3))


def test_eval_of_a_missing_file_in_a_shell(tmp_path):
    missing = tmp_path / "pruned.pth"
    shell = subprocess.run(
        [sys.executable, ROOT / "eval.py", missing], capture_output=True, text=True, cwd=tmp_path
    )
    assert shell.returncode == 1 and shell.stdout == ""
    expected = f"eval.py: error: {missing} does not exist: `make prune` makes it\n"
    assert shell.stderr == expected
    assert files(tmp_path) == []


def test_interrupted_training_keeps_the_finished_epochs(tiny, tmp_path):
    flags = ["--epochs=500", "--batch-size=32", "--width=0.1", "--downsample=8", "--augment=none"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags, f"--data={tiny}", f"--run-dir={tmp_path}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # A shell's background job, which this test may be part of, ignores the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = tmp_path / "logs/train.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().startswith("train.py: interrupted: ") and err.count("\n") == 1
    assert "baseline.pth.resume holds epoch " in err
    assert files(tmp_path) == ["checkpoints/baseline.pth.resume", "logs/train.jsonl"]
    state = checkpoint.read(tmp_path / "checkpoints/baseline.pth.resume")
    lines = log.read_text().splitlines()
    assert len(state["history"]) >= 2 and len(state["history"]) - len(lines) in (0, 1)


# ---- eval.py -------------------------------------------------------------------------------------


def test_eval_json_is_an_object_a_file(run, chain, tiny):
    code, out, err = run("eval", f"--data={tiny}", f"--run-dir={chain}", "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["stage"] for r in rows] == ["pruned", "quantized", "int8", "compressed"]
    for row in rows:
        path = Path(row["file"])
        assert set(row) >= {"file", "stage", "split", "correct", "total", "accuracy", "bytes",
                            "weights", "nonzeros", "macs"}  # fmt: skip
        assert (row["split"], row["total"]) == ("test", 100)
        assert row["accuracy"] == row["correct"] / row["total"]
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["bytes"] == path.stat().st_size
        assert row["nonzeros"] == sum(layer["nonzeros"] for layer in row["layers"])
        assert (chain / f"plots/confusion-{path.stem}-test.png").stat().st_size > 1000
    # From the quantizer on it is one network in three files; the last two run as integers.
    for key in ("weights", "nonzeros", "macs"):
        assert len({row[key] for row in rows[1:]}) == 1
    # Against the nearest ancestor: for the last two the same integers.
    assert "change" not in rows[0] and rows[1]["change"]["from"] == "pruned"
    assert rows[2]["change"]["from"] == "quantized"
    assert rows[3]["change"] == {"from": "int8", "gained": 0, "lost": 0}
    gained, lost = (rows[1]["change"][key] for key in ("gained", "lost"))
    assert rows[1]["correct"] == rows[0]["correct"] + gained - lost
    for key in ("correct", "loss"):
        assert len({row[key] for row in rows[2:]}) == 1
    assert [r["arithmetic"] for r in rows] == ["float32", "float32", "integers", "integers"]
    assert [a["stage"] for a in rows[-1]["ancestors"]] == ["pruned", "quantized", "int8"]
    assert rows[-1]["ancestors"][-1]["sha256"] == rows[2]["sha256"]


def test_eval_table_and_splits(run, chain, tiny):
    file = chain / "checkpoints/int8.pth"
    # The validation split is the parent's unless told otherwise.
    for flags, text in [(["--split=val"], "of 50 val images"),
                        (["--split=val", "--val-size=20"], "of 20 val images"),
                        (["--split=train", "--layers"], "of 270 train images")]:  # fmt: skip
        code, out, _ = run("eval", file, f"--data={tiny}", f"--run-dir={chain}", *flags)
        assert code == 0 and text in out and "W4A8 ptq" in out
        assert "change" not in out  # no ancestor was evaluated beside it
        assert "pruned > quantized > int8" in out
        assert ("features.0.0" in out) == ("--layers" in flags)


def test_eval_tells_the_change_from_the_nearest_ancestor_given(run, chain, tiny, tmp_path):
    paths = [chain / f"checkpoints/{n}" for n in ("pruned.pth", "int8.pth")]
    code, out, _ = run("eval", *paths, f"--data={tiny}", f"--run-dir={tmp_path}")
    test = data.load(tiny).test
    right = [evaluate(checkpoint.load(p).build(), test).predictions == test.labels
             for p in paths]  # fmt: skip
    c = measure.change(*right)
    assert code == 0 and out.count("  change ") == 1
    assert f"  change     {c['gained']} images gained, {c['lost']} lost against pruned\n" in out
    # The child before its parent: nothing to compare with yet.
    code, out, _ = run("eval", *paths[::-1], f"--data={tiny}", f"--run-dir={tmp_path}")
    assert code == 0 and "change" not in out


def test_change_counts_both_ways():
    before, after = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]).bool()
    assert measure.change(before, after) == {"gained": 1, "lost": 1}
    assert measure.change(before, before) == {"gained": 0, "lost": 0}
    assert measure.change(~before, before) == {"gained": 3, "lost": 2}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_one_bad_file_of_several_fails_before_any_work(run, chain, tiny, tmp_path, flags):
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    good = chain / "checkpoints/int8.pth"
    code, out, err = run("eval", good, tmp_path / "bad.pth", f"--data={tiny}",
                         f"--run-dir={tmp_path}", *flags)  # fmt: skip
    assert (code, out) == (1, "") and one_line("eval", err) and "bad.pth" in err
    assert files(tmp_path) == ["bad.pth"]


def test_eval_refuses_what_it_cannot_do(run, tiny, tmp_path):
    common = [f"--data={tiny}", f"--run-dir={tmp_path}", "--assume-downsample=4"]
    code, _, err = run("eval", *common)
    assert code == 1 and one_line("eval", err) and "no files: none named" in err
    torch.save(MobileNetV2(standard(0.1, classes=12)).state_dict(), tmp_path / "x.pth")
    code, _, err = run("eval", tmp_path / "x.pth", *common)
    assert code == 1 and one_line("eval", err) and "12 classes" in err
    code, _, err = run("prune", "--parent", tmp_path / "x.pth", *common)
    assert code == 1 and one_line("prune", err) and "12 classes" in err
    torch.save(MobileNetV2(standard(0.1)).state_dict(), tmp_path / "x.pth")
    code, _, err = run("eval", tmp_path / "x.pth", *common, "--val-size=0", "--split=val")
    assert code == 1 and one_line("eval", err) and "no validation split" in err


def test_eval_of_a_network_that_is_broken_is_no_accuracy(run, tiny, tmp_path):
    model = MobileNetV2(standard(0.1))
    model.stem[1].running_var.fill_(-1)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    code, out, err = run("eval", tmp_path / "x.pth", f"--data={tiny}", f"--run-dir={tmp_path}",
                         "--assume-downsample=4", "--json")  # fmt: skip
    assert (code, out) == (1, "") and one_line("eval", err) and "NaN or infinite logits" in err


def test_eval_of_files_of_odd_and_equal_names(run, chain, tiny, tmp_path):
    good = (chain / "checkpoints/int8.pth").read_bytes()
    names = ["a/x.pth", "b/x.pth", "x-2.pth", "$1_$.pth"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(good)
    with contextlib.suppress(OSError):  # macOS has no such names
        name = os.fsdecode(b"caf\xe9.pth")
        (tmp_path / name).write_bytes(good)
        names.append(name)
    code, out, err = run("eval", *(tmp_path / name for name in names), f"--data={tiny}",
                         f"--run-dir={tmp_path}")  # fmt: skip
    assert (code, err) == (0, "") and (r"caf\udce9.pth" in out or len(names) == 4)
    assert len(list((tmp_path / "plots").glob("*.png"))) == len(names)


def test_names_of_classes_that_a_state_dict_does_not_hold_are_said(run, tmp_path):
    names = sorted(["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
    rng = np.random.default_rng(0)
    for name in names:
        (tmp_path / "set/test" / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set/test" / name / "0.png")
    torch.save(MobileNetV2(standard(0.1)).state_dict(), tmp_path / "x.pth")
    code, _, err = run("eval", tmp_path / "x.pth", f"--data={tmp_path / 'set'}",
                       f"--run-dir={tmp_path}", "--assume-downsample=4")  # fmt: skip
    assert code == 0
    assert "not name its classes: taken to be, in this order, bird, car, cat, deer, dog, ..." in err


def test_eval_of_the_test_split_needs_no_training_images(run, chain, tiny, tmp_path):
    with np.load(tiny) as file:
        some = file["y_test"] < 4
        alone = {"x_test": file["x_test"][some], "y_test": file["y_test"][some]}
        few = {"x_train": file["x_train"][:30], "y_train": file["y_train"][:30]}
    path = tmp_path / "cifar10-part.npz"
    good = chain / "checkpoints/pruned.pth"  # trained with --val-size 50
    for train_images in ({}, few):
        np.savez(path, **alone, **train_images)
        code, out, err = run("eval", good, f"--data={path}", f"--run-dir={tmp_path}")
        assert (code, err) == (0, "") and f"of {some.sum()} test images" in out
    np.savez(path, **alone)
    for flags in (["--split=val"], ["--split=train"]):
        code, out, err = run("eval", good, f"--data={path}", *flags)
        assert (code, out) == (1, "") and one_line("eval", err) and "it is empty" in err


def test_a_network_of_other_classes_is_refused_by_their_names(run, chain, tmp_path):
    path = tmp_path / "checkpoints/pruned.pth"
    names = [f"c{i}" for i in range(10)]
    raw = checkpoint.read(chain / "checkpoints/pruned.pth")
    checkpoint.write(path, raw | {"data": {"source": "images", "classes": names}})
    code, _, err = run("eval", path, f"--run-dir={tmp_path}")
    assert code == 1 and one_line("eval", err) and "was trained on images: give them as" in err
    for given, what in (("c0", None), ("c00", "was trained on other classes: c0, not c00")):
        for split, name in itertools.product(("train", "test"), [given, *names[1:]]):
            folder = tmp_path / given / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(folder / f"{i}.png")
        code, _, err = run("eval", path, f"--data={tmp_path / given}", f"--run-dir={tmp_path}")
        assert what in err if what else (code, err) == (0, "")


# ---- the stages between --------------------------------------------------------------------------


def test_chain_is_recorded_and_smaller_at_each_step(chain):
    paths = [chain / "checkpoints" / n for n in ("pruned.pth", "quantized.pth", "int8.pth",
                                                 "compressed.nnz")]  # fmt: skip
    sources = [checkpoint.load(p) for p in paths]
    assert [s.stage for s in sources] == ["pruned", "quantized", "int8", "compressed"]
    for parent, child in zip(sources, sources[1:], strict=False):
        assert child.ancestors[-1]["sha256"] == parent.sha256
        assert child.data["val_size"] == 50
    assert sources[2].bytes < sources[0].bytes and sources[3].bytes < sources[0].bytes
    assert sources[2].metrics.items() <= sources[1].metrics.items()
    assert set(sources[1].metrics) == {"val_correct", "val_total", "gained", "lost"}
    assert sources[2].metrics["val_total"] == 50
    assert sources[1].quantization == sources[3].quantization == ptq.make_scheme(4, 8)


def test_decompressing_gives_the_same_tensors(run, chain, tmp_path):
    code, _, err = run("sparse_compress", f"--decompress={chain}/checkpoints/compressed.nnz",
                       f"--out={tmp_path}/back.pth")  # fmt: skip
    assert (code, err) == (0, "")
    a, b = checkpoint.load(tmp_path / "back.pth"), checkpoint.load(chain / "checkpoints/int8.pth")
    assert set(a.state) == set(b.state)
    assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)


def test_a_compressed_file_of_a_compressed_one_of_unknown_seed(run, chain, tmp_path):
    source = checkpoint.load(chain / "checkpoints/compressed.nnz")
    again = dataclasses.replace(source, seed=None, ancestors=source.lineage())
    (tmp_path / "again.nnz").write_bytes(compressed.encode(again))
    code, _, err = run("sparse_compress", f"--decompress={tmp_path}/again.nnz",
                       f"--out={tmp_path}/back.pth")  # fmt: skip
    assert (code, err) == (0, "")
    back = checkpoint.load(tmp_path / "back.pth")
    assert (back.stage, back.seed) == ("int8", None)


def test_a_network_that_cannot_be_built_is_not_compressed(run, chain, tmp_path):
    raw = torch.load(chain / "checkpoints/int8.pth", weights_only=True)
    del raw["state"]["classifier.1.bias"]
    torch.save(raw, tmp_path / "x.pth")
    code, out, err = run("sparse_compress", f"--parent={tmp_path}/x.pth", f"--run-dir={tmp_path}")
    assert (code, out) == (1, "") and one_line("sparse_compress", err)
    assert "Missing key" in err and files(tmp_path) == ["x.pth"]


@pytest.mark.parametrize(("stage", "flags", "what"), [
    ("quantize", ["--parent={}/quantized.pth"], "is quantized: start from an fp32 network"),
    ("quantize", ["--parent={}/compressed.nnz"], "is quantized: start from an fp32 network"),
    ("to_int8", ["--parent={}/pruned.pth"], "has 32-bit weights: quantize them to 8 or fewer"),
    ("sparse_compress", ["--decompress={}/int8.pth", "--out=x"], "is not a .nnz file"),
    ("quantize", ["--parent={}/int8.onnx"], "give the .pth that it was made of"),
    ("bench", ["--dense={}/pruned.pth", "--pruned={}/quantized.pth"], "give the fp32 network"),
    ("bench", ["--dense={}/pruned.pth", "--pruned={}/pruned.pth", "--int8={}/int8.pth"],
     "is not an .onnx"),
])  # fmt: skip
def test_parents_that_do_not_fit(run, chain, tiny, tmp_path, stage, flags, what):
    flags = [f.format(chain / "checkpoints") for f in flags]
    given = [f"--data={tiny}", f"--run-dir={tmp_path}"]
    code, out, err = run(stage, *flags, *given)
    assert (code, out) == (1, "") and one_line(stage, err) and what in err
    assert files(tmp_path) == []


@pytest.mark.parametrize(("text", "what"), [
    (None, "No such file"),
    ("", "Expecting value"),
    ('{"features.0.0": 8', "delimiter"),
    ("[8, 4]", "not an object of layer names and bits"),
    ('{"features.0": 8}', "no layer 'features.0'; the first is features.0.0"),
    ('{"features.0.0.weight": 8}', "no layer 'features.0.0.weight'"),
    ('{"classifier.1": 1}', "classifier.1 at 1 bits: 2 to 16, or 32 for off"),
    ('{"classifier.1": 17}', "classifier.1 at 17 bits"),
    ('{"classifier.1": "8"}', "classifier.1 at '8' bits"),
    ('{"classifier.1": 8.0}', "classifier.1 at 8.0 bits"),
    ('{"classifier.1": true}', "classifier.1 at True bits"),
    ('{"classifier.1": [8]}', "classifier.1 at [8] bits"),
])  # fmt: skip
def test_bits_by_layer_that_cannot_be(run, chain, tiny, tmp_path, text, what):
    path = tmp_path / "bits.json"
    if text is not None:
        path.write_text(text)
    code, out, err = run("quantize", f"--parent={chain}/checkpoints/pruned.pth", f"--data={tiny}",
                         f"--run-dir={tmp_path}/run", f"--layer-bits={path}")  # fmt: skip
    assert (code, out) == (1, "") and one_line("quantize", err)
    assert f"--layer-bits {path}: " in err and what in err
    assert files(tmp_path) == (["bits.json"] if text is not None else [])


def test_bits_by_layer_name_first_and_last_and_the_later_item_counts(small, tmp_path):
    path = tmp_path / "bits.json"
    path.write_text('{"classifier.1": 32, "features.2.conv.2": 6}')
    cfg = quantize.Settings(weight_bits=4, act_bits=5, layer_bits=f"first=8,last=8,{path}")
    own = {"features.0.0": 8, "classifier.1": 32, "features.2.conv.2": 6}
    assert quantize.scheme_of(cfg, small(0)) == ptq.make_scheme(
        4, 5, last_act_bits=8, layer_bits=own
    )
    for text, last_act in [
        ("first=8,classifier.1=6", None), ("last=8", 8), ("last_act=6,last=8", 6),
        ("last_act=7", 7),
    ]:  # fmt: skip
        cfg = quantize.Settings(layer_bits=text)
        assert quantize.scheme_of(cfg, small(0)).get("last_act_bits") == last_act
    cfg = quantize.Settings(act_bits=32, layer_bits="last=8")  # of weights alone
    assert "last_act_bits" not in quantize.scheme_of(cfg, small(0))
    cfg = quantize.Settings(act_bits=32, layer_bits="last_act=8")
    with pytest.raises(config.UserError, match="last_act=8: with --act-bits 32 no activations"):
        quantize.scheme_of(cfg, small(0))
    assert quantize.scheme_of(quantize.Settings(), small(0)) == ptq.make_scheme(8, 8)


def test_the_compressed_file_is_an_artifact_when_asked_for(
    run, chain, tmp_path, monkeypatch, wandb_records
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, _, err = run("sparse_compress", f"--run-dir={tmp_path}", "--wandb-artifact")
    assert code == 2 and "--wandb-artifact goes with --wandb" in err
    parent, out = chain / "checkpoints/int8.pth", tmp_path / "checkpoints/compressed.nnz"
    given = [f"--parent={parent}", f"--run-dir={tmp_path}", "--wandb"]
    code, _, err = run("sparse_compress", *given, "--wandb-artifact")
    assert code == 0
    (folder,) = tmp_path.glob("logs/wandb/offline-run-*")
    (found,) = (r.artifact for r in wandb_records(folder) if r.HasField("artifact"))
    about = json.loads(found.metadata)
    assert (found.name, found.type) == ("compressed.nnz", "model")
    assert about["sha256"] == sha256_of(out) and about["bytes"] == out.stat().st_size
    assert [a["sha256"] for a in about["ancestors"]][-1] == sha256_of(parent)
    assert [a["stage"] for a in about["ancestors"]] == ["pruned", "quantized", "int8"]


def test_decompressing_to_nowhere_is_wrong_usage(run, chain):
    code, _, err = run("sparse_compress", f"--decompress={chain}/checkpoints/compressed.nnz")
    assert code == 2 and "--decompress needs --out" in err
    code, _, err = run("sparse_compress", "--onnx=x.onnx")
    assert code == 2 and "--onnx FILE.onnx goes with --decompress" in err


def test_from_the_compressed_file_to_onnx(run, chain, tiny, tmp_path):
    out = tmp_path / "x.onnx"
    code, _, err = run("sparse_compress", f"--decompress={chain}/checkpoints/compressed.nnz",
                       f"--onnx={out}", f"--run-dir={tmp_path}")  # fmt: skip
    assert (code, err) == (0, "") and files(tmp_path) == ["x.onnx"]
    rows = []
    for file in (out, chain / "checkpoints/int8.onnx"):
        code, text, err = run("eval", file, f"--data={tiny}", f"--run-dir={tmp_path}", "--json")
        assert (code, err) == (0, "")
        rows.append(json.loads(text))
    a, b = rows
    assert a["arithmetic"] == "onnxruntime" and a["bytes"] == out.stat().st_size
    assert all(a[k] == b[k] for k in ("correct", "loss", "weights", "nonzeros", "macs", "layers"))
    assert a["ancestors"][-1]["stage"] == "compressed" and b["ancestors"][-1]["stage"] == "int8"


@pytest.mark.parametrize(("flags", "why"), [
    (["--method=reference"], "the reference method's scales change with every batch"),
    (["--act-bits=6", "--calibration=64"], "its activations have 6 bits"),
    (["--act-bits=32", "--calibration=64"], "of its activations 32"),
])  # fmt: skip
def test_no_onnx_is_said_and_the_rest_is_done(run, chain, tiny, tmp_path, flags, why):
    common = [f"--data={tiny}", f"--run-dir={tmp_path}"]
    run("quantize", f"--parent={chain}/checkpoints/pruned.pth", *common, *flags)
    stale = tmp_path / "checkpoints/int8.onnx"
    stale.write_bytes(b"another network's")
    code, out, err = run("to_int8", *common)
    assert (code, err) == (0, "") and "no int8.onnx: " in out and why in out
    assert (tmp_path / "checkpoints/int8.pth").exists() and not stale.exists()
    sparse_compress.main([f"--run-dir={tmp_path}"])
    code, out, err = run("sparse_compress", f"--decompress={tmp_path}/checkpoints/compressed.nnz",
                         f"--onnx={tmp_path}/y.onnx")  # fmt: skip
    assert code == 1 and one_line("sparse_compress", err) and why in err
    assert not (tmp_path / "y.onnx").exists()


def test_to_int8_counts_how_often_the_three_agree(chain):
    line = json.loads((chain / "logs/int8.jsonl").read_text())
    assert set(line["agree"]) == {
        "float32, integers", "float32, onnxruntime", "integers, onnxruntime"}  # fmt: skip
    assert line["agree_total"] == 50 and all(n >= 48 for n in line["agree"].values())
    assert line["onnx_bytes"] == (chain / "checkpoints/int8.onnx").stat().st_size


def test_an_interruption_leaves_no_pair_of_two_networks(run, chain, tiny, tmp_path, monkeypatch):
    """Nor does a file that is not what it should be replace one that is."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(chain / "checkpoints", folder)
    common, before = [f"--data={tiny}", f"--run-dir={tmp_path}"], sha256_of(folder / "int8.pth")
    save, files_then = checkpoint.save, files(folder)

    def spoilt(*args, **kwargs):
        saved = save(*args, **kwargs)
        saved.state["features.0.0.bias"] += 1
        return saved

    monkeypatch.setattr(checkpoint, "save", spoilt)
    code, _, err = run("to_int8", *common)
    assert code == 1 and one_line("to_int8", err) and "was not the same network" in err
    assert sha256_of(folder / "int8.pth") == before and files(folder) == files_then
    monkeypatch.setattr(checkpoint, "save", save)
    for interrupted in ("export", "network"):  # before the graph is written, after it
        with monkeypatch.context() as patch:
            patch.setattr(runtime, interrupted, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                to_int8.main([*common, "--seed=1"])
        assert sha256_of(folder / "int8.pth") == before and files(folder) == files_then
    to_int8.main([*common, "--seed=1"])
    assert sha256_of(folder / "int8.pth") != before and files(folder) == files_then
    graph = runtime.load(folder / "int8.onnx")
    assert graph.ancestors[-1]["sha256"] == sha256_of(folder / "int8.pth")


@pytest.mark.parametrize(("stage", "flags"), [
    ("train", ["--init={}/pruned.pth", "--out={}/pruned.pth"]),
    ("prune", ["--parent={}/pruned.pth"]),
    ("prune", ["--parent={}/int8.pth", "--teacher={}/pruned.pth"]),
    ("quantize", ["--parent={}/quantized.pth"]), ("to_int8", ["--parent={}/int8.pth"]),
    ("sparse_compress", ["--parent={}/compressed.nnz"]),
    ("sparse_compress", ["--decompress={}/compressed.nnz", "--out={}/compressed.nnz"]),
    ("sweep", ["--parent={}/pruned.pth", "--out={}/pruned.pth"]),
    ("sweep", ["--parent={}/pruned.pth", "--results={}/int8.pth", "--beside={}/int8.pth"]),
    ("sensitivity", ["--parent={}/pruned.pth", "--out={}/pruned.pth"]),
    ("eval", ["{}/pruned.pth", "{}/int8.pth", "--results={}/int8.pth"]),
])  # fmt: skip
def test_no_stage_replaces_what_it_reads(run, chain, tiny, tmp_path, stage, flags):
    """A second pruning, say, whose parent is the first: it would be the only copy."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(chain / "checkpoints", folder)
    before = {path.name: sha256_of(path) for path in folder.iterdir()}
    code, out, err = run(stage, *(flag.format(folder) for flag in flags), f"--data={tiny}",
                         f"--run-dir={tmp_path}")  # fmt: skip
    assert (code, out) == (1, "") and one_line(stage, err)
    assert "is what this stage reads, and would be replaced: name another file" in err
    assert {path.name: sha256_of(path) for path in folder.iterdir()} == before


def test_an_output_that_is_a_folder_is_refused_before_the_work(run, chain, tiny, tmp_path):
    code, out, err = run("train", f"--data={tiny}", f"--out={tmp_path}", f"--run-dir={tmp_path}")
    assert (code, out) == (1, "") and one_line("train", err) and "is a folder, not a file" in err
    assert files(tmp_path) == []


def test_to_int8_for_processors_with_vnni(run, chain, tiny, tmp_path, monkeypatch):
    flags = [f"--parent={chain}/checkpoints/quantized.pth", f"--data={tiny}",
             f"--run-dir={tmp_path}", "--target=vnni"]  # fmt: skip
    monkeypatch.setattr(runtime, "saturates", lambda: True)
    code, out, err = run("to_int8", *flags)
    assert code == 1 and one_line("to_int8", err) and "this processor has no VNNI" in err
    assert files(tmp_path) == []
    monkeypatch.setattr(runtime, "saturates", lambda: False)  # 4 bits saturate nowhere
    code, out, err = run("to_int8", *flags)
    assert (code, err) == (0, "") and "int8.onnx: " in out and "target vnni; same answers" in out
    assert json.loads((tmp_path / "logs/int8.jsonl").read_text())["target"] == "vnni"
    code, _, err = run("to_int8", *flags, "--target=avx2")
    assert code == 2 and "invalid choice: 'avx2'" in err


@pytest.mark.parametrize("stage", ["quantize", "to_int8", "sparse_compress"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_leaves_no_half_of_a_file(run, chain, tiny, tmp_path, monkeypatch, stage, old):
    def full(*_):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    if old:
        out.write_bytes(old)
    parent = {"quantize": "pruned.pth", "to_int8": "quantized.pth", "sparse_compress": "int8.pth"}
    monkeypatch.setattr("os.fsync", full)
    quick = ["--method=reference"] if stage == "quantize" else []
    code, _, err = run(stage, f"--parent={chain}/checkpoints/{parent[stage]}", f"--out={out}",
                       f"--data={tiny}", f"--run-dir={tmp_path}", *quick)  # fmt: skip
    assert code == 1 and one_line(stage, err) and "No space left" in err
    assert files(tmp_path) == (["out"] if old else [])
    assert not old or out.read_bytes() == old


def test_no_validation_split_is_no_obstacle(run, chain, tiny, tmp_path):
    code, out, err = run("quantize", f"--parent={chain}/checkpoints/pruned.pth", f"--data={tiny}",
                         f"--run-dir={tmp_path}", "--val-size=0", "--calibration=16")  # fmt: skip
    assert (code, err) == (0, "") and "ptq W8A8" in out
    code, out, err = run("to_int8", f"--data={tiny}", f"--run-dir={tmp_path}")
    assert (code, err) == (0, "") and "no validation split: weights checked" in out
    assert checkpoint.load(tmp_path / "checkpoints/int8.pth").metrics == {}


def test_eval_writes_a_table_for_the_results(run, chain, tiny, tmp_path):
    files = [chain / "checkpoints" / name for name in ("pruned.pth", "int8.pth")]
    path = tmp_path / "table.json"
    code, _, err = run("eval", *files, f"--data={tiny}", f"--run-dir={tmp_path}", "--title=Two",
                       f"--results={path}", "--labels=dense,small")  # fmt: skip
    assert code == 0, err
    table = tables.read(path)
    assert table["title"] == "Two" and table["data"] == "cifar10, test split, n=100"
    assert [row[:2] for row in table["rows"]] == [
        [name, file.stat().st_size] for name, file in zip(("dense", "small"), files, strict=True)
    ]
    images = data.load(tiny).test
    right = [
        evaluate_function(runtime.network(runtime.load(file)), images).predictions
        == images.labels for file in files
    ]  # fmt: skip
    assert [row[3] for row in table["rows"]] == [int(r.sum()) for r in right]
    gained, lost = (int((a & ~b).sum()) for a, b in (right[::-1], right))
    assert [row[5] for row in table["rows"]] == ["", f"+{gained} -{lost}"]
    code, _, err = run("eval", *files, f"--data={tiny}", "--labels=one", f"--results={path}")
    assert code == 1 and "1 --labels for 2 files" in err
    code, _, err = run("eval", *files, f"--data={tiny}", "--labels=one,two")
    assert code == 2 and "--labels and --title are for a table: give --results" in err
