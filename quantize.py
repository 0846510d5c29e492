"""Quantize the weights and activations of a network.

    python quantize.py                                         PTQ, W8A8: no labels, no training
    python quantize.py --weight-bits 4 --act-bits 4            any bits from 2 to 16; 32: off
    python quantize.py --method qat --weight-bits 4 --epochs 2 PTQ, then training at those bits
    python quantize.py --weight-bits 4 --layer-bits first=8,last=8,features.3.conv.0.0=6
    python quantize.py --max-drop 0.5                          the smallest file that loses no more
    python quantize.py --max-bytes 64000                       the best network that fits
    python quantize.py --method reference                      the course report's quantizer

in:  checkpoints/pruned.pth, or any fp32 network (ptq, qat: its dead channels are removed first,
     exactly)
out: checkpoints/quantized.pth: batch norm folded, weights on their grid, static activation scales
     (reference: batch norm as it was, dynamic activation scales);
     logs/quantize.jsonl (qat: one line per epoch), plots/quantize.png (qat), plots/budget.png
     (--max-drop, --max-bytes); during training, quantized.pth.ptq.resume (what ptq made) and
     quantized.pth.resume (finished epochs) beside it

ptq: equalization, layer reconstruction, bias correction, calibration by mean squared error
(lib/ptq.py). qat: from there on, weights and their scales are trained, and below 8 bits the scales
of activations too; pruned weights stay zero; the fp32 parent is the teacher, unless --teacher names
a better network (lib/qat.py). reference: one scale per tensor, weights static, activations dynamic
(the largest magnitude of each batch of 128), simulated in fp32.

With --rd-lambda X, levels and scales are chosen for the least squared error of an image's logits +
X * the size of the weights in 1,000 bytes, as the coder of sparse_compress.py would take them
(rate-distortion optimization). --weight-bits is then the most that a layer may have; how many it
takes follows from X. The right X depends on how large a network's logits are, so it differs
between networks. --max-bytes and --max-drop search for it: of each network that they try by ptq,
they measure the bytes of the .nnz and the accuracy on the validation split.

--layer-bits takes NAME=BITS, separated by commas; a NAME is a layer, or `first` (the stem), `last`
(the classifier and its input), or `last_act` (only the classifier's input). An item without `=` is
a JSON file of such names and bits. Of items for the same layer, the later one counts; for the
classifier's input, `last_act` counts before `last` in either order.
"""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

