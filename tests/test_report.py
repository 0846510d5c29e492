"""report.py: the parts are the whole file, the table is of every file, stale files are named."""

import dataclasses
import json
import os
import re
import shutil

import pytest
import torch

import eval as evaluate
import quantize
import report
import sparse_compress
import to_int8
import train
from lib import checkpoint, compressed, config, memory, metrics, plots, ptq, quantizers
from lib.config import UserError
from lib.nnz import frame
from models.mobilenetv2 import MobileNetV2, standard

FILES = ("baseline.pth", "quantized.pth", "int8.pth", "compressed.nnz")


@pytest.fixture(scope="module")
def chain(tiny, tmp_path_factory):
    """A run of the stages on a tiny network, quantized from the baseline: no pruned.pth."""
    folder = tmp_path_factory.mktemp("run")
    where = [f"--data={tiny}", f"--run-dir={folder}"]
    train.main([*where, "--width=0.1", "--downsample=8", "--epochs=1", "--batch-size=32"])
    parent = f"--parent={folder}/checkpoints/baseline.pth"
    quantize.main([*where, parent, "--weight-bits=4", "--act-bits=6"])
    to_int8.main(where)
    sparse_compress.main([f"--run-dir={folder}"])
    return folder


@pytest.fixture
def run(chain, tmp_path):
    """A copy of it, to be spoilt. The recorded --parent is the original's."""
    shutil.copytree(chain / "checkpoints", tmp_path / "run/checkpoints")
    return tmp_path / "run"


@pytest.fixture
def status(run, capsys):
    def call():
        report.main(["--status", f"--run-dir={run}"])
        return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}

    return call


# ---- the report ----------------------------------------------------------------------------------


def test_report_of_a_chain(run, tiny, capsys, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 40)
    (run / "plots").mkdir()
    (run / "plots/train.png").write_bytes(b"an earlier stage's")
    report.main([f"--run-dir={run}", f"--data={tiny}"])
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "logs/report.jsonl").read_text().splitlines()]

    assert [row["name"] for row in rows] == list(FILES)
    for row in rows:
        size = (run / "checkpoints" / row["name"]).stat().st_size
        assert row["bytes"] == size == sum(row["parts"].values())
        assert min(row["parts"].values()) >= 0  # the order of the channels may carry all scales
        assert row["split"] == "test" and row["total"] == 100
        assert row["change"] == pytest.approx(row["correct"] - rows[0]["correct"])
        line = next(x for x in shown.splitlines() if x.startswith(row["name"]))
        for cell in (f"{size:,}", f"{row['correct']}/100", f"{row['nonzeros']:,}"):
            assert cell in line.split(), line

    # 4-byte weights, then 4-byte weights on a grid, then a byte each, then their own bits
    baseline, quantized, int8, nnz = rows
    weights = baseline["weights"]
    live = int8["live_weights"]  # to_int8.py leaves out channels that no layer reads
    assert [row["weight_bytes"] for row in rows[:3]] == [4 * weights, 4 * weights, live]
    assert list(nnz["parts"]) == [
        *(f"weights: {part}" for part in ("liveness", "significance", "signs", "magnitudes")),
        "scales", "biases", "activation scales", "metadata", "frame",
    ]  # fmt: skip
    code = frame.unpack((run / "checkpoints/compressed.nnz").read_bytes(), version=3)["CODE"]
    assert nnz["weight_bytes"] == len(code)
    assert nnz["ratios"]["model"] == baseline["bytes"] / nnz["bytes"]
    assert nnz["ratios"]["weights"] == 4 * weights / nnz["weight_bytes"]
    # 6 bits, but for the image and what residual blocks read: 8.
    assert 32 / 7 < nnz["ratios"]["activations"] < 32 / 6
    assert 32 / 8 < nnz["ratios"]["peak"] <= 32 / 6 + 1e-3
    assert int8["correct"] == nnz["correct"]  # both as integers; quantized.pth in floats

    assert shown.splitlines()[-3:] == [
        str(run / "plots" / name) for name in ("report.png", "storage.png", "train.png")
    ]
    for name in ("report.png", "storage.png"):
        assert (run / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_report_of_one_file_on_validation(run, tiny, capsys, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 40)
    for name in FILES[:3]:
        (run / "checkpoints" / name).unlink()
    report.main([f"--run-dir={run}", f"--data={tiny}", "--split=val"])
    (row,) = map(json.loads, (run / "logs/report.jsonl").read_text().splitlines())
    held_out = checkpoint.load(run / "checkpoints/compressed.nnz").data["val_size"]
    assert row["total"] == held_out and row["ratios"]["model"] == 1
    assert "W4A6" in capsys.readouterr().out


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="no files of the chain"):
        report.main([f"--run-dir={tmp_path}"])


