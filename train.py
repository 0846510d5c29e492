"""Train MobileNetV2 on CIFAR-10, from scratch or from the weights of another MobileNetV2.

    python train.py --data DIR                       200 epochs of our recipe
    python train.py --init mobilenet_v2.pth          from torchvision's ImageNet weights
    torchrun --nproc-per-node 2 train.py --data DIR  data-parallel, with the same global batches

in:  the training images without the validation split; with --init, a baseline.pth or the state dict
     of a MobileNetV2, with all the channels of its --width
out: checkpoints/baseline.pth (the weights of the best validation epoch), logs/train.jsonl,
     plots/train.png; checkpoints/baseline.pth.resume while it runs
"""

import dataclasses
import sys

import torch

from autoaugment import augmentation
from lib import checkpoint, config, console, data, devices, engine, logs, plots, processes
from lib.config import flag
from lib.evaluation import evaluate
from lib.files import state_of
from models.mobilenetv2 import MobileNetV2, standard

WIDTHS = [i / 20 for i in range(1, 61)]  # tried, to say which --width a file has


@dataclasses.dataclass
class Settings(config.Training):
    out: str | None = flag(
        None, "output file; default: checkpoints/baseline.pth", heading="files and data"
    )
    init: str | None = flag(
        None, "fp32 file whose weights training starts from, of the same --width; its classifier "
        "too if it has as many classes; the strides are those of --downsample",
    )  # fmt: skip
    epochs: int = flag(200, "epochs", heading="recipe", least=1)
    batch_size: int = flag(128, "images per step, over all processes", least=1)
    lr: float = flag(0.1, "peak learning rate", over=0)
    weight_decay: float = flag(4e-5, "L2 penalty; a short run wants more, such as 5e-4", least=0)
    decay_norm: bool = flag(False, "decay BN and biases as well")
    lr_schedule: str = flag(
        "cosine", "of the learning rate, to zero unless constant",
        choices=("cosine", "linear", "constant"),
    )  # fmt: skip
    warmup_epochs: float | None = flag(
        None, "epochs of linear warm-up; default: 2, but at most a quarter of all"
    )
    label_smoothing: float = flag(
        0.0, "share of each label spread over all classes", least=0, most=1
    )
    ema: float = flag(
        0.0, "decay per step of averaged weights, such as 0.999; 0: no average", least=0, under=1
    )
    sync_batchnorm: bool = flag(True, config.SYNC_BATCHNORM_HELP)
    augment: str = flag(
        "auto", "crop and flip (light), with Cutout (cutout), with AutoAugment too (auto)",
        choices=("none", "light", "cutout", "auto"), heading="augmentation",
    )  # fmt: skip
    flip: str = flag(
        "random", "mirror images by chance, or each one in every second epoch",
        choices=("random", "alternate"),
    )  # fmt: skip
    start_side: int = flag(
        16, "side of the images in the first epochs, in pixels; it grows to 32 over the first 70% "
        "of the epochs",
        choices=(16, 20, 24, 28, 32),
    )  # fmt: skip
    width: float = flag(
        1.0, "multiplier of the channels, which are multiples of 8; under 1 the head keeps its "
        "1,280", heading="network", over=0, most=40,
    )  # fmt: skip
    downsample: int = flag(4, "32x32 down to 8x8 (4, the report's) or 4x4 (8)", choices=(4, 8))
    dropout: float = flag(0.0, "share of features dropped before the classifier", least=0,
                          under=1)  # fmt: skip

    def __post_init__(self):
        if not 0 <= self.warmup < self.epochs:
            raise ValueError("--warmup-epochs must be at least 0 and less than --epochs")
        if self.flip == "alternate" and self.augment == "none":
            raise ValueError("--flip alternate needs an --augment that flips: not none")

    @property
    def warmup(self) -> float:
        """The epochs of warm-up."""
        return min(2.0, self.epochs / 4) if self.warmup_epochs is None else self.warmup_epochs


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    processes.start(device)
    out = cfg.path(cfg.out, "checkpoints/baseline.pth")
    config.refuse_replacing(out, cfg.init)
    source = checkpoint.load(cfg.init, cfg.downsample) if cfg.init else None
    with processes.main_first():
        images = data.load(cfg.data, cfg.val_size, device)
    if source and source.knows(images):
        source.check_held_out(images)
    if not len(images.val) and processes.is_main():  # now, and not after days of training
        print(f"train.py: no validation split: {without_validation(images)}", file=sys.stderr)
    model = network(cfg, len(images.classes), source)
    model = model.to(device, memory_format=torch.channels_last)
    identity = config.identity(cfg) | {"data": images.provenance()}
    origin = {"init_sha256": source.sha256} if source else {}
    identity |= origin
    console.say_device(device)
    log = logs.Log(cfg.in_run("logs/train.jsonl"), identity, cfg.wandb)
    state_file = state_of(out)

    processes.claim(out)
    if not cfg.resume:
        processes.discard(state_file)
    recipe = engine.Recipe.of(cfg, warmup_epochs=cfg.warmup)
    history, best = engine.fit(
        model, images, recipe, augmentation(cfg.augment), cfg.seed, state_file,
        identity=identity, log=log,
    )  # fmt: skip
    if processes.is_main():
        final = evaluate(model, images.val) if len(images.val) else None
        figures = {"epoch": history[best]["epoch"]} | origin
        if final:
            figures |= {"val_correct": final.correct, "val_total": final.total}
        saved = checkpoint.save(
            out, "baseline", model, cfg, None, metrics=figures, data=images.provenance()
        )
        title = f"Training for {cfg.epochs} epochs (validation: n={len(images.val)}"
        title += ", in mixed precision)" if devices.is_mixed(device, cfg.amp) else ")"
        plots.curves(history, cfg.in_run("plots/train.png"), title)
        log.close(figures, [cfg.in_run("plots/train.png")])
        state_file.unlink()  # last: until here, the run could be continued
        val = f"val {final}" if final else "no validation split"
        print(f"{out}: {saved.bytes:,} bytes, epoch {figures['epoch']}, {val}")
    processes.stop()


