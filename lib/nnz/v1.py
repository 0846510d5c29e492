"""A `.nnz` file of version 1: the course report's sparse encoding (FORMAT.md, section 3).

It holds, for each weight tensor, its non-zero values, bit-packed, and one index per dimension for
each of them; every other tensor as it is; and a JSON directory. `decode(encode(...))` gives back
the same content, bit for bit.
"""

import hashlib
import math
import operator
import zlib
from typing import NamedTuple

import numpy as np

from lib.nnz.frame import (
    LIMIT,
    MAX_LENGTH,
    ChecksumMismatch,
    LimitExceeded,
    Malformed,
    canonical,
    inflate,
    pack,
    parse_canonical,
    unpack,
)

SPARSE_BITS = {"int8": range(2, 9), "int16": range(2, 17), "float32": range(32, 33)}
DENSE_TYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
META_LIMIT = 1 << 20  # bytes of JSON
MAX_RANK, MAX_NAME = 8, 255  # dimensions of a tensor; characters of its name
MAX_DIM = 1 << 32  # size of a dimension
CHUNK = 1 << 16  # non-zeros packed at a time; a multiple of 8, so that a chunk begins on a byte


class Entry(NamedTuple):
    """A row of the directory: one tensor. A dense tensor has no `bits` and no `nonzeros`."""

    name: str
    dtype: str
    shape: list[int]
    bits: int = 0  # per stored value
    nonzeros: int = 0

    @property
    def numpy_type(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return math.prod(self.shape) * self.numpy_type.itemsize

    @property
    def value_bytes(self) -> int:
        """Bytes of its values in section SVAL."""
        return (self.nonzeros * self.bits + 7) // 8

    @property
    def indexed_dimensions(self) -> list[tuple[int, np.dtype]]:
        """(size, type of an index) of each dimension longer than 1: no other has indices."""
        types = ((1 << 8, "u1"), (1 << 16, "<u2"), (MAX_DIM, "<u4"))
        return [
            (size, np.dtype(next(name for most, name in types if size <= most)))
            for size in self.shape if size > 1
        ]  # fmt: skip

    @property
    def index_bytes(self) -> int:
        """Bytes of its indices in section SIDX."""
        return self.nonzeros * sum(index.itemsize for _, index in self.indexed_dimensions)


def encode(
    meta: dict,
    sparse: dict[str, np.ndarray],
    dense: dict[str, np.ndarray],
    bits: dict[str, int],
) -> bytes:
    """Return the bytes of a `.nnz` file.

    meta: anything that JSON can hold, with string keys, lists and finite numbers. sparse: tensors
    of any shape, of int8 levels of 2 to 8 bits, int16 levels of 2 to 16 bits, or float32. dense:
    tensors of one of DENSE_TYPES. bits: for each sparse tensor the bits per value (float32: 32).
    The order of the tensors is kept, that of the keys in `meta` is not.

    Raises a FormatError for what a file cannot hold, and for a `meta` that is not JSON.
    """
    if set(bits) != set(sparse):
        raise Malformed("`bits` must name exactly the sparse tensors")
    sparse = {name: _little_endian(array) for name, array in sparse.items()}
    dense = {name: _little_endian(array) for name, array in dense.items()}
    rows, values, indices = [], [], []
    for name, array in sparse.items():
        flat = array.reshape(-1)
        if array.dtype.name == "float32":
            flat = flat.view("<u4")  # so that -0.0 and NaN are not zero
        positions = np.flatnonzero(flat)
        width = operator.index(bits[name])
        entry = Entry(name, array.dtype.name, list(array.shape), width, len(positions))
        _check_entry(entry, SPARSE_BITS, MAX_LENGTH)
        values.append(_pack_values(name, flat[positions], width))
        by_dimension = []
        for size, index_type in reversed(entry.indexed_dimensions):
            positions, index = np.divmod(positions, size)
            by_dimension.append(index.astype(index_type).tobytes())
        indices += reversed(by_dimension)
        rows.append(list(entry))
    directory = {
        "dense": [[name, array.dtype.name, list(array.shape)] for name, array in dense.items()],
        "meta": meta,
        "sparse": rows,
    }
    text = canonical(directory)
    if _parse_directory(text, MAX_LENGTH)[0] != meta:
        raise Malformed("meta does not survive JSON: use string keys, and lists for tuples")
    return pack(
        {
            "META": zlib.compress(text, 9),
            "SVAL": b"".join(values),
            "SIDX": b"".join(indices),
            "DENS": b"".join(array.tobytes() for array in dense.values()),
            "HASH": _digest(text, [*sparse.values(), *dense.values()]),
        }
    )


def decode(
    data: bytes, limit: int = LIMIT
) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray], dict[str, int]]:
    """Return (meta, sparse, dense, bits) as given to `encode`, in new, writable arrays.

    Raises a FormatError for any file that is damaged or illegal, or whose tensors would take more
    than `limit` bytes; their size is checked before any of them is allocated.
    """
    limit = min(limit, MAX_LENGTH)
    payloads = unpack(data, limit, version=1)
    text = _inflate_meta(payloads["META"], min(limit, META_LIMIT))
    meta, sparse_entries, dense_entries = _parse_directory(text, limit)
    raw = {tag: np.frombuffer(payloads[tag], np.uint8) for tag in ("SVAL", "SIDX", "DENS")}
    for tag, size in (
        ("SVAL", sum(entry.value_bytes for entry in sparse_entries)),
        ("SIDX", sum(entry.index_bytes for entry in sparse_entries)),
        ("DENS", sum(entry.nbytes for entry in dense_entries)),
    ):
        if len(raw[tag]) != size:
            raise Malformed(f"section {tag} has {len(raw[tag])} bytes, the directory needs {size}")

    sparse, dense = {}, {}
    value_start = index_start = dense_start = 0
    for entry in sparse_entries:
        packed = raw["SVAL"][value_start : value_start + entry.value_bytes]
        index = raw["SIDX"][index_start : index_start + entry.index_bytes]
        sparse[entry.name] = _scatter(entry, packed, index)
        value_start += entry.value_bytes
        index_start += entry.index_bytes
    for entry in dense_entries:
        block = raw["DENS"][dense_start : dense_start + entry.nbytes]
        if entry.dtype == "bool" and (block > 1).any():
            raise Malformed(f"{entry.name!r}: a bool that is neither 0 nor 1")
        dense[entry.name] = block.view(entry.numpy_type).reshape(entry.shape).copy()
        dense_start += entry.nbytes
    if _digest(text, [*sparse.values(), *dense.values()]) != payloads["HASH"]:
        raise ChecksumMismatch("the decoded content is not what was encoded (SHA-256)")
    return meta, sparse, dense, {entry.name: entry.bits for entry in sparse_entries}


