"""The range coder: round trips, pinned bytes, the reference decoder beside it, refusals."""

import hashlib
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import reference_decoder

from lib.nnz import coder
from lib.nnz.coder import CoderError, decode, decode_values, encode, encode_values, part_sizes

needs_numba = pytest.mark.skipif(coder.numba is None, reason="numba is not installed")
FORMAT = " ".join((Path(__file__).parent.parent / "FORMAT.md").read_text().split())
BITS = (2, 3, 4, 5, 6, 7, 8, 12, 16)


def check_round_trip(layers, kinds=None, groups=None, compiled=None):
    kinds = [1] * len(layers) if kinds is None else kinds
    before = [layer.copy() for layer in layers]
    raw = encode(layers, kinds, groups, compiled=compiled)
    shapes = [layer.shape for layer in layers]
    found = decode(raw, shapes, kinds, groups, compiled=compiled)
    for a, b, c in zip(layers, found, before, strict=True):
        assert b.dtype == np.int32 and b.flags.writeable
        assert np.array_equal(a, b) and np.array_equal(a, c)
    parts = part_sizes(raw, shapes, kinds, groups, compiled=compiled)
    assert sum(parts.values()) == len(raw) and min(parts.values()) >= 0
    return raw


def network(seed=0, bits=8, density=0.4):
    """Three layers that share channels, a classifier, some dead rows and columns; int16."""
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1) - 1
    alive = rng.random(12) < 0.8
    shapes = [(12, 8), (12, 9), (8, 12), (5, 8)]
    layers = []
    for i, shape in enumerate(shapes):
        x = np.clip(np.round(rng.laplace(size=shape) * top / 4), -top, top)
        x *= rng.random(shape) < density
        x = x * (alive[None, :] if i == 2 else alive[:, None] if i < 2 else 1)
        layers.append(x.astype(np.int16))
    groups = [("h", "s"), ("h", None), ("s", "h"), (None, "s")]
    return layers, [coder.EXPAND, coder.DEPTHWISE, coder.PROJECT, coder.CLASSIFIER], groups


# ---- what comes back


@pytest.mark.parametrize("bits", BITS)
def test_every_width_and_density_comes_back(bits):
    rng = np.random.default_rng(bits)
    top = 2 ** (bits - 1) - 1
    for density in (0.001, 0.05, 0.5, 1.0):
        x = rng.integers(-top, top + 1, (23, 17)) * (rng.random((23, 17)) < density)
        check_round_trip([x], compiled=False)
        check_round_trip([x.T, -x, np.abs(x)], [0, 3, 5], compiled=False)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 40), (40, 1), (3, 33)])
def test_edge_arrays_come_back(shape):
    zeros = np.zeros(shape, np.int8)
    for fill in (0, 1, -1, 127, -128, 32767, -32767):
        x = np.full(shape, fill, np.int32)
        check_round_trip([x, zeros, x], [0, 1, 2], compiled=False)
    if zeros.size:
        one = zeros.copy()
        one[-1, -1] = -5
        check_round_trip([one], compiled=False)
        ramp = (np.arange(zeros.size) % 65535 - 32767).reshape(shape)
        check_round_trip([ramp], compiled=False)


def test_no_layers_and_zeros_take_no_bytes():
    assert check_round_trip([]) == b""
    assert len(check_round_trip([np.zeros((1000, 1000), np.int8)])) <= 1


def test_more_than_one_chunk(monkeypatch):
    layers, kinds, groups = network()
    raw = encode(layers, kinds, groups, compiled=False)
    monkeypatch.setattr(coder, "CHUNK", 20)
    assert encode(layers, kinds, groups, compiled=False) == raw
    check_round_trip(layers, kinds, groups, compiled=False)


def test_values_come_back():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(200, 260, 50), rng.integers(-3000, 3000, 7), np.zeros(0, np.int64)]
    raw = encode_values(arrays)
    found = decode_values(raw, [len(a) for a in arrays])
    assert all(np.array_equal(a, b) for a, b in zip(arrays, found, strict=True))
    assert len(raw) < 50 * 6.5 / 8 + 7 * 13 / 8 + 20  # entropies, and what learning costs


