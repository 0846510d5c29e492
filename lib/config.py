"""Settings, flags and exit codes: one dataclass a stage, from which its command line is made.

    @dataclass
    class Settings(config.Common):
        lr: float = flag(0.07, "peak learning rate")

    def main(argv=None):
        cfg = config.parse(Settings, __doc__, argv)
"""

import argparse
import contextlib
import ctypes
import dataclasses
import os
import shlex
import sys
import types
import typing
from pathlib import Path

import torch

# What --help calls a flag's value, where the flag's own name would not say it better.
METAVARS = {
    "parent": "FILE", "out": "FILE", "decompress": "FILE", "onnx": "FILE", "data": "PATH",
    "run_dir": "DIR", "release": "DIR", "layer_bits": "BITS", "teacher": "FILE",
}  # fmt: skip


class UserError(Exception):
    """Something that the user can mend, said in one line: no traceback, exit code 1."""


def reason(error: BaseException) -> str:
    """The first line of an error's message; many have none (a TimeoutError), so else its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def flag(default, help: str, choices: tuple | None = None):
    """A dataclass field that becomes `--name`; help says its unit and reason."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {}
    if not factory:
        factory = {"default": default}
    return dataclasses.field(metadata={"help": help, "choices": choices}, **factory)


@dataclasses.dataclass
class Common:
    """What every stage takes."""

    data: str | None = flag(
        None, "cifar10.npz, a folder with the data, or `synthetic`; default: download to ./data"
    )
    val_size: int | None = flag(
        None, "validation images held out of training; default: the parent's, else a tenth"
    )
    run_dir: str = flag(".", "folder that holds checkpoints/, logs/ and plots/")
    assume_downsample: int | None = flag(
        None, "strides of a plain state dict, which does not hold them: 32x32 down to 8x8 (4), "
        "4x4 (8), 2x2 (16) or 1x1 (32, torchvision's own); default: 4, and a line says so",
        choices=(4, 8, 16, 32),
    )  # fmt: skip
    seed: int = flag(47, "of weights, order and augmentation (47 is the report's)")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 ...")
    wandb: bool = flag(False, "log to Weights & Biases too; offline where there is no key")

    def path(self, given: str | None, default: str) -> Path:
        """A file named by a flag, else its place in the run's folder."""
        return Path(given) if given else Path(self.run_dir) / default


def parse(settings, doc: str, argv: list[str] | None = None):
    """Fill the dataclass `settings` from the command line; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # The stage's own flags come first in --help, what all stages share last.
    shared = {f.name for f in dataclasses.fields(Common)}
    fields = sorted(dataclasses.fields(settings), key=lambda f: f.name in shared)
    for field in fields:
        _add(parser, field)
    values = vars(parser.parse_args(argv))
    try:
        return settings(**values)
    except ValueError as error:  # raised by a __post_init__ that checks ranges
        parser.error(str(error))


def _add(parser, field) -> None:
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
    def convert(text: str) -> list:
        return [kind(part) for part in text.split(",") if part]

    convert.__name__ = f"list of {kind.__name__}"  # argparse names it in its error
    convert.metavar = "A,B,..."
    return convert


# Where a stage runs, reads and writes: not part of its identity (what it reads is, by hash).
FILES = {"parent", "teacher"}
PLACES = {"data", "run_dir", "device", "wandb", "out", "resume"} | FILES


def identity(cfg) -> dict:
    """The settings that decide a stage's result."""
    return {k: v for k, v in vars(cfg).items() if k not in PLACES}


def command(stage, values: dict) -> str:
    """The command line that gives a stage these settings: what is not its default, of files the
    names alone. stage: a module whose Settings have no lists; its `flags_of_today`, where it has
    one, translates values of an older version."""
    values = getattr(stage, "flags_of_today", dict)(values)
    words = ["python", f"{stage.__name__}.py"]
    for field in dataclasses.fields(stage.Settings):
        value = values.get(field.name, field.default)
        if value == field.default or field.name in PLACES - FILES:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            is_file = METAVARS.get(field.name) == "FILE"
            words += [f"--{name}", Path(value).name if is_file else str(value)]
    return shlex.join(words)


def files(help: str):
    """A field of positional arguments."""
    return dataclasses.field(
        default_factory=list, metadata={"help": help, "choices": None, "positional": True}
    )


def device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; `cuda` is the rank's own under torchrun."""
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
    """Let glibc keep what is freed: by default it hands every activation back to the kernel, which
    zeroes its pages anew at the next allocation (a third of an evaluation's time on 2 cores)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 1 << 30)


def run(main) -> typing.NoReturn:
    """Call a stage's main and exit: 0 done, 1 failed (one line), 2 usage, 130 interrupted."""
    name = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"{name}: error: {error}")
    except BrokenPipeError:  # `eval.py ... | head`: the reader has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{name}: error: {reason(error)}")
    except KeyboardInterrupt as error:
        print(f"{name}: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
