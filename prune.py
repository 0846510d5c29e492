"""Prune single weights in rounds, each with fine-tuning; keep the last round that is good enough.

    python prune.py --target 0.95
    python prune.py --score magnitude --schedule geometric --prune-fraction 0.2 --rounds 30 \\
        --epochs 10 --lr 0.001 --lr-schedule constant --distill 0 --augment auto
                                             the course report's way
    python prune.py --rounds 0 --parent release/mobilenetv2-cifar10.nnz --dequantize
                                             an fp32 network again, to be pruned or quantized anew

in:  checkpoints/baseline.pth
out: checkpoints/pruned.pth (of the last good round), logs/prune.jsonl (one line per round),
     plots/prune.png, plots/sparsity.png; while it runs, pruned.pth.resume (finished rounds, the
     pruned network of the next) and pruned.pth.round.resume (finished epochs of that round) beside
     it

A round is good if it loses no more than --max-drop on the validation split, against the parent. The
first one that is not ends the pruning.
"""

import copy
import dataclasses
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from autoaugment import augmentation
from lib import (
    budget,
    checkpoint,
    config,
    console,
    data,
    devices,
    engine,
    folding,
    logs,
    metrics,
    plots,
    processes,
    pruning,
)
from lib.compaction import compact, take
from lib.config import UserError, flag
from lib.evaluation import evaluate
from lib.files import rejected_of, state_of
from models.layers import roles
from models.mobilenetv2 import MobileNetV2

# A round may keep up to this share fewer weights than it should; how many are zeroed is adjusted so
# many times.
TOLERANCE, ATTEMPTS = 0.01, 6


@dataclasses.dataclass
class Settings(config.FineTuning):
    parent: str | None = flag(
        None, "network to prune; default: checkpoints/baseline.pth", heading="files and data"
    )
    out: str | None = flag(None, "output file; default: checkpoints/pruned.pth")
    rounds: int = flag(
        8, "largest number of rounds; 0: only compact and save", heading="pruning", least=0
    )
    schedule: str = flag(
        "cubic", "cubic: to --target in --rounds; geometric: --prune-fraction per round",
        choices=("cubic", "geometric"),
    )  # fmt: skip
    score: str = flag(
        "lamp", "weights to remove first: the smallest (magnitude, the report's); those of the "
        "lowest LAMP score, which never empties a layer (lamp); or those whose removal changes the "
        "logits least per bit that it saves in the file (obd)",
        choices=("lamp", "magnitude", "obd"),
    )  # fmt: skip
    target: float = flag(
        0.95, "sparsity after the last round (cubic), or slightly more; the weights of removed "
        "channels count as pruned", over=0, under=1,
    )  # fmt: skip
    prune_fraction: float = flag(
        0.2, "share of the remaining weights that is removed per round (geometric)", over=0, under=1
    )
    max_drop: float = flag(
        0.5, "largest loss of validation accuracy against the parent, in percentage points",
        least=0, most=100,
    )  # fmt: skip
    dequantize: bool = flag(
        False, "take a quantized parent: weights become fp32; batch norms that were folded are "
        "made anew from training images"
    )  # fmt: skip
    compact: bool = flag(True, "remove dead channels, exactly, before and between the rounds")
    epochs: int = flag(3, "epochs of fine-tuning per round", heading="recipe of a round", least=1)
    last_epochs: int | None = flag(
        None, "epochs of round number --rounds; default: --epochs", least=1
    )
    lr: float = flag(0.05, "peak learning rate of a round", over=0)
    lr_schedule: str = flag(
        "linear", "learning-rate schedule of a round, to zero unless constant",
        choices=("linear", "cosine", "constant"),
    )  # fmt: skip
    batch_size: int = flag(128, "images per step, over all processes", least=1)
    weight_decay: float = flag(5e-4, "L2 penalty, on batch norms and biases too", least=0)
    label_smoothing: float = flag(
        0.1, "share of each label spread over all classes", least=0, most=1
    )
    sync_batchnorm: bool = flag(True, config.SYNC_BATCHNORM_HELP)
    start_side: int = flag(
        32, "side of the images in the first epochs of a round, in pixels; it grows to 32 over the "
        "first 70% of the epochs; the teacher always sees 32x32",
        choices=(16, 20, 24, 28, 32),
    )  # fmt: skip
    augment: str = flag("cutout", "see train.py", choices=("none", "light", "cutout", "auto"))

    def __post_init__(self):
        super().__post_init__()
        other = {"cubic": "prune_fraction", "geometric": "target"}[self.schedule]
        if not config.is_default(self, other):
            raise ValueError(f"--{other.replace('_', '-')} is not for --schedule {self.schedule}")
        if self.teacher and not self.rounds:
            raise ValueError("--teacher is for --rounds over 0")
        if self.start_side < 32 and max(self.epochs, self.last_epochs or 1) == 1:
            raise ValueError("--start-side is for rounds of several epochs")


