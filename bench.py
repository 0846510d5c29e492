"""Measure latency and throughput of the fp32 networks and of the integer network, side by side.

    python bench.py --data DIR
    python bench.py --dense FILE.pth --pruned FILE.pth --int8 FILE.onnx
    python bench.py --peers

in:  the dense fp32 network (checkpoints/baseline.pth), the pruned one (checkpoints/pruned.pth; its
     dead channels are removed first), checkpoints/int8.onnx
out: a table on the standard output, logs/bench.jsonl, plots/bench.png; with --results, a table for
     RESULTS.md

Six networks: dense and compacted in fp32, each in torch (eager, channels last) and in onnxruntime;
what onnxruntime's own quantize_static makes of the compacted one (QDQ, one scale per channel,
calibrated on training images; weights of 7 bits, as its documentation advises for processors whose
16-bit sums would saturate, see lib/graph.py); and ours. On CUDA also dense and compacted in torch
with bf16. --peers adds OpenVINO, if it is installed (pip install openvino; tried with 2025.2): the
compacted network in fp32, and in bf16 where the processor has it, as OpenVINO then takes by itself;
and our int8.onnx.

The networks take turns, after one turn each to warm up, so that other load on the machine disturbs
all alike. A turn's time is the median of its calls, and a network's time the median of its turns. A
ratio is the median over turns of a reference's time divided by the network's own. There are two
references: the dense network in torch, and the compacted one in fp32 in onnxruntime, which shows
what the integers gain. CPU time, of all threads together, is given as well: it says more where
cores are shared. Ours converts its uint8 input within the measured time; the others get normalized
images. Weights: the bytes of all tensors that a network stores. Activations: the most bytes alive
at once for one image (lib/memory.py), ours with padding.
"""

import contextlib
import copy
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from lib import config, console, data, devices, graph, logs, memory, plots, runtime, tables
from lib.compaction import compact
from lib.config import UserError, flag
from lib.evaluation import Evaluation, evaluate_function

TITLE = "Speed of the integer network"
COMPACTED = "compacted fp32, onnxruntime"  # what ratios refer to, beside the first network


@dataclasses.dataclass
class Settings(config.AfterTraining):
    dense: str | None = flag(None, "dense fp32 network; default: checkpoints/baseline.pth")
    pruned: str | None = flag(None, "pruned fp32 network; default: checkpoints/pruned.pth")
    int8: str | None = flag(None, "ours; default: checkpoints/int8.onnx")
    threads: list[int] = flag([1, 2], "thread counts", least=1)
    batches: list[int] = flag(
        [1, 250], "batch sizes: the smallest for latency, the largest for throughput", least=1
    )
    turns: int = flag(9, "turns per network, after one to warm up", least=1)
    calls: int = flag(20, "calls per turn at batch 1; one call at larger batches", least=1)
    calibration: int = flag(
        1024, "training images for quantize_static: as quantize.py's ptq has", least=1
    )
    peers: bool = flag(False, "also measure OpenVINO, if it is installed")
    split: str = flag("test", "images for the accuracy", choices=("val", "test", "train"))
    results: str | None = flag(None, "write the table for RESULTS.md, such as results/bench.json")
    title: str | None = flag(None, f"with --results: the table's heading [{TITLE}]")

    def __post_init__(self):
        if self.title and not self.results:
            raise ValueError("--title is for a table: give --results")


@dataclasses.dataclass
class Contestant:
    """A network to measure."""

    name: str
    prepare: Callable  # from uint8 images to the network's input; not timed
    start: Callable  # from a number of threads to a function from that input to logits
    weights: int  # bytes
    peak: int  # bytes of activations per image


def main(argv=None):
    cfg = config.parse(Settings, __doc__, argv)
    device = devices.choose(cfg.device)
    dense, pruned = (
        runtime.load(cfg.path(given, f"checkpoints/{name}.pth"), cfg.assume_downsample)
        for given, name in ((cfg.dense, "baseline"), (cfg.pruned, "pruned"))
    )
    for source in (dense, pruned):
        source.refuse_quantized("give the fp32 network")
    ours = runtime.load(cfg.path(cfg.int8, "checkpoints/int8.onnx"))
    if not isinstance(ours, runtime.OnnxFile):
        raise UserError(f"{ours.file} is not an .onnx: `make int8` writes int8.onnx")
    ours.refuse_saturation()
    images = pruned.images(cfg.data, cfg.val_size, "cpu")
    for source in (dense, ours):
        source.check_images(images)
    if pruned.sha256 not in (ancestor["sha256"] for ancestor in ours.ancestors):
        print(f"bench.py: {ours.file} was not made from {pruned.file}", file=sys.stderr)
    split = images.split(cfg.split)
    if max(cfg.batches) > len(split):
        raise UserError(f"--batches {max(cfg.batches)}: there are {len(split):,} images")

    console.say_device(device)
    sample = data.sample(images.train, cfg.calibration, cfg.seed)
    small = compact(pruned.build())[0]
    field = contestants(dense.build(), small, ours, sample, device)
    field += peers(small, ours) if cfg.peers else []
    rows, threads = [], torch.get_num_threads()
    accuracy = {c.name: accuracy_of(c, split) for c in field}
    for count in cfg.threads:
        torch.set_num_threads(count)
        for batch in cfg.batches:
            timed = race(field, split.images[:batch], count, cfg)
            rows += [
                {"network": c.name, "threads": count, "batch": batch, **timed[c.name],
                 "weight_bytes": c.weights, "peak_bytes": c.peak, "split": cfg.split,
                 "accuracy": accuracy[c.name].accuracy, "correct": accuracy[c.name].correct,
                 "total": len(split)}
                for c in field
            ]  # fmt: skip
    torch.set_num_threads(threads)
    log = logs.Log(cfg.in_run("logs/bench.jsonl"), config.identity(cfg), cfg.wandb)
    log.begin(rows)
    plot = plots.speed(rows, cfg.in_run("plots/bench.png"), "Speed and accuracy")
    log.close({}, [plot])
    print(f"{text_of(rows)}\n\naccuracy on {len(split):,} {cfg.split} images; {plot}")
    if cfg.results:
        bits = ours.quantization
        about = (
            f"dense: {dense.file.name}; compacted: {pruned.file.name} without its dead channels; "
            f"int8.onnx: {bits['method']} W{bits['weight_bits']}A{bits['act_bits']}, target "
            f"{ours.target}"
        )
        tables.write(Path(cfg.results), summary(rows, images.source, about, cfg.title))


