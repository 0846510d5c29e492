"""bench.py on tiny networks: who takes part, what is written; the figures are the machine's."""

import json

import pytest
import torch

import bench
import train
from lib import checkpoint, plots, ptq, quantizers, runtime


def test_all_of_them_run_and_are_written_down(small, pixels, tiny, tmp_path, capsys, monkeypatch):
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
    before = torch.get_num_threads()
    bench.main([f"--data={tiny}", f"--run-dir={tmp_path}", "--threads=1", "--batches=1,4",
                "--turns=2", "--calls=2", "--calibration=64"])  # fmt: skip
    assert torch.get_num_threads() == before
    rows = [json.loads(line) for line in (tmp_path / "logs/bench.jsonl").read_text().splitlines()]
    names = [row["network"] for row in rows]
    assert names[:6] == names[6:] and len(rows) == 12
    assert names[0] == "dense fp32, torch" and names[4:6] == ["quantize_static", "int8.onnx (ours)"]
    by_name = {row["network"]: row for row in rows}
    for row in rows:
        assert row["milliseconds"] > 0 and row["cpu_milliseconds"] > 0 and row["total"] == 100
        assert row["images_a_second"] == pytest.approx(1000 * row["batch"] / row["milliseconds"])
        assert row["turns"] == 2 and row["weight_bytes"] > 0 and row["peak_bytes"] > 0
    for kind in ("dense fp32", "compacted fp32"):  # one network in two runtimes
        torch_row, onnx_row = (by_name[f"{kind}, {r}"] for r in ("torch", "onnxruntime"))
        assert torch_row["accuracy"] == pytest.approx(onnx_row["accuracy"], abs=0.02)
        assert torch_row["peak_bytes"] == onnx_row["peak_bytes"]
    assert rows[0]["ratio"] == rows[0]["cpu_ratio"] == 1
    assert by_name["int8.onnx (ours)"]["peak_bytes"] < by_name["dense fp32, torch"]["peak_bytes"]
    assert (tmp_path / "plots/bench.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "1 thread, batch 4, 2 turns" in out and "accuracy on 100 test images" in out