@dataclasses.dataclass
class State:
    """Everything that an interrupted run needs to continue."""

    rounds: list[dict]  # a line of the log for each finished round; 0: the parent
    last_good: MobileNetV2  # of the last round that was not under the floor
    # SGD's momentum by parameter name: of `pruned`, or without it of the last round.
    velocity: dict[str, Tensor] | None = None
    # The network of a round that has begun, before its fine-tuning. It is kept because scores may
    # be rounded differently when they are computed again, on another machine or by another process.
    pruned: MobileNetV2 | None = None

    def save(self, file: Path, identity: dict) -> None:
        """Write it, once for all processes."""
        networks = {"last_good": self.last_good} | ({"pruned": self.pruned} if self.pruned else {})
        processes.wait()
        if processes.is_main():
            checkpoint.write_state(
                file, identity, rounds=self.rounds, velocity=self.velocity,
                networks={n: (net.settings, net.state_dict()) for n, net in networks.items()},
            )  # fmt: skip
        processes.wait()

    @classmethod
    def load(cls, file: Path, identity: dict, device: torch.device) -> "State":
        """Read what `save` wrote. Raises UserError if it belongs to another run."""
        saved, networks = checkpoint.read_state(file, identity), {}
        for name, (settings, weights) in saved["networks"].items():
            network = MobileNetV2(settings)
            network.load_state_dict(weights)
            networks[name] = network.to(device, memory_format=torch.channels_last)
        return cls(saved["rounds"], velocity=saved["velocity"], **networks)


@dataclasses.dataclass(eq=False)  # its tensors have no ==
class Run:
    """What does not change from round to round."""

    cfg: Settings
    parent: checkpoint.Checkpoint
    counts: list[tuple[str, int, int]]  # of the parent: see metrics.layer_counts
    images: data.Data
    sample: Tensor  # the normalized training images that logits are computed on
    teacher: MobileNetV2
    out: Path
    identity: dict  # what the files of its state belong to: see config.refuse_other_run
    log: logs.Log

    @property
    def total(self) -> int:
        """The weights of the network that the chain began with, of which sparsity is a share."""
        return self.parent.original_weights

    @property
    def start(self) -> float:
        """The parent's sparsity."""
        return sparsity_of(self.counts, self.total)

    @property
    def state_file(self) -> Path:
        """Where the finished rounds are kept."""
        return state_of(self.out)

    @property
    def round_file(self) -> Path:
        """Where the finished epochs of the present round are kept."""
        return state_of(self.out, "round")

    def floor(self, parent: dict) -> float:
        """Return the accuracy that a round must not fall below, for texts and charts: what decides
        is the number of answers, since accuracies are rounded. parent: its line of the log."""
        return parent["val_accuracy"] - self.cfg.max_drop / 100

    def recipe(self, number: int) -> engine.Recipe:
        """Return how to fine-tune in a round."""
        cfg = self.cfg
        epochs = cfg.last_epochs if cfg.last_epochs and number == cfg.rounds else cfg.epochs
        return engine.Recipe.of(cfg, epochs=epochs)


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    processes.start(device)
    file = cfg.path(cfg.parent, "checkpoints/baseline.pth")
    out = cfg.path(cfg.out, "checkpoints/pruned.pth")
    config.refuse_replacing(out, file, cfg.teacher)
    parent = checkpoint.load(file, cfg.assume_downsample)
    if not cfg.dequantize:
        parent.refuse_quantized("prune before quantizing, or add --dequantize")
    elif not parent.quantization:
        raise UserError(f"--dequantize: {file} is not quantized")
    with processes.main_first():
        images = parent.images(cfg.data, cfg.val_size, device)
    images.split("val")  # it decides where pruning stops
    if cfg.rounds:
        engine.refuse_unfit_batches(cfg.batch_size, images.train)
    sample = data.sample(images.train, engine.LOGIT_IMAGES, cfg.seed)
    model = parent.build(device)
    if parent.quantization:
        model = folding.dequantize(model, sample)
    teacher = parent.teacher(cfg.teacher, cfg.assume_downsample, images)
    teacher_network = teacher.build(device) if cfg.teacher else copy.deepcopy(model)
    identity = config.identity(cfg) | {
        "parent": parent.sha256, "teacher": teacher.sha256, "data": images.provenance()
    }  # fmt: skip
    run = Run(
        cfg, parent, metrics.layer_counts(model), images, sample,
        compact(teacher_network)[0], out, identity,  # the same answers, faster
        logs.Log(cfg.in_run("logs/prune.jsonl"), identity, cfg.wandb),
    )  # fmt: skip
    if cfg.teacher:
        engine.match_logits(run.teacher, model, sample)
    if cfg.schedule == "cubic" and cfg.rounds and cfg.target < run.start + 1e-4:
        raise UserError(
            f"--target {cfg.target} is no more than the parent's sparsity {run.start:.4f}"
        )
    console.say_device(device)
    processes.claim(out)
    if not cfg.resume:
        processes.discard(run.state_file, run.round_file)
    if run.state_file.is_file():
        state = _resume(run)
    else:
        if cfg.compact:
            model, _ = compact(model)
        result = evaluate(model, images.val)
        state = State([_line(run, 0, model, result, True, [], 0.0)], model)
        console.say(f"parent: {_describe(state.rounds[0])}")
    run.log.begin(state.rounds)
    state = _run_rounds(run, state)
    rounds = state.rounds
    if cfg.rounds and not rounds[1]["kept"]:
        if processes.is_main():
            run.state_file.unlink()
        raise UserError(
            f"round 1 fell to {rounds[1]['val_accuracy']:.2%} at sparsity "
            f"{rounds[1]['sparsity']:.2%}, under the floor of {run.floor(rounds[0]):.2%}: give it "
            "more --epochs, more --rounds or a larger --max-drop. Its network is in "
            f"{rejected_of(out)}"
        )
    if processes.is_main():
        _finish(run, state, {"teacher_sha256": teacher.sha256} if cfg.teacher else {})
        for file in (run.round_file, run.state_file):  # last: until here, it could be continued
            file.unlink(missing_ok=True)
    processes.stop()