def test_version_1_is_values_and_indices(chain, tmp_path):
    parent = f"--parent={chain}/checkpoints/baseline.pth"
    sparse_compress.main([f"--run-dir={tmp_path}", parent])
    source = checkpoint.load(tmp_path / "checkpoints/compressed.nnz")
    parts = memory.bytes_by_part(source)
    assert sum(parts.values()) == source.bytes
    assert parts[memory.WEIGHTS] == 4 * sum(n for *_, n in metrics.layer_counts(source.build()))
    assert parts[memory.INDICES] and parts[memory.REST]


def test_shared_tensors_are_counted_as_stored(tmp_path):
    model = MobileNetV2(standard(0.1))
    state = model.state_dict()
    state["features.0.1.bias"] = state["features.0.1.running_mean"]  # one storage, two names
    torch.save(state, tmp_path / "plain.pth")
    source = checkpoint.load(tmp_path / "plain.pth")
    parts = memory.bytes_by_part(source)
    assert sum(parts.values()) == source.bytes
    own = sum(t.nbytes for n, t in state.items() if n != "features.0.1.bias")
    assert parts[memory.WEIGHTS] + parts[memory.REST] == own


def test_files_of_another_set_than_the_first_are_refused(run, tiny):
    path = run / "checkpoints/int8.pth"
    raw = checkpoint.read(path)
    checkpoint.write(path, raw | {"data": {"source": "synthetic", "val_size": 30}})
    with pytest.raises(UserError, match="int8.pth was trained on synthetic, the images are"):
        report.main([f"--data={tiny}", f"--run-dir={run}"])
    files = [str(run / f"checkpoints/{name}") for name in ("baseline.pth", "int8.pth")]
    with pytest.raises(UserError, match="int8.pth was trained on synthetic, the images are"):
        evaluate.main([*files, f"--data={tiny}", f"--run-dir={run}"])


# ---- status --------------------------------------------------------------------------------------


def test_status_of_a_fresh_chain(status):
    lines = status()
    assert list(lines) == [*checkpoint.CHAIN, "sweep.csv"]
    assert "missing" in lines["pruned.pth"] and "missing" in lines["sweep.csv"]
    assert "up to date: the start" in lines["baseline.pth"]
    assert "up to date with baseline.pth" in lines["quantized.pth"]
    assert "up to date with quantized.pth" in lines["int8.pth"]
    assert "up to date with int8.pth" in lines["compressed.nnz"]
    assert not any("stale" in line for line in lines.values())


def rewrite(path, **changes):
    content = checkpoint.read(path)
    checkpoint.write(path, content | changes)


def test_status_names_the_parent_that_changed_and_what_follows(chain, run, status):
    old = checkpoint.load(run / "checkpoints/baseline.pth").sha256[:8]
    rewrite(run / "checkpoints/baseline.pth", seed=1)
    new = checkpoint.load(run / "checkpoints/baseline.pth").sha256[:8]
    given = str(chain / "checkpoints/baseline.pth")  # the flag's file is as it was
    assert f"up to date with {given}" in status()["quantized.pth"]

    rewrite(run / "checkpoints/quantized.pth", config={})  # made with the default parent
    lines = status()
    why = f"stale: parent changed: baseline.pth is now {new}, was made from {old}"
    assert why in lines["quantized.pth"]
    assert "stale: parent changed: quantized.pth is now" in lines["int8.pth"]
    assert "stale: int8.pth is not up to date" in lines["compressed.nnz"]
    (run / "logs").mkdir(exist_ok=True)
    for name, note in (("baseline", "up to date with"), ("quantized", "stale: quantized.pth is")):
        parent = checkpoint.load(run / f"checkpoints/{name}.pth").sha256
        (run / "logs/sweep.csv").write_text(f"bits,parent_sha256\n4,{parent}\n")
        assert note in status()["sweep.csv"]
    (run / "logs/sweep.csv").write_bytes(b"bits,parent_sha256\n4,\xff\n")
    assert "damaged: " in status()["sweep.csv"]


