"""Checkpoints: plain types and tensors, read with weights_only=True, written atomically.

A checkpoint is a dict: format, stage, settings (the network's), quantization (or None), state,
config (the stage's settings), command (the command line that made it, without folders), metrics,
ancestors (stage, sha256, bytes, weights, metrics; the last is the parent), data, code, environment,
seed. It can rebuild its own network: `load(path).build()`.
"""

import dataclasses
import hashlib
import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lib import compressed, foreign, processes, quantizers
from lib.config import MAX_SEED, UserError, code_version, command, reason, refuse_other_run
from lib.data import CLASSES, SPLIT_SEED, Data, held_out, names_of
from lib.data import load as load_images
from lib.files import atomic, printable
from lib.metrics import is_weight, largest_map
from models.mobilenetv2 import MobileNetV2, settings_of

FORMAT = "mobilenetv2-cifar10/1"
# Outputs that a layer may have for one image: a small file can describe a network that would take
# all memory. At width 1.0 they are 196,608 at most.
MAX_OUTPUTS = 1 << 23
REPORTS_DOWNSAMPLE = 4  # the strides that the course report trained with
CHAIN = ("baseline.pth", "pruned.pth", "quantized.pth", "int8.pth", "compressed.nnz")
DTYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"
}  # fmt: skip
RELEASE = Path(__file__).parent.parent / "release/mobilenetv2-cifar10.nnz"  # the published one