def part_sizes(data: bytes) -> dict[str, int]:
    """Return {part: bytes} of a file; they add up to len(data).

    The parts are values, indices, dense, metadata and frame (header, section table and SHA-256).
    """
    tags = {"values": "SVAL", "indices": "SIDX", "dense": "DENS", "metadata": "META"}
    payloads = unpack(data, version=1)
    sizes = {part: len(payloads[tag]) for part, tag in tags.items()}
    return {**sizes, "frame": len(data) - sum(sizes.values())}


def _little_endian(array):
    array = np.asarray(array)
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _digest(text, arrays):
    sha = hashlib.sha256(text)
    for array in arrays:
        sha.update(array.reshape(-1).view(np.uint8))
    return sha.digest()


def _inflate_meta(payload, limit):
    stream = zlib.decompressobj()
    text = inflate(stream, payload, limit, "META")
    if stream.unused_data:
        raise Malformed("section META has bytes after its stream")
    return text


def _parse_directory(text, limit):
    """Return (meta, sparse entries, dense entries) of the directory's JSON, all of it checked."""
    if len(text) > META_LIMIT:
        raise LimitExceeded(f"metadata of {len(text)} bytes, over the limit of {META_LIMIT}")
    match parse_canonical(text, "META"):
        case {"dense": list(dense), "meta": dict(meta), "sparse": list(sparse), **rest} if not rest:
            pass
        case _:
            raise Malformed("section META must be an object of dense, meta and sparse")
    for rows, width in ((sparse, 5), (dense, 3)):
        if any(type(row) is not list or len(row) != width for row in rows):
            raise Malformed(f"section META: a directory row must be a list of {width}")
    sparse = [_check_entry(Entry(*row), SPARSE_BITS, limit) for row in sparse]
    dense = [_check_entry(Entry(*row), dict.fromkeys(DENSE_TYPES, (0,)), limit) for row in dense]
    entries = sparse + dense
    if len({entry.name for entry in entries}) != len(entries):
        raise Malformed("two tensors have the same name")
    if sum(entry.nbytes for entry in entries) > limit:
        raise LimitExceeded(f"the tensors take more than the limit of {limit} bytes")
    return meta, sparse, dense


