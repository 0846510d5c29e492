"""Prune by magnitude, round by round, with fine-tuning; stop while validation accuracy holds.

    python prune.py --target 0.95
    python prune.py --schedule geometric --rate 0.2 --rounds 30 --epochs 10 --lr 0.001 \\
        --lr-schedule constant --distill 0 --augment auto        the reference report's schedule

in:  checkpoints/baseline.pth
out: checkpoints/pruned.pth (the last round within --max-drop of the parent), logs/prune.jsonl
     (a round a line), plots/prune.png, plots/sparsity.png; while it runs, pruned.pth.resume
     (finished rounds) and pruned.pth.round.resume (finished epochs of a round) beside it
"""

import dataclasses
import time

from autoaugment import augmentation
from lib import checkpoint, config, data, engine, metrics, plots, pruning
from lib.config import UserError, flag


@dataclasses.dataclass
class Settings(config.Common):
    parent: str | None = flag(None, "network to prune; default: checkpoints/baseline.pth")
    out: str | None = flag(None, "output file; default: checkpoints/pruned.pth")
    rounds: int = flag(8, "rounds at the most; 0 only converts")
    schedule: str = flag(
        "cubic", "cubic: to --target in --rounds; geometric: --rate of the rest a round",
        choices=("cubic", "geometric"),
    )  # fmt: skip
    target: float = flag(0.95, "sparsity after the last round (cubic)")
    rate: float = flag(0.2, "share of the remaining weights that goes a round (geometric)")
    max_drop: float = flag(0.5, "points of validation accuracy that may be lost")
    epochs: int = flag(3, "epochs of fine-tuning a round")
    lr: float = flag(0.02, "peak learning rate of a round")
    lr_schedule: str = flag(
        "linear", "within a round, to zero", choices=("linear", "cosine", "constant")
    )
    batch_size: int = flag(128, "images a step, over all processes")
    weight_decay: float = flag(5e-4, "L2 penalty")
    label_smoothing: float = flag(0.1, "share of the label spread over all classes")
    distill: float = flag(0.5, "weight of the dense parent's soft labels; 0: none")
    temperature: float = flag(2.0, "of the soft labels")
    augment: str = flag("cutout", "see train.py", choices=("none", "light", "cutout", "auto"))
    amp: bool = flag(True, "bf16 autocast; fp16 with loss scaling where CUDA lacks bf16")
    compile: bool = flag(False, "torch.compile")
    resume: bool = flag(True, "continue an interrupted run if its state is there")

    def __post_init__(self):
        if not 0 < self.target < 1 or not 0 < self.rate < 1:
            raise ValueError("--target and --rate must lie between 0 and 1")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = config.device(cfg.device)
    engine.start_processes(device)
    parent = checkpoint.load(cfg.path(cfg.parent, "checkpoints/baseline.pth"))
    if parent.quantization:
        raise UserError(f"{parent.file} is quantized: prune before quantizing")
    images = data.load(cfg.data, parent.val_size(cfg.val_size), device)
    if not len(images.val):
        raise UserError("pruning stops by validation accuracy: --val-size must be over 0")
    out = cfg.path(cfg.out, "checkpoints/pruned.pth")
    model, dense = parent.build(device), parent.build(device)
    start = sparsity_of(model)
    if cfg.schedule == "cubic" and cfg.rounds and cfg.target < start + 1e-4:
        raise UserError(f"--target {cfg.target} is no more than the parent's sparsity {start:.4f}")

    identity = config.identity(cfg) | {"parent": parent.sha256, "data": images.provenance()}
    log = metrics.Log(cfg.path(None, "logs/prune.jsonl"), identity, cfg.wandb)
    state_file = out.with_name(out.name + ".resume")
    round_file = out.with_name(out.name + ".round.resume")
    rounds, kept = [], {k: v.cpu().clone() for k, v in model.state_dict().items()}
    if cfg.resume:
        rounds, kept = _resume(state_file, round_file, identity, model, kept)
    if not rounds:
        result = engine.evaluate(model, images.val)
        rounds = [_line(0, start, result, True, [], 0.0)]
        engine.say(f"parent: sparsity {start:.2%}, val {result}")
    floor = rounds[0]["val_accuracy"] - cfg.max_drop / 100
    log.begin(rounds)

    recipe = engine.Recipe.of(cfg, schedule=cfg.lr_schedule)
    for number in range(len(rounds), cfg.rounds + 1):
        if not rounds[-1]["kept"]:
            break
        began = time.monotonic()
        if cfg.schedule == "cubic":
            sparsity = pruning.cubic(start, cfg.target, number, cfg.rounds)
        else:
            sparsity = pruning.geometric(start, cfg.rate, number)
        mask = pruning.Mask(model, pruning.magnitude_masks(model, sparsity))
        mask.apply()
        history, _ = engine.fit(
            model, images, recipe, augmentation(cfg.augment), cfg.seed + number, round_file,
            config=identity | {"round": number}, resume=cfg.resume,
            teacher=dense if cfg.distill else None, after_step=mask.apply,
            note=f"round {number}/{cfg.rounds} ",
        )  # fmt: skip
        result = engine.evaluate(model, images.val)
        good = result.accuracy >= floor
        line = _line(number, sparsity_of(model), result, good, history, time.monotonic() - began)
        rounds.append(line)
        if good:
            kept = {k: v.cpu().clone() for k, v in model.state_dict().items()}
        if engine.is_main():
            checkpoint.write(state_file, {"config": identity, "rounds": rounds, "kept": kept})
            round_file.unlink()
        log(line)
        verdict = "kept" if good else f"under the floor of {floor:.2%}: the last good one stays"
        engine.say(f"round {number}: sparsity {line['sparsity']:.2%}, val {result}, {verdict}")

    if cfg.rounds and not rounds[1]["kept"]:
        if engine.is_main():
            state_file.unlink()
        raise UserError(
            f"round 1 fell to {rounds[1]['val_accuracy']:.2%} at sparsity "
            f"{rounds[1]['sparsity']:.2%}, under the floor of {floor:.2%}: nothing to keep; "
            "give it more --epochs, more --rounds or a larger --max-drop"
        )
    if engine.is_main():
        model.load_state_dict(kept)
        _finish(cfg, out, model, parent, images, rounds, floor)
        state_file.unlink(missing_ok=True)
        log.close({"sparsity": sparsity_of(model)})
    engine.stop_processes()