@dataclasses.dataclass
class Checkpoint:
    """What a file holds, and how to build the network that it describes."""

    stage: str
    settings: dict  # the network's: see models.mobilenetv2.standard
    state: dict
    quantization: dict | None = None  # see lib.quantizers.attach; None: fp32
    config: dict = dataclasses.field(default_factory=dict)  # the stage's settings
    metrics: dict = dataclasses.field(default_factory=dict)
    data: dict = dataclasses.field(default_factory=dict)  # see lib.data.Data.provenance
    ancestors: list = dataclasses.field(default_factory=list)
    seed: int | None = None
    command: str | None = None  # that made it; files of earlier versions do not hold it
    code: str | None = None  # see config.code_version
    environment: dict | None = None  # see the function of this name
    file: Path | None = None  # where it was read from
    sha256: str | None = None  # of that file
    bytes: int | None = None

    def build(self, device="cpu") -> nn.Module:
        """Return the network with its weights, in eval mode, channels last.

        Raises UserError if the state does not fit the settings, an activation scale is not over 0,
        a weight scale is 0, a layer has over MAX_OUTPUTS, or batch norms are left in a network of
        ptq or qat.
        """
        try:
            # First without memory: the settings of a small file can ask for any amount of it.
            with torch.device("meta"):
                self._network({name: tensor.to("meta") for name, tensor in self.state.items()})
            for name, tensor in self.state.items():
                if name.endswith(".step") and not tensor > 0:
                    raise ValueError(f"{name}, a scale of activations, is {float(tensor)}")
                if name.endswith(".weight_scale") and not tensor.all():
                    raise ValueError(f"{name} has a scale of 0")
            model = self._network(self.state)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            # A strict load names the tensor in its second line; torch does not check the CRCs of
            # its own files, so a flipped bit can also have made nonsense of the settings.
            reasons = [line.strip() for line in str(error).splitlines()][1:2] or [reason(error)]
            text = f"{self.file} does not fit its own description: {_shortened(reasons[0])}"
            raise UserError(text) from None
        return model.to(device, memory_format=torch.channels_last).eval()

    def _network(self, state: dict) -> MobileNetV2:
        """Return a network of these settings and this scheme that holds the state."""
        model = MobileNetV2(self.settings)
        if (values := largest_map(self.settings)) > MAX_OUTPUTS:
            raise ValueError(f"a layer with {values:,} outputs, over the limit of {MAX_OUTPUTS:,}")
        if self.quantization:
            if not self.settings.get("folded") and self.quantization["method"] != "reference":
                raise ValueError("a quantized network with batch norms")
            quantizers.attach(model, self.quantization)
        model.load_state_dict(quantizers.float_state(state), strict=True)
        return model

    @property
    def weights(self) -> int:
        """The number of Conv2d and Linear weights, zeros included."""
        return sum(t.numel() for n, t in self.state.items() if is_weight(n, t))

    @property
    def dtype(self) -> str:
        """The type of the Conv2d and Linear weights as they were read: "fp32", "int8 and fp32"."""
        kinds = {t.dtype for n, t in self.state.items() if is_weight(n, t)}
        return " and ".join(sorted(DTYPES.get(k, str(k).removeprefix("torch.")) for k in kinds))

    @property
    def original_weights(self) -> int:
        """The number of weights of the network that the chain began with, before compaction."""
        return self.ancestors[0]["weights"] if self.ancestors else self.weights

    def lineage(self) -> list[dict]:
        """Return what a child records as its ancestors: this file's own, then this file."""
        this = {
            "stage": self.stage, "sha256": self.sha256, "bytes": self.bytes,
            "weights": self.weights, "metrics": self.metrics,
        }  # fmt: skip
        return [*self.ancestors, this]

    def child(self, network: MobileNetV2, scheme: dict, data: dict, seed: int) -> "Checkpoint":
        """Return a quantized version of this network, as quantize.py's file would hold it.

        scheme, data, seed: of that version.
        """
        return dataclasses.replace(
            self, stage="quantized", settings=network.settings, state=network.state_dict(),
            quantization=scheme, data=data, seed=seed, ancestors=self.lineage(), metrics={},
            sha256=None, bytes=None,
        )  # fmt: skip

    def encode_child(self, network: MobileNetV2, scheme: dict, data: dict, seed: int) -> bytes:
        """Return the .nnz file that a quantized version of this network becomes by the usual
        stages: quantize.py, to_int8.py, sparse_compress.py.

        scheme, data, seed: of that version. The hash of the int8.pth in between is unknown, and
        zeros in its place.
        """
        quantized = self.child(network, scheme, data, seed)
        quantized.sha256 = "0" * 64
        int8 = dataclasses.replace(
            quantized, stage="int8", ancestors=quantized.lineage(), file=Path("int8.pth")
        )
        return compressed.encode(int8)

    def refuse_quantized(self, advice: str = "start from an fp32 network") -> None:
        """Raise UserError, with the advice, if the network is quantized."""
        if self.quantization:
            raise UserError(f"{self.file} is quantized: {advice}")

    def val_size(self, given: int | None) -> int | None:
        """Return --val-size if it is given, else the number that this file was trained with."""
        return self.data.get("val_size") if given is None else given

    def images(
        self, given: str | None, val_size: int | None, device, test_only: bool = False
    ) -> Data:
        """Load the data set that the network was trained on, split as it was then.

        given, val_size: --data and --val-size, or None for what this file says.
        test_only: see lib.data.load.
        Raises UserError as `check_images` does.
        """
        trained_on = self.data.get("source")
        if given is None and trained_on == "synthetic":
            given = trained_on
        if given is None and trained_on not in (None, "cifar10", "synthetic"):
            raise UserError(f"{self.file} was trained on {trained_on}: give them as --data")
        classes = self.settings.get("classes")
        images = load_images(given, self.val_size(val_size), device, test_only, classes)
        self.check_images(images)
        if trained_on is None and images.classes != names_of(len(images.classes)):
            names = printable(", ".join(images.classes[:5])) + ", ..." * (len(images.classes) > 5)
            print(f"{self.file} does not name its classes: taken to be, in this order, {names}",
                  file=sys.stderr)  # fmt: skip
        return images

    def teacher(self, file: str | None, downsample: int | None, images: Data):
        """Return the Checkpoint whose soft labels this one's child learns from.

        file, downsample: --teacher and --assume-downsample; without a file it is this one.
        images: that the child is trained on. Raises UserError if `file` is quantized, or as
        `check_images` does.
        """
        source = self
        if file:
            source = load(file, downsample)
            source.refuse_quantized("give an fp32 network as --teacher")
        source.check_images(images)
        return source

    def knows(self, images: Data) -> bool:
        """Return whether the network was trained on the set that these images are of. All sets that
        are not CIFAR have the source `images`: their classes tell them apart."""
        names = list(images.classes)
        return self.data.get("source") == images.source and self.data.get("classes", names) == names

    def check_images(self, images: Data) -> None:
        """Raise UserError if the network was trained on another data set than these images, or on
        some of those that are held out here for validation, or if it has other classes."""
        trained_on = self.data.get("source")
        if trained_on not in (None, images.source):
            text = f"{self.file} was trained on {trained_on}, the images are {images.source}"
            raise UserError(text)
        if self.data.get("split_seed", SPLIT_SEED) != SPLIT_SEED:
            raise UserError(f"{self.file} was trained on another validation split")
        self.check_held_out(images)
        self.check_classes(images.classes)

    def check_held_out(self, images: Data) -> None:
        """Raise UserError if the network was trained on some of the images that are held out here.

        This needs the number that was held out then, which most files record. A larger number now
        is refused; with the same number, the images must be the same. With a smaller one, another
        order goes unnoticed.
        """
        then, now = self.data.get("val_size"), len(images.val)
        if then is not None and now > then:
            raise UserError(f"{self.file} was trained with --val-size {then}: of the {now} images "
                            "that are held out now, it has learned some")  # fmt: skip
        if then == now and held_out(self.data) not in (None, images.held_out):
            raise UserError(
                f"{self.file} was trained on images that would be held out for validation here: "
                "these are other images, or the same in another order; give the data as they were "
                "then (CIFAR-10: as torchvision has it). Test images alone need no order"
            )

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes: if the file has none, CIFAR-10's for ten, else numbers.

        A line on the standard error says so where the file does not name CIFAR-10 either.
        """
        if known := self.data.get("classes"):
            return tuple(known)
        names = names_of(self.settings["classes"])
        if names == CLASSES and "source" not in self.data:
            print(f"{self.file} does not name its classes: taken to be CIFAR-10's", file=sys.stderr)
        return names

    def check_classes(self, names: tuple[str, ...]) -> None:
        """Raise UserError if the network has not as many classes as there are names, or others than
        these, for sets whose names are all that tells them apart."""
        classes = self.settings.get("classes")
        if classes != len(names):
            raise UserError(f"{self.file} tells {classes} classes apart, not {len(names)}")
        known = self.data.get("classes", names)
        if self.data.get("source") == "images" and list(known) != list(names):
            theirs, ours = next((a, b) for a, b in zip(known, names, strict=True) if a != b)
            raise UserError(f"{self.file} was trained on other classes: {theirs}, not {ours}")


def load(path: Path | str, downsample: int | None = None) -> Checkpoint:
    """Read any file of the chain, or the state dict of a torchvision MobileNetV2: as torch.save
    wrote it or safetensors, plain or as lib.foreign.state_dict takes it.

    downsample: the strides of a plain state dict, which does not hold them (see
        models.mobilenetv2.standard). None: those of the report, and a line on the standard error
        says so. Files of the chain hold theirs.
    Raises UserError for a file that is missing, damaged or foreign, or that holds NaN or infinite
    values or fields of other types. Only tensors, plain types and numpy's scalars are unpickled.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not path.is_file():
        raise UserError(f"{path} does not exist: {_how_to_make(path.name)}")
    if path.suffix == ".onnx":
        raise UserError(f"{path} is for eval.py and predict.py: give the .pth that it was made of")
    raw = path.read_bytes()
    if raw[:4] == b"\x89NNZ":
        loaded = Checkpoint(**compressed.decode(raw, path))
    elif foreign.is_safetensors(raw):
        loaded = _from_dict(foreign.read_safetensors(raw, path), path, downsample)
    else:
        loaded = _from_dict(_read(raw, path), path, downsample)
    check_fields(loaded, path)
    check_finite(loaded.state, path)
    loaded.file, loaded.bytes = path, len(raw)
    loaded.sha256 = hashlib.sha256(raw).hexdigest()
    return loaded


