"""A quantized network as the bytes of a .nnz file, and back: see FORMAT.md."""

from pathlib import Path

import torch

from lib import data, sparse
from lib.checkpoint import Checkpoint
from lib.config import UserError
from lib.container import FormatError
from lib.quantizers import float_state, integer_state


def encode(source: Checkpoint) -> bytes:
    """The network of a checkpoint; weights at the bits of its scheme, fp32 where it has none."""
    scheme = source.quantization
    bits = scheme["weight_bits"] if scheme else 32
    state = stored_state(source)
    weights, dense = {}, {}
    for name, tensor in state.items():
        array = tensor.detach().cpu().numpy()
        (weights if name.endswith(".weight") and array.ndim > 1 else dense)[name] = array
    meta = {
        "settings": source.settings, "quantization": scheme, "seed": source.seed,
        "mean": data.MEAN, "std": data.STD, "data": {"classes": data.CLASSES} | source.data,
        "ancestors": source.lineage(),
    }  # fmt: skip
    return sparse.encode(_plain(meta), weights, dense, dict.fromkeys(weights, bits))


def stored_state(source: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors that a file holds: weights as integers if the network is quantized."""
    if not source.quantization:
        return source.state
    return integer_state(float_state(source.state), source.quantization)


def decode(raw: bytes, path: Path | str = "the file") -> Checkpoint:
    """The checkpoint in a .nnz file, its weights still integers.

    Raises UserError for anything but a whole and legal file.
    """
    try:
        meta, weights, dense, _ = sparse.decode(raw)
        found = Checkpoint(
            "compressed", meta["settings"], {}, meta["quantization"], data=meta["data"],
            ancestors=meta["ancestors"], seed=meta["seed"],
        )  # fmt: skip
    except FormatError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is a .nnz file of something else ({error} missing)") from None
    found.state = {k: torch.from_numpy(v) for k, v in (weights | dense).items()}
    return found


def _plain(value):
    """JSON's own types: lists for tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
