"""Settings, flags and exit codes: one dataclass per stage, from which its command line is made.

    @dataclass
    class Settings(config.Common):
        lr: float = flag(0.1, "peak learning rate", heading="recipe")

    def main(argv=None):
        cfg = config.parse(Settings, __doc__, argv)
"""

import argparse
import dataclasses
import functools
import inspect
import math
import operator
import os
import shlex
import signal
import subprocess
import sys
import types
import typing
from pathlib import Path

import torch

from lib.files import printable

# What --help calls the value of a flag; others are N or X by their type. A FILE is recorded in a
# checkpoint's command by its name alone, without folders.
METAVARS = {
    "parent": "FILE", "out": "FILE", "decompress": "FILE", "onnx": "FILE", "data": "PATH",
    "run_dir": "DIR", "release": "DIR", "layer_bits": "BITS", "teacher": "FILE",
    "init": "FILE", "model": "FILE", "results": "FILE", "beside": "FILE", "reference": "DIR",
    "environment": "DIR", "dense": "FILE", "pruned": "FILE", "int8": "FILE",
}  # fmt: skip
DATA_HELP = (
    "file or folder: cifar10.npz, cifar-10-batches-py or cifar-100-python, its .tar.gz, parquet "
    "files, train/CLASS and "
    "test/CLASS; or `synthetic`: generated images, to try the program with; default: download "
    "CIFAR-10 to ./data"
)
SYNC_BATCHNORM_HELP = (
    "with several processes, batch norm has the statistics of the images of all of them, not of "
    "each process alone; without, a step is about three times faster on CPUs"
)
# The limits that a flag can have, as its error says them.
LIMITS = {
    "least": ("at least", operator.ge), "over": ("over", operator.gt),
    "most": ("at most", operator.le), "under": ("under", operator.lt),
}  # fmt: skip
MAX_SEED = 2**32 - 1  # as FORMAT.md has it, too


class UserError(Exception):
    """An error that the user can correct: shown as one line without a traceback, exit code 1."""


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none (a TimeoutError)."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def flag(default, help: str, choices: tuple | None = None, heading: str | None = None,
         also: str | None = None, needed: bool = False, **limits: float):  # fmt: skip
    """Make a dataclass field that becomes the flag `--name`.

    help: its unit and reason. heading: that of the field and of those that follow it in the class,
        up to the next heading, in --help. also: another name of the flag, without the dashes.
    needed: whether a command line without it is refused.
    limits: of LIMITS, those that the value, or each one of a list, must keep.
    """
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {}
    if not factory:
        factory = {"default": default}
    metadata = {
        "help": help, "choices": choices, "heading": heading, "also": also, "needed": needed,
        "limits": limits,
    }  # fmt: skip
    return dataclasses.field(metadata=metadata, **factory)


def files(help: str):
    """Make a dataclass field of positional arguments."""
    metadata = {"help": help, "choices": None, "positional": True}
    return dataclasses.field(default_factory=list, metadata=metadata)


@dataclasses.dataclass
class Common:
    """Settings shared by all stages that read images."""

    data: str | None = flag(None, DATA_HELP, heading="files and data")
    val_size: int | None = flag(
        None, "training images held out for validation, the same number per class; 0: none; "
        "default: as many as for the parent, or a tenth without a parent"
    )
    run_dir: str = flag(".", "folder that holds checkpoints/, logs/ and plots/")
    seed: int = flag(
        47, "random seed: initial weights, order, augmentation, calibration images",
        heading="run and machine", least=0, most=MAX_SEED,
    )  # fmt: skip
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")
    wandb: bool = flag(False, "log to Weights & Biases too; offline if there is no key")

    def path(self, given: str | None, default: str) -> Path:
        """Return the file that a flag names, or else its usual path in the run's folder."""
        return Path(given) if given else self.in_run(default)

    def in_run(self, name: str) -> Path:
        """Return a path in the run's folder, such as logs/train.jsonl."""
        return Path(self.run_dir) / name


@dataclasses.dataclass
class AfterTraining(Common):
    """The settings of the stages that read a network from a file."""

    assume_downsample: int | None = flag(
        None, "strides of a plain state dict, which does not say them: 32x32 down to 8x8 (4), "
        "4x4 (8), 2x2 (16) or 1x1 (32, torchvision's own); default: 4, and a line says so",
        choices=(4, 8, 16, 32), heading="files and data",
    )  # fmt: skip


