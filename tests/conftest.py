"""A tiny real-shaped data set and the settings that keep a network small."""

import numpy as np
import pytest
import torch

from lib import synthetic


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A cifar10.npz of 320 training and 100 test images."""
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    x_train, y_train, x_test, y_test = synthetic.make(320, 100)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(path)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
