"""lib/budget.py and the budgets of quantize.py: what is asked for is what comes."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import quantize
import sparse_compress
import to_int8
from lib import budget, checkpoint, data, qat, synthetic
from lib.evaluation import Evaluation, evaluate


def attempts_at(edge: float):
    """A stand-in for quantization: up to the lambda `edge` 10 bytes and 8 of 10, beyond 5 and 4."""

    def attempt(rd_lambda: float) -> budget.Attempt:
        size, correct = (10, 8) if rd_lambda <= edge else (5, 4)
        return budget.Attempt("ptq", rd_lambda, None, {}, size, Evaluation(correct, 10, 1.0, None))

    return attempt


@pytest.mark.parametrize("edge", [0.002, 0.03, 0.5, 0.6, 7.0, 900.0])
@pytest.mark.parametrize("asked", [budget.Budget(max_bytes=7), budget.Budget(min_correct=6)])
def test_the_search_ends_just_on_the_right_side(edge, asked):
    found, tried = budget.search(attempts_at(edge), asked)
    ratio = found.rd_lambda / edge if asked.max_bytes else edge / found.rd_lambda
    assert 1 <= ratio < budget.CLOSE and found in tried and len(tried) < 15
    assert len({a.rd_lambda for a in tried}) == len(tried)


@pytest.mark.parametrize("limit", [30_000, 46_000, 64_000, 200_000])
def test_a_budget_of_bytes_is_used_up_in_few_attempts(limit):
    def attempt(rd_lambda):
        size = round(48_000 * max(rd_lambda, 1e-6) ** -0.27) + 3000
        return budget.Attempt("ptq", rd_lambda, None, {}, size, None)

    found, tried = budget.search(attempt, budget.Budget(max_bytes=limit))
    assert 0.99 * limit < found.bytes <= limit and len(tried) <= 8
    assert 0.0 not in [a.rd_lambda for a in tried] or tried[0].bytes <= limit


def test_a_budget_that_all_rd_lambdas_meet_takes_the_last_one_tried():
    found, _ = budget.search(attempts_at(1.0), budget.Budget(min_correct=4))
    assert budget.HIGHEST / budget.FACTOR < found.rd_lambda <= budget.HIGHEST


def test_without_need_nothing_is_saved():
    found, tried = budget.search(attempts_at(1.0), budget.Budget(max_bytes=1000))
    assert found.rd_lambda == 0 and len(tried) == 2
    # The first attempt already uses the budget up.
    found, tried = budget.search(attempts_at(1.0), budget.Budget(max_bytes=10))
    assert found.rd_lambda == budget.FIRST and len(tried) == 1
    # A lower lambda may lose more, and the search still ends at the edge.
    def uneven(rd_lambda):
        correct = {0.0: 5, 0.5: 4, 0.125: 5}.get(rd_lambda, 7)
        return budget.Attempt("ptq", rd_lambda, None, {}, 10, Evaluation(correct, 10, 1.0, None))

    found, _ = budget.search(uneven, budget.Budget(min_correct=6))
    assert 0.125 / budget.CLOSE < found.rd_lambda < 0.125

    def better(rd_lambda):
        result = Evaluation(7 if rd_lambda == 0.5 else 5, 10, 1.0, None)
        return budget.Attempt("ptq", rd_lambda, None, {}, 10, result)

    found, tried = budget.search(better, budget.Budget(max_bytes=1000))
    assert found.rd_lambda == 0.5 and [a.rd_lambda for a in tried] == [0.5, 0.0]
    # No lambda is small enough, and 0 is.
    found, tried = budget.search(attempts_at(budget.LOWEST / 2), budget.Budget(min_correct=6))
    assert found.rd_lambda == 0 and len({a.rd_lambda for a in tried}) == len(tried)


def test_of_all_that_meet_a_budget_the_best_is_taken():
    """Neither bytes nor accuracy follow the lambda exactly: the last attempt need not be it."""

    def search(asked, by_lambda: dict):
        """The (bytes, correct) that is found; by_lambda: those up to each lambda, ascending."""

        def attempt(rd_lambda):
            size, correct = next(v for edge, v in by_lambda.items() if rd_lambda <= edge)
            result = None if correct is None else Evaluation(correct, 10, 1.0, None)
            return budget.Attempt("ptq", rd_lambda, None, {}, size, result)

        found, tried = budget.search(attempt, asked)
        assert found in tried
        return found.bytes, found.result and found.result.correct

    fits, drops = budget.Budget(max_bytes=100), budget.Budget(min_correct=6)
    # From 0.5 down: 0.125 fits, 0.03 does not; the edge is at 0.1.
    assert search(fits, {0.1: (200, 9), 0.2: (90, 5), 8: (60, 7)}) == (60, 7)
    assert search(fits, {0.1: (200, 9), 0.2: (90, 7), 8: (60, 7)}) == (60, 7)
    assert search(fits, {0.1: (200, 9), 0.2: (90, 8), 8: (60, 7)}) == (90, 8)
    assert search(fits, {0.1: (200, None), 0.2: (90, None), 8: (60, None)}) == (90, None)
    # From 0.5 up: 2 meets it, 8 does not; the edge is at 4.
    assert search(drops, {1: (60, 6), 4: (70, 8), 9999: (50, 5)}) == (60, 6)
    assert search(drops, {1: (70, 6), 4: (70, 8), 9999: (50, 5)}) == (70, 8)
    assert search(drops, {1: (80, 6), 4: (70, 8), 9999: (50, 5)}) == (70, 8)


@pytest.mark.parametrize(("correct", "total", "max_drop", "fewest"), [
    (4000, 5000, 0.06, 3997), (4000, 5000, 1.14, 3943), (24, 30, 10, 21), (24, 30, 9.9, 22),
    (24, 30, 0, 24), (24, 30, 99.9, -5),
])  # fmt: skip
def test_a_loss_of_exactly_the_largest_drop_is_within_it(correct, total, max_drop, fewest):
    assert budget.fewest_correct(correct, total, max_drop) == fewest


@pytest.mark.parametrize("asked", [budget.Budget(max_bytes=4), budget.Budget(min_correct=9)])
def test_a_budget_that_no_rd_lambda_meets_finds_nothing(asked):
    found, tried = budget.search(attempts_at(1.0), asked)
    assert found is None and len(tried) == 7
    assert (0.0 in [a.rd_lambda for a in tried]) == (asked.min_correct is not None)


def test_files_are_compared_by_what_is_asked_for():
    def best(asked, *files):
        """The index of the best of (bytes, correct of 10, loss)."""
        scores = [
            asked.score(
                budget.Attempt("ptq", 1.0, None, None, size, Evaluation(correct, 10, loss, None)),
                0.01 / 8,
            )
            for size, correct, loss in files
        ]
        return scores.index(max(scores))

    # An answer right counts, however sure the network is: 0.3 + 0.5 against 0.2 + 0.5.
    assert best(budget.Budget(), (50, 7, 0.9), (50, 8, 1.1)) == 1
    small, large, lossy = (50, 7, 1.0), (60, 9, 0.8), (40, 3, 3.0)
    assert best(budget.Budget(max_bytes=60), small, large, lossy) == 1
    assert best(budget.Budget(max_bytes=55), small, large, lossy) == 0
    assert best(budget.Budget(max_bytes=30), small, large, lossy) == 2  # the nearest to it
    assert best(budget.Budget(min_correct=3), small, large, lossy) == 2
    assert best(budget.Budget(min_correct=7), small, large, lossy) == 0
    assert best(budget.Budget(min_correct=10), small, large, lossy) == 1  # the nearest to it
    assert best(budget.Budget(), small, large, lossy) == 1  # 0.8, 0.7, 1.1


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
    cfg, given = quantize.Settings(), {"metrics": {}, "data": source}
    dense = checkpoint.save(path.with_name("baseline.pth"), "baseline", model, cfg, None, **given)
    checkpoint.save(path, "pruned", model, cfg, dense, **given)
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


def lines_of(folder) -> list[dict]:
    return [json.loads(x) for x in (folder / "logs/quantize.jsonl").read_text().splitlines()]


def chain(answered, parent, folder, *flags) -> tuple[dict, int]:
    """Run quantize.py and, with their defaults, the stages after it; return its log's line and the
    file's bytes."""
    where = [f"--data={answered}", f"--run-dir={folder}", "--val-size=100"]
    quantize.main([f"--parent={parent}", "--calibration=64", *where, *flags])
    to_int8.main(where)
    sparse_compress.main([f"--run-dir={folder}"])
    return lines_of(folder)[-1], (folder / "checkpoints/compressed.nnz").stat().st_size