def _run_rounds(run: Run, state: State) -> State:
    """Run the rounds that are left, to the first that is not good enough; return the last state."""
    cfg, images, device = run.cfg, run.images, run.images.device
    first = state.rounds[0]
    fewest = budget.fewest_correct(first["val_correct"], first["val_total"], cfg.max_drop)
    for number in range(len(state.rounds), cfg.rounds + 1):
        if not state.rounds[-1]["kept"]:
            break
        began = time.monotonic()
        if state.pruned is None:
            if processes.is_main():  # others may round scores otherwise
                with processes.all_threads():
                    state.pruned, state.velocity = _prune(run, state, number)
            state.save(run.state_file, run.identity)
            if not processes.is_main():
                state = State.load(run.state_file, run.identity, device)
        model, recipe = state.pruned, run.recipe(number)
        pruned_in = time.monotonic() - began
        try:
            history, _ = engine.fit(
                model, images, recipe, augmentation(cfg.augment), cfg.seed + number, run.round_file,
                identity=run.identity | {"round": number}, teacher=run.teacher,
                after_step=pruning.Mask(model).apply, velocity=state.velocity,
                note=f"round {number}/{cfg.rounds} ",
            )  # fmt: skip
        except engine.DivergedError as error:
            if number == 1:
                processes.discard(run.round_file, run.state_file)
                raise
            console.say(f"round {number}: {error}; the last good one stays")
            break
        began = time.monotonic()
        result = evaluate(model, images.val)
        good = bool(processes.from_main_process(result.correct >= fewest, device))
        # Of all epochs, also those before an interruption.
        seconds = pruned_in + sum(epoch["seconds"] for epoch in history)
        seconds += time.monotonic() - began
        line = _line(run, number, model, result, good, history, seconds)
        if number == 1 and not good and processes.is_main():  # no earlier one would be kept
            _save(run, rejected_of(run.out), model, line)
        state = State(
            [*state.rounds, line], model if good else state.last_good,
            engine.velocity_of(run.round_file, model, recipe),
        )  # fmt: skip
        state.save(run.state_file, run.identity)
        processes.discard(run.round_file)
        run.log(line)
        under = f"under the floor of {run.floor(first):.2%}: the last good one stays"
        console.say(f"round {number}: {_describe(line)}, {'kept' if good else under}")
    return state


def _prune(
    run: Run, state: State, number: int
) -> tuple[MobileNetV2, dict[str, Tensor] | None]:
    """Return the network of a round that begins: the last good one with further weights zeroed,
    without the channels that die with them; and its momentum, whose buffers shrink alike.

    With a channel that dies, all its weights go. Where they are many, fewer single ones are zeroed,
    so that as many are left in all as the round should keep.
    """
    cfg = run.cfg
    if cfg.schedule == "cubic":
        sparsity = pruning.cubic(run.start, cfg.target, number, cfg.rounds)
    else:
        sparsity = pruning.geometric(run.start, cfg.prune_fraction, number)
    present = _nonzeros(state.last_good)
    wanted = keep = min(present, round((1 - sparsity) * run.total))
    errors = pruning.weight_errors(state.last_good, run.sample) if cfg.score == "obd" else None
    pruned, indices = None, None  # of the channels that are left: see lib.compaction
    most = -1  # weights of `pruned`. The first attempt has at most `wanted`, so there is one
    for _ in range(ATTEMPTS if cfg.compact else 1):
        model, live = copy.deepcopy(state.last_good), None
        pruning.keep_best(model, keep, cfg.score, errors)
        if cfg.compact:
            model, live = compact(model)
        left = _nonzeros(model)
        if most < left <= wanted:
            most, pruned, indices = left, model, live
        if (1 - TOLERANCE) * wanted <= left <= wanted:
            break
        keep = min(present, round(keep * (1 - TOLERANCE / 2) * wanted / max(1, left)))
    velocity = state.velocity
    if indices and velocity:
        velocity = {name: take(buffer, indices[name]) for name, buffer in velocity.items()}
    return pruned, velocity


