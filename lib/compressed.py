"""A quantized network as the bytes of a .nnz file, and back: see FORMAT.md."""

import contextlib
from pathlib import Path

import torch

from lib import container, data, packed, sparse
from lib.checkpoint import Checkpoint
from lib.config import UserError, reason
from lib.container import FormatError
from lib.quantizers import bits_of, float_state, integer_state


def encode(source: Checkpoint) -> bytes:
    """The network of a checkpoint; weights at the bits of its scheme, fp32 where it has none.

    In version 2 of the format if that can hold it, else in version 1, which holds any network.

    Raises UserError for weights that are neither fp32 nor on the scheme's grid.
    """
    scheme = source.quantization
    meta = _plain({
        "settings": source.settings, "quantization": scheme, "seed": source.seed,
        "mean": data.MEAN, "std": data.STD, "data": {"classes": data.CLASSES} | source.data,
        "ancestors": source.lineage(),
    })  # fmt: skip
    try:
        tensors = {n: t.detach().cpu().numpy() for n, t in stored_state(source).items()}
    except (ValueError, TypeError) as error:  # off the grid; a type that numpy has not
        raise UserError(f"{source.file}: {reason(error)}") from None
    if scheme and scheme["method"] in ("ptq", "qat"):
        with contextlib.suppress(FormatError):  # not all layers quantized, or of another kind
            return packed.encode(meta, tensors)
    weights = {name: t for name, t in tensors.items() if _sparse(name, t)}
    dense = {name: t for name, t in tensors.items() if name not in weights}
    try:
        bits = {n: bits_of(n.removesuffix(".weight"), scheme) if scheme else 32 for n in weights}
        return sparse.encode(meta, weights, dense, bits)
    except FormatError as error:
        raise UserError(f"{source.file} does not fit into a .nnz file: {error}") from None


def stored_state(source: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors that a file holds: weights as integers if the network is quantized.

    A mask that multiplies leaves -0.0 where a weight was negative; a file would keep each of them
    as a value, so they become +0.0.
    """
    state = source.state
    if source.quantization:
        state = integer_state(float_state(state), source.quantization)
    return {
        name: t + 0.0 if _sparse(name, t) and t.is_floating_point() else t
        for name, t in state.items()
    }


def _sparse(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim > 1


def decode(raw: bytes, path: Path | str = "the file") -> Checkpoint:
    """The checkpoint in a .nnz file, its weights still integers.

    Raises UserError for anything but a whole and legal file.
    """
    try:
        if version(raw) == 2:
            meta, tensors = packed.decode(raw)
        else:
            meta, weights, dense, _ = sparse.decode(raw)
            tensors = weights | dense
        found = Checkpoint(
            "compressed", meta["settings"], {}, meta["quantization"], data=meta["data"],
            ancestors=meta["ancestors"], seed=meta["seed"],
        )  # fmt: skip
    except FormatError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is a .nnz file of something else ({error} missing)") from None
    found.state = {k: torch.from_numpy(v) for k, v in tensors.items()}
    return found


def version(raw: bytes) -> int:
    """Of a whole file; raises a FormatError for anything else."""
    return next(v for v, tags in container.VERSIONS.items() if tags == tuple(container.unpack(raw)))


def sections(raw: bytes) -> dict[str, int]:
    """Bytes by kind, which add up to len(raw): see the function of that name of either version."""
    return (packed if version(raw) == 2 else sparse).sections(raw)


def _plain(value):
    """JSON's own types: lists for tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