@needs_numba
def test_numba_writes_the_same_bytes():
    for seed in range(4):
        layers, kinds, groups = network(
            seed, bits=(2, 4, 8, 16)[seed], density=(1, 0.5, 0.1)[seed % 3]
        )
        raw = check_round_trip(layers, kinds, groups, compiled=True)
        assert encode(layers, kinds, groups, compiled=False) == raw
        shapes = [layer.shape for layer in layers]
        assert part_sizes(raw, shapes, kinds, groups, compiled=True) == part_sizes(
            raw, shapes, kinds, groups, compiled=False
        )
        for cut in range(0, len(raw), 6):  # errors, too
            outcomes = [outcome(raw[:cut], shapes, kinds, groups, c) for c in (False, True)]
            assert outcomes[0] == outcomes[1]


def outcome(raw, shapes, kinds, groups, compiled):
    try:
        return [x.tobytes() for x in decode(raw, shapes, kinds, groups, compiled=compiled)]
    except CoderError as error:
        return str(error)


# ---- how small


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_not_over_the_entropy(bits, density):
    rng = np.random.default_rng(7)
    top = 2 ** (bits - 1) - 1
    x = np.clip(np.round(rng.laplace(size=(150, 150)) * top / 5), -top, top)
    x = (x * (rng.random(x.shape) < density)).astype(np.int16)
    counts = np.unique(x, return_counts=True)[1]
    entropy = -np.sum(counts * np.log2(counts / x.size)) / 8
    # That many symbols' counts would have to be sent, too: some 10 bits each.
    assert len(encode([x], [1])) < 1.01 * entropy + 1.3 * len(counts) + 40


def test_rows_and_columns_of_their_own_scale_pay():
    rng = np.random.default_rng(3)
    scale = np.exp(rng.normal(size=(100, 1))) * np.exp(rng.normal(size=(1, 100)))
    x = np.clip(np.round(rng.laplace(size=(100, 100)) * scale), -127, 127).astype(np.int16)
    counts = np.unique(x, return_counts=True)[1]
    assert len(encode([x], [1])) < 0.93 * -np.sum(counts * np.log2(counts / x.size)) / 8


# ---- what must be refused


def test_what_cannot_be_held_is_refused():
    good = np.ones((2, 2), np.int8)
    for bad in (np.full((2, 2), 32768), np.full((2, 2), -32768), good * 0.5, good[0], good > 0):
        with pytest.raises(ValueError):
            encode([bad], [1])
    for kinds, groups in (([7], None), ([-1], None), ([1, 1], None), ([1], [])):
        with pytest.raises(ValueError):
            encode([good], kinds, groups)
    with pytest.raises(ValueError, match="differ"):
        encode([good, np.ones((3, 3), np.int8)], [1, 1], [("a", None), (None, "a")])


def small():
    layers, kinds, groups = network(1)
    layers = [layers[0][:5, :4], layers[1][:5], layers[2][:4, :5], layers[3][:2, :4]]
    return encode(layers, kinds, groups, compiled=False), layers, kinds, groups


def check_refused(raw, shapes, kinds, groups):
    """An error of ours, or arrays that these bytes, and no others, are the coding of."""
    try:
        found = decode(raw, shapes, kinds, groups)
    except CoderError:
        return True
    assert encode(found, kinds, groups) == raw
    return False


