"""Take the parts of rate-distortion quantization away one by one: what does each bring, in bytes?

    python benchmarks/price.py --parent FILE --data DIR [--rd-lambda 0.8] [--results FILE]

Every row is one run of lib.ptq.quantize without training, at the same lambda: the bytes of the
file, encoded, and the answers of its network on the validation split. Two files are compared by
both: per byte saved, the loss (mean cross-entropy) may rise by --rd-lambda / 1000 *
lib.qat.loss_per_squared_error, about 1e-6 at 0.8 for release/baseline.pth. The last rows differ in
the calibration images alone: their spread is the noise.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from lib import (
    checkpoint,
    config,
    console,
    data,
    devices,
    ptq,
    quantizers,
    reconstruct,
    tables,
    thinning,
)
from lib.compaction import compact
from lib.config import flag
from lib.evaluation import evaluate
from lib.rate import BITS_PER_KILOBYTE

Fit = reconstruct.IntegerLeastSquares


@dataclass
class Settings:
    parent: str | None = flag(None, "an fp32 network, pruned or not", needed=True)
    data: str | None = flag(None, "as for quantize.py")
    assume_downsample: int | None = flag(None, "as for quantize.py", choices=(4, 8, 16, 32))
    rd_lambda: float = flag(0.8, "as for quantize.py", over=0)
    calibration: int = flag(1024, "training images that PTQ looks at", least=1)
    seeds: list[int] = flag([47, 48, 49], "of the calibration images; parts go at the first")
    device: str = flag("auto", "auto, cpu, cuda ...")
    results: str | None = flag(None, "write the table for RESULTS.md, such as results/NAME.json")


def least_error_first(fit: Fit, coarseness) -> None:
    """Start as a fit without lambda does: at the clip of least error."""
    fit.choose_scales()
    fit.estimate_lengths()
    fit.choose_scales()


def free_support(fit: Fit, *args, begin=Fit.__init__, **options) -> None:
    """Let weights that are zero at the start take any level."""
    begin(fit, *args, **options)
    if fit.max_level:  # else it is the fit of a thinned layer, whose channels are to stay away
        fit.mask = torch.ones_like(fit.mask)


def variants() -> dict[str, tuple[list, dict]]:
    """Return {name: (what is replaced, options of ptq.quantize)}."""
    replace = mock.patch.object
    return {
        "nothing": ([], {}),
        "scales start at the clip of least error": (
            [replace(Fit, "scales_for_lambda", least_error_first)], {}
        ),
        "one start, the scale that theory gives": (
            [replace(reconstruct, "COARSENESS", (1.0,)), replace(reconstruct, "FIRST_CHOICE", 0)],
            {},
        ),
        "no thinning": ([replace(thinning, "CAUTION", 0.0)], {}),
        "scales of 3 bits, biases of 2": ([], {"scale_bits": 3, "bias_bits": 2}),
        "weights of at most 4 bits": ([], {"weight_bits": 4}),
        "pruned weights may come back": ([replace(Fit, "__init__", free_support)], {}),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    parent = checkpoint.load(cfg.parent, cfg.assume_downsample)
    images = parent.images(cfg.data, None, device)
    images.split("val")
    small, _ = compact(parent.build(device))

    def row(name: str, replaced: list, options: dict, seed: int) -> list:
        scheme = ptq.make_scheme(options.pop("weight_bits", 8), 8)
        sample = data.sample(images.train, cfg.calibration, seed)
        with contextlib.ExitStack() as stack:
            for replacement in replaced:
                stack.enter_context(replacement)
            network, _ = ptq.quantize(
                small, sample, scheme, console.progress(name),
                lambda_per_bit=cfg.rd_lambda / BITS_PER_KILOBYTE, **options,
            )  # fmt: skip
        raw = parent.encode_child(network, scheme, images.provenance(), seed)
        result = evaluate(network, images.val)
        console.say(f"{name}: {len(raw):,} bytes, val {result}, loss {result.loss:.4f}")
        return [name, len(raw), result.correct, f"{result.loss:.4f}", channels(network)]

    rows = [row(name, *what, cfg.seeds[0]) for name, what in variants().items()]
    rows += [row(f"nothing, seed {seed}", [], {}, seed) for seed in cfg.seeds[1:]]
    table = tables.table(
        "Rate-distortion quantization without its parts",
        ["left out, or replaced", "bytes", f"correct of {len(images.val):,}", "loss",
         "channels of all layers"], rows, device=device,
        text=f"PTQ, 8-bit activations, --rd-lambda {cfg.rd_lambda:g}; the parent has "
        f"{evaluate(small, images.val)} and {channels(small):,} channels. The last rows "
        "differ in the calibration images alone: their spread is the noise. Accuracies are those "
        "of the network in floats; those of its file, in integers, may differ by an image.",
        data=f"{images.source}, validation split, n={len(images.val):,}",
    )  # fmt: skip
    tables.show(table, cfg.results)


def channels(model) -> int:
    """Return the output channels of all layers together: what has a scale and a bias."""
    return sum(len(layer.weight) for layer in quantizers.weight_layers(model).values())


if __name__ == "__main__":
    config.run(main)
