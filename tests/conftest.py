"""A tiny real-shaped data set, and networks that are small in every way."""

import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from lib import data, metrics, synthetic
from models.mobilenetv2 import MobileNetV2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A cifar10.npz of 320 training and 100 test images."""
    path = tmp_path_factory.mktemp("data") / "cifar10.npz"
    x_train, y_train, x_test, y_test = synthetic.make(320, 100)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(path)


@pytest.fixture(scope="session")
def pixels():
    """64 normalized images of the synthetic set, (64, 3, 32, 32)."""
    return data.normalize(torch.from_numpy(synthetic.make(64, 1)[0]).permute(0, 3, 1, 2))


@pytest.fixture(scope="session")
def small(pixels):
    """A function of a seed: a network with every kind of block, that reacts to images.

    Random batch norms, of which some factors are negative; pruned weights, some as -0.0 as a mask
    leaves them; rows, filters and columns of nothing but zeros.
    """
    shapes = [(8, 8, 1, False), (24, 8, 1, False), (24, 8, 1, True), (20, 12, 2, False),
              (36, 12, 1, True), (36, 16, 2, False)]  # fmt: skip

    def make(seed: int) -> MobileNetV2:
        torch.manual_seed(seed)
        model = MobileNetV2({
            "stem": 8, "stem_stride": 2, "head": 32, "classes": 10, "dropout": 0.1,
            "blocks": [{"hidden": hidden, "out": out, "stride": stride, "expand": i > 0,
                        "residual": residual}
                       for i, (hidden, out, stride, residual) in enumerate(shapes)],
        })  # fmt: skip
        with torch.no_grad():
            for layer in metrics.weight_layers(model).values():
                weight = layer.weight
                weight.mul_(torch.rand_like(weight) < 0.7)
                weight[torch.rand(len(weight)) < 0.1] = 0
                if weight.shape[1] > 3:
                    weight[:, torch.rand(weight.shape[1]) < 0.1] = 0
            norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
            for norm in norms:
                norm.weight.uniform_(0.5, 2)
                norm.weight[torch.rand_like(norm.weight) < 0.1] *= -1
                norm.bias.uniform_(-0.5, 1.5)
                norm.momentum = 1.0
            model.train()(pixels)  # statistics of these weights, or the signal dies out
            for norm in norms:
                norm.momentum = 0.1
            model.classifier[1].weight.mul_(10)
            model.classifier[1].bias.normal_()
        return model.eval().to(memory_format=torch.channels_last)

    return make


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def wandb_records():
    """A function of a folder with one finished W&B run: the records of its file."""
    def read(folder):
        (path,) = folder.glob("*.wandb")
        for _ in range(100):  # W&B's process may still be writing
            records = _wandb_records(path.read_bytes())
            if any(record.HasField("exit") for record in records):
                break
            time.sleep(0.1)
        return records

    return read


@pytest.fixture
def run_file(wandb_records):
    """A function of a folder with one W&B run: (its RunRecord, config, summary), from its file."""
    def read(folder):
        config, summary, run = {}, {}, None
        for record in wandb_records(folder):
            run = record.run if record.HasField("run") else run
            for update in (*record.run.config.update, *record.config.update):
                config[update.key] = json.loads(update.value_json)
            for update in record.summary.update:
                key = ".".join(update.nested_key) or update.key
                summary[key] = json.loads(update.value_json)
        return run, config, summary

    return read


def _wandb_records(raw: bytes) -> list:
    """Return the records of a .wandb file: LevelDB's log, blocks of 32 KiB of parts of records."""
    from wandb.proto import wandb_internal_pb2

    records, at, parts = [], 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(raw):  # whole, last
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(parts)
            parts = b""
    return records