def network(cfg, classes: int, source: checkpoint.Checkpoint | None) -> MobileNetV2:
    """Return the network to train: with new weights, or with those of `source` (--init).

    Strides are those of --downsample. A classifier for another number of classes stays new. Raises
    UserError for a source that is quantized or folded, or that has other channels than --width.
    """
    try:
        settings = standard(cfg.width, cfg.downsample, cfg.dropout, classes)
    except ValueError as error:
        raise config.UserError(error) from None
    weights = {}
    if source:
        refuse_unfit(source, settings, cfg.width)
        settings["blocks"] = with_residuals_of(source.settings["blocks"], settings["blocks"])
        weights, theirs = source.build().state_dict(), source.settings["classes"]
        said = f"{source.file}: starting from its weights"
        if theirs != classes:
            weights = {name: t for name, t in weights.items() if not name.startswith("classifier.")}
            said += f", without its classifier ({theirs} classes, not {classes})"
        if strides(source.settings) != strides(settings):
            said += f", with the strides of --downsample {cfg.downsample}, not its own"
        console.say(said)
    torch.manual_seed(cfg.seed)
    model = MobileNetV2(settings)
    model.load_state_dict(model.state_dict() | weights)
    return model


def refuse_unfit(source: checkpoint.Checkpoint, settings: dict, width: float) -> None:
    """Raise UserError, with what to do, for a source whose weights do not fit the settings."""
    source.refuse_quantized("--init takes an fp32 network")
    if source.settings.get("folded"):
        raise config.UserError(f"{source.file} has no batch norms any more: give an earlier file")
    theirs = channels(source.settings)
    if theirs != channels(settings):
        fits = [each for each in WIDTHS if channels(standard(each)) == theirs]
        advice = f"give --width {fits[-1]}" if fits else "no --width has them"
        text = f"{source.file} has other channels than --width {width}: {advice}"
        raise config.UserError(text)


def with_residuals_of(theirs: list[dict], blocks: list[dict]) -> list[dict]:
    """Return blocks of a network's settings with the residual connections that another network's
    blocks of the same strides have: files of earlier versions may have fewer."""
    return [
        block | {"residual": its["residual"]} if block["stride"] == its["stride"] else block
        for block, its in zip(blocks, theirs, strict=True)
    ]


def channels(settings: dict) -> list:
    """Return the numbers of channels of a network's layers."""
    blocks = [(b["hidden"], b["out"], b["expand"]) for b in settings["blocks"]]
    return [settings["stem"], *blocks, settings["head"]]


def strides(settings: dict) -> list[int]:
    """Return the strides of a network's stem and blocks."""
    return [settings["stem_stride"], *(b["stride"] for b in settings["blocks"])]


def without_validation(images: data.Data) -> str:
    """Say what it means that no images are held out, and what to do."""
    smallest, classes = int(images.train.labels.bincount().min()), len(images.classes)
    advice = f"give --val-size {classes} or a multiple of it"
    if smallest < 2:
        advice = f"the smallest class has only {smallest} training image"
    return f"the last epoch is kept, and prune.py, which needs one, will refuse it; {advice}"


if __name__ == "__main__":
    config.run(main)
