"""lib/metrics.py: intervals and counts."""

import pytest
import torch
from torch import nn

from lib import metrics
from models.mobilenetv2 import MobileNetV2, standard


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
     (1, 29, 0.0061, 0.1718), (940, 1000, 0.9235, 0.9531), (20, 20, 0.8389, 1)],
)  # fmt: skip
def test_wilson_against_published_values(correct, total, low, high):
    found = metrics.wilson(correct, total)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_an_interval_that_narrows_and_mirrors():
    assert metrics.wilson(0, 0) == (0, 1)
    for total in (1, 7, 100, 10_000):
        for correct in {0, 1, total // 3, total}:
            low, high = metrics.wilson(correct, total)
            assert 0 <= low <= correct / total <= high + 1e-12 <= 1 + 1e-12
            mirrored = metrics.wilson(total - correct, total)
            assert mirrored == pytest.approx((1 - high, 1 - low))
            wide = metrics.wilson(correct * 10, total * 10)
            assert wide[1] - wide[0] < high - low


def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1), nn.BatchNorm2d(4), nn.ReLU6(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Flatten(), nn.Linear(4 * 16 * 16, 5),
    )  # fmt: skip


def test_counts_are_of_conv_and_linear_weights_alone():
    model = small()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[3].weight[0, 0, 0, :] = torch.tensor([-0.0, 0.0, 1e-45])
        model[5].bias.zero_()
    assert metrics.layer_counts(model) == [
        ("0", 108, 81), ("3", 36, 34), ("5", 5120, 5120)
    ]  # fmt: skip


@pytest.mark.parametrize("settings", [
    standard(), standard(0.1, 8), standard(0.5, 16), standard(0.35, 32), standard(0.25, classes=3)
])  # fmt: skip
def test_macs_are_those_of_the_network_that_runs(settings):
    model, counts = MobileNetV2(settings).eval(), []
    for layer in metrics.weight_layers(model).values():
        layer.register_forward_hook(
            lambda layer, _, y: counts.append(y[0].numel() * layer.weight[0].numel())
        )
    model(torch.zeros(1, 3, 32, 32))
    assert metrics.macs(settings) == sum(counts)
