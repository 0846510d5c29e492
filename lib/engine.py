"""The recipe, and the training loop that all stages share."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lib import checkpoint, console, data, devices, logs, processes, replay
from lib.augment import SIDE
from lib.config import UserError
from lib.evaluation import BrokenNetworkError, Evaluation, evaluate
from lib.folding import fold

# Training images that say how large logits are (see `match_logits`), what a bit costs (lib/qat.py),
# and what the logits lose without a weight (lib/pruning.py).
LOGIT_IMAGES = 512
MOMENTUM = 0.9  # of SGD, Nesterov's
GROWTH = 0.7  # share of the epochs during which images grow, if they start small


class DivergedError(UserError):
    """The training loss, a weight or an answer is infinite or NaN."""


@dataclasses.dataclass
class Recipe:
    """How to optimize: everything that `fit` needs to know but the network and the images."""

    epochs: int
    batch_size: int = 128  # images per step, over all processes
    optimizer: str = "sgd"  # with Nesterov momentum; or adam (AdamW)
    lr: float = 0.07  # peak
    weight_decay: float = 5e-4
    decay_norm: bool = True  # decay batch norm and biases as well, as the report does
    lr_schedule: str = "cosine"  # or linear, constant; the first two end at zero
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    start_side: int = SIDE  # pixels; if less than 32, images of the first epochs are scaled down
    flip: str = "random"  # or alternate: see lib.data.batches
    ema: float = 0.0  # decay per step of the averaged weights; 0: no average
    distill: float = 0.0  # weight of the teacher's soft labels against the true ones
    temperature: float = 2.0  # of the soft labels
    views: int = 0  # epochs with batches of their own, which later ones repeat; 0: all epochs
    sync_batchnorm: bool = True  # with several processes: statistics of the images of all of them
    amp: bool = True  # mixed precision
    cuda_graph: bool = True  # on one GPU, record a step and replay it: see lib.replay

    @classmethod
    def of(cls, cfg, **fixed) -> "Recipe":
        """Make a recipe from a stage's settings of the same names; `fixed` overrides them."""
        names = {f.name for f in dataclasses.fields(cls)} & set(vars(cfg))
        return cls(**{name: getattr(cfg, name) for name in names} | fixed)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from the start of the run.

        It depends on nothing else, so a resumed run has exactly the same rates.
        """
        total, warm = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        if step < warm:
            return self.lr * min(1, (step + 1) / warm)
        progress = (step - warm) / max(1, total - warm)
        shapes = {
            "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress,
            "constant": 1.0,
        }  # fmt: skip
        return self.lr * shapes[self.lr_schedule]

    def side(self, epoch: int) -> int:
        """Return the side of the training images in an epoch, in pixels.

        It grows from start_side to 32 in steps of 4 during the first 70% of the epochs
        (progressive resizing; Tan and Le 2021, EfficientNetV2, section 4).
        """
        growing = GROWTH * (self.epochs - 1)
        if epoch >= growing:
            return SIDE
        return self.start_side + int((SIDE - self.start_side) * epoch / growing) // 4 * 4


def fit(
    model: nn.Module,
    images: data.Data,
    recipe: Recipe,
    augment,
    seed: int,
    state_file: Path,
    *,
    identity: dict,
    teacher: nn.Module | None = None,
    after_step: Callable[[], None] | None = None,
    penalty: Callable[[], torch.Tensor] | None = None,
    velocity: dict[str, Tensor] | None = None,
    judge: Callable[[nn.Module, int], tuple[Evaluation, dict, float]] | None = None,
    log: logs.Log | None = None,
    note: str = "",
) -> tuple[list[dict], int]:
    """Train `model` in place and leave it with the weights of the best validation epoch.

    augment: an object with two methods, such as autoaugment.Augmentation.
        draw(n, generator) -> dict of CPU tensors of first dimension n: what happens to n images,
            drawn from that torch.Generator alone. A tensor named `flip`, (n,) of 0 and 1, is
            overwritten under recipe.flip "alternate".
        apply(images, params) -> images: uint8 (m, 3, 32, 32) on the device to the same, with the
            m matching rows of each of these tensors. (m, 3, s, s) is possible too.
    state_file: rewritten after every epoch and left behind at the end (the caller deletes it once
        its own output is safe). A state of the same `identity` is continued; another run's is
        refused (config.refuse_other_run). An epoch depends on (seed, epoch) and on that state
        alone, so the result equals an uninterrupted run's to the bit, on the CPU.
    teacher: an fp32 network; with recipe.distill, its soft labels are mixed in (Hinton, Vinyals
        and Dean 2015). It answers batches that repeat (recipe.views) once.
    after_step: called after each optimizer step; to hold masks, for example.
    penalty: a function whose result is added to the loss at each step; logged losses are without.
        With a CUDA graph (lib/replay.py), penalty and after_step are part of the recorded step:
        their kernels run in every step, their Python code only in the first few of an epoch.
    velocity: momentum buffers for SGD to begin with, by parameter name: see `velocity_of`.
    judge: what decides which epoch is best; by default its validation accuracy. A function of the
        network in training and the number of the epoch, from 1. It returns three things:
        the network's Evaluation on images.val;
        a dict of further figures for the log;
        a score: the epoch of the highest one is kept.
    log: gets a line per epoch.
    note: a prefix of what is shown for each epoch.

    Returns the history, one dict per epoch, and the index of the best epoch in it (the last one if
    there is no validation split). `images_per_second` there is of the training alone; `peak_bytes`,
    on a GPU, is the most of its memory that this process has taken so far. Raises DivergedError if
    the loss, a weight or an answer is no longer finite, and UserError for a batch size that does
    not fit and for the state of another run.
    """
    world, rank = processes.world_and_rank()
    device = images.device
    refuse_unfit_batches(recipe.batch_size, images.train)
    steps = len(images.train) // recipe.batch_size
    if world > 1 and recipe.sync_batchnorm:
        processes.synchronize_batchnorm(model)
    state = TrainingState.start(model, recipe, velocity)
    # Without batch norm, the teacher is a third less to compute.
    teacher = fold(teacher) if teacher and recipe.distill else None
    if state_file.is_file():
        state.restore(state_file, identity)
        console.say(f"continuing {state_file} after epoch {len(state.history)}")
    if log:
        log.begin(state.history)
    forward = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    saved_epochs = len(state.history)
    try:
        for epoch in range(saved_epochs, recipe.epochs):
            start = time.monotonic()
            # For dropout, which is a different one in each process.
            torch.manual_seed(seed * 1_000_003 + epoch + rank * 999_983)
            totals = train_epoch(
                state, images.train, recipe, augment, seed, epoch, forward=forward,
                teacher=teacher, after_step=after_step, penalty=penalty,
                note=f"{note}epoch {epoch + 1}/{recipe.epochs}",
            )  # fmt: skip
            broken = torch.stack([~x.isfinite().all() for x in float_tensors(state.final)]).any()
            totals = torch.cat([totals, broken.double().view(1)])
            if world > 1:
                dist.all_reduce(totals)
            count = steps * recipe.batch_size
            loss, correct, broken = (totals / count).tolist()
            advice = f"at epoch {epoch + 1}: lower --lr, or --no-amp"
            advice += ", with --no-resume" * state_file.is_file()
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} {advice}")
            if broken:  # the loss is of the weights before the last step
                raise DivergedError(f"weights are infinite or NaN {advice}")
            line = {
                "epoch": epoch + 1, "train_loss": loss, "train_accuracy": correct,
                "lr": recipe.learning_rate((epoch + 1) * steps - 1, steps),
                "images_per_second": round(count / (time.monotonic() - start), 1),
            }  # fmt: skip
            if device.type == "cuda":
                line["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            try:
                line |= _validated(state.final, images, recipe, judge, epoch + 1)
            except BrokenNetworkError as error:
                raise DivergedError(f"{error} {advice}") from None
            line["seconds"] = round(time.monotonic() - start, 1)
            state.add(line)
            state.save(state_file, identity)
            saved_epochs = epoch + 1
            if log:
                log(line)
            console.say(_summary(line, f"{note}epoch {epoch + 1}/{recipe.epochs}"))
    except KeyboardInterrupt:
        held = f"{note}before its first epoch was saved"
        if saved_epochs:
            held = f"{state_file} holds {note}epoch {saved_epochs}"
        raise KeyboardInterrupt(f"{held}; the same command continues") from None
    model.load_state_dict(state.best_weights)
    return state.history, state.best


def _validated(model: nn.Module, images: data.Data, recipe: Recipe, judge, number: int) -> dict:
    """Return what the log says of a network on the validation split, {} if there is none.

    judge: see `fit`. number: of the epoch, from 1.
    """
    if not len(images.val):
        return {}
    line = {}
    if judge:
        result, line, score = judge(model, number)
        line |= {"score": processes.from_main_process(score, images.device)}
    else:
        result = evaluate(model, images.val, recipe.amp)
    accuracy = processes.from_main_process(result.accuracy, images.device)
    return line | {
        "val_loss": result.loss, "val_accuracy": accuracy, "val_total": result.total,
    }  # fmt: skip


def refuse_unfit_batches(size: int, split: data.Split) -> None:
    """Raise UserError if a split cannot be trained on in batches of this size."""
    world, _ = processes.world_and_rank()
    if size > len(split):
        raise UserError(f"--batch-size {size} is over the {len(split)} training images")
    if size % world:
        raise UserError(f"--batch-size {size} is no multiple of the {world} processes")


@dataclasses.dataclass
class TrainingState:
    """All that changes during a run: what is saved after every epoch, and restored."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module | None  # the averaged weights (recipe.ema)
    history: list[dict] = dataclasses.field(default_factory=list)  # one line per epoch
    best: int = -1  # index in history of the highest score
    best_weights: dict[str, Tensor] | None = None  # the state dict of that epoch, on the CPU
    # {view: the teacher's logits, a tensor per batch of this process}, where batches repeat. A view
    # is the number of an epoch modulo recipe.views.
    answers: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(
        cls, model: nn.Module, recipe: Recipe, velocity: dict[str, Tensor] | None = None
    ) -> "TrainingState":
        """Return the state of a run that begins. velocity: see `build_optimizer`."""
        device = next(model.parameters()).device
        return cls(
            model, build_optimizer(model, recipe, velocity),
            torch.amp.GradScaler(device.type, enabled=devices.is_fp16(device) and recipe.amp),
            copy.deepcopy(model) if recipe.ema else None,
        )  # fmt: skip

    @property
    def final(self) -> nn.Module:
        """The network that is evaluated and kept."""
        return self.average or self.model

    def add(self, line: dict) -> None:
        """Append the line of a finished epoch; keep its weights if it is the best so far."""
        best = self.history[self.best] if self.history else None
        self.history.append(line)
        if best is None or _score(line) > _score(best):
            self.best = len(self.history) - 1
            weights = self.final.state_dict()
            self.best_weights = {name: t.cpu().clone() for name, t in weights.items()}

    def save(self, path: Path, identity: dict) -> None:
        """Write the state, with the identity of its run, in the main process; all processes call
        this, since the file holds the teacher's answers to the batches of all of them."""
        answers = {
            view: processes.concatenate(torch.stack(logits), 1)
            for view, logits in self.answers.items()
        }
        if processes.is_main():
            checkpoint.write_state(
                path, identity, model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                average=self.average.state_dict() if self.average else None,
                history=self.history, best=self.best, best_weights=self.best_weights,
                answers=answers,  # by view: (steps, images per batch, classes)
            )  # fmt: skip

    def restore(self, path: Path, identity: dict) -> None:
        """Read back what `save` wrote. Raises UserError if it belongs to another run, or to a
        version of this program that had other networks."""
        saved = checkpoint.read_state(path, identity)
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError:
            text = f"{path} is of another version of this program: --no-resume discards it"
            raise UserError(text) from None
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty from a run that needed none: on a CPU, or on a GPU with bf16
            self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        self.history, self.best = saved["history"], saved["best"]
        self.best_weights = saved["best_weights"]
        device, (world, rank) = next(self.model.parameters()).device, processes.world_and_rank()
        self.answers = {
            view: list(logits.to(device).chunk(world, 1)[rank].unbind())
            for view, logits in saved["answers"].items()
        }


