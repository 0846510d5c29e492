"""lib/thinning.py: which channels go, and how little the network notices."""

import copy

import pytest
import torch

from lib import thinning
from lib.compaction import compact
from lib.folding import fold
from lib.importance import row_importance
from lib.metrics import weight_layers


@pytest.fixture(scope="module")
def network(small, pixels):
    """(a compacted network, the importance of its rows)."""
    model, _ = compact(small(0))
    return model, row_importance(fold(model), pixels)


def thin(*args):
    """The thinned network, whose rows have an importance each."""
    thinned, importance = thinning.thin(*args)
    lengths = {name: len(layer.weight) for name, layer in weight_layers(thinned).items()}
    assert {name: len(value) for name, value in importance.items()} == lengths
    return thinned


def rows_of(model) -> int:
    return sum(len(layer.weight) for layer in weight_layers(model).values())


@torch.no_grad()
def error(model, other, pixels) -> float:
    wrong = model(pixels) - other(pixels)
    return float((wrong - wrong.mean(1, keepdim=True)).square().sum(1).mean())


def test_without_lambda_all_channels_stay(network, pixels):
    model, importance = network
    same = thin(model, pixels, importance, 0.0)
    assert same.settings == model.settings
    torch.testing.assert_close(same(pixels), model(pixels))


def test_a_larger_lambda_takes_more_and_leaves_a_larger_error(network, pixels):
    model, importance = network
    before, rows, errors = copy.deepcopy(model.state_dict()), [rows_of(model)], [0.0]
    for lambda_per_bit in (1e-5, 1e-4, 3e-4):
        thinned = thin(model, pixels, importance, lambda_per_bit)
        rows.append(rows_of(thinned))
        errors.append(error(model, thinned, pixels))
        kept = thinned.settings
        for old, new in zip(model.settings["blocks"], kept["blocks"], strict=True):
            assert new["hidden"] <= old["hidden"] and new["residual"] == old["residual"]
            if len(rows) == 2:  # channels of streams go only once nothing reads them
                assert new["out"] == old["out"]
    assert rows == sorted(rows, reverse=True) and rows[-1] < 0.7 * rows[0] and rows[1] < rows[0]
    assert errors[1] < 0.1 * errors[-1] and errors == sorted(errors)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_channel_without_effect_goes_first(network, pixels):
    model, importance = copy.deepcopy(network[0]), network[1]
    projection = model.blocks[2].project
    projection.weight.data[:, 3] *= 1e-6
    thinned = thin(model, pixels, importance, 1e-9)
    assert thinned.settings["blocks"][2]["hidden"] < model.settings["blocks"][2]["hidden"]
    torch.testing.assert_close(thinned(pixels), model(pixels), rtol=1e-3, atol=1e-3)


def test_the_layers_that_read_them_make_up_for_it(network, pixels, monkeypatch):
    model, importance = network
    fitted = error(model, thin(model, pixels, importance, 1e-4), pixels)
    monkeypatch.setattr(thinning, "refit_floats", lambda *_, **__: None)
    assert fitted < 0.8 * error(model, thin(model, pixels, importance, 1e-4), pixels)
