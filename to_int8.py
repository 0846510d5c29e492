"""Store the weights of a quantized network as the integers that they are.

    python to_int8.py

in:  checkpoints/quantized.pth, weights at 8 bits or fewer
out: checkpoints/int8.pth: int8 weights with their scales, the rest as it was; logs/int8.jsonl
"""

import dataclasses

import torch

from lib import checkpoint, config, engine, metrics, quantizers
from lib.config import UserError, flag


@dataclasses.dataclass
class Settings(config.Common):
    parent: str | None = flag(None, "quantized network; default: checkpoints/quantized.pth")
    out: str | None = flag(None, "output file; default: checkpoints/int8.pth")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = config.device(cfg.device)
    parent = checkpoint.load(cfg.path(cfg.parent, "checkpoints/quantized.pth"))
    scheme = parent.quantization
    bits = max(scheme["weight_bits"], *scheme.get("layer_bits", {}).values(), 0) if scheme else 32
    if bits > 8:
        raise UserError(f"{parent.file} has {bits}-bit weights: quantize them to 8 or fewer first")
    images = parent.images(cfg.data, cfg.val_size, device)
    model = parent.build(device)
    try:
        state = quantizers.integer_state(model.state_dict(), scheme)
    except ValueError as error:
        raise UserError(f"{parent.file}: {error}") from None

    expected = engine.evaluate(model, images.val) if len(images.val) else None
    figures = {"val_correct": expected.correct, "val_total": expected.total} if expected else {}
    out = cfg.path(cfg.out, "checkpoints/int8.pth")
    saved = checkpoint.save(
        out, "int8", model, cfg, parent, metrics=figures, data=images.provenance(),
        quantization=scheme, state=state,
    )  # fmt: skip

    # What was written is what counts: the same weights to the bit, the same answers to the image.
    again = saved.build(device)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    if same and expected:
        same = torch.equal(engine.evaluate(again, images.val).predictions, expected.predictions)
    if not same:
        out.unlink()
        raise UserError(f"{out} was not the same network as {parent.file}: it is deleted")
    metrics.log_stage(cfg, "int8", {"bytes": saved.bytes, **figures})
    print(f"{out}: {saved.bytes:,} bytes (parent {parent.bytes:,}), val {expected}, checked")


if __name__ == "__main__":
    config.run(main)