def _resume(state_file, round_file, identity: dict, model, kept: dict) -> tuple[list, dict]:
    """The finished rounds and the last good weights, which go into the model."""
    if not state_file.is_file():
        return [], kept
    state = checkpoint.read(state_file)
    engine.same_run(state_file, state["config"], identity)
    if round_file.is_file():  # killed after a round was written, before its own state went
        done = checkpoint.read(round_file)["config"].get("round", 0) < len(state["rounds"])
        if done and engine.is_main():
            round_file.unlink()
    model.load_state_dict(state["kept"])
    engine.say(f"continuing {state_file} after round {len(state['rounds']) - 1}")
    return state["rounds"], state["kept"]


def sparsity_of(model) -> float:
    layers = metrics.layer_counts(model)
    return 1 - sum(n for _, _, n in layers) / sum(w for _, w, _ in layers)


def _line(number, sparsity, result, good, history, seconds) -> dict:
    return {
        "round": number, "sparsity": sparsity, "val_accuracy": result.accuracy,
        "val_correct": result.correct, "val_total": result.total, "kept": good,
        "seconds": round(seconds, 1), "epochs": history,
    }  # fmt: skip


def _finish(cfg, out, model, parent, images, rounds, floor) -> None:
    last = [line for line in rounds if line["kept"]][-1]
    figures = {k: last[k] for k in ("round", "sparsity", "val_correct", "val_total")}
    saved = checkpoint.save(
        out, "pruned", model, cfg, parent, metrics=figures, data=images.provenance()
    )
    n = f"validation: n={len(images.val)}"
    best = rounds.index(last)
    plots.accuracy_sparsity(
        [line | {"kept": i == best} for i, line in enumerate(rounds)],
        cfg.path(None, "plots/prune.png"), f"Accuracy against sparsity ({n})", floor,
    )  # fmt: skip
    plots.layer_sparsity(
        metrics.layer_counts(model), cfg.path(None, "plots/sparsity.png"),
        f"Sparsity of every layer, {last['sparsity']:.2%} in all",
    )  # fmt: skip
    print(
        f"{out}: {saved.bytes:,} bytes, sparsity {last['sparsity']:.2%}, val "
        f"{last['val_accuracy']:.2%} ({last['val_correct']}/{last['val_total']}), "
        f"parent {rounds[0]['val_accuracy']:.2%}; round {last['round']} of {len(rounds) - 1} tried"
    )


if __name__ == "__main__":
    config.run(main)