def test_truncations_flips_and_mutations_are_refused_or_canonical():
    good, layers, kinds, groups = small()
    shapes = [layer.shape for layer in layers]
    draw = random.Random(0)
    cases = [good[:cut] for cut in range(len(good))]
    cases += [good + bytes([n]) for n in (0, 1, 128, 255)] + [good + bytes(100)]
    for bit in range(0, 8 * len(good), 3):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        cases.append(bytes(flipped))
    for _ in range(80):
        mutated = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            mutated[draw.randrange(len(good))] = draw.randrange(256)
        cases.append(bytes(mutated))
    cases += [draw.randbytes(draw.randrange(60)) for _ in range(80)]
    cases += [bytes([fill]) * n for fill in (0, 1, 127, 128, 255) for n in (1, 5, 60, 4000)]
    refused = sum(check_refused(case, shapes, kinds, groups) for case in cases)
    assert refused > 0.9 * len(cases)


def test_other_shapes_and_kinds_do_not_crash():
    good, layers, kinds, groups = small()
    shapes = [layer.shape for layer in layers]
    for other in ([], shapes[:2], [(0, 0)] * 4, [(9, 9)] * 4, [(1, 100)] * 4):
        check_refused(good, other, kinds[: len(other)], None)
    check_refused(good, shapes, kinds[::-1], groups)


def test_garbage_takes_no_more_memory_than_the_shapes():
    draw = random.Random(1)
    tracemalloc.start()
    try:
        for _ in range(3):
            with pytest.raises(CoderError):
                decode(draw.randbytes(200), [(70, 70)], [1], compiled=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6  # the contexts and tables are 12 MB of Python integers


# ---- the bytes themselves


def golden():
    layers, kinds, groups = network(2)
    return encode(layers, kinds, groups), layers, kinds, groups


def test_pinned_bytes():
    raw = encode([np.array([[0, -3, 0], [7, 0, 1]])], [coder.EXPAND])
    assert raw.hex() == "671e3957"
    raw = golden()[0]
    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (
        173,
        "45cdfee1d5790819985e40f0ef59ecd96659ee6d3886fe8ca26a10826417f721",
    )


def check_reference_decoder(layers, kinds, groups):
    raw = encode(layers, kinds, groups)
    decoded = reference_decoder.decode_levels(raw, [x.shape for x in layers], kinds, groups)
    assert all(np.array_equal(a, b) for a, b in zip(layers, decoded, strict=True))


def test_the_reference_decoder_agrees():
    for seed, bits in enumerate((8, 2, 4, 16, 12)):
        check_reference_decoder(*network(seed, bits))
    check_reference_decoder(*golden()[1:])
    wide = np.random.default_rng(0).integers(-9, 10, (5, 40))  # over 32 columns
    square = np.random.default_rng(1).integers(-2, 3, (6, 6)) * (np.arange(6) != 2)
    # Rows and columns of one group, as in a residual block without expansion.
    check_reference_decoder([wide, square, square], [1, 3, 3], [(None, None), *[("s", "s")] * 2])


def test_the_reference_decoder_sees_where_a_stream_ends():
    """It refuses what the fast one refuses for its end, and else returns the same."""
    raw, layers, kinds, groups = small()
    shapes = [layer.shape for layer in layers]
    refused = 0
    for other in (raw + b"\0", raw + b"\1", *(raw[:cut] for cut in range(len(raw) - 6, len(raw)))):
        try:
            expected = [x.tolist() for x in decode(other, shapes, kinds, groups, compiled=False)]
        except CoderError as error:
            refused += "does not end" in str(error)
            with pytest.raises(AssertionError):
                reference_decoder.decode_levels(other, shapes, kinds, groups)
        else:
            assert reference_decoder.decode_levels(other, shapes, kinds, groups) == expected
    assert refused >= 2


def test_the_tables_are_those_of_the_text():
    squash, stretch, adaptation, _ = coder._tables()
    assert squash.tolist() == list(reference_decoder.SQUASH.values())
    assert stretch.tolist() == reference_decoder.STRETCH
    assert adaptation.tolist() == reference_decoder.ADAPTATION
    for name, table in (("squash", squash), ("stretch", stretch), ("adaptation", adaptation)):
        assert f"{name} {hashlib.sha256(table.astype('<i4').tobytes()).hexdigest()[:16]}" in FORMAT
