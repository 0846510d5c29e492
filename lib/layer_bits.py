"""Read --layer-bits: weight bits of single layers, by name or from a JSON file.

    by_layer("first=8,last=8,features.3.conv.0.0=6", names, act_bits=4)
"""

import json
import os
from pathlib import Path

from lib.config import UserError, reason
from lib.quantizers import BITS


def by_layer(text: str | None, layers: list[str], act_bits: int) -> tuple[dict[str, int], dict]:
    """Return what --layer-bits says: weight bits by layer, and `last_act_bits` if it is given.

    act_bits: of all other activations; at 32 none is quantized, and `last` is of weights alone.
    Raises UserError for a file that cannot be read, for names that are not in `layers`, and for a
    `last_act` that would stand alone.
    """
    bits_by_layer, last_act, last_bits = {}, None, None
    for item in parse(text or ""):
        named = _read(item) if isinstance(item, Path) else dict([item])
        for name, bits in named.items():
            if name == "last_act":
                last_act = bits
                continue
            if name == "last":
                last_bits = bits
            layer = {"first": layers[0], "last": layers[-1]}.get(name, name)
            if layer not in layers:
                where = item if isinstance(item, Path) else f"{name}={bits}"
                raise UserError(
                    f"--layer-bits {where}: no layer {name!r}; the first is {layers[0]}"
                )
            bits_by_layer[layer] = bits
    if act_bits == 32 and last_act not in (None, 32):
        raise UserError(f"--layer-bits last_act={last_act}: with --act-bits 32 no activations are "
                        "quantized")  # fmt: skip
    if last_act is None and act_bits < 32:
        last_act = last_bits
    return bits_by_layer, {} if last_act is None else {"last_act_bits": last_act}


def parse(text: str) -> list[tuple[str, int] | Path]:
    """Split --layer-bits into (name, bits) and files; ValueError for bits that cannot be, and for
    an item without text."""
    if not text:
        return []
    items = []
    # os.path: a text that is too long for a path is no file, and no error.
    for item in [text] if os.path.isfile(text) else text.split(","):  # noqa: PTH113
        if not item.strip():
            raise ValueError(f"--layer-bits {text}: an item between commas is empty")
        name, equals, bits = item.strip().rpartition("=")
        if not equals or os.path.isfile(item):  # noqa: PTH113
            items.append(Path(item))
        elif not bits.isdecimal() or int(bits) not in BITS:
            raise ValueError(f"--layer-bits: {name} at {bits} bits: 2 to 16, or 32 for off")
        else:
            items.append((name, int(bits)))
    return items


def _read(path: Path) -> dict[str, int]:
    """Return {name: bits} of a JSON file; UserError where it is no such file."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--layer-bits {path}: {reason(error)}") from None
    if not isinstance(given, dict):
        raise UserError(f"--layer-bits {path}: not an object of layer names and bits")
    for name, bits in given.items():
        if type(bits) is not int or bits not in BITS:
            raise UserError(f"--layer-bits {path}: {name} at {bits!r} bits: 2 to 16, or 32 for off")
    return given
