"""What is known of a file: the one place that eval.py, sweep.py and report.py take figures from."""

import torch
from torch import Tensor

from lib import data, engine, metrics
from lib.checkpoint import Checkpoint


def file(
    source: Checkpoint, split: data.Split, name: str, known: dict[str, Tensor] | None = None
) -> tuple[dict, Tensor]:
    """All figures of a file on a split, and its confusion matrix (10, 10): true by predicted.

    known: which images each file got right, by its SHA-256; this one is added. Where an ancestor is
    among them, the figures have the change from the nearest one, image by image.
    """
    model = source.build(split.images.device)
    result = engine.evaluate(model, split, note=str(source.file))
    low, high = metrics.wilson(result.correct, result.total)
    layers = metrics.layer_counts(model)
    nonzeros = sum(n for _, _, n in layers)
    figures = {
        "file": str(source.file), "stage": source.stage, "split": name,
        "correct": result.correct, "total": result.total, "accuracy": result.accuracy,
        "interval": [low, high], "loss": result.loss, "bytes": source.bytes,
        "sha256": source.sha256, "quantization": source.quantization,
        # Of the network that the chain began with; compaction leaves fewer live ones.
        "weights": source.original_weights, "live_weights": source.weights, "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / source.original_weights, "macs": metrics.macs(model),
        "layers": [{"name": n, "weights": w, "nonzeros": z} for n, w, z in layers],
        "ancestors": [
            {k: a.get(k) for k in ("stage", "sha256", "bytes")} for a in source.ancestors
        ],
    }  # fmt: skip
    labels = split.labels.cpu()
    known = {} if known is None else known
    known[source.sha256] = result.predictions == labels
    for ancestor in reversed(source.ancestors):
        if ancestor.get("sha256") in known:
            figures["change"] = {"from": ancestor["stage"]} | change(
                known[ancestor["sha256"]], known[source.sha256]
            )
            break
    classes = model.settings["classes"]
    pairs = labels * classes + result.predictions
    return figures, torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def change(before: Tensor, after: Tensor) -> dict[str, int]:
    """Images that were wrong and are right, and the reverse, of two lists of right answers.

    Two networks on the same images differ by far less than their intervals: the noise of the
    sample is common to both (a paired comparison; McNemar 1947)."""
    return {"gained": int((after & ~before).sum()), "lost": int((before & ~after).sum())}
