"""How fast is it? Latency and throughput of the fp32 networks and of the integers, side by side.

    python bench.py --data DIR
    python bench.py --dense FILE.pth --pruned FILE.pth --int8 FILE.onnx

in:  the dense fp32 network (checkpoints/baseline.pth), the pruned one (checkpoints/pruned.pth; its
     dead channels are removed first), checkpoints/int8.onnx
out: a table on the standard output, logs/bench.jsonl, plots/bench.png

Six networks: dense and compacted in fp32, by torch (eager, channels last) and by onnxruntime; what
onnxruntime's own quantize_static makes of the compacted one (QDQ, a step a channel, calibrated on
training images; weights of 7 bits, as its documentation advises for processors that would saturate
in 16, see lib/graph.py); and ours. On CUDA also dense and compacted by torch in bf16.

They take turns, after one each to warm up, so that a neighbour on the machine disturbs all alike; a
turn is the median of its calls, a figure the median of its turns, a ratio the median over the turns
of dense torch's time by its own; of the processor's time as well, all threads together, which says
more where the cores are shared. Ours makes its inputs from uint8 within the time; the others have
them normalized beforehand. Weights are all tensors but the images that a network keeps. Activations
are the most that is alive at once for one image (lib/memory.py), ours with the padding.
"""

import contextlib
import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from lib import config, data, engine, graph, memory, metrics, plots, ptq, runtime
from lib.compaction import compact
from lib.config import UserError, flag
from models.mobilenetv2 import MobileNetV2


@dataclasses.dataclass
class Settings(config.Common):
    dense: str | None = flag(None, "dense fp32 network; default: checkpoints/baseline.pth")
    pruned: str | None = flag(None, "pruned fp32 network; default: checkpoints/pruned.pth")
    int8: str | None = flag(None, "ours; default: checkpoints/int8.onnx")
    threads: list[int] = flag([1, 2], "thread counts")
    batches: list[int] = flag([1, 250], "batch sizes: the first for latency, the last throughput")
    turns: int = flag(9, "turns each, after one to warm up")
    calls: int = flag(20, "calls a turn at batch 1; one at larger batches")
    calibration: int = flag(1024, "training images for quantize_static: as quantize.py's ptq has")
    split: str = flag("test", "images for the accuracy", choices=("val", "test", "train"))

    def __post_init__(self):
        numbers = [*self.threads, *self.batches, self.turns, self.calls, self.calibration]
        if min(numbers) < 1 or not self.threads or not self.batches:
            raise ValueError("thread counts, batch sizes, turns, calls, calibration: 1 or more")


@dataclasses.dataclass
class Contestant:
    name: str
    prepare: Callable  # uint8 images to its input, outside of the time
    start: Callable  # a number of threads to a function of that input to logits
    weights: int  # bytes
    peak: int  # bytes of activations of an image


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = config.device(cfg.device)
    dense, pruned = (
        runtime.load(cfg.path(given, f"checkpoints/{name}.pth"), cfg.assume_downsample)
        for given, name in ((cfg.dense, "baseline"), (cfg.pruned, "pruned"))
    )
    for source in (dense, pruned):
        source.refuse_quantized("give the fp32 network")
    ours = runtime.load(cfg.path(cfg.int8, "checkpoints/int8.onnx"))
    if not isinstance(ours, runtime.OnnxFile):
        raise UserError(f"{ours.file} is not an .onnx: `make int8` writes int8.onnx")
    images = pruned.images(cfg.data, cfg.val_size, "cpu")
    split = images.split(cfg.split)

    sample = ptq.calibration(images.train, cfg.calibration, cfg.seed)
    field = contestants(dense.build(), compact(pruned.build())[0], ours, sample, device)
    rows, threads = [], torch.get_num_threads()
    accuracy = {c.name: accuracy_of(c, split) for c in field}
    for count in cfg.threads:
        torch.set_num_threads(count)
        for batch in cfg.batches:
            timed = race(field, split.images[:batch], count, cfg)
            rows += [
                {"network": c.name, "threads": count, "batch": batch, **timed[c.name],
                 "weight_bytes": c.weights, "peak_bytes": c.peak, "split": cfg.split,
                 "accuracy": accuracy[c.name].accuracy, "total": len(split)}
                for c in field
            ]  # fmt: skip
    torch.set_num_threads(threads)
    log = metrics.Log(cfg.path(None, "logs/bench.jsonl"), vars(cfg), cfg.wandb)
    log.begin(rows)
    log.close({})
    plot = plots.speed(rows, cfg.path(None, "plots/bench.png"), "Speed and accuracy")
    print(f"{table(rows)}\n\naccuracy on {len(split):,} {cfg.split} images; {plot}")


# ---- who runs ------------------------------------------------------------------------------------


def contestants(dense, small, ours, sample, device) -> list[Contestant]:
    field = []
    for name, model in (("dense fp32", dense), ("compacted fp32", small)):
        size, peak = fp32_bytes(model), 4 * memory.activations(model)["peak_values"]
        raw = graph.to_bytes(graph.fp32(model, {}))
        field += [by_torch(f"{name}, torch", model, size, peak),
                  by_onnx(f"{name}, onnxruntime", raw, normalized, peak)]  # fmt: skip
        if device.type == "cuda":
            name = f"{name}, torch, CUDA bf16"
            field.append(by_torch(name, copy.deepcopy(model).to(device), size, peak, device))
    own = by_onnx("int8.onnx (ours)", ours.graph, lambda x: x.numpy(), padded_peak(ours.settings))
    theirs = quantize_static(raw, sample.contiguous().numpy())
    peak = memory.activations(small)["peak_values"]
    return [*field, by_onnx("quantize_static", theirs, normalized, peak), own]


