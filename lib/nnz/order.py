"""Store bytes in the order of the channels (FORMAT.md, section 4.6).

The order of hidden channels does not change what a network computes, but a file that stores one of
the n! orders of n channels spends log2(n!) bits on it. Version 3 gets these bits back. Every
channel has a key, made of its levels, that depends on no order. A reader returns the channels in
the order of their keys; in the file they lie in another one, which stands for a number, and so for
bytes of something else (after Kunze et al. 2024, "Entropy Coding of Unordered Data Structures":
they, too, let what is free to choose carry other bits).

Measured, bytes of the same networks in version 2 and in version 3: the course report's at W8A8
128,591 and 125,723, at W4A8 80,178 and 77,357, at a lambda of 0.44 57,503 and 55,587; our own
60,746 and 57,308. (Published files leave out the channels that no layer reads, too.) A part of the
gain, 1% of our own file, is that the order of the keys sorts scales roughly by size.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import numpy as np

from lib.nnz.frame import Malformed
from models.layers import Group

CHUNK_BITS = 4096  # so many bits of a number are computed at once: its time is linear in its length


def by_key(matrices: list[np.ndarray], groups: list[tuple]) -> dict[Group, np.ndarray]:
    """Return {group: its channels in the order of their keys}; channels of one key as they lie.

    matrices: levels, 2-D, of all layers. groups: for each the channel groups of its rows and of its
    columns, or None: as v2.kinds_and_groups returns them.
    """
    orders = {}
    for group, keys in _keys(matrices, groups):
        orders[group] = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    return orders


def permute(matrices: list[np.ndarray], groups: list[tuple], orders: dict) -> list[np.ndarray]:
    """Return the matrices with channel orders[group][i] of each group as its channel i."""
    permuted = []
    for matrix, names in zip(matrices, groups, strict=True):
        for axis, name in enumerate(names):
            if name is not None:
                matrix = matrix.take(orders[name], axis)
        permuted.append(matrix)
    return permuted


def carry(
    data: bytes, matrices: list[np.ndarray], groups: list[tuple]
) -> tuple[list[np.ndarray], bytes]:
    """Return (matrices, rest): the channels in an order that carries the first bytes of `data`, and
    the bytes that are left over.

    matrices: with their channels in the order of their keys. If the order could carry more than
    there is, it carries zeros at the end. The bytes are a number, of which each digit chooses one
    of the channels that are left (a Lehmer code, in the factorial number system).
    """
    single, twins = {}, {}
    for group, keys in _keys(matrices, groups):
        single[group], twins[group] = _single_and_twins(keys, range(len(keys)))
    digits, carried = _digits(data, [n for channels in single.values() for n in _radices(channels)])
    orders, start = {}, 0
    for group, channels in single.items():
        left = list(channels)
        chosen = [left.pop(digit) for digit in digits[start : start + len(channels)]]
        orders[group] = np.array(chosen + twins[group])
        start += len(channels)
    return permute(matrices, groups, orders), data[carried:]


def collect(matrices: list[np.ndarray], groups: list[tuple]) -> tuple[list[np.ndarray], bytes]:
    """Return (matrices, data) from the matrices of a file: the channels in the order of their keys,
    and what their order carried.

    Raises Malformed for an order that `carry` never makes.
    """
    orders, digits, radices = {}, [], []
    for group, keys in _keys(matrices, groups):
        order = sorted(range(len(keys)), key=keys.__getitem__)
        single, twins = _single_and_twins(keys, order)
        if twins != list(range(len(single), len(keys))):
            raise Malformed("section CODE: channels of one key that are not the last ones")
        rank = dict(zip(single, range(len(single)), strict=True))
        left = list(range(len(single)))
        for channel in range(len(single)):
            digits.append(bisect_left(left, rank[channel]))
            del left[digits[-1]]
        radices += _radices(single)
        orders[group] = np.array(order)
    return permute(matrices, groups, orders), _bytes(digits, radices)


def _keys(matrices, groups) -> Iterator[tuple[Group, list[bytes]]]:
    """Yield (group, the key of each of its channels), in the order in which the groups occur.

    Keys compare as bytes: their numbers have a fixed length and come with the highest byte first.
    """
    members = {}
    for index, names in enumerate(groups):
        for axis, name in enumerate(names):
            if name is not None:
                members.setdefault(name, []).append((index, axis))
    for group, axes in members.items():
        parts = []
        for index, axis in axes:
            levels = matrices[index] if axis == 0 else matrices[index].T
            if groups[index][1 - axis] is not None:  # what lies there has no order of its own
                levels = np.sort(levels, 1)
            parts.append(levels)
        levels = np.concatenate(parts, 1).astype(np.int32)
        size = np.abs(levels).sum(1, dtype=np.int64)
        numbers = (levels + 32768).astype(">u2")
        # The largest first: rows of large levels have small scales, so scales lie by size, too.
        yield group, [
            (2**63 - 1 - s).to_bytes(8, "big") + row.tobytes()
            for s, row in zip(size.tolist(), numbers, strict=True)
        ]


def _single_and_twins(keys: list[bytes], channels) -> tuple[list[int], list[int]]:
    """Return those of `channels` whose key no other channel has, and the others, in their order."""
    count = Counter(keys)
    single = [channel for channel in channels if count[keys[channel]] == 1]
    return single, [channel for channel in channels if count[keys[channel]] > 1]


def _radices(single: list[int]) -> range:
    """Return how many choices there are for each channel of a group in turn."""
    return range(len(single), 0, -1)


def _chunks(radices: list[int]) -> Iterator[tuple[list[int], int]]:
    """Yield (radices, bytes that their digits carry) of consecutive digits."""
    chunk, product = [], 1
    for radix in radices:
        chunk.append(radix)
        product *= radix
        if product >> CHUNK_BITS:
            yield chunk, (product.bit_length() - 1) // 8
            chunk, product = [], 1
    yield chunk, (product.bit_length() - 1) // 8


def _digits(data: bytes, radices: list[int]) -> tuple[list[int], int]:
    """Return the digits that stand for the first bytes of `data`, and how many bytes that are."""
    digits, carried = [], 0
    for chunk, size in _chunks(radices):
        number = int.from_bytes(data[carried : carried + size], "little")
        for radix in chunk:
            number, digit = divmod(number, radix)
            digits.append(digit)
        carried += size
    return digits, carried


def _bytes(digits: list[int], radices: list[int]) -> bytes:
    """Return the bytes that digits stand for; raises Malformed where they stand for none."""
    data, start = [], 0
    for chunk, size in _chunks(radices):
        number = 0
        for i in reversed(range(len(chunk))):
            number = number * chunk[i] + digits[start + i]
        if number >> 8 * size:
            raise Malformed("section CODE: an order of the channels that stands for no bytes")
        data.append(number.to_bytes(size, "little"))
        start += len(chunk)
    return b"".join(data)