def test_a_report_says_which_files_are_stale(run, capsys):
    def said():
        report.say_stale([checkpoint.load(run / "checkpoints" / name) for name in FILES], None)
        return capsys.readouterr().err.splitlines()

    assert said() == []
    rewrite(run / "checkpoints/quantized.pth", config={}, seed=1)
    int8, small = said()
    assert int8.startswith("report.py: int8.pth is stale: parent changed: quantized.pth is now ")
    assert small == "report.py: compressed.nnz is stale: int8.pth is not up to date"


def test_status_of_a_parent_outside_the_chain_whose_own_parent_changed(run, status):
    baseline, between, quantized = (
        run / f"checkpoints/{name}.pth" for name in ("baseline", "pruned_a", "quantized")
    )
    between.write_bytes(quantized.read_bytes())
    rewrite(between, config={}, stage="pruned")
    lineage = checkpoint.load(between).lineage()
    rewrite(quantized, config={"parent": str(between)}, ancestors=lineage)
    assert f"up to date with {between}" in status()["quantized.pth"]
    rewrite(baseline, seed=1)
    assert f"stale: {between} is not up to date" in status()["quantized.pth"]


def test_status_of_missing_damaged_and_other_code(run, status):
    (run / "checkpoints/quantized.pth").unlink()
    (run / "checkpoints/baseline.pth").write_bytes(b"not a checkpoint")
    rewrite(run / "checkpoints/int8.pth", code="0123456789ab")
    lines = status()
    assert "unreadable" in lines["baseline.pth"]
    assert lines["quantized.pth"].endswith("missing")
    assert "stale: parent missing: no quantized.pth" in lines["int8.pth"]
    assert f"made by code 0123456789ab, this is {config.code_version()}" in lines["int8.pth"]


def test_status_of_a_file_that_records_no_hash_of_its_parent(run, status):
    """A cell of sweep.py, whose quantized network was never a file of its own."""
    source = checkpoint.load(run / "checkpoints/quantized.pth")
    (run / "checkpoints/compressed.nnz").write_bytes(
        compressed.encode(dataclasses.replace(source, sha256=None))
    )
    assert "parent unknown: this file records no hash" in status()["compressed.nnz"]


def test_status_of_unfinished_runs(run, status):
    folder = run / "checkpoints"
    torch.save({"history": [{}, {}]}, folder / "baseline.pth.resume")
    torch.save({"rounds": [{}, {}, {}, {}]}, folder / "pruned.pth.resume")
    torch.save({"history": [{}]}, folder / "pruned.pth.round.resume")
    torch.save({"attempts": [{}]}, folder / "quantized.pth.ptq.resume")
    (folder / "int8.pth.resume").write_bytes(b"half")
    lines = status()
    assert "up to date" in lines["baseline.pth"]
    assert "unfinished: baseline.pth.resume at epoch 2" in lines["baseline.pth"]
    assert lines["pruned.pth"].endswith(
        "missing; unfinished: pruned.pth.resume at round 3; "
        "unfinished: pruned.pth.round.resume at epoch 1"
    )
    assert "quantized.pth.ptq.resume at the end of ptq" in lines["quantized.pth"]
    assert "int8.pth.resume is damaged" in lines["int8.pth"]


def test_status_shows_date_and_bytes(run, status):
    path = run / "checkpoints/int8.pth"
    os.utime(path, (0, 1_600_000_000))
    line = status()["int8.pth"]
    assert f"{path.stat().st_size:,}" in line
    assert re.search(r" int8 +2020-09-1\d \d\d:\d\d ", line)


