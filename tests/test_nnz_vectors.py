"""Float vectors as integers: every bit pattern comes back, and rounded numbers take few bytes."""

import tracemalloc

import numpy as np
import pytest

from lib.nnz import coder, vectors
from lib.nnz.frame import FormatError, Malformed

EDGES = np.array(
    [0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF,
     0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7FFFFFFF, 0xFFFFFFFF], "<u4",
).view("<f4")  # fmt: skip


def parted(raw):
    """(stream, tail) of what `pack` wrote."""
    lengths, at = [], 0
    while len(lengths) < 2:
        value = shift = 0
        while True:
            byte, at = raw[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        lengths.append(value)
    assert len(raw) == at + sum(lengths)
    return raw[at : at + lengths[0]], raw[at + lengths[0] :]


def check_round_trip(given):
    given = [np.asarray(vector, np.float32) for vector in given]
    raw = vectors.pack(given)
    found = vectors.unpack(*parted(raw), [len(vector) for vector in given])
    for a, b in zip(given, found, strict=True):
        assert b.dtype == np.float32 and a.tobytes() == b.tobytes()
    return len(raw)


def test_every_kind_of_float_comes_back():
    check_round_trip([])
    check_round_trip([[], [0.0], [-0.0], [0, 0], [1.5]])
    check_round_trip([EDGES, EDGES[::-1], EDGES[:1], *EDGES[:, None]])
    rng = np.random.default_rng(0)
    for _ in range(10):
        bits = rng.integers(0, 1 << 32, rng.integers(0, 40), dtype=np.uint32)
        check_round_trip([bits.view(np.float32), (bits & 0xFFFF0000).view(np.float32)])


@pytest.mark.parametrize("mantissa", range(24))
def test_few_mantissa_bits_come_back(mantissa):
    rng = np.random.default_rng(mantissa)
    bits = np.exp(rng.normal(size=60)).astype(np.float32).view(np.uint32)
    values = (bits >> 23 - mantissa << 23 - mantissa).view(np.float32)
    check_round_trip([values, -values, values * rng.choice([-1, 1], 60)])


@pytest.mark.parametrize("exponent", [-149, -130, -30, -6, 0, 3, 60, 112])
def test_grids_come_back(exponent):
    rng = np.random.default_rng(7)
    for top in (1, 100, 32767, 65535):
        numbers = rng.integers(-top, top + 1, 50)
        check_round_trip([np.ldexp(numbers.astype(np.float64), exponent)])


def test_rounded_numbers_take_few_bits():
    rng = np.random.default_rng(3)
    many = np.exp(rng.normal(-3, 0.7, (20, 100))).astype(np.float32)
    coarse = (many.view(np.uint32) + 0x10000 >> 17 << 17).view(np.float32)  # 6 bits
    biases = rng.normal(0, 20, (20, 100))
    assert check_round_trip(many) < 2000 * 27 / 8
    assert check_round_trip(coarse) < 2000 * 8.8 / 8
    assert check_round_trip(np.round(biases) * 2.0**-9) < 2000 * 8.3 / 8
    assert check_round_trip(np.zeros((20, 100))) < 40


def packed_numbers(forms, cuts, *numbers):
    return coder.encode_values([forms, cuts, *numbers])


@pytest.mark.parametrize(("stream", "tail", "sizes"), [
    (packed_numbers([0], [0], [1]), b"", [1]),  # no such form
    (packed_numbers([25], [0], [1]), b"", [1]),
    (packed_numbers([-278], [0], [1]), b"", [1]),
    (packed_numbers([1], [-1], [1]), b"", [1]),
    (packed_numbers([1], [18], [0]), b"\0\0\0", [1]),
    (packed_numbers([1], [0], [256]), b"", [1]),  # 8 bits of exponent and none of mantissa
    (packed_numbers([1], [0], [-257]), b"", [1]),
    (packed_numbers([-277], [0], [2]), b"", [1]),  # 2 * 2^127
    (packed_numbers([-150], [17], [32767]), (1).to_bytes(3, "little"), [1]),  # 33 bits
    (packed_numbers([24], [3], [1]), b"", [1]),  # no tail
    (packed_numbers([24], [3], [1]), b"\1\0", [1]),  # too long
    (packed_numbers([24], [3], [1]), b"\x08", [1]),  # padding
    (packed_numbers([1], [0], [1]), b"", [2]),
    (b"garbage, not a stream", b"", [5, 5]),
])  # fmt: skip
def test_what_is_not_legal_is_refused(stream, tail, sizes):
    with pytest.raises(Malformed) as caught:
        vectors.unpack(stream, tail, sizes)
    assert isinstance(caught.value, FormatError) and "\n" not in str(caught.value)


def test_low_bits_are_counted_before_they_are_unpacked():
    tail = bytes(1 << 22)
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="not as many low bits"):
            vectors.unpack(packed_numbers([24], [3], [1]), tail, [1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(tail)
