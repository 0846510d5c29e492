"""A network as the bytes of a `.nnz` file, and back. The file itself: lib/nnz/ and FORMAT.md.

This module knows no checkpoint files: `lib.checkpoint.load` calls `decode` and builds the
Checkpoint from its fields.
"""

import contextlib
from pathlib import Path

import torch

from lib import data
from lib.config import UserError, reason
from lib.metrics import is_weight
from lib.nnz import frame, v1, v2
from lib.nnz.frame import FormatError
from lib.quantizers import bits_of, float_state, integer_state


def encode(source) -> bytes:
    """Return a network as a file: weights at the bits of its scheme, fp32 if it has none.

    source: a lib.checkpoint.Checkpoint, or anything with its attributes settings, quantization,
    state, data, seed and file and its method lineage(). The file has version 2 of the format if
    that can hold the network, else version 1, which can hold any.

    Raises UserError for weights that are neither fp32 nor on the grid of the scheme.
    """
    scheme = source.quantization
    classes = data.names_of(source.settings["classes"])
    meta = _with_lists({
        "settings": source.settings, "quantization": scheme, "seed": source.seed,
        "mean": data.MEAN, "std": data.STD, "data": {"classes": classes} | source.data,
        "ancestors": source.lineage(),
    })  # fmt: skip
    try:
        tensors = {n: t.detach().cpu().numpy() for n, t in stored_state(source).items()}
    except (ValueError, TypeError) as error:  # off the grid; a type that numpy does not have
        raise UserError(f"{source.file}: {reason(error)}") from None
    if scheme and scheme["method"] in ("ptq", "qat"):
        with contextlib.suppress(FormatError):  # not quantized throughout, or of another kind
            return v2.encode(meta, tensors)
    weights = {name: t for name, t in tensors.items() if is_weight(name, t)}
    dense = {name: t for name, t in tensors.items() if name not in weights}
    try:
        bits = {n: bits_of(n.removesuffix(".weight"), scheme) if scheme else 32 for n in weights}
        return v1.encode(meta, weights, dense, bits)
    except FormatError as error:
        raise UserError(f"{source.file} does not fit into a .nnz file: {error}") from None


def stored_state(source) -> dict[str, torch.Tensor]:
    """Return the tensors that a file holds: weights as integers if the network is quantized.

    source: as for `encode`. A mask that multiplies leaves -0.0 where a weight was negative. A file
    would keep each of these as a value, so they become +0.0.
    """
    state = source.state
    if source.quantization:
        state = integer_state(float_state(state), source.quantization)
    return {
        name: t + 0.0 if is_weight(name, t) and t.is_floating_point() else t
        for name, t in state.items()
    }


def decode(raw: bytes, path: Path | str = "the file") -> dict:
    """Return the network in a file as the fields of a lib.checkpoint.Checkpoint, {field: value}.

    They are stage ("compressed"), settings, state (its weights still integers), quantization, data,
    ancestors and seed. path: names the file in errors.

    Raises UserError for anything but a whole and legal file.
    """
    try:
        if version(raw) == 2:
            meta, tensors = v2.decode(raw)
        else:
            meta, weights, dense, _ = v1.decode(raw)
            tensors = weights | dense
        fields = {
            name: meta[name] for name in ("settings", "quantization", "data", "ancestors", "seed")
        }
    except FormatError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is a .nnz file of something else ({error} missing)") from None
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return {"stage": "compressed", "state": state} | fields


def version(raw: bytes) -> int:
    """Return the format version of a whole file. Raises a FormatError for anything else."""
    tags = tuple(frame.unpack(raw))
    return next(v for v, known in frame.VERSIONS.items() if known == tags)


def sections(raw: bytes) -> dict[str, int]:
    """Return {part: bytes} of a file, which add up to len(raw); the parts depend on its version.

    See v1.sections and v2.sections of lib/nnz/.
    """
    return (v2 if version(raw) == 2 else v1).sections(raw)


def _with_lists(value):
    """Return the value with JSON's own types: lists for tuples."""
    if isinstance(value, dict):
        return {k: _with_lists(v) for k, v in value.items()}
    return [_with_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