# ---- who runs ------------------------------------------------------------------------------------


def contestants(dense, small, ours, sample, device) -> list[Contestant]:
    """Return the networks to measure, dense torch first.

    dense, small: fp32 models; ours: runtime.OnnxFile; sample: normalized calibration images.
    """
    field = []
    for name, model in (("dense fp32", dense), ("compacted fp32", small)):
        size, peak = fp32_bytes(model), 4 * peak_values(model.settings)
        raw = graph.to_bytes(graph.fp32(model, {}))
        field += [by_torch(f"{name}, torch", model, size, peak),
                  by_onnx(f"{name}, onnxruntime", raw, normalized, peak)]  # fmt: skip
        if device.type == "cuda":
            name = f"{name}, torch, CUDA bf16"
            field.append(by_torch(name, copy.deepcopy(model).to(device), size, peak, device))
    integers = by_onnx(
        "int8.onnx (ours)", ours.graph, lambda x: x.numpy(), padded_peak(ours.settings)
    )
    theirs = quantize_static(raw, sample.contiguous().numpy())
    peak = peak_values(small.settings)
    return [*field, by_onnx("quantize_static", theirs, normalized, peak), integers]


def by_torch(name: str, model, weights: int, peak: int, device=None) -> Contestant:
    """Return a model as run by torch, on the CPU unless a device is given."""
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
    """Return a graph as run by onnxruntime."""

    def start(threads: int) -> Callable:
        session = runtime.session(raw, threads, name)
        return lambda x: torch.from_numpy(session.run(None, {"images": x})[0])

    return Contestant(name, prepare, start, stored_bytes(raw), peak)


def peers(small, ours) -> list[Contestant]:
    """Return the compacted network and ours, run by OpenVINO; where it is not installed,
    print a line and return none."""
    try:
        import openvino
    except ImportError:
        print("--peers: none is measured, since openvino is not installed")
        return []
    core = openvino.Core()

    def by_openvino(name: str, raw: bytes, prepare: Callable, peak: int, **options) -> Contestant:
        def start(threads: int) -> Callable:
            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}

            @functools.cache
            def request(count: int):  # a fixed batch size is a third faster than any
                model = core.read_model(raw, b"")
                model.reshape([count, 3, 32, 32])
                return core.compile_model(model, "CPU", settings).create_infer_request()

            return lambda x: torch.from_numpy(request(len(x)).infer([x])["logits"])

        return Contestant(f"{name}, OpenVINO", prepare, start, stored_bytes(raw), peak)

    raw, values = graph.to_bytes(graph.fp32(small, {})), peak_values(small.settings)

    def compacted(kind: str, size: int) -> Contestant:
        """Return it in numbers of that kind, of so many bytes."""
        options = {"INFERENCE_PRECISION_HINT": kind.replace("fp32", "f32")}
        return by_openvino(f"compacted {kind}", raw, normalized, size * values, **options)

    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    integers = by_openvino(
        "int8.onnx (ours)", ours.graph, lambda x: x.numpy(), padded_peak(ours.settings)
    )
    return [compacted("fp32", 4), *[compacted("bf16", 2)] * bf16, integers]


def stored_bytes(raw: bytes) -> int:
    tensors = onnx.load_from_string(raw).graph.initializer
    return sum(numpy_helper.to_array(t).nbytes for t in tensors)


def normalized(images) -> np.ndarray:
    return data.normalize(images).contiguous().numpy()


def quantize_static(raw: bytes, images: np.ndarray) -> bytes:
    """Return what onnxruntime's own post-training quantization makes of an fp32 graph.

    images: (n, 3, 32, 32), normalized, to calibrate with.
    """
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


def peak_values(settings: dict) -> int:
    return memory.activations(settings)["peak_values"]


