"""Encode a network as the bytes of a `.nnz` file, and decode it (lib/nnz/; FORMAT.md).

This module knows no checkpoint files: `lib.checkpoint.load` calls `decode` and builds the
Checkpoint from its fields.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch

from lib import data
from lib.compaction import without_unread
from lib.config import UserError, reason
from lib.metrics import is_weight
from lib.nnz import frame, v1, v2, v3
from lib.nnz.frame import FormatError
from lib.quantizers import bits_of, float_state, integer_state

QUANTIZED = {2: v2, 3: v3}  # the versions for quantized networks; 1 is for any


def encode(source) -> bytes:
    """Return a network as a file: weights at the bits of its scheme, fp32 if it has none.

    source: a lib.checkpoint.Checkpoint, or anything with its attributes settings, quantization,
    state, data, seed and file and its method lineage(). The file has version 3 of the format if
    that can hold the network, else version 1, which can hold any.

    Raises UserError for weights that are neither fp32 nor on the grid of the scheme.
    """
    scheme = source.quantization
    settings, state = stored(source)
    meta, tensors = _meta(source, settings), _arrays(state)
    if _is_folded(scheme):
        with contextlib.suppress(FormatError):  # not quantized throughout, or of another kind
            return v3.encode(meta, tensors)
    weights = {name: t for name, t in tensors.items() if is_weight(name, t)}
    dense = {name: t for name, t in tensors.items() if name not in weights}
    try:
        bits = {n: bits_of(n.removesuffix(".weight"), scheme) if scheme else 32 for n in weights}
        return v1.encode(meta, weights, dense, bits)
    except FormatError as error:
        raise UserError(f"{source.file} does not fit into a .nnz file: {error}") from None


def stored(source) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return (settings, state) of a network as a file holds it and gives it back.

    Weights are integers if the network is quantized. What version 3 can hold has no channel that no
    layer reads, and its channels in an order that follows from the weights: it computes the same.
    source: as for `encode`. A mask that multiplies leaves -0.0 where a weight was negative. A file
    would keep each of these as a value, so they become +0.0.

    Raises UserError for weights that are neither fp32 nor on the grid of the scheme.
    """
    settings, state, scheme = source.settings, source.state, source.quantization
    try:
        if scheme:
            state = integer_state(float_state(state), scheme)
        state = {
            name: t + 0.0 if is_weight(name, t) and t.is_floating_point() else t
            for name, t in state.items()
        }
        arrays = _arrays(state)
    except (ValueError, TypeError) as error:  # off the grid; a type that numpy does not have
        raise UserError(f"{source.file}: {reason(error)}") from None
    if _is_folded(scheme):
        with contextlib.suppress(FormatError):
            v3.check(_meta(source, settings), arrays)  # else it lacks what the next line needs
            settings, state = without_unread(settings, state)
            arrays = v3.in_order(_meta(source, settings), _arrays(state))
            state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return settings, state


def _is_folded(scheme: dict | None) -> bool:
    """Return whether a scheme is of those whose networks have no batch norm."""
    return bool(scheme) and scheme["method"] in ("ptq", "qat")


def _meta(source, settings: dict) -> dict:
    """Return what a file says of a network beside its tensors, in JSON's own types."""
    classes = data.names_of(settings["classes"])
    return _with_lists({
        "settings": settings, "quantization": source.quantization, "seed": source.seed,
        "mean": data.MEAN, "std": data.STD, "data": {"classes": classes} | source.data,
        "ancestors": source.lineage(),
    })  # fmt: skip


def _arrays(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}


def decode(raw: bytes, path: Path | str = "the file") -> dict:
    """Return the network in a file as the fields of a lib.checkpoint.Checkpoint, {field: value}.

    They are stage ("compressed"), settings, state (its weights still integers), quantization, data,
    ancestors and seed. path: names the file in errors.

    Raises UserError for anything but a whole and legal file.
    """
    try:
        if version(raw) in QUANTIZED:
            meta, tensors = QUANTIZED[version(raw)].decode(raw)
        else:
            meta, weights, dense, _ = v1.decode(raw)
            tensors = weights | dense
        if [meta["mean"], meta["std"]] != [list(data.MEAN), list(data.STD)]:
            raise UserError(f"{path} is of images with mean {meta['mean']} and standard deviation "
                            f"{meta['std']}: this program has {data.MEAN} and {data.STD} alone")
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


def part_sizes(raw: bytes) -> dict[str, int]:
    """Return {part: bytes} of a file, which add up to len(raw); the parts depend on its version.

    See v1.part_sizes, v2.part_sizes and v3.part_sizes of lib/nnz/.
    """
    return QUANTIZED.get(version(raw), v1).part_sizes(raw)


def _with_lists(value):
    """Return the value with JSON's own types: lists for tuples."""
    if isinstance(value, dict):
        return {k: _with_lists(v) for k, v in value.items()}
    return [_with_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