def check_fields(source: Checkpoint, path: Path) -> None:
    """Raise UserError unless the fields that a file fills have the types that this program writes.

    Whether state and settings fit each other is for `build` to find.
    """
    def ensure(legal, what):
        if not legal:
            raise UserError(f"{path} does not fit its own description: {what}")

    ensure(isinstance(source.stage, str) and source.stage.isprintable(), "its stage is no text")
    for name in ("settings", "state", "data", "config", "metrics"):
        value = getattr(source, name)
        ensure(isinstance(value, dict), f"{name}: a {type(value).__name__!r} object, not a dict")
    blocks = source.settings.get("blocks")
    # A file can repeat a block in two bytes, and each takes memory and time to build.
    legal = isinstance(blocks, list) and 1 <= len(blocks) <= 255
    ensure(legal, "its 'blocks' are no list of 1 to 255")
    foreign.check_stored(source.state, path)
    if source.quantization is not None:
        _check_scheme(source.quantization, ensure)
    ensure(isinstance(source.ancestors, list), "ancestors: not a list")
    for row in source.ancestors:
        match row:
            case {"stage": str(stage), "sha256": str() | None, "weights": int() | None,
                  "metrics": dict()} if stage.isprintable():  # fmt: skip
                continue
        ensure(False, "an ancestor without a legal stage, sha256, weights and metrics")
    weights = source.ancestors[0]["weights"] if source.ancestors else 1
    ensure(weights and weights > 0, "the first ancestor has no weights")  # ratios are against them
    classes = source.settings.get("classes")
    legal = "classes" not in source.settings or type(classes) is int and classes > 0
    ensure(legal, "its 'classes' are no number over 0")
    names, held_out = source.data.get("classes", []), source.data.get("val_size")
    ensure(isinstance(names, list) and all(isinstance(n, str) for n in names), "names of classes")
    ensure(
        "classes" not in source.data or len(names) == classes,
        f"{len(names)} names of {classes} classes",
    )
    ensure(held_out is None or type(held_out) is int and held_out >= 0, "data: val_size")
    legal = source.seed is None or type(source.seed) is int and 0 <= source.seed <= MAX_SEED
    ensure(legal, "a seed that is not 0 to 2^32 - 1")