from autoaugment import augmentation
from lib import (
    budget,
    checkpoint,
    config,
    console,
    data,
    devices,
    engine,
    layer_bits,
    logs,
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
from lib.evaluation import Evaluation, evaluate
from lib.files import rejected_of, state_of
from lib.folding import fold
from lib.importance import row_importance
from lib.rate import BITS_PER_KILOBYTE
from models.mobilenetv2 import MobileNetV2

LARGEST_IN_CHAIN = 8  # weight bits: to_int8.py takes no more
LAMBDA_FLAGS = "--rd-lambda, --max-bytes and --max-drop"  # with which bits count: see has_lambda
# Settings that training alone depends on, not ptq.
OF_TRAINING = (
    "epochs", "lr", "batch_size", "distill", "teacher", "temperature", "views", "ema", "augment",
    "amp",
)
# With --max-drop, qat starts from a network that loses this many times as much.
DROP_BEFORE_QAT = 2.0


@dataclasses.dataclass
class Settings(config.FineTuning):
    parent: str | None = flag(
        None, "fp32 network; default: checkpoints/pruned.pth", heading="files and data"
    )
    out: str | None = flag(None, "output file; default: checkpoints/quantized.pth")
    method: str = flag(
        "ptq", "explained above", choices=("ptq", "qat", "reference"), heading="quantization"
    )
    weight_bits: int = flag(8, "bits per weight: 2 to 16; 32: off", choices=quantizers.BITS)
    act_bits: int = flag(8, "bits per activation: 2 to 16; 32: off", choices=quantizers.BITS)
    weight_scale: str = flag(
        "channel", "granularity: one weight scale per output channel, or (ptq only) one per tensor "
        "as it was before folding, rounded to nearest: at 8 bits this keeps the integers of a "
        "network that was int8 before", choices=("channel", "tensor"),
    )  # fmt: skip
    layer_bits: str | None = flag(
        None, "weight bits of layers that differ, such as first=8,last=8; or a JSON file "
        '{"features.3.conv.0.0": 6, ...}; explained above'
    )  # fmt: skip
    rd_lambda: float = flag(
        0.0, "rate-distortion: the squared error of an image's logits that is accepted for each "
        "1,000 bytes of weights that are saved. Levels are chosen by error and size together; in "
        "qat the size is part of the loss",
        heading="size against accuracy", least=0,
    )  # fmt: skip
    max_bytes: int | None = flag(
        None, "the most bytes that compressed.nnz may have; finds --rd-lambda", least=1
    )
    max_drop: float | None = flag(
        None, "largest loss of validation accuracy against the parent, in percentage points; finds "
        "--rd-lambda", least=0, under=100,
    )  # fmt: skip
    calibration: int = flag(
        1024, "training images for ptq, used without their labels", heading="ptq", least=1,
        most=50_000,
    )  # fmt: skip
    epochs: int = flag(3, "epochs of qat", heading="qat", least=1)
    lr: float = flag(
        1e-4, "peak learning rate of qat (AdamW): 0.2 epochs of warm-up, then linear to zero",
        over=0,
    )  # fmt: skip
    batch_size: int = flag(128, "images per step, over all processes", least=1)
    ema: float = flag(
        0.0, "decay per step of averaged weights in qat; 0: no averaging", least=0, under=1
    )
    keep: str = flag(
        "best", "which epoch qat keeps: the best one on the validation split, or the last one, as "
        "for a parent that was trained on the validation images", choices=("best", "last"),
    )  # fmt: skip
    augment: str = flag("light", "see train.py", choices=("none", "light", "cutout", "auto"))

    def __post_init__(self):
        super().__post_init__()
        if self.weight_scale == "tensor" and self.method != "ptq":
            raise ValueError("--weight-scale tensor is for --method ptq")
        if self.method == "reference" and self.layer_bits:
            raise ValueError("--layer-bits is not for --method reference")
        layer_bits.parse(self.layer_bits or "")
        given = [self.rd_lambda or None, self.max_bytes, self.max_drop]
        if sum(value is not None for value in given) > 1:
            raise ValueError(f"give one of {LAMBDA_FLAGS}")
        if self.has_lambda and (self.weight_scale == "tensor" or self.method == "reference"):
            raise ValueError(f"{LAMBDA_FLAGS} are for --method ptq or qat with --weight-scale "
                             "channel")  # fmt: skip
        if self.has_lambda and self.weight_bits > LARGEST_IN_CHAIN:
            raise ValueError(f"{LAMBDA_FLAGS} are for 2 to {LARGEST_IN_CHAIN} weight bits")
        if self.keep == "last" and (self.method != "qat" or self.has_budget):
            raise ValueError("--keep last is for --method qat without --max-bytes and --max-drop")
        for name in OF_TRAINING:
            if self.method != "qat" and not config.is_default(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is for --method qat")

    @property
    def has_budget(self) -> bool:
        return self.max_bytes is not None or self.max_drop is not None

    @property
    def budget_in_words(self) -> str:
        """What --max-bytes or --max-drop ask for; "" without them."""
        if self.max_bytes is not None:
            return f"at most {self.max_bytes:,} bytes"
        return f"at most {self.max_drop:g} points less than its parent" if self.has_budget else ""

    @property
    def has_lambda(self) -> bool:
        """Return whether bits count beside error, at a lambda that is given or searched for."""
        return self.rd_lambda > 0 or self.has_budget


@dataclasses.dataclass(eq=False)  # its tensors have no ==
class Job:
    """A network to quantize, how, and what its quantized versions are compared with."""

    cfg: Settings
    parent: checkpoint.Checkpoint
    teacher: checkpoint.Checkpoint  # that qat learns from
    network: MobileNetV2  # the parent's, without dead channels (reference: with them)
    scheme: dict  # see lib.quantizers
    images: data.Data
    before: Evaluation | None  # of the parent on the validation split, if there is one

    @property
    def identity(self) -> dict:
        """What the state of an interrupted qat belongs to."""
        return config.identity(self.cfg) | {
            "scheme": self.scheme, "parent": self.parent.sha256, "teacher": self.teacher.sha256,
            "data": self.images.provenance(),
        }  # fmt: skip

    @property
    def identity_of_ptq(self) -> dict:
        """What its stored result belongs to: the identity without what training alone needs."""
        return {k: v for k, v in self.identity.items() if k not in OF_TRAINING}

    def scheme_by(self, method: str) -> dict:
        """Return the scheme of a network that this method made."""
        return self.scheme | {"method": method}

    def measure(
        self, method: str, network: MobileNetV2, rd_lambda: float, latent: dict | None = None
    ) -> budget.Attempt:
        """Return a quantized network with its accuracy and, if there is a lambda, its bytes."""
        result = evaluate(network, self.images.val) if self.before else None
        size = 0
        if self.cfg.has_lambda:
            source, scheme = self.images.provenance(), self.scheme_by(method)
            size = len(self.parent.encode_child(network, scheme, source, self.cfg.seed))
        return budget.Attempt(method, rd_lambda, network, latent, size, result)

    def save(self, path: Path, network: MobileNetV2, method: str, figures: dict):
        """Write a quantized network that this method made, and return its Checkpoint."""
        return checkpoint.save(
            path, "quantized", network, self.cfg, self.parent, metrics=figures,
            data=self.images.provenance(), quantization=self.scheme_by(method),
        )  # fmt: skip

    def goal(self, times: float = 1.0) -> budget.Budget:
        """Return what is asked for, or a Budget of nothing; times: multiplies --max-drop."""
        if self.cfg.max_drop is None:
            return budget.Budget(max_bytes=self.cfg.max_bytes)
        before, max_drop = self.before, times * self.cfg.max_drop
        fewest = budget.fewest_correct(before.correct, before.total, max_drop)
        return budget.Budget(min_correct=fewest)


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    processes.start(device)
    file = cfg.path(cfg.parent, "checkpoints/pruned.pth")
    out = cfg.path(cfg.out, "checkpoints/quantized.pth")
    config.refuse_replacing(out, file, cfg.teacher)
    parent = checkpoint.load(file, cfg.assume_downsample)
    parent.refuse_quantized()
    model = parent.build(device)
    scheme = None if cfg.method == "reference" else scheme_of(cfg, model)
    with processes.main_first():
        images = parent.images(cfg.data, cfg.val_size, device)
    if cfg.max_drop is not None or (cfg.has_budget and cfg.method == "qat"):
        images.split("val")  # it decides
    teacher = parent.teacher(cfg.teacher, cfg.assume_downsample, images)
    console.say_device(device)
    if cfg.method != "qat" and not processes.is_main():  # one process does it all
        processes.stop()
        return
    before = evaluate(model, images.val) if len(images.val) else None

    processes.claim(out)
    attempts = []
    if cfg.method == "reference":
        scheme = quantizers.quantize_reference(model, cfg.weight_bits, cfg.act_bits)
        job = Job(cfg, parent, teacher, model, scheme, images, before)
        made = job.measure("reference", model, 0.0)
    else:
        job = Job(cfg, parent, teacher, compact(model)[0], scheme, images, before)
        if cfg.method == "ptq":
            made, _, attempts = post_training(job)
        else:
            engine.refuse_unfit_batches(cfg.batch_size, images.train)
            start, fallback, attempts = stored_post_training(job, out)
            made = train(job, start, fallback, out)
            if cfg.has_budget and before:
                kept = (fallback, None) if made is fallback else (None, made)
                draw_budget(job, attempts, *kept)

    if processes.is_main():
        figures, text = {}, f"{made.method} W{cfg.weight_bits}A{cfg.act_bits}"
        if before:
            figures, words = accuracy_figures(before, made.result, images.val.labels.cpu())
            text += words
        if cfg.has_lambda:
            sizes, words = size_figures(cfg, made, attempts)
            figures, text = figures | sizes, text + words
        if cfg.teacher and made.method == "qat":
            figures["teacher_sha256"] = teacher.sha256
        saved = job.save(out, made.network, made.method, figures)
        if cfg.method == "qat":  # last of all: until here, the run could be continued
            for file in (state_of(out), state_of(out, "ptq")):
                file.unlink()
        else:
            logs.log_stage(cfg, "quantize", {"bytes": saved.bytes, **saved.quantization, **figures})
        print(f"{out}: {saved.bytes:,} bytes, {text}")
    processes.stop()


def accuracy_figures(before, after, labels) -> tuple[dict, str]:
    """Return the figures of a network on the validation split, beside its parent's, and in words.

    before, after: Evaluations of the parent and of the network. labels: of the images, on the CPU.
    """
    moved = measure.change(before.predictions == labels, after.predictions == labels)
    figures = {"val_correct": after.correct, "val_total": after.total} | moved
    return figures, (
        f", val {after}, +{moved['gained']} -{moved['lost']} from the parent's {before}"
    )


def size_figures(cfg, made: budget.Attempt, attempts: list) -> tuple[dict, str]:
    """Return the figures of a network that was quantized at a lambda, and in words.

    attempts: those of the search, for the log.
    """
    used = quantizers.bits_used(made.network)
    figures = {"rd_lambda": made.rd_lambda, "nnz_bytes": made.bytes, "bits_used": used}
    words = f"; lambda {made.rd_lambda:.4g}: {made.bytes:,} bytes as .nnz"
    if cfg.has_budget:
        tried = [
            {"rd_lambda": each.rd_lambda, "bytes": each.bytes,
             "val_correct": each.result.correct if each.result else None}
            for each in attempts
        ]  # fmt: skip
        figures |= {"asked": cfg.budget_in_words, "tried": tried}
        words += f" (asked: {cfg.budget_in_words})"
    return figures, words + f", layers of {min(used.values())} to {max(used.values())} bits"


class PostTraining(NamedTuple):
    """The networks that ptq made: where qat starts, and what is kept if no epoch is better.

        flags              start: ptq's result, where qat starts   fallback: if no epoch is better
        none               at lambda 0                             None: the best epoch is kept
        --rd-lambda        at that lambda                          the same
        --max-bytes        the best that fits                      the same
        --max-drop, ptq    the smallest within the drop            the same
        --max-drop, qat    ... within DROP_BEFORE_QAT drops,       the smallest within the drop, or
                           to win the rest back                    None

    Without a validation split, and with --keep last, qat has no fallback.
    """

    start: budget.Attempt
    fallback: budget.Attempt | None
    attempts: list[budget.Attempt]  # all, in their order


def post_training(job: Job) -> PostTraining:
    """Quantize without training; search for the lambda if there is a budget."""
    cfg = job.cfg
    sample = data.sample(job.images.train, cfg.calibration, cfg.seed)
    importance = None
    if cfg.has_lambda:
        importance = row_importance(fold(job.network), sample)

    @functools.cache
    def attempt(rd_lambda: float) -> budget.Attempt:
        network, latent = ptq.quantize(
            job.network, sample, job.scheme, console.progress("calibrate"),
            importance=importance, lambda_per_bit=rd_lambda / BITS_PER_KILOBYTE,
        )  # fmt: skip
        made = job.measure("ptq", network, rd_lambda, latent)
        if cfg.has_lambda:
            val = f", val {made.result}" if made.result else ""
            console.say(f"lambda {rd_lambda:.4g}: {made.bytes:,} bytes{val}")
        return made

    if not cfg.has_budget:
        start = attempt(cfg.rd_lambda)
        compared = cfg.has_lambda and job.before and cfg.keep == "best"
        return PostTraining(start, start if compared else None, [start])
    fallback, attempts = budget.search(attempt, job.goal())
    start = fallback
    if cfg.method == "qat" and cfg.max_drop is not None:
        _, further = budget.search(attempt, job.goal(DROP_BEFORE_QAT))
        attempts += [tried for tried in further if tried not in attempts]
        # Of those of both searches: one may have come across what the other looked for.
        start = budget.best(attempts, job.goal(DROP_BEFORE_QAT))
        fallback = budget.best(attempts, job.goal())
    if job.before:
        draw_budget(job, attempts, start)
    if start is None:
        raise UserError(f"no network was found that has {cfg.budget_in_words}: the search came to "
                        + nearest(attempts, job.goal()))  # fmt: skip
    return PostTraining(start, fallback, attempts)


def nearest(attempts: list[budget.Attempt], unmet: budget.Budget) -> str:
    """Return the attempt nearest to a budget that none met, in words."""
    if unmet.max_bytes is not None:
        return f"{min(tried.bytes for tried in attempts):,} bytes"
    return f"{max((tried.result for tried in attempts), key=lambda r: r.correct)} on validation"


def draw_budget(job: Job, attempts: list[budget.Attempt], chosen, trained=None) -> None:
    """Draw the networks that were tried for a budget, in the main process.

    chosen: the Attempt among them that is taken; trained: the one that training made; or None.
    """
    if not processes.is_main():
        return
    cfg = job.cfg
    cells = [
        {
            "weight_bits": cfg.weight_bits, "act_bits": cfg.act_bits, "rd_lambda": tried.rd_lambda,
            "accuracy": tried.result.accuracy, "total": tried.result.total, "bytes": tried.bytes,
        }
        for tried in attempts
    ]  # fmt: skip
    plots.accuracy_bytes(
        cells, cfg.in_run("plots/budget.png"),
        f"{job.parent.file.name}, {cfg.budget_in_words}: validation (n={job.before.total})",
        {"parent": (job.parent.bytes, job.before.accuracy)}
        | ({"after training": (trained.bytes, trained.result.accuracy)} if trained else {}),
        cells[attempts.index(chosen)] if chosen else None,
    )  # fmt: skip


def scheme_of(cfg, model) -> dict:
    """Return the scheme of ptq or qat (see lib.quantizers); UserError where --layer-bits does not
    fit."""
    layers = list(metrics.weight_layers(model))
    bits, others = layer_bits.by_layer(cfg.layer_bits, layers, cfg.act_bits)
    for layer, count in bits.items():
        if cfg.has_lambda and count > LARGEST_IN_CHAIN:
            raise UserError(f"--layer-bits: {layer} at {count} bits: {LAMBDA_FLAGS} are for 2 to "
                            f"{LARGEST_IN_CHAIN} weight bits")  # fmt: skip
    # Version 3 of the .nnz file cannot hold this. Of version 1, which repeats what the files before
    # it say of themselves, the size is not known in advance.
    if cfg.has_lambda and cfg.act_bits < 32 and others.get("last_act_bits") == 32:
        raise UserError(f"--layer-bits last_act=32: {LAMBDA_FLAGS} need --act-bits 32 as well")
    others |= {"method": cfg.method, "weight_scale": cfg.weight_scale, "layer_bits": bits}
    return ptq.make_scheme(cfg.weight_bits, cfg.act_bits, **others)


def train(job: Job, start: budget.Attempt, fallback, out: Path) -> budget.Attempt:
    """Return the quantized network of `start`, trained, or `fallback` if no epoch is better; leave
    the state of the training beside `out`.

    fallback: an Attempt or None, see PostTraining. With a lambda, epochs are compared by what is
    asked for, as files: see lib.budget.Budget.score.
    """
    cfg, images = job.cfg, job.images
    if job.before:
        console.say(f"ptq: val {start.result}")
    model, latent = copy.deepcopy(start.network), start.latent
    # Weights zeroed to save bits count as pruned: they would flip to and from 0.
    if start.rd_lambda:
        layers = metrics.weight_layers(model)
        latent = {name: latent[name].where(layers[name].weight != 0, 0) for name in latent}
    qat.begin(model, job.scheme, latent)
    mask, goal = pruning.Mask(model), job.goal()
    sample = data.sample(images.train, engine.LOGIT_IMAGES, cfg.seed)
    loss_per_bit, wrong_per_bit = 0.0, 0.0
    if cfg.has_lambda:
        loss_per_bit, wrong_per_bit = qat.cost_of_a_bit(
            start.network, sample, start.rd_lambda / BITS_PER_KILOBYTE, start.result,
            cfg.distill, cfg.temperature,
        )  # fmt: skip

    def judge(network, epoch: int) -> tuple[Evaluation, dict, float]:
        """Judge a network in training as a file; see engine.fit."""
        made = job.measure("qat", qat.finished(network), start.rd_lambda)
        score = goal.score(made, wrong_per_bit)
        if cfg.keep == "last":
            score = float(epoch)
        return made.result, {"bytes": made.bytes} if cfg.has_lambda else {}, score

    log = logs.Log(cfg.in_run("logs/quantize.jsonl"), job.identity, cfg.wandb)
    # Adam: without batch norm, rows of all magnitudes share one learning rate, and SGD diverges.
    # Its first steps are as large as its later ones, whatever the gradients: so they are warmed up.
    recipe = engine.Recipe.of(
        cfg, optimizer="adam", lr_schedule="linear", weight_decay=0.0, warmup_epochs=0.2
    )
    # Without dead channels, the parent answers the same and is faster.
    teacher_network = job.network
    if cfg.teacher:
        teacher_network, _ = compact(job.teacher.build(images.device))
        engine.match_logits(teacher_network, job.network, sample)
    history, best = engine.fit(
        model, images, recipe, augmentation(cfg.augment), cfg.seed, state_of(out),
        identity=job.identity, after_step=mask.apply, log=log,
        teacher=teacher_network,
        penalty=(lambda: loss_per_bit * qat.network_bits(model)) if loss_per_bit else None,
        judge=judge if job.before else None,
    )  # fmt: skip
    qat.finish(model)
    if processes.is_main():
        plots.curves(history, cfg.in_run("plots/quantize.png"), "Quantization-aware training")
        log.close({"best_epoch": best + 1}, [cfg.in_run("plots/quantize.png")])
    if fallback and goal.score(fallback, wrong_per_bit) >= history[best]["score"]:
        console.say(f"no epoch is better than ptq's network of {fallback.bytes:,} bytes, val "
                   f"{fallback.result}: that is kept")  # fmt: skip
        return fallback
    if cfg.has_budget and history[best]["score"] < 0:
        rejected = rejected_of(out)
        if processes.is_main():
            job.save(rejected, model, "qat", {})
        line = history[best]
        raise UserError(f"no epoch has {cfg.budget_in_words}: the best one, {best + 1}, has "
                        f"{line['val_accuracy']:.2%} and {line['bytes']:,} bytes. Its network is "
                        f"in {rejected}")  # fmt: skip
    return job.measure("qat", model, start.rd_lambda)


def stored_post_training(job: Job, out: Path) -> PostTraining:
    """Return `post_training(job)` for qat. It is run once, in the main process, and kept beside
    `out` until qat is done, so that training begins with the same network in all processes, and
    again where it is continued on a processor that rounds otherwise. Without --resume, the state of
    the training goes; what ptq made stays if it is of the same job."""
    file, training, wanted = state_of(out, "ptq"), state_of(out), job.identity_of_ptq
    if not job.cfg.resume:
        processes.discard(training)
        if processes.is_main() and not _is_ptq_of(file, wanted):
            file.unlink(missing_ok=True)
    if processes.is_main() and file.is_file():
        console.say(f"what ptq made before is in {file.name}")
    elif processes.is_main():
        if training.is_file():
            raise UserError(f"{training} has no {file.name} beside it (it was deleted, or "
                            "the state is of an earlier version): --no-resume discards it")
        with processes.all_threads():
            save_ptq(post_training(job), file, wanted)
    processes.wait()
    saved, attempts = checkpoint.read_state(file, wanted), []
    for row in saved["attempts"]:
        network, latent = None, None
        if packed := row.pop("packed"):
            network, latent = qat.unpack(packed, job.scheme, job.images.device)
        if row["result"]:
            row["result"] = Evaluation(**row["result"])
        attempts.append(budget.Attempt("ptq", **row, network=network, latent=latent))
    fallback = None if saved["fallback"] is None else attempts[saved["fallback"]]
    return PostTraining(attempts[saved["start"]], fallback, attempts)


def _is_ptq_of(file: Path, identity: dict) -> bool:
    """Return whether a file holds what ptq made for this job by this version, and can be read."""
    try:
        saved = checkpoint.read(file) if file.is_file() else {}
        return (saved["identity"], saved["code"]) == (identity, config.code_version())
    except (UserError, KeyError):
        return False


def save_ptq(result: PostTraining, file: Path, identity: dict) -> None:
    """Write what ptq made for qat: all attempts, with the networks of those that it needs."""
    start, fallback, attempts = result
    checkpoint.write_state(
        file, identity, start=attempts.index(start),
        fallback=attempts.index(fallback) if fallback else None,
        attempts=[
            {
                "rd_lambda": tried.rd_lambda, "bytes": tried.bytes,
                "result": vars(tried.result) if tried.result else None,
                "packed": (
                    qat.pack(tried.network, tried.latent) if tried in (start, fallback) else None
                ),
            }
            for tried in attempts
        ],
    )  # fmt: skip


if __name__ == "__main__":
    config.run(main)
