"""Quantize the weights and activations of a network.

    python quantize.py --weight-bits 4 --act-bits 8

in:  checkpoints/pruned.pth, or any fp32 network
out: checkpoints/quantized.pth: weights on their grid, with their scales; logs/quantize.jsonl

--method reference is the report's: symmetric, one step a tensor, zero preserved, weights static,
activations dynamic (the largest magnitude of each batch of 128), simulated in fp32.
"""

import dataclasses

from lib import checkpoint, config, engine, metrics, quantizers
from lib.config import UserError, flag


@dataclasses.dataclass
class Settings(config.Common):
    parent: str | None = flag(None, "fp32 network; default: checkpoints/pruned.pth")
    out: str | None = flag(None, "output file; default: checkpoints/quantized.pth")
    method: str = flag("reference", "the report's quantizer", choices=("reference",))
    weight_bits: int = flag(8, "2 to 16, or 32 for off", choices=quantizers.BITS)
    act_bits: int = flag(8, "of activations: 2 to 16, or 32 for off", choices=quantizers.BITS)


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = config.device(cfg.device)
    parent = checkpoint.load(cfg.path(cfg.parent, "checkpoints/pruned.pth"))
    if parent.quantization:
        raise UserError(f"{parent.file} is quantized already: start from an fp32 network")
    images = parent.images(cfg.data, cfg.val_size, device)
    model = parent.build(device)
    validate = len(images.val) > 0
    before = engine.evaluate(model, images.val) if validate else None
    scheme = quantizers.quantize_reference(model, cfg.weight_bits, cfg.act_bits)
    after = engine.evaluate(model, images.val) if validate else None

    figures = {"val_correct": after.correct, "val_total": after.total} if validate else {}
    out = cfg.path(cfg.out, "checkpoints/quantized.pth")
    saved = checkpoint.save(
        out, "quantized", model, cfg, parent, metrics=figures, data=images.provenance(),
        quantization=scheme,
    )  # fmt: skip
    metrics.log_stage(cfg, "quantize", {"bytes": saved.bytes, **scheme, **figures})
    bits = f"W{cfg.weight_bits}A{cfg.act_bits}"
    print(f"{out}: {saved.bytes:,} bytes, {bits}, val {after} (parent {before})")


if __name__ == "__main__":
    config.run(main)
