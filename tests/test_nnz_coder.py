"""The range coder: round trips, pinned bytes, a slow decoder beside the fast one, refusals."""

import hashlib
import random
import tracemalloc

import numpy as np
import pytest

from lib.nnz import coder
from lib.nnz.coder import CoderError, account, decode, decode_values, encode, encode_values

needs_numba = pytest.mark.skipif(coder.numba is None, reason="numba is not installed")
BITS = (2, 3, 4, 5, 6, 7, 8, 12, 16)


def check_round_trip(layers, kinds=None, links=None, compiled=None):
    kinds = [1] * len(layers) if kinds is None else kinds
    before = [layer.copy() for layer in layers]
    raw = encode(layers, kinds, links, compiled=compiled)
    shapes = [layer.shape for layer in layers]
    found = decode(raw, shapes, kinds, links, compiled=compiled)
    for a, b, c in zip(layers, found, before, strict=True):
        assert b.dtype == np.int32 and b.flags.writeable
        assert np.array_equal(a, b) and np.array_equal(a, c)
    parts = account(raw, shapes, kinds, links, compiled=compiled)
    assert sum(parts.values()) == len(raw) and min(parts.values()) >= 0
    return raw


def network(seed=0, bits=8, density=0.4):
    """Three linked layers, a classifier, some dead rows and columns; int16."""
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
    links = [("h", "s"), ("h", None), ("s", "h"), (None, "s")]
    return layers, [coder.EXPAND, coder.DEPTHWISE, coder.PROJECT, coder.CLASSIFIER], links


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
    layers, kinds, links = network()
    raw = encode(layers, kinds, links, compiled=False)
    monkeypatch.setattr(coder, "CHUNK", 20)
    assert encode(layers, kinds, links, compiled=False) == raw
    check_round_trip(layers, kinds, links, compiled=False)


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
        layers, kinds, links = network(
            seed, bits=(2, 4, 8, 16)[seed], density=(1, 0.5, 0.1)[seed % 3]
        )
        raw = check_round_trip(layers, kinds, links, compiled=True)
        assert encode(layers, kinds, links, compiled=False) == raw
        shapes = [layer.shape for layer in layers]
        assert account(raw, shapes, kinds, links, compiled=True) == account(
            raw, shapes, kinds, links, compiled=False
        )
        for cut in range(0, len(raw), 6):  # errors, too
            outcomes = [outcome(raw[:cut], shapes, kinds, links, c) for c in (False, True)]
            assert outcomes[0] == outcomes[1]


def outcome(raw, shapes, kinds, links, compiled):
    try:
        return [x.tobytes() for x in decode(raw, shapes, kinds, links, compiled=compiled)]
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
    for kinds, links in (([7], None), ([-1], None), ([1, 1], None), ([1], [])):
        with pytest.raises(ValueError):
            encode([good], kinds, links)
    with pytest.raises(ValueError, match="differ"):
        encode([good, np.ones((3, 3), np.int8)], [1, 1], [("a", None), (None, "a")])


def small():
    layers, kinds, links = network(1)
    layers = [layers[0][:5, :4], layers[1][:5], layers[2][:4, :5], layers[3][:2, :4]]
    return encode(layers, kinds, links, compiled=False), layers, kinds, links


def check_refused(raw, shapes, kinds, links):
    """An error of ours, or arrays that these bytes, and no others, are the coding of."""
    try:
        found = decode(raw, shapes, kinds, links)
    except CoderError:
        return True
    assert encode(found, kinds, links) == raw
    return False


def test_truncations_flips_and_mutations_are_refused_or_canonical():
    good, layers, kinds, links = small()
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
    refused = sum(check_refused(case, shapes, kinds, links) for case in cases)
    assert refused > 0.9 * len(cases)


