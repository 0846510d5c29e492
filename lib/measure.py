"""Measure a file: accuracy, bytes, non-zeros and MACs, for eval.py, sweep.py and report.py."""

import torch
from torch import Tensor

from lib import data, metrics, runtime
from lib.checkpoint import Checkpoint
from lib.evaluation import evaluate_function


def figures_of_file(
    source: Checkpoint, split: data.Split, name: str,
    correct_by_file: dict[str, Tensor] | None = None, *, integers: bool = True,
) -> tuple[dict, Tensor]:  # fmt: skip
    """Evaluate a file on a split; return its figures and its confusion matrix.

    name: of the split. The matrix is int64 (classes, classes), true classes by predicted ones.
    correct_by_file: which images each file got right, bool (n,), by the file's SHA-256; this file
        is added. If an ancestor is among them, the figures have the change from the nearest one.
    integers: see lib.runtime.network.
    """
    network = runtime.network(source, split.images.device, integers=integers)
    result = evaluate_function(network, split, note=str(source.file))
    low, high = metrics.wilson(result.correct, result.total)
    layers = [
        (name.removesuffix(".weight"), weight.numel(), int(torch.count_nonzero(weight)))
        for name, weight in source.state.items() if metrics.is_weight(name, weight)
    ]  # fmt: skip
    nonzeros = sum(n for _, _, n in layers)
    figures = {
        "file": str(source.file), "stage": source.stage, "split": name,
        "correct": result.correct, "total": result.total, "accuracy": result.accuracy,
        "interval": [low, high], "loss": result.loss, "bytes": source.bytes,
        "sha256": source.sha256, "dtype": source.dtype, "quantization": source.quantization,
        # Of the network that the chain began with; compaction leaves fewer live ones.
        "weights": source.original_weights, "live_weights": source.weights, "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / source.original_weights, "macs": metrics.macs(source.settings),
        "arithmetic": network.arithmetic,
        "layers": [{"name": n, "weights": w, "nonzeros": z} for n, w, z in layers],
        "ancestors": [
            {k: a.get(k) for k in ("stage", "sha256", "bytes")} for a in source.ancestors
        ],
    }  # fmt: skip
    labels = split.labels.cpu()
    correct_by_file = {} if correct_by_file is None else correct_by_file
    correct = correct_by_file[source.sha256] = result.predictions == labels
    for ancestor in reversed(source.ancestors):
        if ancestor.get("sha256") in correct_by_file:
            moved = change(correct_by_file[ancestor["sha256"]], correct)
            figures["change"] = {"from": ancestor["stage"]} | moved
            break
    classes = source.settings["classes"]
    pairs = labels * classes + result.predictions
    return figures, torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def change(before: Tensor, after: Tensor) -> dict[str, int]:
    """Count the images that became right and those that became wrong.

    before, after: which images are right, bool (n,).
    Two networks on the same images differ by far less than their intervals, since both have the
    same sample's noise (a paired comparison; McNemar 1947).
    """
    return {"gained": int((after & ~before).sum()), "lost": int((before & ~after).sum())}