def _check_scheme(scheme, ensure) -> None:
    """Ensure that a scheme is one that lib/quantizers.py describes."""
    ensure(isinstance(scheme, dict), "quantization: not a dict")
    layer_bits = scheme.get("layer_bits", {})
    ensure(isinstance(layer_bits, dict), "quantization: 'layer_bits' is not a dict")
    bits = {name: scheme.get(name) for name in ("weight_bits", "act_bits")}
    bits |= {"last_act_bits": scheme.get("last_act_bits", bits["act_bits"])} | layer_bits
    for name, value in bits.items():
        legal = type(value) is int and value in quantizers.BITS
        ensure(legal, f"quantization: {name!r} is not 2 to 16, or 32")
    method = scheme.get("method")
    ensure(method in ("reference", "ptq", "qat"), "quantization: an unknown 'method'")
    ensure(method == "reference" or "layer_bits" in scheme, "quantization: no 'layer_bits'")


def check_finite(state: dict, path: Path) -> None:
    """Raise UserError if a tensor of the state holds NaN or infinite values."""
    bad = [
        name for name, tensor in state.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]  # fmt: skip
    if bad:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{path} holds NaN or infinite values in {bad[0]}{others}: it is of no use")


def _how_to_make(name: str) -> str:
    """Return what to do about a missing file of this name."""
    targets = dict(zip(CHAIN, ("train", "prune", "quantize", "int8", "compress"), strict=True))
    return f"`make {targets[name]}` makes it" if name in targets else "check the path"


def read(path: Path):
    """Read tensors and plain types from a torch file. Raises UserError, with why, if that fails."""
    return _read(path.read_bytes(), path)


def _read(raw: bytes, path: Path):
    """Return what the bytes of a torch file hold, as `read` does. path: names it in errors."""
    try:
        return foreign.load(raw)
    except Exception as error:  # torch.load's readers raise whatever their parsers do
        raise UserError(foreign.why_refused(raw, path, error)) from None


def _shortened(text: str) -> str:
    """Return torch's list of missing or unexpected tensors with the first three and a count."""
    head, names = text.partition(": ")[0], re.findall(r'"[^"]+"', text)
    return f"{head}: {foreign.first_three(names)}" if len(names) > 3 else text


