"""Store the weights of a quantized network as integers, and write the integer network as ONNX.

    python to_int8.py
    python to_int8.py --target vnni

in:  checkpoints/quantized.pth, weights at 8 bits or fewer
out: checkpoints/int8.pth: int8 weights with their scales, the rest unchanged; of methods ptq and
     qat without the channels that no layer reads, the others in the order that a .nnz file gives
     back; logs/int8.jsonl
     checkpoints/int8.onnx, if methods ptq or qat quantized the activations to 8 bits: the same
     network in integers alone (lib/integer.py), for onnxruntime and OpenVINO; its input is uint8
     images

On processors with VNNI (Intel's servers since 2019, AMD's since 2022) --target vnni is faster: see
lib/graph.py. Its file gives wrong answers on older processors; this project's programs refuse it
there.

The log has how often the float network, the integer network and onnxruntime agree on the first
1,000 validation images.
"""

import dataclasses
from itertools import combinations

import torch

from lib import (
    checkpoint,
    compressed,
    config,
    console,
    data,
    devices,
    graph,
    logs,
    quantizers,
    runtime,
)
from lib.config import UserError, flag
from lib.evaluation import Evaluation, evaluate, evaluate_function


@dataclasses.dataclass
class Settings(config.AfterTraining):
    parent: str | None = flag(None, "quantized network; default: checkpoints/quantized.pth")
    out: str | None = flag(None, "output file; default: checkpoints/int8.pth")
    target: str = flag("any", "processors that the .onnx is for", choices=graph.TARGETS)

    def __post_init__(self):
        if self.out and self.out.endswith(".onnx"):
            raise ValueError("--out names the .pth; the .onnx is written beside it")


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    if cfg.target == "vnni" and runtime.saturates():
        raise UserError("--target vnni: this processor has no VNNI, and could not check the file")
    file = cfg.path(cfg.parent, "checkpoints/quantized.pth")
    out = cfg.path(cfg.out, "checkpoints/int8.pth")
    config.refuse_replacing(out, file)
    parent = checkpoint.load(file, cfg.assume_downsample)
    scheme = parent.quantization
    bits = quantizers.most_weight_bits(scheme) if scheme else 32
    if bits > 8:
        raise UserError(f"{parent.file} has {bits}-bit weights: quantize them to 8 or fewer first")
    images = parent.images(cfg.data, cfg.val_size, device)
    parent.build()  # or it says what does not fit
    settings, state = compressed.stored(parent)
    model = dataclasses.replace(parent, settings=settings, state=state).build(device)

    console.say_device(device)
    expected = evaluate(model, images.val) if len(images.val) else None
    figures = {"val_correct": expected.correct, "val_total": expected.total} if expected else {}
    onnx = out.with_suffix(".onnx")
    unchecked = out.with_name(out.name + ".unchecked")
    graph_file = onnx.with_stem(onnx.stem + ".unchecked")
    try:
        saved = checkpoint.save(
            unchecked, "int8", model, cfg, parent, metrics=figures, data=images.provenance(),
            quantization=scheme, state=state, parents_seed=True,
        )  # fmt: skip
        check(saved, model, images.val, expected)
        exported, text = export(saved, graph_file, images.val, cfg.target)
        # The .pth last: if this is interrupted here, make finds an older one, and repeats it.
        if exported:
            graph_file.replace(onnx)
        else:
            onnx.unlink(missing_ok=True)
        unchecked.replace(out)
    finally:
        unchecked.unlink(missing_ok=True)
        graph_file.unlink(missing_ok=True)
    val = f"val {expected}, checked" if expected else "no validation split: weights checked"
    print(f"{out}: {saved.bytes:,} bytes (parent {parent.bytes:,}), {val}")
    print(f"{onnx}: {text}" if exported else f"no {onnx.name}: {text}")
    logs.log_stage(cfg, "int8", {"bytes": saved.bytes, **figures, **exported})


def check(saved: checkpoint.Checkpoint, model, split, expected: Evaluation | None) -> None:
    """Raise UserError unless the file that was written is the same network: the weights of `model`
    bit for bit, and the `expected` answers on the split."""
    device = next(model.parameters()).device
    again = saved.build(device)
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    if same and expected:
        same = torch.equal(evaluate(again, split).predictions, expected.predictions)
    if not same:
        raise UserError(f"{saved.file} was not the same network as its parent: it is deleted")


def export(saved, path, split, target: str) -> tuple[dict, str]:
    """Write the .onnx of an int8.pth; return figures for the log, among them how often the three
    arithmetics agree on the first 1,000 images of the split, and the same in words; or {} and why
    no file was written.

    target: one of graph.TARGETS.
    """
    if why := runtime.why_no_onnx(saved.quantization):
        return {}, why
    onnx = runtime.export(saved, path, target)
    figures, text = {"onnx_bytes": onnx.bytes, "target": target}, ""
    if len(split):
        first = data.Split(split.images[:1000], split.labels[:1000])
        float_network = runtime.network(saved, split.images.device, integers=False)
        answers = {
            network.arithmetic: evaluate_function(network, first).predictions
            for network in (float_network, runtime.network(saved), runtime.network(onnx))
        }
        agree = {
            f"{a}, {b}": int((answers[a] == answers[b]).sum()) for a, b in combinations(answers, 2)
        }
        figures |= {"agree": agree, "agree_total": len(first)}
        text = f"; same answers of {len(first)}: " + "; ".join(f"{k} {n}" for k, n in agree.items())
    return figures, f"{onnx.bytes:,} bytes, target {target}{text}"


if __name__ == "__main__":
    config.run(main)