@dataclasses.dataclass
class Training(Common):
    """The settings of the stages that train, by lib.engine.fit."""

    amp: bool = flag(
        True, "mixed precision: bf16, or fp16 on GPUs without it; fp32 on CPUs without it",
        heading="run and machine",
    )  # fmt: skip
    cuda_graph: bool = flag(True, "on one GPU, record a training step and replay it: faster")
    resume: bool = flag(True, "continue an interrupted run if its state is there")


@dataclasses.dataclass
class FineTuning(AfterTraining, Training):
    """The settings of the stages that train a network further, with another as its teacher."""

    distill: float = flag(
        0.5, "share of the loss that is against the teacher's soft labels; the rest is against the "
        "true ones", heading="learning from a teacher", least=0, most=1,
    )  # fmt: skip
    teacher: str | None = flag(
        None, "fp32 network to learn from, for a parent that has lost accuracy already; its logits "
        "are scaled to the standard deviation of the parent's; default: the parent"
    )  # fmt: skip
    temperature: float = flag(2.0, "softmax temperature of the soft labels", over=0)
    views: int = flag(
        0, "epochs with new batches (prune.py: of a round); later epochs repeat these, order and "
        "augmentation included, and the teacher's logits are not computed again: faster; 0: every "
        "epoch has new batches", least=0,
    )  # fmt: skip

    def __post_init__(self):
        if (self.teacher or self.views) and not self.distill:
            raise ValueError("--teacher and --views need a --distill over 0")


def parse(settings, doc: str, argv: list[str] | None = None):
    """Make an instance of the dataclass `settings` from the command line.

    doc: the stage's docstring, for --help. Wrong usage exits with code 2. Raises UserError where a
    folder is given for a file.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups = {}
    for field, heading in _with_headings(settings):
        if heading and heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        _add(groups.get(heading, parser), field)
    values = vars(parser.parse_args(argv))
    code_version()  # of now: hours later, the checkout may hold another than runs
    for name, value in values.items():  # before hours of work, not after
        if value == "":  # a variable of the shell that is not set, which must not mean the default
            parser.error(f"--{name.replace('_', '-')} needs a value")
        if METAVARS.get(name) == "FILE" and value and Path(value).is_dir():
            raise UserError(f"{value} is a folder, not a file")
    for field in dataclasses.fields(settings):
        if wrong := _outside(field, values[field.name]):
            parser.error(wrong)
    try:
        return settings(**values)
    except ValueError as error:  # raised by a __post_init__ that checks ranges
        parser.error(str(error))


def _outside(field: dataclasses.Field, value) -> str | None:
    """Return what is wrong with the value of a flag by its limits, or None."""
    name, limits = "--" + field.name.replace("_", "-"), field.metadata.get("limits", {})
    several = isinstance(value, list)
    if several and not value and field.default_factory():
        return f"{name} needs at least one value"
    for each in value if several else [value]:
        if isinstance(each, float) and not math.isfinite(each):
            return f"{name} must be a finite number"
        if each is not None and not all(LIMITS[k][1](each, limit) for k, limit in limits.items()):
            words = " and ".join(f"{LIMITS[key][0]} {limit}" for key, limit in limits.items())
            return f"{name} must be {words}"
    return None


def _with_headings(settings) -> list[tuple[dataclasses.Field, str | None]]:
    """Return the fields of a stage with their headings: its own first, then the shared ones."""
    fields, found = {field.name: field for field in dataclasses.fields(settings)}, []
    for part in settings.__mro__:
        heading = None
        for name in inspect.get_annotations(part):
            if name in fields:  # else a stage has its own
                field = fields.pop(name)
                heading = field.metadata.get("heading") or heading
                found.append((field, heading))
    return found


def _add(parser, field) -> None:
    """Add the flag of a field to a parser or to a group of one."""
    kind, default = field.type, field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(kind, types.UnionType):  # `int | None`: None means "not given"
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    text = field.metadata["help"].replace("%", "%%")
    if default is not None and default is not False and default != []:
        text += f" [{','.join(map(str, default)) if isinstance(default, list) else default}]"
    options = {"default": default, "help": text}
    name = field.name
    if field.metadata.get("positional"):
        parser.add_argument(name, nargs="*", metavar=name.rstrip("s").upper(), **options)
    elif kind is bool:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, action=argparse.BooleanOptionalAction, **options)
    else:
        if typing.get_origin(kind) is list:
            kind = _comma_separated(typing.get_args(kind)[0])
        choices = field.metadata["choices"]
        options |= {"type": kind, "choices": choices, "required": field.metadata["needed"]}
        if not choices or len(choices) > 8:  # the help says which
            known = METAVARS.get(name) or {int: "N", float: "X"}.get(kind)
            options["metavar"] = known or getattr(kind, "metavar", None)
        names = [name.replace("_", "-"), field.metadata.get("also")]
        parser.add_argument(*(f"--{n}" for n in names if n), dest=name, **options)


def _comma_separated(kind):
    """Return a function from `a,b,c` to a list of values of a type."""
    def convert(text: str) -> list:
        return [kind(part) for part in text.split(",") if part]

    convert.__name__ = f"list of {kind.__name__}"  # argparse names it in its error
    convert.metavar = "A,B,..."
    return convert


# Flags that say where a stage runs, reads and writes. They are no part of a run's identity: the
# hashes of the files that it reads are, in place of their names.
PARENTS = {"parent", "teacher", "init"}
LOCATIONS = PARENTS | {
    "data", "run_dir", "device", "cuda_graph", "wandb", "wandb_artifact", "out", "resume"
}


def refuse_replacing(out: Path | str | None, *read: Path | str | None) -> None:
    """Raise UserError if `out` is one of the files that a stage reads: it would be lost."""
    for file in read if out else ():
        if file and Path(out).exists() and Path(file).exists() and Path(out).samefile(file):
            raise UserError(f"{out} is what this stage reads, and would be replaced: name another "
                            "file")  # fmt: skip


def is_default(cfg, name: str) -> bool:
    """Return whether a setting that is no list has its default value."""
    return getattr(cfg, name) == getattr(type(cfg), name)  # a dataclass keeps defaults in its class


def identity(cfg) -> dict:
    """Return the settings that a stage's result depends on."""
    return {k: v for k, v in vars(cfg).items() if k not in LOCATIONS}


