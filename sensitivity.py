"""Measure how much accuracy is lost when one layer alone has few weight bits, for each layer.

    python sensitivity.py --weight-bits 4,2

in:  checkpoints/pruned.pth, or any fp32 network (dead channels are removed first, exactly)
out: logs/sensitivity.csv: one row per layer and bit-width, with the images gained and lost against
     the parent; plots/sensitivity.png; logs/sensitivity.jsonl: the same rows as they are measured
     (an interrupted run continues from them)

A layer's weights are reconstructed on calibration images as in quantize.py, but with float32 scales
and a float32 bias; all other layers and all activations stay fp32. The table helps to choose
--layer-bits of quantize.py.
"""

import copy
import dataclasses
from pathlib import Path

import torch

from lib import checkpoint, config, console, data, devices, logs, measure, metrics, plots, ptq
from lib.compaction import compact
from lib.config import flag
from lib.evaluation import evaluate
from lib.files import write_csv
from lib.folding import fold
from models.layers import roles

COLUMNS = ("layer", "weight_bits", "weights", "nonzeros", "split", "correct", "total", "accuracy",
           "loss", "gained", "lost")  # fmt: skip


@dataclasses.dataclass
class Settings(config.AfterTraining):
    parent: str | None = flag(
        None, "fp32 network; default: checkpoints/pruned.pth", heading="files and data"
    )
    out: str | None = flag(None, "CSV; default: logs/sensitivity.csv")
    weight_bits: list[int] = flag(
        [4, 2], "bit-widths to try, each 2 to 16", heading="measurement", least=2, most=16
    )
    calibration: int = flag(1024, "training images to fit on, used without their labels", least=1)
    split: str = flag("val", "images to evaluate on", choices=("val", "train"))
    resume: bool = flag(True, "continue an interrupted run of the same settings")


@torch.no_grad()
def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    file = cfg.path(cfg.parent, "checkpoints/pruned.pth")
    out = cfg.path(cfg.out, "logs/sensitivity.csv")
    config.refuse_replacing(out, file)
    parent = checkpoint.load(file, cfg.assume_downsample)
    parent.refuse_quantized()
    images = parent.images(cfg.data, cfg.val_size, device)
    split = images.split(cfg.split)
    console.say_device(device)
    model, _ = compact(parent.build(device))
    fp32 = fold(model)
    labels = split.labels.cpu()
    before = evaluate(fp32, split)

    counts = {name: (weights, n) for name, weights, n in metrics.layer_counts(fp32)}
    bit_widths = list(dict.fromkeys(cfg.weight_bits))
    identity = config.identity(cfg) | {"parent": parent.sha256, "data": images.provenance()}
    del identity["weight_bits"]  # the rows of some bits serve a run of others
    log = logs.Log(cfg.in_run("logs/sensitivity.jsonl"), identity, cfg.wandb)
    measured = past_rows(log.path, identity) if cfg.resume else []
    if measured:
        console.say(f"{len(measured)} rows were measured before, by this version")
    planned = {row["weight_bits"] for row in measured} | set(bit_widths)
    first = identity | {"rows": len(counts) * len(planned), "code": config.code_version()}
    log.begin([first, *measured])
    done = {(row["layer"], row["weight_bits"]) for row in measured}
    sample = data.sample(images.train, cfg.calibration, cfg.seed)
    for bits in bit_widths:
        todo = [name for name in counts if (name, bits) not in done]
        if not todo:
            continue
        alone = ptq.layers_alone(model, sample, bits, console.progress(f"{bits} bits: fit"))
        for name in console.progress(f"{bits} bits: evaluate")(todo):
            changed = copy.deepcopy(fp32)
            changed.get_submodule(name).load_state_dict(alone[name])
            after = evaluate(changed, split)
            moved = measure.change(before.predictions == labels, after.predictions == labels)
            weights, nonzeros = counts[name]
            row = {
                "layer": name, "weight_bits": bits, "weights": weights, "nonzeros": nonzeros,
                "split": cfg.split, "correct": after.correct, "total": after.total,
                "accuracy": after.accuracy, "loss": after.loss, **moved,
            }  # fmt: skip
            log(row)
            measured.append(row)
    order = list(counts)
    rows = [row for row in measured if row["weight_bits"] in bit_widths]
    rows.sort(key=lambda row: (order.index(row["layer"]), -row["weight_bits"]))
    write_csv(out, COLUMNS, rows)
    title = f"Each layer's weights alone at few bits: {parent.file.name}, {cfg.split}"
    role = roles(fp32.settings)
    plots.sensitivity(
        [row | {"role": role[row["layer"]]} for row in rows], before.accuracy,
        cfg.in_run("plots/sensitivity.png"), title,
    )  # fmt: skip
    worst = min(rows, key=lambda row: row["correct"])
    log.close({"worst": worst["layer"]}, [cfg.in_run("plots/sensitivity.png")])
    print(
        f"{out}: {len(rows)} rows; parent {before}; the most is lost by {worst['layer']} at "
        f"{worst['weight_bits']} bits: {worst['accuracy']:.2%} (+{worst['gained']} "
        f"-{worst['lost']})"
    )


def past_rows(path: Path, identity: dict) -> list[dict]:
    """Return the rows that an earlier run with these settings measured, if this version of the
    program did.

    Raises UserError if the log is that of another run which was interrupted.
    """
    past = logs.read_log(path, torn=True)
    if not past:
        return []
    its, wanted = dict(past[0]), past[1:]
    planned, code = its.pop("rows", 0), its.pop("code", None)
    if its == identity:
        if code == config.code_version():
            return wanted
        console.say(f"{path} is of commit {code}, and this is {config.code_version()}: all is "
                    "measured again")  # fmt: skip
        return []
    if len(wanted) < planned:
        config.refuse_other_run(path, its, identity)
    return []


if __name__ == "__main__":
    config.run(main)