def _score(line: dict) -> float:
    """Return what the epochs of a run are compared by; without validation the last one wins."""
    return line.get("score", line.get("val_accuracy", line["epoch"]))


def build_optimizer(
    model: nn.Module, recipe: Recipe, velocity: dict[str, Tensor] | None = None
) -> torch.optim.Optimizer:
    """Make the recipe's optimizer for a model, fused.

    velocity: momentum buffers for SGD to begin with, by parameter name; they are copied.
        None: zeros.
    """
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    optimizer = torch.optim.SGD(
        groups, lr=recipe.lr, momentum=MOMENTUM, nesterov=True, fused=True
    )
    for name, parameter in model.named_parameters():
        # Zeros, as a first step has them: where loss scaling skips that step (fp16), torch's own
        # buffer would stay what lay in memory. With the strides of the parameter, since a fused
        # optimizer reads both in the order of memory: compaction leaves buffers contiguous while
        # the weights are channels-last (on the CPU they would be permuted in silence).
        buffer = torch.zeros_like(parameter)
        if velocity:
            buffer.copy_(velocity[name])
        optimizer.state[parameter]["momentum_buffer"] = buffer
    return optimizer


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Return the optimizer's groups. Weights are decayed, batch norms and biases only with
    recipe.decay_norm; a parameter's attribute `lr_factor` multiplies its learning rate."""
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            decay = recipe.weight_decay if recipe.decay_norm or p.ndim > 1 else 0.0
            groups.setdefault((decay, getattr(p, "lr_factor", 1.0)), []).append(p)
    return [
        {"params": params, "weight_decay": decay, "lr_factor": lr_factor}
        for (decay, lr_factor), params in groups.items()
    ]


