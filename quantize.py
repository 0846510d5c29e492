"""Quantize the weights and activations of a network.

    python quantize.py                                         PTQ, W8A8: no labels, no training
    python quantize.py --weight-bits 4 --act-bits 4            any bits from 2 to 16; 32 is off
    python quantize.py --method qat --weight-bits 4 --epochs 2 then trained at those bits
    python quantize.py --method reference                      the reference report's quantizer

in:  checkpoints/pruned.pth, or any fp32 network (dead channels are removed first, exactly)
out: checkpoints/quantized.pth: batch norm folded, weights on their grid, static activation steps;
     logs/quantize.jsonl (qat: a line an epoch), plots/quantize.png (qat); while it trains,
     quantized.pth.resume beside it

ptq: equalization, layer reconstruction, bias correction, clips by mean squared error (lib/ptq.py).
qat: learned steps from there on, masks held, distilled from the fp32 parent (lib/qat.py).
reference: one step a tensor, weights static, activations dynamic (the largest magnitude of each
batch of 128), simulated in fp32.
"""

import dataclasses
import json
from pathlib import Path

from autoaugment import augmentation
from lib import (
    checkpoint,
    config,
    engine,
    measure,
    metrics,
    plots,
    processes,
    pruning,
    ptq,
    qat,
    quantizers,
)
from lib.compaction import compact
from lib.config import UserError, flag
from lib.rate import KILOBYTE


@dataclasses.dataclass
class Settings(config.Common):
    parent: str | None = flag(None, "fp32 network; default: checkpoints/pruned.pth")
    out: str | None = flag(None, "output file; default: checkpoints/quantized.pth")
    method: str = flag("ptq", "see above", choices=("ptq", "qat", "reference"))
    weight_bits: int = flag(8, "2 to 16, or 32 for off", choices=quantizers.BITS)
    act_bits: int = flag(8, "of activations: 2 to 16, or 32 for off", choices=quantizers.BITS)
    weight_scale: str = flag(
        "channel", "one step an output channel; or a tensor, as it was before folding, rounded to "
        "nearest (ptq): at 8 bits the integers of an int8 network are kept",
        choices=("channel", "tensor"),
    )  # fmt: skip
    first_last_bits: int | None = flag(
        None, "other bits for the stem's and the classifier's weights and the classifier's input",
        choices=quantizers.BITS,
    )  # fmt: skip
    layer_bits: str | None = flag(
        None, 'a JSON file of weight bits by layer, {"features.3.conv.0.0": 6, ...}'
    )
    scale_bits: int | None = flag(
        None, "mantissa bits of the weights' steps; 23: float32; default: 3; 5 with one a tensor"
    )
    bias_bits: int = flag(
        2, "biases are multiples of a power of two, about 2^-N of the step of what the layer "
        "writes; 32: float32"
    )  # fmt: skip
    rate: float = flag(
        0.0, "squared error of an image's logits that saving 1,000 bytes of weights may cost: "
        "levels are chosen by error and size together; in qat their size joins the loss"
    )  # fmt: skip
    calibration: int = flag(1024, "training images that ptq looks at, without their labels")
    epochs: int = flag(3, "of qat")
    lr: float = flag(2e-4, "peak learning rate of qat (Adam), linear to zero")
    batch_size: int = flag(128, "images a step, over all processes")
    weight_decay: float = flag(0.0, "L2 penalty of qat")
    distill: float = flag(0.5, "weight of the fp32 parent's soft labels in qat; 0: none")
    temperature: float = flag(2.0, "of the soft labels")
    dampen: float = flag(
        0.0, "share of its distance to its level that a weight is moved a step, at the end of qat: "
        "against oscillation"
    )  # fmt: skip
    ema: float = flag(0.0, "decay a step of averaged weights in qat; 0: none")
    augment: str = flag("light", "see train.py", choices=("none", "light", "cutout", "auto"))
    amp: bool = flag(True, "bf16 autocast; fp16 with loss scaling where CUDA lacks bf16")
    compile: bool = flag(False, "torch.compile")
    resume: bool = flag(True, "continue an interrupted qat if its state is there")

    def __post_init__(self):
        if self.weight_scale == "tensor" and self.method != "ptq":
            raise ValueError("--weight-scale tensor is for --method ptq")
        if self.method == "reference" and (self.layer_bits or self.first_last_bits):
            raise ValueError("--layer-bits and --first-last-bits are not for --method reference")
        if not 1 <= (23 if self.scale_bits is None else self.scale_bits) <= 23:
            raise ValueError("--scale-bits must be 1 to 23")
        if not (0 <= self.bias_bits <= 16 or self.bias_bits == 32):
            raise ValueError("--bias-bits must be 0 to 16, or 32 for off")
        if not self.rate >= 0:
            raise ValueError("--rate must be at least 0")
        if self.rate and (self.weight_scale == "tensor" or self.method == "reference"):
            raise ValueError("--rate is for --method ptq or qat with --weight-scale channel")
        if not 1 <= self.calibration <= 50_000:
            raise ValueError("--calibration must be 1 to 50000 images")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("--epochs and --batch-size must be at least 1")
        if not 0 <= self.distill <= 1 or not 0 <= self.dampen < 1 or not 0 <= self.ema < 1:
            raise ValueError("--distill must be in [0, 1], --dampen and --ema in [0, 1)")
        if not self.temperature > 0 or not self.lr > 0 or self.weight_decay < 0:
            raise ValueError("--lr and --temperature must be over 0, --weight-decay at least 0")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = config.device(cfg.device)
    processes.start(device)
    parent = checkpoint.load(cfg.path(cfg.parent, "checkpoints/pruned.pth"), cfg.assume_downsample)
    parent.refuse_quantized()
    model = parent.build(device)
    scheme = scheme_of(cfg, model)
    with processes.main_first():
        images = parent.images(cfg.data, cfg.val_size, device)
    validate = len(images.val) > 0
    before = engine.evaluate(model, images.val) if validate else None
    out = cfg.path(cfg.out, "checkpoints/quantized.pth")

    if cfg.method == "reference":
        quantizers.quantize_reference(model, cfg.weight_bits, cfg.act_bits)
    else:
        fp32, _ = compact(model)
        sample = ptq.calibration(images.train, cfg.calibration, cfg.seed)
        model, latent = ptq.quantize(
            fp32, sample, scheme, engine.progress("calibrate"), scale_bits=cfg.scale_bits,
            bias_bits=cfg.bias_bits, rate=cfg.rate / KILOBYTE,
        )  # fmt: skip
    after = engine.evaluate(model, images.val) if validate else None
    if cfg.method == "qat":
        engine.say(f"ptq: val {after}")
        train(cfg, model, fp32, latent, scheme, images, out, parent)
        after = engine.evaluate(model, images.val) if validate else None

    if processes.is_main():
        figures, text = {}, f"{cfg.method} W{cfg.weight_bits}A{cfg.act_bits}"
        if validate:
            labels = images.val.labels.cpu()
            moved = measure.change(before.predictions == labels, after.predictions == labels)
            figures = {"val_correct": after.correct, "val_total": after.total} | moved
            text += f", val {after}, +{moved['gained']} -{moved['lost']} from the parent's {before}"
        saved = checkpoint.save(
            out, "quantized", model, cfg, parent, metrics=figures, data=images.provenance(),
            quantization=scheme,
        )  # fmt: skip
        if cfg.method == "qat":
            state_file(out).unlink()  # last of all: until here it could be finished again
        else:
            metrics.log_stage(cfg, "quantize", {"bytes": saved.bytes, **scheme, **figures})
        print(f"{out}: {saved.bytes:,} bytes, {text}")
    processes.stop()


