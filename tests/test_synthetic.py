"""The embedded image set: its form, that every machine draws it alike, and that it is not trivial.

That the small network passes 90% on it is the demo's own check.
"""

import hashlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib import synthetic


@pytest.fixture(scope="module")
def images():
    return synthetic.make(3000, 1000)


def test_form(images):
    x_train, y_train, x_test, y_test = images
    assert len(set(synthetic.CLASSES)) == 10
    for x, y, n in ((x_train, y_train, 3000), (x_test, y_test, 1000)):
        assert x.shape == (n, 32, 32, 3) and x.dtype == np.uint8
        assert y.shape == (n,) and y.dtype == np.uint8
        assert np.bincount(y).tolist() == [n // 10] * 10
        assert len(set(y[:100])) == 10  # shuffled: any slice holds every class


def test_counts_that_ten_does_not_divide():
    _, y_train, x_test, y_test = synthetic.make(23, 7)
    assert sorted(np.bincount(y_train, minlength=10)) == [2] * 7 + [3] * 3
    assert len(x_test) == 7 and len(set(y_test)) == 7


def test_pinned_pixels():
    digest = hashlib.sha256(b"".join(a.tobytes() for a in synthetic.make(40, 20))).hexdigest()
    assert digest == "74b28daeef88c153e598e318306ea3e8b88b945cd2acbeb7d8fe08fe04dddceb"


def test_same_seed_same_set_other_seed_another(images):
    again = synthetic.make(10, 1000)  # the test split is the same whatever the train split
    assert all(np.array_equal(a, b) for a, b in zip(again[2:], images[2:], strict=True))
    assert not np.array_equal(synthetic.make(10, 1000, seed=1)[2], images[2])


def test_no_image_twice_and_none_in_both_splits(images):
    drawn = [image.tobytes() for image in np.concatenate((images[0], images[2]))]
    assert len(set(drawn)) == 4000


def test_every_class_stands_out_from_its_background(images):
    x, y = images[0].astype(np.int32), images[1]
    means = np.stack([x[y == k].mean(axis=(0, 3)) for k in range(10)])
    assert (means[:, 12:20, 12:20].mean((1, 2)) > means[:, :3, :3].mean((1, 2)) + 5).all()


def test_a_linear_classifier_stays_under_60_percent(images):
    x_train, y_train, x_test, y_test = (torch.from_numpy(a) for a in images)

    def pixels(x):
        return (x.flatten(1).float() - 120) / 60

    x, y = pixels(x_train), y_train.long()
    linear = torch.nn.Linear(x.shape[1], 10)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x), y) + 0.15 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        accuracy = (linear(pixels(x_test)).argmax(1) == y_test).float().mean().item()
    assert 0.2 < accuracy < 0.6
