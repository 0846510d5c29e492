"""Train MobileNetV2 on CIFAR-10 from scratch.

    python train.py --data DIR                       the report's recipe, 300 epochs
    torchrun --nproc-per-node 2 train.py --data DIR  data-parallel, with the same global batches

in:  the training images without the validation split
out: checkpoints/baseline.pth (the weights of the best validation epoch), logs/train.jsonl,
     plots/train.png; checkpoints/baseline.pth.resume while it runs
"""

import dataclasses

import torch

from autoaugment import augmentation
from lib import checkpoint, config, data, engine, metrics, plots, processes
from lib.config import flag
from models.mobilenetv2 import MobileNetV2, standard


@dataclasses.dataclass
class Settings(config.Common):
    out: str | None = flag(
        None, "output file; default: checkpoints/baseline.pth", heading="files and data"
    )
    resume: bool = flag(True, "continue an interrupted run if its state is there")
    epochs: int = flag(300, "epochs", heading="recipe")
    batch_size: int = flag(128, "images per step, over all processes")
    lr: float = flag(0.07, "peak learning rate")
    weight_decay: float = flag(5e-4, "L2 penalty; 4e-5 does better at 300 epochs elsewhere")
    decay_norm: bool = flag(True, "decay BN and biases as well (the report does)")
    schedule: str = flag(
        "cosine", "of the learning rate, to zero unless constant",
        choices=("cosine", "linear", "constant"),
    )  # fmt: skip
    warmup_epochs: float = flag(0.0, "epochs of linear warm-up")
    label_smoothing: float = flag(0.1, "share of each label spread over all classes")
    ema: float = flag(0.0, "decay per step of averaged weights, such as 0.999; 0: no average")
    augment: str = flag(
        "auto", "crop and flip (light), with Cutout (cutout), with AutoAugment too (auto)",
        choices=("none", "light", "cutout", "auto"), heading="augmentation",
    )  # fmt: skip
    flip: str = flag(
        "random", "mirror images by chance, or each one in every second epoch",
        choices=("random", "alternate"),
    )  # fmt: skip
    start_side: int = flag(
        32, "side of the first images in pixels; it grows to 32 over the first 70% of the epochs",
        choices=(16, 20, 24, 28, 32),
    )  # fmt: skip
    width: float = flag(1.0, "multiplier of all channels", heading="network")
    downsample: int = flag(4, "32x32 down to 8x8 (4, the report's) or 4x4 (8)", choices=(4, 8))
    dropout: float = flag(0.2, "share of features dropped before the classifier")
    amp: bool = flag(
        True, "bf16 autocast; fp16 with loss scaling if CUDA lacks bf16", heading="run and machine"
    )

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("--epochs and --batch-size must be at least 1")
        if not self.lr > 0 or self.weight_decay < 0:
            raise ValueError("--lr must be over 0, --weight-decay at least 0")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError("--warmup-epochs must be at least 0 and less than --epochs")
        if not 0 <= self.label_smoothing <= 1 or not 0 <= self.ema < 1:
            raise ValueError("--label-smoothing must be in [0, 1], --ema in [0, 1)")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = config.device(cfg.device)
    processes.start(device)
    out = cfg.path(cfg.out, "checkpoints/baseline.pth")
    with processes.main_first():
        images = data.load(cfg.data, cfg.val_size, device)
    try:
        settings = standard(cfg.width, cfg.downsample, cfg.dropout, len(images.classes))
    except ValueError as error:
        raise config.UserError(error) from None
    torch.manual_seed(cfg.seed)
    model = MobileNetV2(settings).to(device, memory_format=torch.channels_last)
    identity = config.identity(cfg) | {"data": images.provenance()}
    engine.say_device(device)
    log = metrics.Log(cfg.path(None, "logs/train.jsonl"), identity, cfg.wandb)
    state_file = out.with_name(out.name + ".resume")

    history, best = engine.fit(
        model, images, engine.Recipe.of(cfg), augmentation(cfg.augment), cfg.seed, state_file,
        config=identity, resume=cfg.resume, log=log,
    )  # fmt: skip
    if processes.is_main():
        final = engine.evaluate(model, images.val) if len(images.val) else None
        figures = {"epoch": history[best]["epoch"]}
        if final:
            figures |= {"val_correct": final.correct, "val_total": final.total}
        saved = checkpoint.save(
            out, "baseline", model, cfg, None, metrics=figures, data=images.provenance()
        )
        title = f"Training for {cfg.epochs} epochs (validation: n={len(images.val)})"
        plots.curves(history, cfg.path(None, "plots/train.png"), title)
        log.close(figures, [cfg.path(None, "plots/train.png")])
        state_file.unlink()  # last: until here, the run could be continued
        print(f"{out}: {saved.bytes:,} bytes, epoch {figures['epoch']}, val {final}")
    processes.stop()


if __name__ == "__main__":
    config.run(main)