def velocity_of(state_file: Path, model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Return SGD's momentum buffers from the state of a run of this model, by parameter name."""
    parameters = [p for group in parameter_groups(model, recipe) for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    state = checkpoint.read(state_file)["optimizer"]["state"]
    return {names[id(p)]: state[i]["momentum_buffer"] for i, p in enumerate(parameters)}


def train_epoch(state: TrainingState, split: data.Split, recipe: Recipe, augment, seed: int,
                epoch: int, *, forward: nn.Module | None = None, teacher: nn.Module | None = None,
                after_step=None, penalty=None, note: str = "") -> Tensor:  # fmt: skip
    """Train for one epoch; return [sum of losses, correct answers] of this process, float64 (2,).

    forward: DistributedDataParallel around the model of `state`, or None for that model itself.
    The rest is as in `fit`; the teacher is taken as it is.
    The host never waits for the device, except to record a step (lib/replay.py): the totals stay
    on the device, and the caller reads them once. The images of an epoch have one size.
    """
    world, rank = processes.world_and_rank()
    device = split.images.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    forward, optimizer, scaler = forward or state.model, state.optimizer, state.scaler
    forward.train()
    groups, steps = optimizer.param_groups, len(split) // recipe.batch_size
    learning_rates = _learning_rates(groups, recipe, epoch * steps, steps)
    drawn = epoch % recipe.views if recipe.views else epoch
    batches = data.batches(
        split, recipe.batch_size, augment, seed, drawn, rank, world, recipe.flip == "alternate"
    )
    side = recipe.side(epoch)
    known = None  # the teacher's answers, batch by batch, if they are kept
    if teacher and 0 < recipe.views < recipe.epochs:
        known = state.answers.setdefault(drawn, [])
    averaged = state.average and (float_tensors(state.average), float_tensors(state.model))

    @torch.no_grad()
    def ask(x: Tensor) -> Tensor:
        with devices.autocast(device, recipe.amp):
            return teacher(x).float()

    def step(x: Tensor, labels: Tensor, group_rates, soft: Tensor | None = None) -> None:
        _set_options(groups, lr=group_rates)
        if teacher and soft is None:
            soft = ask(x)  # it sees the images as they are, whatever the student sees
        if side < SIDE:
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        with devices.autocast(device, recipe.amp):
            logits = forward(x)
        loss = _loss(logits.float(), labels, soft, recipe)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss + penalty() if penalty else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if after_step:
            after_step()
        with torch.no_grad():
            totals[0] += loss.detach() * len(labels)
            totals[1] += (logits.argmax(1) == labels).sum()

    run_step, last = step, learning_rates[-1]
    recorded = recipe.cuda_graph and device.type == "cuda" and world == 1
    if recorded:
        run_step = replay.Replayed(step)
        learning_rates = data.move(torch.tensor(learning_rates), device)
        _set_options(groups, capturable=[True] * len(groups))
        # The steps before the recording are intended: torch need not warn of them (Adam).
        optimizer._warned_capturable_if_run_uncaptured = True
    shown = tqdm(batches, total=steps, desc=note, leave=False, disable=console.quiet() or rank > 0)
    for i, ((x, labels), group_rates) in enumerate(zip(shown, learning_rates, strict=True)):
        soft = []
        if known is not None:
            if len(known) == i:
                known.append(ask(x))
            soft = [known[i]]
        run_step(x, labels, group_rates, *soft)
        if averaged:
            # A small decay at first (as in TensorFlow's ExponentialMovingAverage), so that the
            # random start is forgotten.
            n = epoch * steps + i
            torch._foreach_lerp_(*averaged, 1 - min(recipe.ema, (1 + n) / (10 + n)))
    if recorded:  # numbers again: the state that is saved can be continued on any device
        _set_options(groups, lr=last, capturable=[False] * len(groups))
    return totals


def _set_options(groups: list[dict], **options) -> None:
    """Set options of an optimizer's parameter groups; each value has an item per group. Options
    that the optimizer does not know are left out (`capturable` is Adam's)."""
    for name, values in options.items():
        for group, value in zip(groups, values, strict=True):
            if name in group:
                group[name] = value


def _learning_rates(
    groups: list[dict], recipe: Recipe, first: int, steps: int
) -> list[list[float]]:
    """Return the learning rate of each parameter group in each step of an epoch.

    first: number of the epoch's first step. The rates are float32, as fused optimizers take them
    from a GPU's memory.
    """
    rates = [recipe.learning_rate(first + i, steps) for i in range(steps)]
    return torch.tensor([[rate * g["lr_factor"] for g in groups] for rate in rates]).tolist()


def _loss(logits: Tensor, labels: Tensor, soft: Tensor | None, recipe: Recipe) -> Tensor:
    """Return the mean cross-entropy; with a teacher's logits `soft`, mixed with the divergence
    from its soft labels."""
    hard = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if soft is None:
        return hard
    t = recipe.temperature
    kl = F.kl_div(
        F.log_softmax(logits / t, 1), F.log_softmax(soft / t, 1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return (1 - recipe.distill) * hard + recipe.distill * t * t * kl


@torch.no_grad()
def match_logits(teacher: nn.Module, student: nn.Module, images: Tensor) -> None:
    """Multiply a teacher's classifier, in place, so that its logits are as large as a student's.

    Their size is the standard deviation over the classes. Label smoothing keeps it small, a long
    training makes it large. As they are, large logits would give soft labels that are nearly hard
    at the usual temperature, and the student would learn their size first of all (Sun et al. 2024,
    "Logit Standardization in Knowledge Distillation", algorithm 1; here one factor per network).
    images: (n, 3, H, W), normalized. Both networks are left in eval mode. A teacher whose logits
    are all alike stays as it is.
    """
    wanted, width = (net.eval()(images).var(1).mean().sqrt() for net in (student, teacher))
    if width > 0:
        for parameter in teacher.classifier.parameters():
            parameter.mul_(wanted / width)


def float_tensors(network: nn.Module) -> list[Tensor]:
    """Return the floating-point tensors of a network, batch norm statistics included."""
    return [x for x in network.state_dict().values() if x.is_floating_point()]


def _summary(line: dict, note: str) -> str:
    """Return the line of an epoch as text."""
    text = f"{note}  loss {line['train_loss']:.4f}  train {line['train_accuracy']:.2%}"
    if "val_accuracy" in line:
        text += f"  val {line['val_accuracy']:.2%} (n={line['val_total']})"
    return f"{text}  {line['seconds']:.0f} s  {line['images_per_second']:,.0f} images/s"
