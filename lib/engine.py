"""The training loop that all stages share, and the evaluation that all figures come from."""

import contextlib
import copy
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lib import checkpoint, data, metrics, quantizers
from lib.augment import SIDE
from lib.config import UserError

EVAL_BATCH = 128  # the report's; its dynamic activation ranges depend on it
GROWTH = 0.7  # of the epochs: how long images grow where they start small


class DivergedError(UserError):
    """The loss is no longer a number."""


@dataclasses.dataclass
class Recipe:
    """How to optimize: what `fit` needs to know beside the network and the images."""

    epochs: int
    batch_size: int = 128
    optimizer: str = "sgd"  # with Nesterov momentum, or adam (AdamW)
    lr: float = 0.07  # peak
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norm: bool = True  # decay BN and biases as well, as the report does
    schedule: str = "cosine"  # or linear, constant; to zero at the last step
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    start_side: int = SIDE  # pixels; under 32, the images of the first epochs are scaled down
    flip: str = "random"  # or alternate: see lib.data.batches
    ema: float = 0.0  # decay a step of the averaged weights; 0: none
    distill: float = 0.0  # weight of the teacher's soft labels against the true ones
    temperature: float = 2.0
    amp: bool = True
    channels_last: bool = True
    compile: bool = False

    @classmethod
    def of(cls, cfg, **fixed) -> "Recipe":
        """From the flags of the same names, and what the stage itself fixes."""
        names = {f.name for f in dataclasses.fields(cls)} & set(vars(cfg))
        return cls(**{name: getattr(cfg, name) for name in names} | fixed)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Of a step counted from the start of the run: a pure function, so resuming is exact."""
        total, warm = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        if step < warm:
            return self.lr * (step + 1) / warm
        progress = (step - warm) / max(1, total - warm)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (1 - progress) if self.schedule == "linear" else self.lr

    def side(self, epoch: int) -> int:
        """Pixels of the images in an epoch: from start_side to 32 in steps of 4 over the first 70%
        of the epochs (progressive resizing; Tan and Le 2021, EfficientNetV2, section 4)."""
        growing = GROWTH * (self.epochs - 1)
        if epoch >= growing:
            return SIDE
        return self.start_side + int((SIDE - self.start_side) * epoch / growing) // 4 * 4


@dataclasses.dataclass
class Evaluation:
    correct: int
    total: int
    loss: float
    predictions: Tensor  # int64 (total,), on the CPU

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{self.accuracy:.2%} ({self.correct}/{self.total})"


@torch.inference_mode()
def evaluate(model: nn.Module, split: data.Split, amp: bool = False, note: str = "") -> Evaluation:
    """Count correct answers over a whole split, in its order, in fp32 unless amp."""
    model.eval()

    def network(images: Tensor) -> Tensor:
        with _autocast(split.images.device, amp):
            return model(data.normalize(images)).float()

    return count(network, split, note)


@torch.inference_mode()
def count(network: Callable, split: data.Split, note: str = "") -> Evaluation:
    """The same of any function from uint8 images to logits."""
    starts = range(0, len(split), EVAL_BATCH)
    shown = tqdm(starts, desc=note or "evaluate", leave=False, disable=_quiet())
    logits = torch.cat([network(split.images[a : a + EVAL_BATCH]) for a in shown])
    predictions = logits.argmax(1)
    correct = int((predictions == split.labels).sum())
    loss = float(F.cross_entropy(logits, split.labels))
    return Evaluation(correct, len(split), loss, predictions.cpu())


def fit(
    model: nn.Module,
    images: data.Data,
    recipe: Recipe,
    augment,
    seed: int,
    state_file: Path,
    *,
    config: dict,
    resume: bool = True,
    teacher: nn.Module | None = None,
    after_step: Callable[[float], None] | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
    velocity: dict[str, Tensor] | None = None,
    log: metrics.Log | None = None,
    note: str = "",
) -> tuple[list[dict], int]:
    """Train `model` in place and leave it with the weights of the best validation epoch.

    state_file: rewritten after every epoch and left behind at the end (the caller deletes it once
        its own output is safe). With `resume`, a state made with the same `config` is continued;
        another's is refused. An epoch depends on (seed, epoch) and on that state alone, so the
        result is bit for bit the uninterrupted one, on CPU.
    teacher: fp32; with recipe.distill, its soft labels are mixed in (Hinton et al. 2015).
    after_step: called after each optimizer step (to hold masks), with the share of the run done.
    penalty: what is added to the loss at each step; the history's losses are without it.
    velocity: SGD's momentum buffers to begin with, by parameter: see `velocity_of`.
    Returns the history, a dict an epoch, and the index of the best epoch in it (the last one
    where there is no validation split). Raises DivergedError when the loss is no longer finite.
    """
    world, rank = processes()
    device = images.train.images.device
    steps = len(images.train) // recipe.batch_size
    if recipe.batch_size % world or not steps:
        raise UserError(
            f"--batch-size {recipe.batch_size} must be a multiple of the {world} processes "
            f"and at most the {len(images.train)} training images"
        )
    if world > 1:
        synchronize_batchnorm(model)
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "adam":
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(
            groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True, fused=True
        )
    for name, parameter in model.named_parameters() if velocity else ():
        optimizer.state[parameter]["momentum_buffer"] = velocity[name].to(device, copy=True)
    scaler = torch.amp.GradScaler(device.type, enabled=_half(device) and recipe.amp)
    average = copy.deepcopy(model) if recipe.ema else None
    # Folded: a third less to compute.
    teacher = quantizers.fold(teacher) if teacher and recipe.distill else None
    history, best, best_state = [], -1, None

    if not resume:
        discard(state_file)
    if state_file.is_file():
        state = checkpoint.read(state_file)
        same_run(state_file, state["config"], config)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:  # a state from before the key was renamed
            group.setdefault("lr_factor", group.pop("rate", 1.0))
        scaler.load_state_dict(state["scaler"])
        if average:
            average.load_state_dict(state["average"])
        history, best, best_state = state["history"], state["best"], state["best_state"]
        say(f"continuing {state_file} after epoch {len(history)}")
    match_layouts(optimizer)
    if log:
        log.begin(history)

    forward = model
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(model)
    if recipe.compile:
        forward = torch.compile(forward)

    saved = len(history)
    try:
        for epoch in range(len(history), recipe.epochs):
            start = time.monotonic()
            torch.manual_seed(seed * 1_000_003 + epoch + rank * 999_983)  # dropout: its own a rank
            totals = train_epoch(
                forward, images.train, recipe, augment, optimizer, scaler, average, seed, epoch,
                steps, teacher=teacher, after_step=after_step, penalty=penalty,
                note=f"{note}epoch {epoch + 1}/{recipe.epochs}",
            )  # fmt: skip
            if world > 1:
                dist.all_reduce(totals)
            loss, correct = (totals / (steps * recipe.batch_size)).tolist()
            if not math.isfinite(loss):
                where = f"at epoch {epoch + 1}"
                raise DivergedError(f"the loss is {loss} {where}: lower --lr, or --no-amp")
            line = {
                "epoch": epoch + 1, "train_loss": loss, "train_accuracy": correct,
                "lr": recipe.learning_rate((epoch + 1) * steps - 1, steps),
            }  # fmt: skip
            final = average or model
            if len(images.val):
                result = evaluate(final, images.val, recipe.amp)
                line |= {"val_loss": result.loss, "val_accuracy": agreed(result.accuracy, device),
                         "val_total": result.total}  # fmt: skip
            line["seconds"] = round(time.monotonic() - start, 1)
            history.append(line)
            if best < 0 or line.get("val_accuracy", 1) > history[best].get("val_accuracy", 0):
                best = epoch
                best_state = {k: v.cpu().clone() for k, v in final.state_dict().items()}
            if rank == 0:
                checkpoint.write(state_file, {
                    "config": config, "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "average": average.state_dict() if average else None,
                    "history": history, "best": best, "best_state": best_state,
                })  # fmt: skip
            saved = epoch + 1
            if log:
                log(line)
            say(_summary(line, f"{note}epoch {epoch + 1}/{recipe.epochs}"))
    except KeyboardInterrupt:
        held = f"{state_file} holds {note}epoch {saved}" if saved else f"{note}epoch 0"
        raise KeyboardInterrupt(f"{held}; continue with --resume") from None
    model.load_state_dict(best_state)
    return history, best


def velocity_of(state_file: Path, model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """SGD's momentum buffers at the end of the finished run whose state that is, by parameter."""
    parameters = [p for group in parameter_groups(model, recipe) for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    state = checkpoint.read(state_file)["optimizer"]["state"]
    return {names[id(p)]: state[i]["momentum_buffer"] for i, p in enumerate(parameters)}


def match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give each of the optimizer's buffers the strides of its parameter.

    A fused optimizer walks both in the order of memory. Compaction leaves buffers contiguous where
    the weights are channels-last: on the CPU that permutes them in silence, on CUDA it raises.
    """
    for parameter, state in optimizer.state.items():
        for name, buffer in state.items():
            if buffer.shape == parameter.shape and buffer.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)


def train_epoch(forward, split, recipe, augment, optimizer, scaler, average, seed, epoch, steps,
                 *, teacher, after_step, note, penalty=None) -> Tensor:  # fmt: skip
    """One epoch; returns [sum of losses, correct answers] of this rank, on the device.

    Nothing in a step waits for the device: the totals are read once, by the caller.
    """
    world, rank = processes()
    device = split.images.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    forward.train()
    batches = data.batches(
        split, recipe.batch_size, augment, seed, epoch, rank, world, recipe.flip == "alternate"
    )
    side = recipe.side(epoch)
    for i, (x, labels) in enumerate(
        tqdm(batches, total=steps, desc=note, leave=False, disable=_quiet() or rank > 0)
    ):
        step = epoch * steps + i
        if side < SIDE:
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        if not recipe.channels_last:
            x = x.contiguous()
        for group in optimizer.param_groups:
            group["lr"] = group["lr_factor"] * recipe.learning_rate(step, steps)
        with _autocast(device, recipe.amp):
            logits = forward(x)
            with torch.no_grad():
                soft = teacher(x).float() if teacher else None
        loss = _loss(logits.float(), labels, soft, recipe)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss + penalty() if penalty else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if after_step:
            after_step((step + 1) / (recipe.epochs * steps))
        if average:
            # Short memory at first (as in TensorFlow's ExponentialMovingAverage), so that the
            # random start is forgotten.
            decay = min(recipe.ema, (1 + step) / (10 + step))
            update_average(average, _plain(forward), decay)
        with torch.no_grad():
            totals[0] += loss.detach() * len(labels)
            totals[1] += (logits.argmax(1) == labels).sum()
    return totals


def _loss(logits: Tensor, labels: Tensor, soft: Tensor | None, recipe: Recipe) -> Tensor:
    hard = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if soft is None:
        return hard
    t = recipe.temperature
    kl = F.kl_div(
        F.log_softmax(logits / t, 1), F.log_softmax(soft / t, 1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return (1 - recipe.distill) * hard + recipe.distill * t * t * kl


def _plain(forward: nn.Module) -> nn.Module:
    """The plain network under torch.compile's and DistributedDataParallel's wrappers."""
    forward = getattr(forward, "_orig_mod", forward)
    return getattr(forward, "module", forward)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, BN statistics included."""
    pairs = [
        (a, m)
        for a, m in zip(average.state_dict().values(), model.state_dict().values(), strict=True)
        if a.is_floating_point()
    ]
    torch._foreach_lerp_([a for a, _ in pairs], [m for _, m in pairs], 1 - decay)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Weights with decay, BN and biases with or without; a parameter's `lr_factor` multiplies its
    learning rate."""
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            decay = recipe.weight_decay if recipe.decay_norm or p.ndim > 1 else 0.0
            groups.setdefault((decay, getattr(p, "lr_factor", 1.0)), []).append(p)
    return [
        {"params": params, "weight_decay": decay, "lr_factor": lr_factor}
        for (decay, lr_factor), params in groups.items()
    ]


def same_run(path: Path, found: dict, wanted: dict) -> None:
    different = [
        f"{key} was {found.get(key)}, is {wanted.get(key)}"
        for key in sorted(found | wanted)
        if found.get(key) != wanted.get(key)
    ]
    if different:
        raise UserError(
            f"{path} is the state of another run ({'; '.join(different)}): "
            "give its flags to continue it, or --no-resume to discard it"
        )


def _half(device: torch.device) -> bool:
    """Whether mixed precision has to be fp16, which needs loss scaling (CUDA without bf16)."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def _autocast(device: torch.device, enabled: bool):
    dtype = torch.float16 if _half(device) else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=enabled and not _slow_bf16(device))


