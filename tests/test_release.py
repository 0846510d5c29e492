"""What lies in release/ is whole, and the README's figures of it are those that were measured."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from lib import checkpoint, runtime, synthetic

ROOT = Path(__file__).parent.parent
RELEASE = checkpoint.RELEASE.parent


@pytest.fixture(scope="module")
def results():
    return json.loads((RELEASE / "results.json").read_text())


def test_the_published_files_are_whole_and_small(results):
    files = results["files"]
    assert results["published"][checkpoint.RELEASE.name] == "compressed.nnz"
    for file, name in results["published"].items():
        raw = (RELEASE / file).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == files[name]["sha256"]
        assert len(raw) == files[name]["bytes"] < (1_000_000 if name != "baseline.pth" else 10**7)
    small, dense = files["compressed.nnz"], files["baseline.pth"]
    assert small["bytes"] < 90_000 and dense["bytes"] > 100 * small["bytes"]


def test_the_published_network_runs_in_integers():
    images = torch.from_numpy(synthetic.make(20, 1)[0]).permute(0, 3, 1, 2)
    network = runtime.network(runtime.load(checkpoint.RELEASE))
    logits = network(images)
    assert network.arithmetic == runtime.INTEGER and logits.shape == (20, 10)
    assert torch.equal(network(images[5:9]), logits[5:9]) and logits.isfinite().all()


def test_the_charts_that_are_published_are_shown():
    page = (ROOT / "RESULTS.md").read_text()
    for chart in RELEASE.glob("*.png"):
        assert f"release/{chart.name}" in page, f"{chart.name} is published but not shown"


@pytest.mark.parametrize("file", [checkpoint.RELEASE, RELEASE / "baseline.pth"])
def test_the_table_of_a_published_file_is_of_that_file(file):
    table = json.loads((ROOT / "results/release.json").read_text())
    (row,) = [row for row in table["rows"] if Path(row[0]).name == file.name]
    assert row[table["columns"].index("bytes")] == file.stat().st_size
