"""Vectors of floats as short integers, without loss (FORMAT.md, section 4.4).

Weight scales, biases and activation scales are stored this way. A vector becomes
integers in one of two forms, whichever is shorter: the floats' own bits without the trailing zeros
of the mantissa, or multiples of a power of two. So floats that were rounded, to few mantissa bits
or to a grid, take few bits, and all others come back just as exactly.
"""

import numpy as np

from lib.nnz import coder
from lib.nnz.frame import Malformed, Reader, varint

# The form of a vector is 1 + its mantissa bits (1 to 24), or -150 - e for multiples of 2^e (-1 to
# -277).
MAX_CUT = 17  # low bits that bypass the coder: it can hold the 32 - 17 others


def pack(vectors: list[np.ndarray]) -> bytes:
    """Return the bytes of float32 vectors, of any values: two lengths, a coder stream, a tail."""
    forms, cuts, high, low = [], [], [], [np.zeros(0, np.uint8)]
    for vector in vectors:
        form, numbers = _shortest_form(np.asarray(vector, "<f4"))
        cut = _low_bits_to_cut(numbers)
        forms.append(form)
        cuts.append(cut)
        high.append(numbers >> cut)
        low.append(_low_bits(numbers, cut))
    heads = np.array([forms, cuts], np.int64)
    stream = coder.encode_values([*heads, *high])
    tail = np.packbits(np.concatenate(low), bitorder="little").tobytes()
    return varint(len(stream)) + varint(len(tail)) + stream + tail


def split(reader: Reader) -> tuple[bytes, bytes]:
    """Return (coder stream, tail) of the next vectors that `pack` wrote. Raises Malformed if the
    bytes end before."""
    stream_length, tail_length = reader.varint(), reader.varint()
    return bytes(reader.bytes(stream_length)), bytes(reader.bytes(tail_length))


def unpack(stream: bytes, tail: bytes, sizes: list[int]) -> list[np.ndarray]:
    """Return the float32 vectors, of these sizes, from what `split` returns.

    Raises Malformed unless the bytes are legal for these sizes.
    """
    try:
        forms, cuts, *high = coder.decode_values(stream, [len(sizes)] * 2 + sizes)
    except coder.CoderError as error:
        raise Malformed(f"section SIDE: {error}") from None
    if ((cuts < 0) | (cuts > MAX_CUT)).any():
        raise Malformed("section SIDE: an illegal number of low bits")
    needed = int(cuts @ np.array(sizes, np.int64)) if sizes else 0
    if len(tail) != (needed + 7) // 8:  # before they are unpacked: each takes a byte then
        raise Malformed("section SIDE: not as many low bits as the vectors need")
    bits = np.unpackbits(np.frombuffer(tail, np.uint8), bitorder="little")
    if bits[needed:].any():
        raise Malformed("section SIDE: padding bits that are not zero")
    vectors, start = [], 0
    for form, cut, numbers in zip(forms.tolist(), cuts.tolist(), high, strict=True):
        end = start + cut * len(numbers)
        low = bits[start:end].reshape(len(numbers), cut) @ (1 << np.arange(cut, dtype=np.int64))
        vectors.append(_floats(form, (numbers.astype(np.int64) << cut) + low))
        start = end
    return vectors


def _shortest_form(vector):
    """Return (form, integers as int64) of a float32 vector, in the form that codes shorter."""
    bits = vector.view("<u4").astype(np.int64)
    sign, size = bits >> 31, bits & 0x7FFFFFFF
    mantissa = 23 - _trailing_zeros(size, 23)
    floats = size >> 23 - mantissa
    floats = np.where(sign, ~floats, floats)  # -0.0 is -1: nothing is lost
    form = 1 + mantissa
    if np.isfinite(vector).all() and not (sign & (size == 0)).any() and size.any():
        exponent = np.maximum(size >> 23, 1) - 150
        whole = size & 0x7FFFFF | (size >> 23 > 0).astype(np.int64) << 23
        live = whole > 0
        lowest_bit = np.log2(whole[live] & -whole[live]).astype(np.int64)  # exact: powers of two
        exponent = int((exponent[live] + lowest_bit).min())
        grid = np.ldexp(vector.astype(np.float64), -exponent)
        if np.abs(grid).max() <= coder.LARGEST and _span(grid) <= _span(floats):
            return -150 - exponent, grid.astype(np.int64)
    return form, floats


def _span(numbers):
    """Return largest minus smallest magnitude of the non-zeros: zeros and signs are cheap."""
    return np.ptp(np.abs(numbers[numbers != 0]))


def _trailing_zeros(numbers, most):
    """Return how many low bits are 0 in all numbers, at most `most`."""
    union = int(np.bitwise_or.reduce(numbers, initial=0))
    return min((union & -union).bit_length() - 1, most) if union else most


def _low_bits_to_cut(numbers):
    """Return how many low bits must go for the coder to hold the rest."""
    cut = 0
    while len(numbers) and max(int(numbers.max()) >> cut, -(int(numbers.min()) >> cut)) > (
        coder.LARGEST
    ):
        cut += 1
    return cut


def _low_bits(numbers, cut):
    """Return the `cut` low bits of each number, lowest first, as one array of 0 and 1."""
    return (numbers[:, None] >> np.arange(cut) & 1).astype(np.uint8).reshape(-1)


def _floats(form, numbers):
    """Return the float32 vector of these integers in this form; raises Malformed."""
    if 1 <= form <= 24:
        size = np.where(numbers < 0, ~numbers, numbers)
        if size.size and int(size.max()) >> 7 + form:
            raise Malformed("section SIDE: a number is too large for its form")
        return (size << 24 - form | (numbers < 0).astype(np.int64) << 31).astype("<u4").view("<f4")
    if not -277 <= form <= -1:
        raise Malformed("section SIDE: an illegal form")
    exact = np.ldexp(numbers.astype(np.float64), -150 - form)
    with np.errstate(over="ignore"):
        vector = exact.astype("<f4")
    if not (vector == exact).all() or not np.isfinite(vector).all():
        raise Malformed("section SIDE: a number that is no float32")
    return vector