# ---- activation memory ---------------------------------------------------------------------------


def by_hand(settings: dict, size: int) -> tuple[int, int]:
    """(sum, peak) from the settings alone: arithmetic on channels and sides, no network."""
    steps = []  # (input, output, residual input held beside them)

    def layer(inputs, outputs, side, stride, held=0):
        after = (side - 1) // stride + 1
        steps.append((inputs * side**2, outputs * after**2, held))
        return after

    side = layer(3, settings["stem"], size, settings["stem_stride"])
    channels = settings["stem"]
    for b in settings["blocks"]:
        held = channels * side**2 if b["residual"] else 0
        if b["expand"]:
            layer(channels, b["hidden"], side, 1)  # its input is the residual one
        side = layer(b["hidden"], b["hidden"], side, b["stride"], held if b["expand"] else 0)
        layer(b["hidden"], b["out"], side, 1, held)
        channels = b["out"]
    layer(channels, settings["head"], side, 1)
    layer(settings["head"], settings["classes"], 1, 1)
    return sum(s[0] for s in steps), max(map(sum, steps))


def uneven():
    """Widths as compaction leaves them: no two alike."""
    settings = standard(0.25, 8)
    for i, block in enumerate(settings["blocks"]):
        block["hidden"] = block["hidden"] - i - 1 if block["expand"] else block["hidden"]
    return settings


@pytest.mark.parametrize("settings", [standard(), standard(0.1, 8), standard(0.5, 32), uneven()])
def test_activations_are_those_that_the_network_has(settings):
    found = memory.activations(settings)
    assert (found["sum_values"], found["peak_values"]) == by_hand(settings, 32)
    model, seen = MobileNetV2(settings).eval(), []
    for name, layer in metrics.weight_layers(model).items():
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: seen.append(
                {"name": name, "input": inputs[0].numel(), "output": output.numel()}
            )
        )
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert [{k: x[k] for k in ("name", "input", "output")} for x in found["layers"]] == seen


def test_activations_of_the_reports_network():
    """The first layers and the peak, written out: values of one 32x32 image."""
    found = memory.activations(standard())
    pixels = 32 * 32
    first = [(x["input"] // pixels, x["output"] // pixels, x["held"]) for x in found["layers"][:5]]
    assert first == [(3, 32, 0), (32, 32, 0), (32, 16, 0), (16, 96, 0), (96, 96, 0)]
    # Block 5 at 32x32: 192 channels into the depthwise layer, 192 out, 32 held for the sum.
    assert found["peak_values"] == pixels * (192 + 192 + 32)
    assert found["peak_layer"] == "features.5.conv.1.0"


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_bytes_of_activations_are_those_of_their_quantizers(bits):
    """Tensors that are added or only averaged keep 8 bits where others have fewer."""
    model = MobileNetV2(standard(1.0, 4) | {"folded": True}).eval()
    plain = memory.activations(model.settings)
    quantizers.attach(model, ptq.make_scheme(8, bits))
    found = memory.activation_bytes(model, bits)
    assert memory.activation_bytes(MobileNetV2(standard(1.0, 4)), bits)["peak_bytes"] == (
        plain["peak_values"] * bits // 8
    )
    # Block 5: 192 channels into the depthwise layer and out of it, 32 of the residual stream held.
    pixels = 32 * 32
    assert found["peak_layer"] == "features.5.conv.1.0" == plain["peak_layer"]
    assert found["peak_bytes"] == pixels * (192 * bits + 192 * bits + 32 * 8) // 8
    # The image and what residual blocks read have 8 bits.
    inputs = {x["name"]: x["input"] for x in plain["layers"]}
    residual = [n for n, block in enumerate(model.settings["blocks"], 1) if block["residual"]]
    wide = inputs["features.0.0"] + sum(inputs[f"features.{n}.conv.0.0"] for n in residual)
    assert found["sum_bytes"] == (plain["sum_values"] * bits + wide * (8 - bits)) // 8