def _from_dict(raw, path: Path, downsample: int | None) -> Checkpoint:
    """Make a Checkpoint of what a torch file holds. Raises UserError if it is none of ours."""
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, not a checkpoint")
    if str(raw.get("format")).startswith(FORMAT.rpartition("/")[0]):
        if raw["format"] != FORMAT:
            raise UserError(f"{path} has format {raw['format']!r}; this program reads {FORMAT!r}")
        fields = {f.name for f in dataclasses.fields(Checkpoint)}
        try:
            return Checkpoint(**{k: v for k, v in raw.items() if k in fields})
        except TypeError as error:
            raise UserError(f"{path} lacks a field: {error}") from None
    try:
        state = foreign.state_dict(raw, path)
        for name, tensor in state.items():
            if is_weight(name, tensor) and not tensor.is_floating_point():
                raise ValueError(f"{name} holds {tensor.dtype}, no floats: give the network as it "
                                 "was before it was quantized")  # fmt: skip
        settings = settings_of(state, downsample or REPORTS_DOWNSAMPLE)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if downsample is None:
        print(
            f"{path} does not say its strides: taken as --assume-downsample {REPORTS_DOWNSAMPLE} "
            f"(32x32 down to {32 // REPORTS_DOWNSAMPLE}x{32 // REPORTS_DOWNSAMPLE})",
            file=sys.stderr,
        )  # fmt: skip
    return Checkpoint("baseline", settings, state)


def save(path: Path, stage: str, model: nn.Module, cfg, parent: Checkpoint | None, *,
         metrics: dict, data: dict, quantization: dict | None = None,
         state: dict | None = None, parents_seed: bool = False) -> Checkpoint:  # fmt: skip
    """Write a checkpoint atomically and return it as `load` would.

    cfg: the settings of the stage, from which the command line is recorded as well.
    parent: the checkpoint that it was made from; None for the first of a chain.
    data: what Data.provenance() says. quantization: the scheme; None: fp32.
    state: what to store in place of the model's own state dict (integers, for example).
    parents_seed: whether to record the seed of the parent (None: unknown), not that of the stage.
    Raises UserError, and leaves an old file in place, if the state holds NaN or infinite values.
    """
    state = model.state_dict() if state is None else state
    check_finite(state, path)
    content = {
        "format": FORMAT, "stage": stage, "settings": model.settings,
        "quantization": quantization,
        "state": {k: v.detach().cpu().contiguous() for k, v in state.items()},
        "config": {k: v for k, v in dataclasses.asdict(cfg).items() if v is not None},
        "command": command(cfg),
        "metrics": metrics, "data": data, "ancestors": parent.lineage() if parent else [],
        "seed": parent.seed if parents_seed else cfg.seed, "code": code_version(),
        "environment": environment(next(model.parameters()).device),
    }  # fmt: skip
    write(path, content)
    return load(path)


def write(path: Path, content) -> None:
    """Write tensors and plain types with torch.save, atomically."""
    with atomic(path) as file:
        torch.save(content, file)


def write_state(path: Path, identity: dict, **content) -> None:
    """Write the state of an unfinished run, atomically. identity: see config.refuse_other_run."""
    write(path, {"identity": identity, "code": code_version()} | content)


def read_state(path: Path, identity: dict) -> dict:
    """Read what `write_state` wrote.

    Where another version of this program wrote it, a line says so. Raises UserError if it belongs
    to another run, or if a version wrote it that stored other things.
    """
    saved = read(path)
    if not isinstance(saved, dict) or not {"identity", "code"} <= set(saved):
        raise UserError(f"{path} is of an earlier version: --no-resume discards it")
    refuse_other_run(path, saved["identity"], identity)
    if saved["code"] != code_version() and processes.is_main():
        print(f"{path} is of commit {saved['code']}, and this is {code_version()}: what comes out "
              "is the work of both", file=sys.stderr)  # fmt: skip
    return saved


def environment(device: torch.device) -> dict:
    """Return the versions and the hardware that a result may depend on.

    device: of the network.
    """
    return {
        "python": platform.python_version(), "torch": str(torch.__version__),
        "numpy": np.__version__, "platform": platform.machine(),
        "cuda": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