def refuse_other_run(path: Path, saved: dict, wanted: dict) -> None:
    """Raise UserError, naming the differences, if the state of an interrupted run was not made with
    these settings.

    path: of the state. saved, wanted: identities, of the run that it belongs to and of this run.
    """
    different = [
        f"{key} was {saved.get(key)}, is {wanted.get(key)}"
        for key in sorted(saved | wanted)
        if saved.get(key) != wanted.get(key)
    ]
    if different and set(saved) < set(wanted):
        raise UserError(f"{path} is of an earlier version: --no-resume discards it")
    if different:
        raise UserError(
            f"{path} is the state of another run ({'; '.join(different)}): "
            "give its flags to continue it, or --no-resume to discard it"
        )


def command(cfg) -> str:
    """Return the command line that gives a stage these settings: those that are not the default.

    cfg: an instance of the Settings of a stage. Of files it has the names alone, and nothing of the
    folders and devices that the stage used.
    """
    words = ["python", Path(inspect.getfile(type(cfg))).name]
    default = type(cfg)()
    for field, _ in _with_headings(type(cfg)):
        value = getattr(cfg, field.name)
        if value == getattr(default, field.name) or field.name in LOCATIONS - PARENTS:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", ",".join(map(str, value))]
        else:
            if METAVARS.get(field.name) == "FILE":
                value = Path(value).name
            elif METAVARS.get(field.name) == "BITS":  # files may be among its items
                value = ",".join(Path(item).name for item in value.split(","))
            words += [f"--{name}", str(value)]
    return shlex.join(words)


@functools.cache
def code_version() -> str:
    """Return the git commit, with `+` if files differ from it, or `unknown` outside a checkout.

    It is that of the first call, which `parse` makes.
    """
    root = Path(__file__).parent.parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=root, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"


def run(main) -> typing.NoReturn:
    """Call a stage's main and exit: 0 done, 1 failed (one line), 2 wrong usage, 130 interrupted,
    141 if the reader of its output has gone before the end (`train.py | head`)."""
    name, done = Path(sys.argv[0]).name, False
    for stream in filter(None, (sys.stdout, sys.stderr)):  # names of files may be no text there
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        done = True
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"{name}: error: {printable(str(error))}")  # it may quote a stranger's file
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not done:
            sys.exit(128 + signal.SIGPIPE)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"{name}: error: {reason(error)}")
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        sys.exit(f"{name}: error: not enough memory: {str(error).split(': ')[-1]}")
    except KeyboardInterrupt as error:
        print(f"{name}: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
