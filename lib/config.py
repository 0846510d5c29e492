"""Settings, flags and exit codes: one dataclass per stage, from which its command line is made.

    @dataclass
    class Settings(config.Common):
        lr: float = flag(0.07, "peak learning rate", heading="recipe")

    def main(argv=None):
        cfg = config.parse(Settings, __doc__, argv)
"""

import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import os
import shlex
import sys
import types
import typing
from pathlib import Path

import torch

# What --help calls the value of a flag; others are N or X by their type. A FILE is recorded in a
# checkpoint's command by its name alone, without folders.
METAVARS = {
    "parent": "FILE", "out": "FILE", "decompress": "FILE", "onnx": "FILE", "data": "PATH",
    "run_dir": "DIR", "release": "DIR", "layer_bits": "BITS", "teacher": "FILE",
    "init": "FILE",
}  # fmt: skip


class UserError(Exception):
    """An error that the user can correct: shown as one line without a traceback, exit code 1."""


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none (a TimeoutError)."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def flag(default, help: str, choices: tuple | None = None, heading: str | None = None):
    """Make a dataclass field that becomes the flag `--name`.

    help: its unit and reason. heading: that of the field and of those that follow it in the class,
        up to the next heading, in --help.
    """
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {}
    if not factory:
        factory = {"default": default}
    metadata = {"help": help, "choices": choices, "heading": heading}
    return dataclasses.field(metadata=metadata, **factory)


def files(help: str):
    """Make a dataclass field of positional arguments."""
    metadata = {"help": help, "choices": None, "positional": True}
    return dataclasses.field(default_factory=list, metadata=metadata)


@dataclasses.dataclass
class Common:
    """The settings of every stage."""

    data: str | None = flag(
        None, "file or folder: cifar10.npz, cifar-10-batches-py, its .tar.gz, parquet files, "
        "train/CLASS and test/CLASS; or `synthetic`; default: download CIFAR-10 to ./data",
        heading="files and data",
    )  # fmt: skip
    val_size: int | None = flag(
        None, "validation images held out of training; default: the parent's, else a tenth"
    )
    run_dir: str = flag(".", "folder that holds checkpoints/, logs/ and plots/")
    assume_downsample: int | None = flag(
        None, "strides of a plain state dict, which does not say them: 32x32 down to 8x8 (4), "
        "4x4 (8), 2x2 (16) or 1x1 (32, torchvision's own); default: 4, and a line says so",
        choices=(4, 8, 16, 32),
    )  # fmt: skip
    seed: int = flag(
        47, "of weights, order and augmentation (47 is the report's)", heading="run and machine"
    )
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")
    wandb: bool = flag(False, "log to Weights & Biases too; offline if there is no key")

    def path(self, given: str | None, default: str) -> Path:
        """Return the file that a flag names, or else its default place in the run's folder."""
        return Path(given) if given else Path(self.run_dir) / default


def parse(settings, doc: str, argv: list[str] | None = None):
    """Make an instance of the dataclass `settings` from the command line.

    doc: the stage's docstring, for --help. Wrong usage exits with code 2.
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
    try:
        return settings(**values)
    except ValueError as error:  # raised by a __post_init__ that checks ranges
        parser.error(str(error))


def _with_headings(settings) -> list[tuple[dataclasses.Field, str | None]]:
    """Return the fields of a stage with their headings: its own first, then those of Common."""
    shared, heading = {}, None
    for field in dataclasses.fields(Common):
        heading = shared[field.name] = field.metadata["heading"] or heading
    first, last, heading = [], [], None
    for field in dataclasses.fields(settings):
        if field.name in shared:
            last.append((field, shared[field.name]))
        else:
            heading = field.metadata.get("heading") or heading
            first.append((field, heading))
    return first + last


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
        options |= {"type": kind, "choices": field.metadata["choices"]}
        if not options["choices"]:
            known = METAVARS.get(name) or {int: "N", float: "X"}.get(kind)
            options["metavar"] = known or getattr(kind, "metavar", None)
        parser.add_argument("--" + name.replace("_", "-"), **options)


def _comma_separated(kind):
    """Return a function from `a,b,c` to a list of values of a type."""
    def convert(text: str) -> list:
        return [kind(part) for part in text.split(",") if part]

    convert.__name__ = f"list of {kind.__name__}"  # argparse names it in its error
    convert.metavar = "A,B,..."
    return convert


# Where a stage runs, reads and writes, which does not change its result. (What it reads does: that
# is compared by hash.)
PARENTS = {"parent", "teacher", "init"}
PLACES = {"data", "run_dir", "device", "wandb", "out", "resume"} | PARENTS


def identity(cfg) -> dict:
    """Return the settings that a stage's result depends on."""
    return {k: v for k, v in vars(cfg).items() if k not in PLACES}


def command(cfg) -> str:
    """Return the command line that gives a stage these settings: those that are not the default.

    cfg: an instance of the Settings of a stage. Of files it has the names alone, and nothing of the
    folders and devices that the stage used.
    """
    words = ["python", Path(inspect.getfile(type(cfg))).name]
    default = type(cfg)()
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value == getattr(default, field.name) or field.name in PLACES - PARENTS:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", ",".join(map(str, value))]
        else:
            is_file = METAVARS.get(field.name) == "FILE"
            words += [f"--{name}", Path(value).name if is_file else str(value)]
    return shlex.join(words)


def device(name: str) -> torch.device:
    """Return the device of a name, and prepare it.

    `auto` is CUDA if there is one, else the CPU; `cuda` is one GPU per process under torchrun.
    Raises UserError if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here: {reason(error)}") from None
    if chosen.type == "cpu":
        _keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # fp32 figures are fp32; training uses bf16 anyway
    return chosen


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation.

    By default it returns every activation to the kernel, which has to zero the pages again (a third
    of an evaluation's time on 2 cores).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 1 << 30)


def run(main) -> typing.NoReturn:
    """Call a stage's main and exit: 0 done, 1 failed (one line), 2 wrong usage, 130 interrupted."""
    name = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"{name}: error: {error}")
    except BrokenPipeError:  # `eval.py ... | head`: the reader has gone, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{name}: error: {reason(error)}")
    except KeyboardInterrupt as error:
        print(f"{name}: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