def scheme_of(cfg, model) -> dict:
    """The plain data that a checkpoint keeps; UserError where --layer-bits does not fit."""
    if cfg.method == "reference":
        return {"method": "reference", "weight_bits": cfg.weight_bits, "act_bits": cfg.act_bits}
    layers = list(metrics.weight_layers(model))
    own, more = {}, {}
    if cfg.first_last_bits:
        own = dict.fromkeys((layers[0], layers[-1]), cfg.first_last_bits)
        more = {"last_act_bits": cfg.first_last_bits}
    if cfg.layer_bits:
        own |= read_layer_bits(Path(cfg.layer_bits), layers)
    more |= {"method": cfg.method, "weight_scale": cfg.weight_scale, "layer_bits": own}
    return ptq.scheme(cfg.weight_bits, cfg.act_bits, **more)


def read_layer_bits(path: Path, layers: list[str]) -> dict[str, int]:
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--layer-bits {path}: {config.reason(error)}") from None
    if not isinstance(given, dict):
        raise UserError(f"--layer-bits {path}: not an object of layer names and bits")
    for name, bits in given.items():
        if name not in layers:
            raise UserError(f"--layer-bits {path}: no layer {name!r}; the first is {layers[0]}")
        if type(bits) is not int or bits not in quantizers.BITS:
            raise UserError(f"--layer-bits {path}: {name} at {bits!r} bits: 2 to 16, or 32 for off")
    return given


def train(cfg, model, teacher, latent, scheme, images, out, parent) -> None:
    """Quantization-aware training, in place; leaves its state beside `out`."""
    if cfg.rate:  # what was made zero to save bits is pruned: it would sit on zero's border
        for name, layer in metrics.weight_layers(model).items():
            latent[name][layer.weight == 0] = 0
    qat.begin(model, scheme, latent)
    mask = pruning.Mask(model)
    price = cfg.rate / KILOBYTE * qat.NATS  # of a bit

    def after_step(progress: float) -> None:
        if cfg.dampen:
            qat.dampen(model, cfg.dampen * progress)
        mask.apply()

    identity = config.identity(cfg) | {
        "scheme": scheme, "parent": parent.sha256, "data": images.provenance()
    }  # fmt: skip
    log = metrics.Log(cfg.path(None, "logs/quantize.jsonl"), identity, cfg.wandb)
    # Adam: without batch norm, rows of all magnitudes share one rate, and SGD diverges.
    recipe = engine.Recipe.of(cfg, optimizer="adam", schedule="linear", decay_norm=False)
    history, best = engine.fit(
        model, images, recipe, augmentation(cfg.augment), cfg.seed, state_file(out),
        config=identity, resume=cfg.resume, teacher=teacher, after_step=after_step, log=log,
        penalty=(lambda: price * qat.bits(model)) if cfg.rate else None,
    )  # fmt: skip
    qat.finish(model)
    if processes.is_main():
        plots.curves(history, cfg.path(None, "plots/quantize.png"), "Quantization-aware training")
        log.close({"best_epoch": best + 1})


def state_file(out: Path) -> Path:
    return out.with_name(out.name + ".resume")


if __name__ == "__main__":
    config.run(main)