def _slow_bf16(device: torch.device) -> bool:
    """A CPU for which oneDNN has no bf16 kernels but its reference code: 100 times slower than fp32
    (seen on one with AVX2 alone)."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return device.type == "cpu"
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def progress(note: str):
    """A function that shows how far a loop over a list is."""
    return lambda items: tqdm(items, desc=note, leave=False, disable=_quiet() or not is_main())


def _quiet() -> bool:
    return not sys.stderr.isatty()


def say(text: str) -> None:
    """A plain line for people, from the main process alone."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()


def _summary(line: dict, note: str) -> str:
    text = f"{note}  loss {line['train_loss']:.4f}  train {line['train_accuracy']:.2%}"
    if "val_accuracy" in line:
        text += f"  val {line['val_accuracy']:.2%} (n={line['val_total']})"
    return f"{text}  {line['seconds']:.0f} s"


def processes() -> tuple[int, int]:
    """(processes, this one's rank)."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def start_processes(device: torch.device) -> None:
    """Join the other processes where torchrun started this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Hours: a process may wait for another that has the longer half of a sweep.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12)
        )


def stop_processes() -> None:
    wait()  # the main process may still be writing
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """For all processes, before one reads what another wrote or deleted."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first():
    """The main process goes through the block before the others (a download, say)."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def agreed(value: float, device: torch.device) -> float:
    """The main process's value: decisions taken on it are the same in all."""
    if dist.is_initialized():
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        value = shared.item()
    return value


def discard(*state_files: Path) -> None:
    """Delete the state of an earlier run, once, for all processes."""
    if is_main():
        for file in state_files:
            file.unlink(missing_ok=True)
    wait()


def is_main() -> bool:
    return processes()[1] == 0


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class _SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the global batch. torch's own SyncBatchNorm refuses CPU tensors; this one
    runs the same lines on any device. In eval mode, and in a state dict, it is an ordinary one."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = _AllReduce.apply(x32.sum((0, 2, 3))) / count
        centred = x32 - mean.view(1, -1, 1, 1)
        # Two passes: the mean of squares less the square of the mean loses digits in float32.
        var = _AllReduce.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def synchronize_batchnorm(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SyncBatchNorm
