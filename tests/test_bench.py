"""bench.py on tiny networks: who takes part, what is written; the figures are the machine's."""

import json
import sys

import pytest
import torch

import bench
import train
from lib import checkpoint, plots, ptq, quantizers, runtime, tables
from lib.config import UserError


@pytest.fixture
def folder(small, pixels, tmp_path, monkeypatch):
    """Checkpoints to measure."""
    monkeypatch.setattr(plots, "DPI", 40)
    folder, scheme = tmp_path / "checkpoints", ptq.make_scheme(8, 8)
    given = {"metrics": {}, "data": {"source": "cifar10", "val_size": 50}}
    for name, stage in (("baseline", "baseline"), ("pruned", "pruned")):
        model = small(0 if name == "baseline" else 1)
        checkpoint.save(folder / f"{name}.pth", stage, model, train.Settings(), None, **given)
    model, _ = ptq.quantize(small(1), pixels, scheme)
    int8 = checkpoint.save(
        folder / "int8.pth", "int8", model, train.Settings(), None, quantization=scheme,
        state=quantizers.integer_state(model.state_dict(), scheme), **given,
    )  # fmt: skip
    runtime.export(int8, folder / "int8.onnx")
    return folder


def test_all_of_them_run_and_are_written_down(folder, tiny, tmp_path, capsys):
    before = torch.get_num_threads()
    bench.main([f"--data={tiny}", f"--run-dir={tmp_path}", "--threads=1", "--batches=1,4",
                "--turns=2", "--calls=2", "--calibration=64",
                f"--results={tmp_path / 'bench.json'}", "--title=Speed here"])  # fmt: skip
    assert torch.get_num_threads() == before
    rows = [json.loads(line) for line in (tmp_path / "logs/bench.jsonl").read_text().splitlines()]
    names = [row["network"] for row in rows]
    assert names[:6] == names[6:] and len(rows) == 12
    assert names[0] == "dense fp32, torch" and names[4:6] == ["quantize_static", "int8.onnx (ours)"]
    by_name = {row["network"]: row for row in rows}
    for row in rows:
        assert row["milliseconds"] > 0 and row["cpu_milliseconds"] > 0 and row["total"] == 100
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["milliseconds"])
        assert row["turns"] == 2 and row["weight_bytes"] > 0 and row["peak_bytes"] > 0
    for kind in ("dense fp32", "compacted fp32"):  # one network in two runtimes
        torch_row, onnx_row = (by_name[f"{kind}, {r}"] for r in ("torch", "onnxruntime"))
        assert torch_row["accuracy"] == pytest.approx(onnx_row["accuracy"], abs=0.02)
        assert torch_row["peak_bytes"] == onnx_row["peak_bytes"]
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == 1
    base = by_name["compacted fp32, onnxruntime"]
    assert base["ratio_to_compacted"] == base["cpu_ratio_to_compacted"] == 1
    assert by_name["int8.onnx (ours)"]["peak_bytes"] < by_name["dense fp32, torch"]["peak_bytes"]
    assert (tmp_path / "plots/bench.png").stat().st_size > 1000
    table = tables.read(tmp_path / "bench.json")
    assert table["title"] == "Speed here"
    assert [row[0] for row in table["rows"]] == names[:6] and "test split, n=100" in table["data"]
    assert table["columns"][1:4] == ["batch 1, 1 thread", "batch 4, 1 thread", "correct of 100"]
    assert table["rows"][3][0] == bench.COMPACTED and table["rows"][3][1:3] == ["1.0x", "1.0x"]
    ours = by_name["int8.onnx (ours)"]  # of the last case, batch 4
    assert table["rows"][5][2] == f"{ours['ratio_to_compacted']:.1f}x"
    assert table["rows"][5][3:5] == [round(100 * ours["accuracy"]), ours["weight_bytes"]]
    out, err = capsys.readouterr()
    assert "int8.onnx was not made from " in err and "pruned.pth" in err  # the fixture's was not
    assert "1 thread, batch 4, 2 turns" in out and "accuracy on 100 test images" in out
    assert "--peers" not in out


def test_networks_of_other_images_are_refused(folder, tiny, tmp_path, small, monkeypatch):
    monkeypatch.setattr(bench, "contestants", None)  # before any work
    other = {"metrics": {}, "data": {"source": "cifar100", "val_size": 50}}
    file = tmp_path / "other.pth"
    checkpoint.save(file, "baseline", small(0), train.Settings(), None, **other)
    with pytest.raises(UserError, match="other.pth was trained on cifar100"):
        bench.main([*few(tiny, tmp_path), f"--dense={file}"])
    source = checkpoint.load(folder / "int8.pth")
    source.data = other["data"]
    runtime.export(source, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="other.onnx was trained on cifar100"):
        bench.main([*few(tiny, tmp_path), f"--int8={tmp_path / 'other.onnx'}"])


def few(tiny, tmp_path) -> list[str]:
    return [f"--data={tiny}", f"--run-dir={tmp_path}", "--threads=1", "--batches=1", "--turns=1",
            "--calls=1", "--calibration=64", "--peers"]  # fmt: skip


def test_without_a_peer_the_others_are_measured(folder, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    bench.main(few(tiny, tmp_path))
    out = capsys.readouterr().out
    assert "--peers: none is measured, since openvino is not installed\n" in out
    assert len((tmp_path / "logs/bench.jsonl").read_text().splitlines()) == 6


def test_openvino_on_the_fp32_network_and_on_ours(folder, tiny, tmp_path):
    pytest.importorskip("openvino")
    bench.main(few(tiny, tmp_path))
    lines = (tmp_path / "logs/bench.jsonl").read_text().splitlines()
    rows = {row["network"]: row for row in map(json.loads, lines)}
    for name in ("compacted fp32", "int8.onnx (ours)"):
        ours = rows[name if "ours" in name else f"{name}, onnxruntime"]
        theirs = rows[f"{name}, OpenVINO"]
        assert theirs["accuracy"] == pytest.approx(ours["accuracy"], abs=0.03)
        assert theirs["weight_bytes"] == ours["weight_bytes"]


def test_no_race_on_a_processor_that_computes_something_else(folder, tiny, tmp_path, monkeypatch):
    runtime.export(checkpoint.load(folder / "int8.pth"), folder / "int8.onnx", "vnni")
    monkeypatch.setattr(runtime, "saturates", lambda: True)
    with pytest.raises(UserError, match="int8.onnx is for processors with VNNI"):
        bench.main(few(tiny, tmp_path))