def test_max_bytes_is_kept_by_the_file_itself(answered, parent, tmp_path, capsys):
    free, size = chain(answered, parent, tmp_path / "free", "--rd-lambda=0.01")
    assert free["nnz_bytes"] == size
    limit = int(size * 0.8)
    line, size = chain(answered, parent, tmp_path / "small", f"--max-bytes={limit}")
    assert line["nnz_bytes"] == size and 0.9 * limit < size <= limit
    assert line["rd_lambda"] > 0.01 and line["asked"] == f"at most {limit:,} bytes"
    assert {"rd_lambda": line["rd_lambda"], "bytes": size, "val_correct": line["val_correct"]} in (
        line["tried"]
    )
    assert set(line["bits_used"].values()) <= set(range(2, 9))
    assert f"quantized for at most {limit:,} bytes: {size:,} bytes came" in capsys.readouterr().out
    assert (tmp_path / "small/plots/budget.png").is_file()


def test_a_file_has_the_seed_that_its_network_was_quantized_with(answered, parent, tmp_path):
    line, size = chain(answered, parent, tmp_path, "--rd-lambda=1", "--seed=1234567")
    assert checkpoint.load(tmp_path / "checkpoints/compressed.nnz").seed == 1234567
    assert line["nnz_bytes"] == size


def test_max_drop_is_kept_on_validation(answered, parent, tmp_path):
    sizes = []
    for drop in (20, 50):
        line, size = chain(answered, parent, tmp_path / str(drop), f"--max-drop={drop}")
        assert line["val_total"] == 100 and 0 < line["lost"] - line["gained"] <= drop
        sizes.append(size)
    assert sizes[1] < 0.9 * sizes[0]


