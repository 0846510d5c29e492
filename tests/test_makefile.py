"""The Makefile on other people's machines: old Pythons, names with spaces, other folders."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import synthetic

ROOT = Path(__file__).parent.parent


def make(*arguments, cwd=ROOT, **environment):
    """Run a make of its own, not one under the make that runs the tests."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    env = {k: v for k, v in os.environ.items() if k not in outer}
    return subprocess.run(
        ["make", *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
        stdin=subprocess.DEVNULL, env=env | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def python_of(version: tuple, path: Path) -> Path:
    """Make an interpreter that says it is of that version, and notes the modules that it runs.

    Its `-m venv FOLDER` makes one that is alike.
    """
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    return script(path, f"""echo "$@" >> {path}.calls
case "$1 $2" in
"-c "*) exec {sys.executable} -c '{code}' "$2";;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
esac""")


def test_every_recipe_line_stops_make(tmp_path):
    """A recipe has no second command behind a `;`, a `|` or a `||` without `set -e -o pipefail`."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text())
    recipes = [line for line in text.splitlines() if line.startswith("\t")]
    assert len(recipes) > 20
    for line in recipes:
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
        assert not bare.lstrip("\t@").startswith("-"), line
        assert "||" not in bare and ";" not in bare and " | " not in bare, line
    assert re.search(r"^stage = @set -eu -o pipefail;", text, re.M)


def test_clean_that_fails_stops_make(tmp_path):
    (tmp_path / "checkpoints/sub").mkdir(parents=True)
    rm = script(tmp_path / "bin/rm", "echo rm: no permission >&2; exit 1")
    run = make("clean", f"RUN={tmp_path}", PATH=f"{rm.parent}:{os.environ['PATH']}")
    assert run.returncode != 0 and "no permission" in run.stderr
    assert make("clean", f"RUN={tmp_path}").returncode == 0
    assert not (tmp_path / "checkpoints/sub").exists()
    assert make("clean", f"RUN={tmp_path}/nowhere").returncode == 0


def test_a_misspelt_variable_stops_make():
    """It would be ignored, and a stage run for hours without it."""
    for variable in ("PRUNE_FLAG=--target=0.97", "data=DIR", "MODEL=x.nnz"):
        run, name = make("-n", "prune", variable), variable.split("=")[0]
        assert run.returncode != 0 and f"no variable is named {name}" in run.stderr
    flags = [f"{stage}_FLAGS=" for stage in ("TRAIN", "PRUNE", "QUANTIZE", "INT8", "COMPRESS",
             "SWEEP", "SENSITIVITY", "EVAL", "REPORT", "BENCH", "PREDICT")]  # fmt: skip
    known = [f"{name}=" for name in ("DATA", "WANDB", "DEVICE", "PROCESSES", "FILES", "IMAGES")]
    assert make("-n", "status", *flags, *known, "SPLIT=val", "RUN=x", "PYTHON=x").returncode == 0


@pytest.mark.parametrize(("value", "on"), [("1", True), ("", False), ("0", False), ("no", False)])
def test_wandb_is_on_or_off(tmp_path, value, on):
    run = make("-n", "train", f"WANDB={value}", f"RUN={tmp_path}", "PYTHON=python3")
    assert run.returncode == 0 and ("--wandb" in run.stdout) == on


def test_several_processes_share_the_stages_that_can(tmp_path):
    run = make("-n", "compress", "PROCESSES=2", "DEVICE=cpu", f"RUN={tmp_path}", "PYTHON=python3")
    launched = re.findall(r"; (python3 [^;|]*) \|", run.stdout)
    several = "-m torch.distributed.run --standalone --nproc-per-node 2 "
    assert [line.split("--run-dir")[0].replace(f"{ROOT}/", "") for line in launched] == [
        f"python3 {several}train.py ", f"python3 {several}prune.py ",
        f"python3 {several}quantize.py ", "python3 to_int8.py ", "python3 sparse_compress.py ",
    ]  # fmt: skip
    assert all(" --device cpu" in line for line in launched)


# ---- interpreters --------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A folder with what `make venv` needs."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", "train.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def calls(python: Path) -> list[str]:
    return [c for c in Path(f"{python}.calls").read_text().splitlines() if c.startswith("-m venv")]


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 10, 13)])
def test_an_old_python_is_refused_before_anything_is_installed(checkout, version):
    python3 = python_of(version, checkout.parent / "bin/python3")
    run = make("venv", cwd=checkout, PATH=f"{python3.parent}:{os.environ['PATH']}")
    first, *rest = run.stderr.splitlines()
    assert run.returncode != 0 and len(rest) == 1 and rest[0].startswith("make: ***")
    assert first.startswith("Python 3.11 or later is needed, and python3 is ")
    assert f"python3 is {version[0]}.{version[1]}:" in first
    assert calls(python3) == [] and not (checkout / ".venv").exists()
    given = make("train", f"PYTHON={python3}", cwd=checkout)
    assert given.returncode != 0 and given.stderr.startswith("Python 3.11 or later is needed")


def test_a_venv_stays_until_its_python_is_gone(checkout):
    """A job may be running in it while another shell has another python3."""
    def venv(version):
        python3 = python_of(version, checkout.parent / "bin/python3")
        Path(f"{python3}.calls").write_text("")
        run = make("venv", cwd=checkout, PATH=f"{python3.parent}:{os.environ['PATH']}")
        assert run.returncode == 0, run.stderr
        return calls(python3)

    made = ["-m venv .venv"]
    assert venv((3, 11, 4)) == made
    mark = checkout / ".venv/mark"
    mark.touch()
    assert venv((3, 12, 1)) == [] and mark.exists()
    (checkout / ".venv/bin/python").unlink()
    (checkout / ".venv/bin/python").symlink_to("/nowhere/python3.12")
    assert venv((3, 12, 2)) == made and not mark.exists()
    os.utime(checkout / "requirements.txt")  # other packages, the same interpreter
    os.utime(checkout / ".venv/installed", (0, 0))
    mark.touch()
    assert venv((3, 11, 4)) == [] and mark.exists()
    assert (checkout / ".venv/installed").stat().st_mtime > 0


# ---- names and folders ---------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "my pics"
    folder.mkdir()
    for name, pixels in zip(("a b.png", "it's.png", "c.png"), synthetic.make(3, 1)[0], strict=True):
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.mark.parametrize(("images", "files"), [
    ("my pics/a b.png", ["my pics/a b.png"]),
    ("my pics/it's.png", ["my pics/it's.png"]),
    ("'my pics/a b.png' \"my pics/it's.png\" my\\ pics/c.png",
     ["my pics/a b.png", "my pics/it's.png", "my pics/c.png"]),
    ("my pics", ["my pics/a b.png", "my pics/c.png", "my pics/it's.png"]),
])  # fmt: skip
def test_pictures_whose_names_have_spaces(pictures, images, files):
    run = make("-f", ROOT / "Makefile", "predict", f"IMAGES={images}", f"PYTHON={sys.executable}",
               cwd=pictures.parent)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert [line.split("  ")[0] for line in run.stdout.splitlines()] == files


def test_the_demo_deletes_nothing_of_others(tmp_path):
    thesis = tmp_path / "demo/thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    for target in ("demo", "clean"):
        run = make("-f", ROOT / "Makefile", target, "RUN=.", f"PYTHON={sys.executable}",
                   cwd=tmp_path)  # fmt: skip
        assert thesis.read_text() == "mine", run.stdout
        assert ("demo is not of an earlier demo" in run.stderr) == (target == "demo")
        assert (run.returncode != 0) == (target == "demo")
    (tmp_path / "demo/.demo").touch()
    make("-f", ROOT / "Makefile", "-n", "demo", f"PYTHON={sys.executable}", cwd=tmp_path)
    assert thesis.exists()  # it is said what would be done
    assert make("-f", ROOT / "Makefile", "clean", "RUN=.", cwd=tmp_path).returncode == 0
    assert not thesis.exists()


def test_clean_from_elsewhere_deletes_only_a_folder_that_was_named(tmp_path):
    mine = tmp_path / "checkpoints/thesis.pt"
    mine.parent.mkdir()
    mine.touch()
    run = make("-f", ROOT / "Makefile", "clean", cwd=tmp_path)
    assert run.returncode != 0 and "give RUN=. if that is meant" in run.stderr and mine.exists()
    assert make("-f", ROOT / "Makefile", "clean", "RUN=.", cwd=tmp_path).returncode == 0
    assert not mine.exists()


def test_the_demo_takes_a_python_by_a_relative_path(tmp_path):
    script(tmp_path / "v/python", f"""case $1 in
-c) exec {sys.executable} "$@";;
*) echo "python called for $1"; exit 3;;
esac""")
    run = make("-f", ROOT / "Makefile", "demo", "PYTHON=v/python", cwd=tmp_path)
    assert run.returncode != 0 and "python called for train.py" in run.stdout, run.stderr


@pytest.mark.parametrize("data", ['it"s', "a`id`b", "a b", "it's", "$$HOME/x"])
def test_any_path_of_the_data_reaches_the_stage_as_it_is(tmp_path, data):
    run = make("-f", ROOT / "Makefile", "train", f"PYTHON={sys.executable}", f"DATA={data}",
               cwd=tmp_path)  # fmt: skip
    assert f"no data at {data.replace('$$', '$')}: give" in run.stderr


def test_from_elsewhere_with_a_checkout_that_is_only_read(tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "wandb", "demo", "data", "*.pth"))  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in checkout.rglob("*")}
    for path in before:
        path.chmod(path.stat().st_mode & ~0o222)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    x_train, y_train, x_test, y_test = synthetic.make(320, 100)
    np.savez(elsewhere / "mine.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)

    def there(*arguments):
        return make("-f", checkout / "Makefile", f"PYTHON={sys.executable}", "DATA=mine.npz",
                    "RUN=run", *arguments, cwd=elsewhere, PYTHONDONTWRITEBYTECODE="1")  # fmt: skip

    run = there("train", "TRAIN_FLAGS=--epochs 1 --batch-size 32 --width 0.1 --downsample 8")
    assert run.returncode == 0, run.stderr
    assert (elsewhere / "run/checkpoints/baseline.pth").is_file()
    assert "epoch 1/1" in run.stdout
    run = there("eval", "FILES=run/checkpoints/baseline.pth")
    assert run.returncode == 0 and "of 100 test images" in run.stdout
    assert there("status").returncode == 0 and "make train " in there("help").stdout
    assert {p.name for p in elsewhere.iterdir()} == {"mine.npz", "run"}
    assert before == {p: p.stat().st_mtime_ns for p in checkout.rglob("*")}
