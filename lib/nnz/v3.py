"""A `.nnz` file of version 3: as version 2, but the order of its channels carries bytes, too.

FORMAT.md, section 4.6, specifies it. `decode(encode(meta, tensors))` gives back every tensor of
`in_order(meta, tensors)`, bit for bit, and of the metadata what FORMAT.md names.
"""

import numpy as np

from lib.nnz import coder, description, order, v2
from lib.nnz.frame import LIMIT, Malformed, pack, unpack
from models.layers import Layer


def check(meta: dict, tensors: dict[str, np.ndarray]) -> None:
    """Raise Malformed or LimitExceeded unless a file can hold them; see `encode`. (That its section
    CODE is long enough for so many weights is found when it is encoded.)"""
    _, _, settings = description.pack(meta)
    network, scheme = v2.layers(settings), meta["quantization"]
    expected = v2.tensors_of(settings, scheme)
    if {name: (a.dtype.name, a.shape) for name, a in tensors.items()} != expected:
        raise Malformed("the tensors are not those of the network that the settings describe")
    v2.check_levels(network, _matrices(network, tensors), scheme)


def in_order(meta: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the same network with its channels in the order in which `decode` gives them back.

    meta, tensors, and what is raised: as for `encode`.
    """
    check(meta, tensors)
    network = v2.layers(meta["settings"])
    matrices = _matrices(network, tensors)
    groups = v2.kinds_and_groups(network)[1]
    orders = order.by_key(matrices, groups)
    matrices = order.permute(matrices, groups, orders)
    names = v2.tensors_of(meta["settings"], meta["quantization"])
    sorted_tensors = {name: tensors[name] for name in names}
    for layer, matrix, (rows, _) in zip(network, matrices, groups, strict=True):
        sorted_tensors[f"{layer.name}.weight"] = matrix.reshape(layer.shape)
        for part in ("weight_scale", "bias") if rows else ():
            name = f"{layer.name}.{part}"
            sorted_tensors[name] = tensors[name][orders[rows]]
    return sorted_tensors


def encode(meta: dict, tensors: dict[str, np.ndarray]) -> bytes:
    """Return the bytes of a file.

    meta: settings, quantization, seed, mean, std, data and ancestors as lib/compressed.py has them.
    tensors: the network's state, its weights as levels, int8 up to 8 bits, else int16.

    Raises Malformed or LimitExceeded for what a file of this version cannot hold.
    """
    tensors = in_order(meta, tensors)
    beginning, section, settings = description.pack(meta)
    network = v2.layers(settings)
    kinds, groups = v2.kinds_and_groups(network)
    matrices = _matrices(network, tensors)
    side = v2.pack_side(meta, matrices, tensors)
    matrices, rest = order.carry(side, matrices, groups)
    code = coder.encode(matrices, kinds, groups)
    v2.check_weights(network, len(code))
    return pack({"NETW": section + v2.sha_of(beginning, tensors), "CODE": code, "REST": rest})


def decode(data: bytes, limit: int = LIMIT) -> tuple[dict, dict[str, np.ndarray]]:
    """Return (meta, tensors) of a file, in new, writable arrays: see v2.decode."""
    payloads = unpack(data, limit, version=3)
    meta, content, matrices, side, padded = _read(payloads, limit)
    return meta, v2.read_tensors(meta, content, matrices, side, padded=padded)


def part_sizes(data: bytes) -> dict[str, int]:
    """Return {part: bytes} of a file; they add up to len(data), with the parts of v2.part_sizes.

    What the order of the channels carries takes no bytes: it is the first of the scales.
    """
    payloads = unpack(data, version=3)
    *_, side, padded = _read(payloads, LIMIT)
    sizes = v2.side_part_sizes(side, padded)
    left = len(payloads["REST"])  # it holds whatever is last in the side
    for part in reversed(sizes):
        sizes[part] = min(sizes[part], left)
        left -= sizes[part]
    sizes = v2.section_part_sizes(payloads, sizes)
    return sizes | {"frame": len(data) - sum(sizes.values())}


def _read(payloads: dict, limit: int) -> tuple:
    """Return (meta, content, matrices, side, padded) of a file: see v2.read_levels, but the
    channels are in the order of their keys.

    side: what their order carried, and the section REST after it. padded: the order may carry more
    than there is; then zeros follow, and REST is empty.
    """
    meta, content, matrices = v2.read_levels(payloads, limit)
    groups = v2.kinds_and_groups(v2.layers(meta["settings"]))[1]
    matrices, carried = order.collect(matrices, groups)
    rest = bytes(payloads["REST"])
    return meta, content, matrices, carried + rest, not rest


def _matrices(network: list[Layer], tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the levels of each layer, of the shape that v2.matrix_shape says."""
    return [tensors[f"{layer.name}.weight"].reshape(v2.matrix_shape(layer)) for layer in network]