def padded_peak(settings: dict) -> int:
    """Return the bytes of the integer network's activations, padded channels included."""

    def up(count: int) -> int:
        return count + -count % graph.MULTIPLE

    blocks = [b | {"hidden": up(b["hidden"]), "out": up(b["out"])} for b in settings["blocks"]]
    settings = settings | {"stem": up(settings["stem"]), "head": up(settings["head"])}
    return peak_values(settings | {"blocks": blocks})


# ---- the race ------------------------------------------------------------------------------------


def accuracy_of(contestant: Contestant, split) -> Evaluation:
    run = contestant.start(torch.get_num_threads())
    return evaluate_function(lambda x: run(contestant.prepare(x)), split, contestant.name)


def race(field: list[Contestant], images, threads: int, cfg) -> dict[str, dict]:
    """Time all networks in turns; return times per call, images per second and ratios, by name.

    A ratio is the time of the first network, or of COMPACTED, divided by this network's.
    """
    ready = [(c.name, c.start(threads), c.prepare(images)) for c in field]
    turns = {c.name: [] for c in field}
    calls = cfg.calls if len(images) == 1 else 1
    note = console.progress(f"{threads} threads, batch {len(images)}")
    for turn in note(range(cfg.turns + 1)):
        first = turn % len(ready)  # or one would always run behind the one that fills the caches
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

    def ratios(base: str, name: str) -> list[float]:
        """Return those of wall and CPU time."""
        pairs = list(zip(turns[base], turns[name], strict=True))
        return [statistics.median(a[i] / b[i] for a, b in pairs) for i in range(2)]

    figures = {}
    for name, pairs in turns.items():
        wall, cpu = list(zip(*pairs, strict=True))
        ratio, cpu_ratio = ratios(field[0].name, name)
        to_compacted, cpu_to_compacted = ratios(COMPACTED, name)
        figures[name] = {
            "milliseconds": 1000 * statistics.median(wall), "fastest": 1000 * min(wall),
            "images_per_second": len(images) / statistics.median(wall), "ratio": ratio,
            "ratio_to_compacted": to_compacted,
            "cpu_milliseconds": 1000 * statistics.median(cpu), "cpu_ratio": cpu_ratio,
            "cpu_ratio_to_compacted": cpu_to_compacted, "turns": len(wall),
        }  # fmt: skip
    return figures


def summary(rows: list[dict], source: str, about: str, title: str | None = None) -> dict:
    """Return the table for RESULTS.md: a row per network, a column per batch size and thread count.

    source: where the images come from. about: the networks, in words. title: TITLE if None.
    """
    ratios = {(r["network"], r["batch"], r["threads"]): r["ratio_to_compacted"] for r in rows}
    cases = sorted({(r["batch"], r["threads"]) for r in rows})
    networks = {r["network"]: r for r in rows}.values()
    return tables.table(
        title or TITLE,
        ["network", *(f"batch {b}, {t} thread{'s' * (t > 1)}" for b, t in cases),
         f"correct of {rows[0]['total']:,}", "bytes of weights", "bytes of activations"],
        [[r["network"], *(f"{ratios[r['network'], *case]:.1f}x" for case in cases), r["correct"],
          r["weight_bytes"], r["peak_bytes"]] for r in networks],
        device=torch.device("cpu"),  # but for the rows of CUDA, which say so
        data=f"{source}, {rows[0]['split']} split, n={rows[0]['total']:,}",
        text=f"{about}. How many times as fast as the network of the row `{COMPACTED}`; medians of "
        f"{rows[0]['turns']} alternating turns.",
    )  # fmt: skip


def text_of(rows: list[dict]) -> str:
    """Return the rows as text, one part per thread count and batch size.

    Columns: times, and how many times as fast as the dense network in torch and than COMPACTED.
    """
    lines = []
    for threads, batch in dict.fromkeys((r["threads"], r["batch"]) for r in rows):
        some = [r for r in rows if (r["threads"], r["batch"]) == (threads, batch)]
        plural = "s" if threads > 1 else ""
        lines.append(f"\n{threads} thread{plural}, batch {batch}, {some[0]['turns']} turns")
        lines.append(f"  {'':28}{'ms':>10}{'images/s':>9}{'dense':>8}{'compacted':>11}"
                     f"{'CPU ms':>10}{'dense':>8}{'compacted':>11}"
                     f"{'accuracy':>10}{'weights':>12}{'activations':>13}")  # fmt: skip
        lines += [
            f"  {r['network']:28}{r['milliseconds']:>10.2f}{r['images_per_second']:>9.0f}"
            f"{r['ratio']:>7.1f}x{r['ratio_to_compacted']:>10.1f}x{r['cpu_milliseconds']:>10.2f}"
            f"{r['cpu_ratio']:>7.1f}x{r['cpu_ratio_to_compacted']:>10.1f}x"
            f"{r['accuracy']:>10.2%}"
            f"{r['weight_bytes']:>12,}{r['peak_bytes']:>13,}"
            for r in some
        ]
    return "\n".join(lines).strip("\n")


if __name__ == "__main__":
    config.run(main)