def by_torch(name: str, model, weights: int, peak: int, device=None) -> Contestant:
    device = device or torch.device("cpu")

    def start(threads: int) -> Callable:
        cuda = device.type == "cuda"
        amp = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()

        @torch.inference_mode()
        def run(x):
            with amp:
                return model(x).float().cpu()  # on CUDA, this waits for it

        return run

    return Contestant(name, lambda x: data.normalize(x).to(device), start, weights, peak)


def by_onnx(name: str, raw: bytes, prepare: Callable, peak: int) -> Contestant:
    def start(threads: int) -> Callable:
        session = runtime.session(raw, threads, name)
        return lambda x: torch.from_numpy(session.run(None, {"images": x})[0])

    tensors = onnx.load_from_string(raw).graph.initializer
    weights = sum(numpy_helper.to_array(t).nbytes for t in tensors)
    return Contestant(name, prepare, start, weights, peak)


def normalized(images) -> np.ndarray:
    return data.normalize(images).contiguous().numpy()


def quantize_static(raw: bytes, images: np.ndarray) -> bytes:
    """onnxruntime's own post-training quantization of an fp32 graph."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.parts = iter(np.array_split(images, max(1, len(images) // 64)))

        def get_next(self):
            part = next(self.parts, None)
            return None if part is None else {"images": part}

    with tempfile.TemporaryDirectory() as folder:
        fp32, ready, out = (str(Path(folder) / f"{n}.onnx") for n in ("fp32", "ready", "int8"))
        Path(fp32).write_bytes(raw)
        quant_pre_process(fp32, ready)
        quantization.quantize_static(
            ready, out, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8, reduce_range=True,
        )  # fmt: skip
        return Path(out).read_bytes()


def fp32_bytes(model) -> int:
    return sum(t.nbytes for t in model.state_dict().values())


def padded_peak(settings: dict) -> int:
    """Bytes of the integer network's activations, channels as many as the graph has."""

    def up(count: int) -> int:
        return count + -count % graph.MULTIPLE

    blocks = [b | {"hidden": up(b["hidden"]), "out": up(b["out"])} for b in settings["blocks"]]
    settings = settings | {"stem": up(settings["stem"]), "head": up(settings["head"])}
    return memory.activations(MobileNetV2(settings | {"blocks": blocks}))["peak_values"]


# ---- the race ------------------------------------------------------------------------------------


def accuracy_of(contestant: Contestant, split) -> engine.Evaluation:
    run = contestant.start(torch.get_num_threads())
    return engine.evaluate_function(lambda x: run(contestant.prepare(x)), split, contestant.name)


def race(field: list[Contestant], images, threads: int, cfg) -> dict[str, dict]:
    """Times of a call, images a second, and times faster than the first, by name."""
    ready = [(c.name, c.start(threads), c.prepare(images)) for c in field]
    turns = {c.name: [] for c in field}
    calls = cfg.calls if len(images) == 1 else 1
    note = engine.progress(f"{threads} threads, batch {len(images)}")
    for turn in note(range(cfg.turns + 1)):
        first = turn % len(ready)  # nobody is always behind the one that fills the caches
        for name, run, x in ready[first:] + ready[:first]:
            wall = []
            worked = time.process_time()
            for _ in range(calls):
                began = time.perf_counter()
                run(x)
                wall.append(time.perf_counter() - began)
            worked = (time.process_time() - worked) / calls
            if turn:
                turns[name].append((statistics.median(wall), worked))
    found, dense = {}, list(zip(*turns[field[0].name], strict=True))
    for name, pairs in turns.items():
        wall, cpu = times = list(zip(*pairs, strict=True))
        ratios = [
            statistics.median(a / b for a, b in zip(theirs, own, strict=True))
            for theirs, own in zip(dense, times, strict=True)
        ]
        found[name] = {
            "milliseconds": 1000 * statistics.median(wall), "fastest": 1000 * min(wall),
            "images_a_second": len(images) / statistics.median(wall), "ratio": ratios[0],
            "cpu_milliseconds": 1000 * statistics.median(cpu), "cpu_ratio": ratios[1],
            "turns": len(wall),
        }  # fmt: skip
    return found


def table(rows: list[dict]) -> str:
    lines = []
    for threads, batch in dict.fromkeys((r["threads"], r["batch"]) for r in rows):
        some = [r for r in rows if (r["threads"], r["batch"]) == (threads, batch)]
        plural = "s" if threads > 1 else ""
        lines.append(f"\n{threads} thread{plural}, batch {batch}, {some[0]['turns']} turns")
        lines.append(f"  {'':28}{'ms':>10}{'images/s':>9}{'ratio':>7}{'CPU ms':>10}{'ratio':>7}"
                     f"{'accuracy':>10}{'weights':>12}{'activations':>13}")  # fmt: skip
        lines += [
            f"  {r['network']:28}{r['milliseconds']:>10.2f}{r['images_a_second']:>9.0f}"
            f"{r['ratio']:>6.1f}x{r['cpu_milliseconds']:>10.2f}{r['cpu_ratio']:>6.1f}x"
            f"{r['accuracy']:>10.2%}"
            f"{r['weight_bytes']:>12,}{r['peak_bytes']:>13,}"
            for r in some
        ]
    return "\n".join(lines).strip("\n")


if __name__ == "__main__":
    config.run(main)