def test_other_shapes_and_kinds_do_not_crash():
    good, layers, kinds, links = small()
    shapes = [layer.shape for layer in layers]
    for other in ([], shapes[:2], [(0, 0)] * 4, [(9, 9)] * 4, [(1, 100)] * 4):
        check_refused(good, other, kinds[: len(other)], None)
    check_refused(good, shapes, kinds[::-1], links)


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
    layers, kinds, links = network(2)
    return encode(layers, kinds, links), layers, kinds, links


def test_pinned_bytes():
    raw = encode([np.array([[0, -3, 0], [7, 0, 1]])], [coder.EXPAND])
    assert raw.hex() == "671e3957"
    raw = golden()[0]
    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (
        173,
        "45cdfee1d5790819985e40f0ef59ecd96659ee6d3886fe8ca26a10826417f721",
    )


class SlowDecoder:
    """Written from FORMAT.md alone: contexts by name, nothing shared with lib/nnz/coder.py."""

    def __init__(self, raw):
        self.raw, self.read = raw, 5
        self.low, self.high = 0, 2**40 - 1
        self.value = int.from_bytes((raw + bytes(5))[:5], "big")
        self.contexts = {}  # name -> [probability of 1, of 2^22; times seen, to 255]
        self.weights = {}
        half, power = [], 2**64
        for _ in range(3072):
            half.append(power * 65536 // (power + 2**64))
            power = power * 18518942588666869715 // 2**64
        self.squash = {x: half[x] if x >= 0 else 65536 - half[-x] for x in range(-3071, 3072)}
        self.stretch = []
        x = -3071
        for p in range(4096):
            while self.squash[x] < 16 * p + 8:
                x += 1
            self.stretch.append(x)

    def bit(self, names, weights=None, slow=16):
        states = [self.contexts.setdefault(name, [2**21, 0]) for name in names]
        inputs = [self.stretch[p // 1024] for p, _ in states]
        if weights is None:
            x = sum(inputs) // len(inputs)
        else:
            w = self.weights.setdefault(weights, [32768, 32768])
            x = (w[0] * inputs[0] + w[1] * inputs[1]) // 65536
            x = max(-3071, min(3071, x))
        p = self.squash[x]
        middle = self.low + (self.high - self.low) * p // 65536
        bit = int(self.value <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low // 2**32 == self.high // 2**32:
            self.low = self.low % 2**32 * 256
            self.high = self.high % 2**32 * 256 + 255
            byte = self.raw[self.read] if self.read < len(self.raw) else 0
            self.value = self.value % 2**32 * 256 + byte
            self.read += 1
        for state in states:
            state[0] += (bit * 2**22 - state[0]) * (2**17 // (2 * state[1] + 3)) // 65536
            state[1] = min(state[1] + 1, 255)
        if weights is not None:
            for i in range(2):
                w[i] += inputs[i] * (bit * 65536 - p) // 2**slow
        return bit

    def array(self, rows, columns, kind, smallest, width, row_hints, column_hints):
        """The cells of live rows and columns, as a list of rows."""
        out = [[0] * columns for _ in range(rows)]
        count = total = 0  # of the array so far: non-zeros, and their magnitudes over the smallest
        for r in range(rows):
            layer_density = (2 * count + 1) * 4096 // (2 * r * columns + 2)
            for c in range(columns):
                left = [v for v in out[r][:c] if v]
                above = [out[i][c] for i in range(r) if out[i][c]]
                x_row = self.stretch[(len(left) * 4096 + 8 * layer_density) // (c + 8)]
                x_column = self.stretch[(len(above) * 4096 + 8 * layer_density) // (r + 8)]
                both = (x_row + x_column - self.stretch[layer_density] + 7168) // 64
                names = (
                    ("s1", kind, (x_row + 2560) // 128, (x_column + 2560) // 128),
                    ("s2", both, row_hints[r] + column_hints[c]),
                )
                if not self.bit(names):
                    continue
                in_row = sum(abs(v) - smallest for v in left)
                in_column = sum(abs(v) - smallest for v in above)
                mean = (2 * total + 2**width // 2) // (2 * count + 2)
                row_mean = (in_row + 3 * mean) * 16 // (len(left) + 3) // 2**width
                column_mean = (in_column + 3 * mean) * 16 // (len(above) + 3) // 2**width
                n = len(left) + len(above) + 3
                both_mean = (in_row + in_column + 3 * mean) * 8 // n // 2**width
                node = 1
                for depth in range(width):
                    if depth < 4:
                        names = (
                            ("m1", row_mean, column_mean, node),
                            ("m2", both // 4, both_mean, kind, node),
                        )
                        bit = self.bit(names, ("m", depth, kind))
                    else:
                        bit = self.bit([("low", node if depth < 8 else 0)])
                    node = 2 * node + bit
                over = node - 2**width
                magnitude = over + smallest
                negative = 0
                if kind != 7:
                    mean += smallest
                    last = 0 if not left else 1 if left[-1] > 0 else 2
                    where = c if columns <= 32 else 32
                    names = (
                        ("g1", min(magnitude * 8 // 2**width, 7), lean(sum(above), mean), kind),
                        ("g2", where, last, lean(sum(left), mean), kind),
                    )
                    negative = self.bit(names, ("g", kind), 14)
                out[r][c] = -magnitude if negative else magnitude
                count += 1
                total += over
        return out

    def numbers(self, n, width, hint, states=None):
        out = self.array(n, 1, 7, 1, width, states or [0] * n, [hint])
        return [row[0] for row in out]


def lean(total, mean):
    size, steps = abs(total) * 4 // mean, 0
    while size and steps < 7:
        size, steps = size // 2, steps + 1
    return steps if total > 0 else 8 + steps


def slow_decode(raw, shapes, kinds, links):
    d = SlowDecoder(raw)
    tops = d.numbers(len(shapes), 4, 40)
    least = d.numbers(len(shapes), d.numbers(1, 4, 44)[0], 48)
    groups, out = {}, []  # name -> (non-zeros of each channel, cells)
    for (rows, columns), kind, link, top, low in zip(
        shapes, kinds, links, tops, least, strict=True
    ):
        layer = [[0] * columns for _ in range(rows)]
        known = [
            groups.get(name, ([0] * n, 0)) for name, n in zip(link, (rows, columns), strict=True)
        ]
        if top:
            live = []
            for j, n in enumerate((rows, columns)):
                states = [(2 if k else 1) if known[j][1] else 0 for k in known[j][0]]
                flags = d.numbers(n, 0, 52 + 4 * j, states)
                live.append([i for i in range(n) if flags[i]])
            hints = [0] * columns
            counts, cells = known[1]
            if cells:
                for i in range(columns):
                    share = max(1, min(4095, (counts[i] + 1) * 4096 // (cells + 2)))
                    hints[i] = (d.stretch[share] + 2560) // 128
            found = d.array(
                len(live[0]), len(live[1]), kind, low + 1, top - 1,
                [0] * rows, [hints[i] for i in live[1]],
            )  # fmt: skip
            for i, r in enumerate(live[0]):
                for j, c in enumerate(live[1]):
                    layer[r][c] = found[i][j]
        for name, (counts, cells), lines, n in zip(
            link, known, (layer, list(zip(*layer, strict=True))), (columns, rows), strict=True
        ):
            if name is not None:
                new = [k + sum(v != 0 for v in x) for k, x in zip(counts, lines, strict=True)]
                groups[name] = (new, cells + n)
        out.append(layer)
    return out


def test_a_slow_decoder_written_from_the_format_agrees():
    for seed, bits in enumerate((8, 2, 4, 16, 12)):
        layers, kinds, links = network(seed, bits)
        raw = encode(layers, kinds, links)
        found = slow_decode(raw, [layer.shape for layer in layers], kinds, links)
        assert all(np.array_equal(a, b) for a, b in zip(layers, found, strict=True))
    raw, layers, kinds, links = golden()
    found = slow_decode(raw, [layer.shape for layer in layers], kinds, links)
    assert all(np.array_equal(a, b) for a, b in zip(layers, found, strict=True))
