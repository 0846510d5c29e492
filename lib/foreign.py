"""Read networks that other programs wrote: wrapped, prefixed, masked, in safetensors, pickled.

What is mechanical is undone, and one line on the standard error says what was done. Of a pickle,
tensors and plain types are read, and numpy's scalars through stand-ins of our own. All else is
refused by its reason, which is found without executing anything of the file.
"""

import io
import json
import math
import pickletools
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.config import UserError

FIRST = "features.0.0.weight"  # the tensor by which a MobileNetV2 is recognized
DEPTH = 3  # of dicts in dicts that are searched for it


# ---- state dicts ---------------------------------------------------------------------------------


def state_dict(raw: dict, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a MobileNetV2 under torchvision's names, wherever in `raw` they are.

    A line on the standard error says what was undone: keys of dicts, a prefix of all names, the
    masks of torch.nn.utils.prune, tensors beside the network's. Where there is no such network, the
    tensors of `raw` itself are returned. Raises UserError for masks that do not fit.
    """
    networks = _networks(raw)
    if not networks:
        return _tensors(raw)
    keys, prefix, tensors = networks[0]
    # Beside a network with a prefix, other names belong to something else (a loss, a metric).
    # Without a prefix, a name without a dot is no layer's. Neither is one of another network, such
    # as a teacher.
    inside = [p for k, p, _ in networks[1:] if k == keys and p.startswith(prefix)]
    inner = tuple(p for p in inside if p != prefix)
    state = {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items()
        if (name.startswith(prefix) if prefix else "." in name) and not name.startswith(inner)
    }  # fmt: skip
    beside = [repr(name) for name in tensors if not (name.startswith(prefix) and "." in name)]
    done = [f"taken from {_where(keys, '')}"] if keys else []
    done += [f"without the prefix {prefix!r}"] if prefix else []
    done += [f"without {first_three(beside)} beside it"] if beside else []
    others = [_where(*network[:2]) for network in networks[1:]]
    done += [f"not the network at {first_three(others)}"] if others else []
    if any(name.endswith("_mask") for name in state):
        check_stored(state, path)
        state = _masked(state, path)
        done.append("its weights multiplied by their masks")
    if done:
        print(f"{path}: {', '.join(done)}", file=sys.stderr)
    return state


def _networks(raw: dict) -> list[tuple[tuple[str, ...], str, dict[str, Tensor]]]:
    """Return (keys, prefix, tensors) of each MobileNetV2 in a dict of dicts, the outermost first.

    keys lead from `raw` to the dict that holds the tensors; prefix is that of their names.
    """
    networks, queue, seen = [], [((), raw)], {id(raw)}
    for keys, content in queue:  # which grows on the way
        tensors = _tensors(content)
        for name in tensors:
            prefix = name.removesuffix("_orig").removesuffix(FIRST)
            if prefix + FIRST == name.removesuffix("_orig") and prefix[-1:] in ("", "."):
                networks.append((keys, prefix, tensors))
        for key, value in content.items():
            if isinstance(value, dict) and id(value) not in seen and len(keys) < DEPTH:
                seen.add(id(value))
                queue.append(((*keys, str(key)), value))
    return networks


def _tensors(content: dict) -> dict[str, Tensor]:
    """Return the tensors of a dict by name."""
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _where(keys: tuple[str, ...], prefix: str) -> str:
    """Return where a network lies in a file: 'model' > 'module.'."""
    return " > ".join(repr(key) for key in (*keys, *([prefix] if prefix else [])))


def _masked(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the state with x = x_orig * x_mask, as torch.nn.utils.prune computes it."""
    result = {}
    for name, tensor in state.items():
        base = name.removesuffix("_orig")
        if name.endswith("_orig") and f"{base}_mask" in state:
            mask = state[f"{base}_mask"]
            if mask.shape != tensor.shape:
                raise UserError(
                    f"{path}: {base}_mask is {tuple(mask.shape)}, not {tuple(tensor.shape)}"
                )
            result[base] = (tensor.detach() * mask.detach()).to(tensor.dtype)
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            result[name] = tensor
    return result


def check_stored(state: dict, path: Path) -> None:
    """Raise UserError unless these are dense tensors by name, with all of their elements stored.

    An expanded tensor stores one element for many, and any copy of it would take memory for all.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r} in its state is no tensor")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
            raise UserError(f"{path}: {name!r} in its state is no dense tensor")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{path}: {name!r} is of {tensor.dtype}: convert it to float32 first")
        size = tensor.numel() * tensor.element_size()
        if size > (stored := tensor.untyped_storage().nbytes()):
            raise UserError(f"{path}: {name!r} is of {size} bytes, of which {stored} are stored")


def first_three(names: list[str]) -> str:
    """Return a list of names as text: the first three, and the count of the others."""
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    return " and ".join(filter(None, [", ".join(names[:3]), *more]))


# ---- safetensors ---------------------------------------------------------------------------------

# https://github.com/huggingface/safetensors#format: the header's length, uint64; the header, JSON;
# the tensors' bytes, little-endian.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def is_safetensors(raw: bytes) -> bool:
    """Return whether bytes begin as a safetensors file: a length, and a header of JSON."""
    return raw[8:9] == b"{" and 2 <= int.from_bytes(raw[:8], "little") <= len(raw) - 8


def read_safetensors(raw: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name. Raises UserError if it is damaged."""
    start = 8 + int.from_bytes(raw[:8], "little")
    state, name, end = {}, "its header", 0
    try:
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if re.fullmatch(r"[A-Z]\d\w*", kind := entry["dtype"]) and kind not in DTYPES:
                raise UserError(f"{path}: {name!r} is of type {kind}: convert it to F32 first")
            dtype, shape = DTYPES[kind], entry["shape"]
            low, high = entry["data_offsets"]
            size = math.prod(shape) * dtype.itemsize
            if low != end or high - low != size or min(shape, default=0) < 0:
                raise ValueError(f"bytes {low} to {high}, not {end} to {end + size}")
            end, content = high, bytearray(raw[start + low : start + high])  # may be written to
            state[name] = torch.empty(shape, dtype=dtype)
            if size:
                state[name] = torch.frombuffer(content, dtype=dtype).view(shape)
        if end != len(raw) - start:
            raise ValueError(f"{len(raw) - start - end} bytes of no tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        what = f"{ascii(name)}: {type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is a damaged safetensors file, at {what}") from None
    return state


# ---- pickles -------------------------------------------------------------------------------------


class _Dtype:
    """Stands in for numpy.dtype in a pickle: booleans, integers, floats and texts alone."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|U\d{1,4}", code):
            raise ValueError(f"a numpy scalar of type {code}")
        self.code = code

    def __setstate__(self, state: tuple):
        if state[1] not in ("<", ">", "|"):
            raise ValueError(f"a numpy scalar of byte order {state[1]}")
        self.code = state[1] + self.code


def _scalar(dtype: _Dtype, raw: bytes):
    """Stands in for numpy's constructor of scalars in a pickle; returns a plain Python value."""
    return np.frombuffer(raw, dtype.code, count=1)[0].item()


STAND_INS = [
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"), (_scalar, "numpy._core.multiarray.scalar"),
]  # fmt: skip


def load(raw: bytes):
    """Return the tensors and plain types in the bytes of a torch file.

    Raises what torch.load does, and ValueError for what could ask for any amount of memory, which
    torch.load allows.
    """
    protocol, names = _pickled(raw)
    # What cannot be listed here might still be read by torch.
    if not protocol or _is_compressed(raw) or any(n.endswith(".bytearray") for n in names):
        raise ValueError("it could ask for any amount of memory")
    # Warnings are of what is refused in a moment anyway.
    with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(STAND_INS):
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def why_refused(raw: bytes, path: Path, error: Exception) -> str:
    """Return why `load` raised this error, in one line with what the file's owner can do.

    path: names the file.
    """
    refused = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
    protocol, names = _pickled(raw)
    names = [refused[1]] if refused else names * (protocol > 0)
    objects = [name for name in names if not re.match(HARMLESS, name)]
    line, what = 'torch.save(model.state_dict(), "plain.pth")', None
    if _is_torchscript(raw):
        what = "is a TorchScript archive, which holds code"
        line = f'torch.save(torch.jit.load("{path.name}").state_dict(), "plain.pth")'
    elif _is_compressed(raw):
        what = "is a compressed archive, which torch.save does not write"
    elif objects and objects[0].startswith("numpy."):
        what = "holds pickled numpy arrays"
        line = 'torch.save({k: torch.from_numpy(v) for k, v in state.items()}, "plain.pth")'
    elif objects:
        name = ascii(objects[0])[1:-1][:80]
        what = f"holds a pickled {name}"
        if not name.rpartition(".")[2].lstrip("_")[:1].isupper():  # no class: a function
            what = f"is not a checkpoint, or is damaged: it asks to call {name}"
    elif names and protocol > 2:
        what = f"is pickled with protocol {protocol}, torch.save's is 2"
    if not what:
        return f"{path} is not a checkpoint, or is damaged"
    return f"{path} {what}: only tensors and plain types are read. Its owner can run: {line}"


def _is_archive(raw: bytes) -> bool:
    """Return whether torch reads a file as a zip archive, which its older files are not."""
    return raw[:4] == b"PK\x03\x04"


def _entries(raw: bytes) -> list[zipfile.ZipInfo]:
    """Return the entries of a zip archive; [] for another file, or a damaged one."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return archive.infolist()
    except Exception:  # zipfile raises whatever its parsers do
        return []


def _is_compressed(raw: bytes) -> bool:
    """Return whether a file is a zip archive with a compressed entry."""
    return _is_archive(raw) and any(
        entry.compress_type != zipfile.ZIP_STORED for entry in _entries(raw)
    )


def _pickles(raw: bytes):
    """Yield the pickles of a torch file, each as a list of (opcode, argument): those named data.pkl
    of an archive; of an older file the five before the tensors' bytes, if there are so many.

    Raises what zipfile and pickletools do.
    """
    if not _is_archive(raw):
        files = [(io.BytesIO(raw), 5)]
    else:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            files = [
                (io.BytesIO(archive.read(entry)), 1) for entry in archive.infolist()
                if entry.filename.endswith("data.pkl") and entry.compress_type == zipfile.ZIP_STORED
            ]  # fmt: skip
    for file, count in files:
        for _ in range(count):
            if file.tell() < len(file.getbuffer()):
                yield [(op, argument) for op, argument, _ in pickletools.genops(file)]


HARMLESS = r"torch\.(_utils\.|storage\.|\w+$)|collections\.OrderedDict$|_codecs\.encode$"


def _pickled(raw: bytes) -> tuple[int, list[str]]:
    """Return the lowest protocol of a file's pickles and the names that they ask for; 0 if there is
    no pickle, or one is damaged or does not say its protocol.

    Their instructions are listed, not executed.
    """
    protocols, names = [], []
    try:
        for pickled in _pickles(raw):
            protocols.append(0)
            texts, memo, last = [], [], None  # what STACK_GLOBAL takes its two words from
            for opcode, argument in pickled:
                if opcode.name == "PROTO":
                    protocols[-1] = argument
                elif opcode.name == "GLOBAL":
                    names.append(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(texts[-2:]))
                elif opcode.name == "MEMOIZE":
                    memo.append(last)
                got = opcode.name in ("BINGET", "LONG_BINGET") and memo
                last = memo[argument] if got else argument
                if isinstance(last, str):
                    texts.append(last)
    except Exception:  # zipfile and pickletools raise whatever their parsers do
        return 0, names
    return min(protocols, default=0), names


def _is_torchscript(raw: bytes) -> bool:
    """Return whether a file is an archive with TorchScript's table of constants."""
    return any(entry.filename.endswith("/constants.pkl") for entry in _entries(raw))
