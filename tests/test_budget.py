"""lib/budget.py and the budgets of quantize.py: what is asked for is what comes."""

import json

import numpy as np
import pytest
import torch

import quantize
import sparse_compress
import to_int8
from lib import budget, checkpoint, data, synthetic


def attempts_at(size, accuracy=lambda price: 0.0):
    """A stand-in for quantization: bytes by price."""
    return lambda price: budget.Attempt(price, None, {}, size(price), accuracy(price))


@pytest.mark.parametrize("edge", [0.002, 0.03, 0.5, 0.6, 7.0, 900.0])
@pytest.mark.parametrize("highest", [False, True])
def test_the_search_ends_just_on_the_right_side(edge, highest):
    found, tried = budget.search(
        attempts_at(lambda price: 1000),
        lambda a: a.rd_lambda <= edge if highest else a.rd_lambda >= edge, highest=highest,
    )  # fmt: skip
    ratio = edge / found.rd_lambda if highest else found.rd_lambda / edge
    assert 1 <= ratio < budget.CLOSE and found in tried and len(tried) < 15
    assert len({a.rd_lambda for a in tried}) == len(tried)


def test_a_budget_that_all_prices_meet_takes_the_last_one_tried():
    everything = lambda a: True  # noqa: E731
    found, _ = budget.search(attempts_at(lambda price: 1), everything, highest=True)
    assert budget.HIGHEST / budget.FACTOR < found.rd_lambda <= budget.HIGHEST
    found, _ = budget.search(attempts_at(lambda price: 1), everything, highest=False)
    assert budget.LOWEST <= found.rd_lambda < budget.LOWEST * budget.FACTOR


def test_a_budget_that_no_price_meets_finds_nothing():
    for highest in (False, True):
        found, tried = budget.search(
            attempts_at(lambda price: 1), lambda a: False, highest=highest
        )
        assert found is None and len(tried) > 3


# ---- quantize.py ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(small, pixels, tmp_path_factory):
    """A network that gives each answer to some images."""
    model, path = small(0), tmp_path_factory.mktemp("parent") / "pruned.pth"
    with torch.no_grad():
        logits, classifier = model(pixels), model.linear
        spread = logits.std(0).clamp(min=1e-3)  # a row of zeros has none
        classifier.weight.div_(spread[:, None])
        classifier.bias.sub_(logits.mean(0)).div_(spread)
    source = {"source": "cifar10", "val_size": 100}
    checkpoint.save(path, "pruned", model, quantize.Settings(), None, metrics={}, data=source)
    return path


@pytest.fixture(scope="module")
def answered(parent, tmp_path_factory):
    """A set whose labels are the network's own answers, 20 of each: it has all of them right."""
    pixels = synthetic.make(4000, 1)[0]
    with torch.no_grad():
        x = data.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        answers = checkpoint.load(parent).build()(x).argmax(1).numpy()
    chosen = np.concatenate([np.flatnonzero(answers == label)[:20] for label in range(10)])
    assert len(chosen) == 200
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    x, y = pixels[chosen], answers[chosen]
    np.savez(path, x_train=x, y_train=y, x_test=x[::10], y_test=y[::10])
    return str(path)


def chain(answered, parent, folder, *flags) -> tuple[dict, int]:
    """Run quantize.py and the stages behind it; return its log's line and the file's bytes."""
    where = [f"--data={answered}", f"--run-dir={folder}", "--val-size=100"]
    quantize.main([f"--parent={parent}", "--calibration=64", *where, *flags])
    to_int8.main(where)
    sparse_compress.main([f"--run-dir={folder}"])
    line = json.loads((folder / "logs/quantize.jsonl").read_text())
    return line, (folder / "checkpoints/compressed.nnz").stat().st_size


def test_max_bytes_is_kept_by_the_file_itself(answered, parent, tmp_path, capsys):
    free, size = chain(answered, parent, tmp_path / "free", "--rd-lambda=0.01")
    assert free["nnz_bytes"] == size
    limit = int(size * 0.8)
    line, size = chain(answered, parent, tmp_path / "small", f"--max-bytes={limit}")
    assert line["nnz_bytes"] == size and 0.9 * limit < size <= limit
    assert line["rd_lambda"] > 0.01 and line["asked"] == f"at most {limit:,} bytes"
    assert set(line["bits_used"].values()) <= set(range(2, 9))
    assert f"quantized for at most {limit:,} bytes: {size:,} bytes came" in capsys.readouterr().out
    assert (tmp_path / "small/plots/budget.png").is_file()


def test_max_drop_is_kept_on_validation(answered, parent, tmp_path):
    sizes = []
    for drop in (20, 50):
        line, size = chain(answered, parent, tmp_path / str(drop), f"--max-drop={drop}")
        assert line["val_total"] == 100 and 0 < line["lost"] - line["gained"] <= drop
        sizes.append(size)
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--max-bytes=300"], "--max-bytes 300: .* bytes at least"),
        (["--max-drop=0", "--act-bits=2"], "--max-drop 0.0: the best network"),
        (["--max-drop=1", "--val-size=0"], "no validation"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_an_error(answered, parent, tmp_path, flags, reason):
    with pytest.raises(checkpoint.UserError, match=reason):
        quantize.main([
            f"--parent={parent}", "--calibration=64", f"--data={answered}", f"--run-dir={tmp_path}",
            "--val-size=100", *flags,
        ])  # fmt: skip
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-bytes=1000", "--max-drop=1"], ["--max-bytes=1000", "--rd-lambda=1"],
        ["--max-bytes=0"], ["--max-drop=-1"], ["--max-drop=nan"],
        ["--max-drop=1", "--method=reference"], ["--max-drop=1", "--weight-bits=32"],
        ["--max-bytes=1000", "--weight-scale=tensor"],
    ],
)  # fmt: skip
def test_budgets_that_mean_nothing_are_wrong_usage(flags):
    with pytest.raises(SystemExit) as stop:
        quantize.main(flags)
    assert stop.value.code == 2