def _check_entry(entry, legal_bits, limit):
    """Return the entry if it is legal; legal_bits: {type: bits}, limit: bytes of a tensor."""
    name, dtype, shape, bits, nonzeros = entry
    if type(name) is not str or not 1 <= len(name) <= MAX_NAME:
        raise Malformed(f"a tensor name must be a string of 1 to {MAX_NAME} characters")
    if type(dtype) is not str or dtype not in legal_bits:
        raise Malformed(f"{name!r}: type {str(dtype)[:20]!r} is not of {', '.join(legal_bits)}")
    if type(bits) is not int or bits not in legal_bits[dtype]:
        raise Malformed(f"{name!r}: an illegal number of bits for {dtype}")
    if type(shape) is not list or len(shape) > MAX_RANK:
        raise Malformed(f"{name!r}: a shape must be a list of at most {MAX_RANK}")
    if any(type(size) is not int or not 0 <= size <= MAX_DIM for size in shape):
        raise Malformed(f"{name!r}: a dimension must be an integer of 0 to 2^32")
    if math.prod(size or 1 for size in shape) * entry.numpy_type.itemsize > limit:
        raise LimitExceeded(f"{name!r}: shape {shape} takes more than the limit of {limit} bytes")
    if type(nonzeros) is not int or not 0 <= nonzeros <= math.prod(shape):
        raise Malformed(f"{name!r}: an illegal number of non-zeros")
    return entry


def _pack_values(name, values, bits):
    """Return the values as a bit string of `bits` bits per value."""
    if bits == 32:
        return values.astype("<u4").tobytes()
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if len(values) and not low <= values.min() <= values.max() <= high:
        raise Malformed(f"{name!r}: a level outside {low} to {high}")
    packed = []
    for start in range(0, len(values), CHUNK):
        pairs = values[start : start + CHUNK].astype("<i2").view(np.uint8).reshape(-1, 2)
        planes = np.unpackbits(pairs, axis=1, bitorder="little")
        packed.append(np.packbits(planes[:, :bits], bitorder="little").tobytes())
    return b"".join(packed)


def _unpack_values(name, packed, count, bits):
    """Return the `count` values of a bit string: int16, or uint32 for the bits of floats."""
    if bits == 32:
        return packed.view("<u4")
    stream = np.unpackbits(packed, bitorder="little")
    if stream[count * bits :].any():
        raise Malformed(f"{name!r}: padding bits that are not zero")
    planes = stream[: count * bits].reshape(count, bits)
    sign = np.repeat(planes[:, -1:], 16 - bits, axis=1)  # two's complement: extend the top bit
    return np.packbits(np.hstack([planes, sign]), axis=1, bitorder="little").view("<i2")[:, 0]


def _scatter(entry, packed, index):
    """Return the tensor of these values and indices, uint8 arrays; CHUNK bounds its temporaries."""
    count, bits, name = entry.nonzeros, entry.bits, entry.name
    dimensions, start = [], 0
    for size, index_type in entry.indexed_dimensions:
        end = start + count * index_type.itemsize
        dimensions.append((size, index[start:end].view(index_type)))
        start = end
    out = np.zeros(entry.shape, entry.numpy_type)
    flat = out.reshape(-1)  # a view
    if bits == 32:
        flat = flat.view("<u4")
    last = -1
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        position = np.zeros(stop - start, np.int64)
        for size, indices in dimensions:
            if indices[start:stop].max() >= size:
                raise Malformed(f"{name!r}: an index outside its dimension")
            position = position * size + indices[start:stop]
        if position[0] <= last or (position[1:] <= position[:-1]).any():
            raise Malformed(f"{name!r}: positions are not strictly increasing")
        last = position[-1]
        block = packed[start * bits // 8 : (stop * bits + 7) // 8]
        values = _unpack_values(name, block, stop - start, bits)
        if not values.all():
            raise Malformed(f"{name!r}: a stored value is zero")
        flat[position] = values
    return out
