"""publish.py and verify.py: what is published is what was measured, and a change to it shows."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import call, one_line

import eval as evaluation
import predict
import prune
import publish
import quantize
import sparse_compress
import to_int8
import train
from lib import checkpoint, plots, runtime

CHAIN = ("baseline.pth", "quantized.pth", "int8.pth", "compressed.nnz", "int8.onnx")


@pytest.fixture(scope="module", autouse=True)
def _coarse_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 20)
        yield


@pytest.fixture(scope="module")
def chain(tiny, tmp_path_factory):
    """A run without pruning: to publish, it has to be evaluated on both splits."""
    folder = tmp_path_factory.mktemp("run")
    where = [f"--data={tiny}", f"--run-dir={folder}"]
    recipe = ["--width=0.1", "--downsample=8", "--epochs=1", "--batch-size=32", "--no-amp"]
    train.main([*where, *recipe])
    parent = f"--parent={folder}/checkpoints/baseline.pth"
    quantize.main([*where, parent, "--weight-bits=4", "--calibration=32"])
    to_int8.main(where)
    sparse_compress.main([f"--run-dir={folder}"])
    return folder


@pytest.fixture
def run(chain, tiny, tmp_path, monkeypatch, capfd):
    """A function of a stage and flags, on a copy of the chain."""
    shutil.copytree(chain / "checkpoints", tmp_path / "run/checkpoints")

    def go(stage: str, *flags):
        if stage == "eval":
            flags = (f"--data={tiny}", *flags, f"--run-dir={tmp_path}/run")
        if stage == "publish":
            flags = (*flags, f"--run-dir={tmp_path}/run", f"--release={tmp_path}/release")
        if stage == "verify":
            flags = (*flags, f"--data={tiny}", f"--release={tmp_path}/release")
        return call(stage, *flags, monkeypatch=monkeypatch, capfd=capfd)

    go.folder = tmp_path / "run"
    go.release = tmp_path / "release"
    go.files = [go.folder / "checkpoints" / name for name in CHAIN]
    return go


@pytest.fixture(scope="module")
def evaluated(chain, tiny, tmp_path_factory):
    """A published folder, as text what publish.py said, and the logs of both splits."""
    folder, out = tmp_path_factory.mktemp("published"), io.StringIO()
    for split in ("val", "test"):
        files = [str(chain / "checkpoints" / name) for name in CHAIN]
        evaluation.main([*files, f"--split={split}", f"--data={tiny}", f"--run-dir={chain}"])
    shutil.copy(chain / "logs/quantize.jsonl", chain / "logs/quantize-again.jsonl")
    with contextlib.redirect_stdout(out):
        publish.main([f"--run-dir={chain}", f"--release={folder}"])
    return folder, out.getvalue()


@pytest.fixture
def published(run, evaluated):
    folder, run.out = evaluated
    shutil.copytree(folder, run.release)
    return run


def test_the_figures_are_those_of_the_files(published, tiny):
    results = json.loads((published.release / "results.json").read_text())
    assert set(results["files"]) == set(CHAIN)
    parent = None
    for name in CHAIN[:4]:
        path, row = published.folder / "checkpoints" / name, results["files"][name]
        source = checkpoint.load(path)
        assert row["sha256"] == source.sha256 and row["bytes"] == path.stat().st_size
        assert row["parent"] == parent and row["seed"] == 47
        parent = source.sha256
        images = source.images(tiny, None, "cpu")
        network = runtime.network(source)
        for split in ("val", "test"):
            part, figures = getattr(images, split), row["accuracy"][split]
            right = network(part.images).argmax(1) == part.labels
            assert (figures["correct"], figures["total"]) == (int(right.sum()), len(part))
    assert results["files"]["baseline.pth"]["command"] == (
        "python train.py --epochs 1 --batch-size 32 --width 0.1 --downsample 8 --no-amp"
    )
    assert results["files"]["quantized.pth"]["command"] == (
        "python quantize.py --parent baseline.pth --weight-bits 4 --calibration 32"
    )
    assert {name: len(lines) for name, lines in results["logs"].items()} == {
        "train": 1, "quantize": 1, "quantize-again": 1,
    }  # fmt: skip
    assert (published.release / "train.png").read_bytes().startswith(b"\x89PNG")
    small = published.folder / "checkpoints/compressed.nnz"
    assert (published.release / checkpoint.RELEASE.name).read_bytes() == small.read_bytes()
    ratio = published.files[0].stat().st_size / small.stat().st_size
    assert f"{ratio:.1f} times smaller" in published.out
    assert str(published.folder.parent) not in (published.release / "results.json").read_text()


def test_the_command_of_a_compressed_file_names_its_parent(run):
    parent = run.folder / "checkpoints/quantized.pth"
    sparse_compress.main([f"--run-dir={run.folder}", f"--parent={parent}"])
    for split in ("val", "test"):
        code, _, err = run("eval", run.files[0], parent, run.files[3], f"--split={split}")
        assert (code, err) == (0, "")
    assert run("publish")[0] == 0
    files = json.loads((run.release / "results.json").read_text())["files"]
    assert files["compressed.nnz"]["command"] == (
        "python sparse_compress.py --parent quantized.pth"
    )


def test_a_file_that_records_no_command_is_published_without(run):
    """As the files of earlier versions."""
    file = run.folder / "checkpoints/int8.pth"
    content = checkpoint.read(file)
    del content["command"]
    checkpoint.write(file, content)
    sparse_compress.main([f"--run-dir={run.folder}"])
    for split in ("val", "test"):
        code, _, err = run("eval", *run.files[:4], f"--split={split}")
        assert (code, err) == (0, "")
    assert run("publish")[0] == 0
    rows = json.loads((run.release / "results.json").read_text())["files"]
    assert [name for name, row in rows.items() if "command" not in row] == ["int8.pth"]


def test_verify_finds_it_as_published(published):
    code, out, err = published("verify")
    assert (code, err) == (0, "")
    for words in ("mobilenetv2-cifar10.nnz: ", "mobilenetv2-cifar10.onnx: ", "30 val images",
                  "100 test images", "in integers", "in onnxruntime"):  # fmt: skip
        assert words in out


def test_verify_compares_the_first_images_where_more_are_at_hand(
    published, tiny, tmp_path, monkeypatch, capfd
):
    with np.load(tiny) as file:
        arrays = dict(file)
    more = {k: np.concatenate([arrays[k], arrays[k][:60]]) for k in ("x_test", "y_test")}
    np.savez(tmp_path / "more.npz", **arrays | more)
    code, out, _ = call(
        "verify", f"--data={tmp_path}/more.npz", f"--release={published.release}",
        monkeypatch=monkeypatch, capfd=capfd,
    )  # fmt: skip
    lines = [line for line in out.splitlines() if "test images" in line]
    assert code == 0 and len(lines) == 3
    assert all("of 100 test images" in line and "/160) of all" in line for line in lines)


def test_test_images_alone_will_do(published, tiny, tmp_path, monkeypatch, capfd):
    with np.load(tiny) as file:
        np.savez(tmp_path / "cifar10-test.npz", x_test=file["x_test"], y_test=file["y_test"])
    flags = [f"--data={tmp_path}/cifar10-test.npz", f"--release={published.release}"]
    code, out, _ = call(
        "verify", *flags, "--split=test", monkeypatch=monkeypatch, capfd=capfd
    )
    assert code == 0 and "100 test images" in out and "val images" not in out
    code, _, err = call("verify", *flags, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 1 and one_line("verify", err)


def test_verify_refuses_what_was_changed(published, tiny):
    release = published.release
    file = release / checkpoint.RELEASE.name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    code, out, err = published("verify")
    assert code == 1 and one_line("verify", err) and "is not the published file" in err

    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    results = json.loads((release / "results.json").read_text())
    results["files"]["compressed.nnz"]["accuracy"]["val"]["correct"] += 1
    (release / "results.json").write_text(json.dumps(results))
    code, out, err = published("verify")
    assert code == 1 and one_line("verify", err) and "not as published" in err

    file.unlink()
    code, _, err = published("verify")
    assert code == 1 and one_line("verify", err) and "is missing" in err
    texts = [
        "", "[]", "{}", '{"published": {}}', '{"published": {"x": "y"}, "files": {}}',
        '{"published": {"x": "y"}, "files": {"y": {"sha256": "0", "accuracy": {}}}}',
    ]  # fmt: skip
    for text in texts:
        (release / "results.json").write_text(text)
        code, _, err = published("verify")
        assert code == 1 and one_line("verify", err) and "is damaged" in err
    (release / "results.json").unlink()
    code, _, err = published("verify")
    assert code == 1 and one_line("verify", err) and "nothing is published" in err


def test_publish_refuses_figures_of_other_files(run):
    code, _, err = run("publish")
    assert code == 1 and one_line("publish", err) and "no figures in" in err
    run("eval", *run.files[1:], "--split=val")
    run("eval", *run.files[1:], "--split=test")
    code, _, err = run("publish")
    assert code == 1 and "the parent of the quantized file was not evaluated" in err
    run("eval", *run.files, "--split=val")
    code, _, err = run("publish")
    assert code == 1 and "baseline.pth was not evaluated on both splits" in err
    run("eval", *run.files[:3], "--split=val")
    run("eval", *run.files[:3], "--split=test")
    code, _, err = run("publish")
    assert code == 1 and "compressed.nnz is not among the evaluated files" in err
    for split in ("val", "test"):
        run("eval", *run.files, f"--split={split}")
    quantized = run.folder / "checkpoints/quantized.pth"
    content = checkpoint.read(quantized)
    checkpoint.write(quantized, content | {"seed": 1})
    code, _, err = run("publish")
    assert code == 1 and one_line("publish", err) and "is not the file that eval.py measured" in err
    for text, what in (("{", "is damaged"), ('{"file": "x"}', "is not a log of this eval.py")):
        (run.folder / "logs/eval-val.jsonl").write_text(text)
        code, _, err = run("publish")
        assert code == 1 and one_line("publish", err) and what in err
    assert not run.release.exists()


def test_a_plain_state_dict_is_not_published(run):
    dense = run.folder / "checkpoints/baseline.pth"
    torch.save(checkpoint.load(dense).state, dense)
    for split in ("val", "test"):
        run("eval", *run.files, f"--split={split}", "--assume-downsample=8")
    code, _, err = run("publish")
    assert code == 1 and "baseline.pth is a plain state dict, which does not say its str" in err
    assert not run.release.exists()


def test_what_a_run_lacks_is_not_left_of_an_earlier_one(published):
    assert (published.release / "mobilenetv2-cifar10.onnx").exists()
    (published.release / "quantize.png").touch()
    for split in ("val", "test"):
        published("eval", *published.files[:4], f"--split={split}")
    assert published("publish")[0] == 0
    names = {path.name for path in published.release.iterdir()}
    # The chart of the training is that of the same baseline.pth.
    assert names == {"mobilenetv2-cifar10.nnz", "baseline.pth", "results.json", "train.png"}
    assert published("verify")[0] == 0


def test_a_run_from_the_published_network_keeps_the_log_of_its_training(published):
    index, chart = published.release / "results.json", published.release / "train.png"
    old = json.loads(index.read_text())["logs"]["train"]
    chart.write_bytes(b"a chart")
    for split in ("val", "test"):
        published("eval", *published.files, f"--split={split}")
    assert not (published.folder / "logs/train.jsonl").exists()
    assert published("publish")[0] == 0
    assert json.loads(index.read_text())["logs"]["train"] == old
    assert chart.read_bytes() == b"a chart"
    # Another dense network has another training; and of a damaged index nothing is known.
    results = json.loads(index.read_text())
    results["files"]["baseline.pth"]["sha256"] = "0"
    for text in (json.dumps(results), "{", "[]"):
        index.write_text(text)
        assert published("publish")[0] == 0
        assert "train" not in json.loads(index.read_text())["logs"] and not chart.exists()


def test_a_run_from_the_published_file_keeps_what_was_published_of_its_parents(published, tiny):
    before = json.loads((published.release / "results.json").read_text())
    folder, dense = published.folder, published.files[0]
    where = [f"--data={tiny}", f"--run-dir={folder}"]
    decoded = folder / "checkpoints/decoded.pth"
    prune.main([*where, "--rounds=0", "--dequantize", f"--out={decoded}",
                f"--parent={published.release / checkpoint.RELEASE.name}"])  # fmt: skip
    quantize.main([*where, f"--parent={decoded}", "--weight-bits=3", "--calibration=32"])
    to_int8.main(where)
    sparse_compress.main([f"--run-dir={folder}"])
    files = [dense, decoded, *published.files[1:4]]
    for split in ("val", "test"):
        assert published("eval", *files, f"--split={split}")[0] == 0
    assert published("publish")[0] == 0
    now = json.loads((published.release / "results.json").read_text())
    kept = {f"before/{name}" for name in ("quantized.pth", "int8.pth", "compressed.nnz")}
    assert set(now["files"]) == {file.name for file in files} | kept
    for name in kept:
        assert now["files"][name] == before["files"][name.removeprefix("before/")]
    assert now["logs"]["before/quantize"] == before["logs"]["quantize"]
    assert now["logs"]["train"] == before["logs"]["train"]
    assert published("verify")[0] == 0


def test_a_refusal_leaves_what_was_published(published, tiny):
    def content():
        return {path.name: path.read_bytes() for path in published.release.iterdir()}

    before = content()
    for split in ("val", "test"):
        published("eval", *published.files, f"--split={split}")
    (published.folder / "logs/sweep.csv").write_text("bits,parent_sha256\n4,0123\n")
    code, _, err = published("publish")
    assert code == 1 and "sweep.csv is of another network" in err and content() == before
    (published.folder / "logs/sweep.csv").write_bytes(b"bits,parent_sha256\n4,\xff\n")
    code, _, err = published("publish")
    assert code == 1 and "sweep.csv is damaged: " in err and content() == before
    (published.folder / "logs/sweep.csv").unlink()
    (published.folder / "logs/train.jsonl").write_text("{")
    code, _, err = published("publish")
    assert code == 1 and "is damaged" in err and content() == before
    (published.folder / "logs/train.jsonl").unlink()
    code, _, err = published("eval", *published.files, "--split=val", "--data=nowhere")
    assert code == 1
    assert published("publish")[0] == 0, "a failed evaluation lost the figures of the last one"
    assert set(content()) <= set(before)


def test_predict_uses_the_published_file_where_nothing_was_trained(
    published, tmp_path, monkeypatch, capfd
):
    file = published.release / checkpoint.RELEASE.name
    monkeypatch.setattr(checkpoint, "RELEASE", file)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save("x.png")
    code, out, err = call("predict", "x.png", "--json", monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    image = torch.full((1, 3, 32, 32), 99, dtype=torch.uint8)
    expected = runtime.network(checkpoint.load(file))(image).softmax(1).max()
    assert json.loads(out)["top"][0]["probability"] == pytest.approx(float(expected))
    own = Path("checkpoints/compressed.nnz")
    own.parent.mkdir()
    shutil.copy(file, own)
    assert predict.latest(Path("checkpoints")) == own
    assert predict.latest(Path("elsewhere/checkpoints")) != file