def _nonzeros(model: nn.Module) -> int:
    """Return the number of non-zero weights."""
    return sum(nonzeros for _, _, nonzeros in metrics.layer_counts(model))


def _resume(run: Run) -> State:
    """Return the state of an interrupted run. Raises UserError if it is another run's."""
    state = State.load(run.state_file, run.identity, run.images.device)
    if processes.is_main() and _round_of(run.round_file) < len(state.rounds):
        run.round_file.unlink(missing_ok=True)  # killed between writing a round and this
    processes.wait()
    console.say(f"continuing {run.state_file} after round {len(state.rounds) - 1}")
    return state


def _round_of(round_file: Path) -> int:
    """Return the number of the round whose epochs a state file holds; 0 without a file."""
    return checkpoint.read(round_file)["identity"]["round"] if round_file.is_file() else 0


def sparsity_of(counts: list[tuple[str, int, int]], total: int) -> float:
    """Return the share of `total` weights that are gone, as zeros or with their channel.

    counts: of the network: see metrics.layer_counts.
    """
    return 1 - sum(nonzeros for _, _, nonzeros in counts) / total


def _line(run: Run, number, model, result, good, history, seconds) -> dict:
    """Return the log's line of a round. good: whether its accuracy is above the floor."""
    counts = metrics.layer_counts(model)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    return {
        "round": number, "sparsity": sparsity_of(counts, run.total),
        "val_accuracy": result.accuracy, "val_correct": result.correct, "val_total": result.total,
        "kept": good, "live_weights": sum(weights for _, weights, _ in counts),
        "channels": channels, "macs": metrics.macs(model.settings), "seconds": round(seconds, 1),
        "epochs": history,
    }  # fmt: skip


def _describe(line: dict) -> str:
    """Return the line of a round as text."""
    return (
        f"sparsity {line['sparsity']:.2%}, val {line['val_accuracy']:.2%} "
        f"({line['val_correct']}/{line['val_total']}), {line['channels']:,} channels, "
        f"{line['macs'] / 1e6:.1f} M MACs, {line['seconds']:.0f} s"
    )


def _save(run: Run, path: Path, model, line: dict, figures: dict | None = None):
    """Write the network of a round and return its Checkpoint. line: of the log; figures: further
    ones, for the file."""
    names = ("round", "sparsity", "val_correct", "val_total")
    return checkpoint.save(
        path, "pruned", model, run.cfg, run.parent, data=run.images.provenance(),
        metrics={name: line[name] for name in names} | (figures or {}),
    )  # fmt: skip


def _finish(run: Run, state: State, figures: dict) -> None:
    """Save the network of the last good round, draw both charts and end the log.

    figures: further ones, for the file.
    """
    cfg, parent, rounds, model = run.cfg, run.parent, state.rounds, state.last_good
    last_kept = max(i for i, line in enumerate(rounds) if line["kept"])
    last = rounds[last_kept]
    saved = _save(run, run.out, model, last, figures)
    charts = [cfg.in_run(f"plots/{name}.png") for name in ("prune", "sparsity")]
    plots.accuracy_sparsity(
        rounds, last_kept, run.floor(rounds[0]), charts[0],
        f"Accuracy against sparsity (validation: n={len(run.images.val)})",
    )  # fmt: skip
    role = roles(model.settings)
    left = {name: nonzeros for name, _, nonzeros in metrics.layer_counts(model)}
    plots.layer_sparsity(  # of the weights that a layer had
        [{"layer": name, "role": role[name], "weights": weights, "nonzeros": left[name]}
         for name, weights, _ in run.counts],
        charts[1],
        f"Sparsity of every layer, against {parent.file.name} (of the first network's weights: "
        f"{last['sparsity']:.2%})",
    )  # fmt: skip
    run.log.close({"sparsity": last["sparsity"]}, charts)
    print(
        f"{run.out}: {saved.bytes:,} bytes, {_describe(last)} in round {last['round']} of "
        f"{len(rounds) - 1} tried; parent {rounds[0]['val_accuracy']:.2%}"
    )


if __name__ == "__main__":
    config.run(main)