def test_a_byte_has_a_price_where_nothing_is_wrong_yet(answered, parent):
    file = checkpoint.load(parent)
    network, images = file.build(), file.images(answered, 100, torch.device("cpu"))
    result = evaluate(network, images.val)
    assert result.correct == result.total
    sample = data.sample(images.train, 100, 0)
    for loss in (result.loss, 0.0):
        nothing_wrong = dataclasses.replace(result, loss=loss)
        prices = qat.cost_of_a_bit(network, sample, 1e-4, nothing_wrong, 0.5, 2.0)
        assert all(0 < price < math.inf for price in prices)


QAT = ["--method=qat", "--epochs=2", "--batch-size=20", "--distill=1", "--no-amp"]


def test_training_keeps_an_epoch_within_the_budget(
    answered, parent, tmp_path, capsys, monkeypatch
):
    """Of the epochs that are within it, the most accurate, if ptq's network is less accurate."""
    untrained = quantize.stored_post_training

    def inaccurate(job, out):  # few steps on few images do not win against ptq by themselves
        made = untrained(job, out)
        result = dataclasses.replace(made.fallback.result, correct=0)
        return made._replace(fallback=dataclasses.replace(made.fallback, result=result))

    monkeypatch.setattr(quantize, "stored_post_training", inaccurate)
    _, size = chain(answered, parent, tmp_path, *QAT, "--max-bytes=2200", "--lr=1e-3")
    lines, out = lines_of(tmp_path), capsys.readouterr().out
    within = [x for x in lines if x["bytes"] <= 2200]
    assert all((x["score"] > 0) == (x in within) for x in lines)
    saved = checkpoint.load(tmp_path / "checkpoints/quantized.pth")
    assert "that is kept" not in out and saved.quantization["method"] == "qat"
    best = max(within, key=lambda x: x["val_accuracy"])
    assert saved.metrics["val_correct"] == round(100 * best["val_accuracy"])
    assert saved.metrics["nnz_bytes"] == size == best["bytes"]


@pytest.mark.parametrize("asked", ["--max-bytes=3000", "--rd-lambda=2", "--max-drop=30"])
def test_training_that_ruins_the_network_leaves_what_it_started_from(
    answered, parent, tmp_path, capsys, asked
):
    _, untrained = chain(answered, parent, tmp_path / "ptq", asked)
    _, size = chain(answered, parent, tmp_path / "qat", asked, *QAT, "--lr=1")
    out = capsys.readouterr().out
    assert "no epoch is better than ptq's" in out and "bytes, ptq W8A8" in out
    # The search may end at another lambda, since its files say `qat` and have a few bytes more.
    assert abs(size - untrained) <= 0.1 * untrained
    saved = checkpoint.load(tmp_path / "qat/checkpoints/quantized.pth")
    assert saved.quantization["method"] == "ptq" and saved.metrics["nnz_bytes"] == size
    # What is recorded is the lambda of the file, not the one that training began with. (Until it is
    # kept, the file would say `qat`, and have a few bytes more.)
    if tried := saved.metrics.get("tried"):
        (its,) = [t for t in tried if t["rd_lambda"] == saved.metrics["rd_lambda"]]
        assert 0 <= its["bytes"] - size < 20


def test_training_that_misses_the_budget_leaves_its_best_epoch_beside_the_output(
    answered, parent, tmp_path, monkeypatch
):
    """Its epochs may have taken hours."""
    def without_fallback(job, out):
        return untrained(job, out)._replace(fallback=None)

    untrained = quantize.stored_post_training
    monkeypatch.setattr(quantize, "stored_post_training", without_fallback)
    with pytest.raises(checkpoint.UserError, match="no epoch has at most 30 .*quantized.rejected"):
        chain(answered, parent, tmp_path, *QAT, "--max-drop=30", "--lr=1")
    rejected = checkpoint.load(tmp_path / "checkpoints/quantized.rejected.pth")
    assert rejected.quantization["method"] == "qat" and rejected.build()
    assert not (tmp_path / "checkpoints/quantized.pth").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--max-bytes=300"], "at most 300 bytes: the search came to [0-9,]* bytes"),
        (["--max-drop=0", "--act-bits=2"], "at most 0 points less .* came to .*/100. on valid"),
        (["--max-drop=1", "--val-size=0"], "no validation"),
        (["--max-bytes=3000", "--layer-bits=last=32"], "classifier.1 at 32 bits: .* for 2 to 8"),
        (["--rd-lambda=1", "--layer-bits=last_act=32"], "last_act=32: .* need --act-bits 32 as we"),
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
        ["--rd-lambda=1", "--weight-bits=16"],
        ["--max-bytes=1000", "--weight-scale=tensor"],
    ],
)  # fmt: skip
def test_budgets_that_mean_nothing_are_wrong_usage(flags):
    with pytest.raises(SystemExit) as stop:
        quantize.main(flags)
    assert stop.value.code == 2
