"""What is known of a file: the one place that eval.py, sweep.py and report.py take figures from."""

import torch
from torch import Tensor

from lib import data, engine, metrics, runtime
from lib.checkpoint import Checkpoint
from models.mobilenetv2 import MobileNetV2


def file(
    source: Checkpoint, split: data.Split, name: str, known: dict[str, Tensor] | None = None,
    *, integers: bool = True,
) -> tuple[dict, Tensor]:  # fmt: skip
    """All figures of a file on a split, and its confusion matrix (10, 10): true by predicted.

    known: which images each file got right, by its SHA-256; this one is added. Where an ancestor is
    among them, the figures have the change from the nearest one, image by image.
    integers: see lib.runtime.network.
    """
    network = runtime.network(source, split.images.device, integers=integers)
    result = engine.count(network, split, note=str(source.file))
    low, high = metrics.wilson(result.correct, result.total)
    layers = [
        (name.removesuffix(".weight"), weight.numel(), int(torch.count_nonzero(weight)))
        for name, weight in source.state.items() if name.endswith(".weight") and weight.ndim > 1
    ]  # fmt: skip
    nonzeros = sum(n for _, _, n in layers)
    figures = {
        "file": str(source.file), "stage": source.stage, "split": name,
        "correct": result.correct, "total": result.total, "accuracy": result.accuracy,
        "interval": [low, high], "loss": result.loss, "bytes": source.bytes,
        "sha256": source.sha256, "quantization": source.quantization,
        # Of the network that the chain began with; compaction leaves fewer live ones.
        "weights": source.original_weights, "live_weights": source.weights, "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / source.original_weights, "macs": macs(source.settings),
        "arithmetic": network.arithmetic,
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
    classes = source.settings["classes"]
    pairs = labels * classes + result.predictions
    return figures, torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def macs(settings: dict) -> int:
    with torch.device("meta"):  # shapes are all that it takes
        return metrics.macs(MobileNetV2(settings))


def change(before: Tensor, after: Tensor) -> dict[str, int]:
    """Images that were wrong and are right, and the reverse, of two lists of right answers.

    Two networks on the same images differ by far less than their intervals: the noise of the
    sample is common to both (a paired comparison; McNemar 1947)."""
    return {"gained": int((after & ~before).sum()), "lost": int((before & ~after).sum())}
