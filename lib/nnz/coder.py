"""An adaptive binary range coder of our own for integer weights: sparse or dense, 2 to 16 bits.

A layer is a matrix of levels (output channels, inputs). Which rows and columns live comes first,
then row by row its live cells: is it zero; if not, its magnitude from the layer's smallest up, as
a bit tree; its sign. Each decision is predicted in two contexts, each a probability that moves by
1/n, later 1/256 of its error; the log odds of the two are averaged, or mixed by weights that learn
(Mahoney, PAQ6, 2005; Data Compression Explained, 2013, 4.3.2), and an arithmetic coder without
carries (the same, 3.2) writes the decision. FORMAT.md has all of it exactly. Only integers decide,
so that every machine decodes the same.

Both directions are the one function `_cells`, plain Python that numba compiles if it is installed:
the same bytes, some 50 times faster.

Measured (benchmarks/coder.py): bytes of the reference's int8 weights after compaction, 498,710
cells with 96,502 non-zeros; and of the same network at 4 and 2 bits, one scale a row. Each line is
one change of the first; + is worse.

    this coder                                              109,835   69,799   26,606
    significance in one context: density of row, of column     +214     +216     +126
    magnitudes in one context: mean of row, of column          +309     +308        0
    signs in one context: lean of the column                   +285     +339     +164
    signs not modelled                                         +832     +855     +374
    all log odds averaged: no weights                          +232     +307      +59
    all log odds mixed: weights for significance, too            +7       +7      +27
    no links between layers                                     +47      +47       +8
    magnitudes from 1 up, not from the smallest                +105      -24        0
    low bits of magnitudes (the 5th on) in one context         +472        0        0
    adaptation at a fixed 1/32                               +1,378   +1,067     +803
    adaptation from 1/n to 1/64                                +231     +108     +134
    two rates averaged, 1/n and 1/32 (as VVC does)             +271     +250     +242
    left out, for their time, code or tables:
    a third context each: link of the row, mean of both         -76      -20      +11
    a last stage that corrects the probability (SSE)            -42      -21      -11
    weights for each node of the tree                            -7       +2        0
    a live row without a non-zero yet must still have one       +43      +33      +16
"""

import functools

import numpy as np

try:  # optional: the same function, compiled, writes the same bytes
    import numba
except ImportError:
    numba = None

PARTS = ("liveness", "significance", "signs", "magnitudes")
LARGEST = 32767  # magnitude of a level
STEM, EXPAND, DEPTHWISE, PROJECT, HEAD, CLASSIFIER, VALUES, _SIDE = range(8)  # kinds of arrays
CHUNK = 1 << 16  # cells at a time (or one row): bounds what is allocated beside the arrays

# The state vector of a stream: the ends of the interval, the input's bits there, the next byte of
# the buffer, the input's length, the direction, and what each part has cost, in 2^-16 bits.
LOW, HIGH, VALUE, AT, END, DECODING, SPENT = range(7)
MASK = (1 << 40) - 1  # 40-bit ends: times a 16-bit probability they stay under 63 bits
CONTEXTS, WEIGHTS = 132736, 82


class CoderError(ValueError):
    """Bytes that `encode` does not write for these shapes, kinds and links."""


def encode(layers, kinds, links=None, *, compiled: bool | None = None) -> bytes:
    """The bytes of 2-D integer arrays (output channels, inputs), levels of -32767 to 32767.

    kinds: for each layer one of the small ints above; layers of a kind share statistics.
    links: for each layer (row group, column group), each any hashable or None. Layers that name
    the same group have the same channels there, in the same order, and predict one another's.
    compiled: by numba; None: if it is installed. Raises ValueError for what it cannot hold.
    """
    layers = [np.asarray(layer) for layer in layers]
    for layer in layers:
        if layer.ndim != 2 or layer.dtype.kind not in "iu":
            raise ValueError("a layer must be a 2-D array of integers")
        if layer.size and (layer.max() > LARGEST or layer.min() < -LARGEST):
            raise ValueError(f"a level's magnitude is over {LARGEST}")
    layers = [layer.astype(np.int32, copy=False) for layer in layers]
    stream = _Stream(None, compiled)
    _code(stream, layers, [layer.shape for layer in layers], kinds, links)
    return stream.finish()


def decode(raw: bytes, shapes, kinds, links=None, *, compiled: bool | None = None):
    """The layers, int32, of the shapes (rows, columns) that the caller knows.

    Takes time and memory linear in the shapes, whatever the bytes are. Raises CoderError unless
    `encode` writes exactly these bytes for the layers returned.
    """
    return _decode(raw, shapes, kinds, links, compiled)[0]


def account(raw: bytes, shapes, kinds, links=None, *, compiled: bool | None = None):
    """Bytes of each part, {part: bytes}, that add up to len(raw).

    The costs -log2 p of all decisions, by largest remainder. The header counts as liveness.
    """
    spent = [int(v) for v in _decode(raw, shapes, kinds, links, compiled)[1].state[SPENT:]]
    total = max(sum(spent), 1)
    parts = [v * len(raw) // total for v in spent]
    rest = sorted(range(len(parts)), key=lambda i: -(spent[i] * len(raw) % total))
    for i in rest[: len(raw) - sum(parts)]:
        parts[i] += 1
    return dict(zip(PARTS, parts, strict=True))


def encode_values(arrays, *, compiled: bool | None = None) -> bytes:
    """The bytes of 1-D integer arrays of -32767 to 32767, such as scales and biases."""
    columns = [np.asarray(array).reshape(-1, 1) for array in arrays]
    return encode(columns, [VALUES] * len(columns), compiled=compiled)


def decode_values(raw: bytes, sizes, *, compiled: bool | None = None) -> list[np.ndarray]:
    """The inverse of `encode_values`, int32, from the arrays' sizes. Raises CoderError."""
    columns = decode(raw, [(n, 1) for n in sizes], [VALUES] * len(sizes), compiled=compiled)
    return [column[:, 0] for column in columns]


def _decode(raw, shapes, kinds, links, compiled):
    stream = _Stream(bytes(raw), compiled)
    layers = [np.zeros((int(rows), int(columns)), np.int32) for rows, columns in shapes]
    _code(stream, layers, [layer.shape for layer in layers], kinds, links)
    stream.check_end()
    return layers, stream


def _code(stream, layers, shapes, kinds, links):
    """Both directions: `layers` are to be written, or are zeros to be filled."""
    links = [(None, None)] * len(shapes) if links is None else links
    if not len(kinds) == len(links) == len(shapes):
        raise ValueError("layers, kinds and links must be of one length")
    if any(kind not in range(_SIDE) for kind in kinds):
        raise ValueError(f"a kind must be of 0 to {_SIDE - 1}")
    groups = {}
    for shape, link in zip(shapes, links, strict=True):
        for size, group in zip(shape, link, strict=True):
            if group is None:
                continue
            if len(groups.setdefault(group, _Channels(size)).nonzeros) != size:
                raise ValueError(f"layers of group {group!r} differ in its size")

    if not layers:
        return
    # Of each layer: 1 + bits of (magnitude - smallest), 0 where all are zero; and smallest - 1.
    tops, least = zip(*map(_extent, layers), strict=True)
    tops = stream.numbers(tops, 4, 40)
    (bits,) = stream.numbers([_bits(least)], 4, 44)
    least = stream.numbers(least, int(bits), 48)

    for i, layer in enumerate(layers):
        sides = [
            _Channels(n) if group is None else groups[group]
            for n, group in zip(shapes[i], links[i], strict=True)
        ]
        alive = layer != 0
        nonzeros = [0, 0]
        if tops[i]:
            live = [
                np.flatnonzero(stream.numbers(alive.any(1 - j), 0, 52 + 4 * j, sides[j].state()))
                for j in range(2)
            ]
            if min(map(len, live)) == 0:
                raise CoderError("a layer that lives without a live row or column")
            stream.cells(
                layer, live, kinds[i], int(least[i]) + 1, int(tops[i]) - 1,
                np.zeros(len(live[0])), sides[1].density()[live[1]],
            )  # fmt: skip
            nonzeros = [np.count_nonzero(layer, 1 - j) for j in range(2)]
            if any((n > 0).sum() != len(index) for n, index in zip(nonzeros, live, strict=True)):
                raise CoderError("a live row or column without a non-zero")
        if stream.decoding and _extent(layer) != (tops[i], least[i]):
            raise CoderError("levels that are not what the header says")
        for side, n, cells in zip(sides, nonzeros, shapes[i][::-1], strict=True):
            side.add(n, cells)
    if bits != _bits(least):
        raise CoderError("a header that is longer than it needs")


def _extent(layer):
    """Two numbers for the header: 1 + bits of (largest - smallest magnitude), and smallest - 1."""
    sizes = np.abs(layer[layer != 0])
    if not sizes.size:
        return 0, 0
    low, high = int(sizes.min()), int(sizes.max())
    if high > LARGEST:
        raise CoderError(f"a level's magnitude is over {LARGEST}")
    return 1 + (high - low).bit_length(), low - 1


def _bits(least):
    return int(max([1, *least]) - 1).bit_length()


class _Channels:
    """What the layers so far tell of channels that they share: non-zeros, of how many cells."""

    def __init__(self, size):
        self.nonzeros, self.cells = np.zeros(size, np.int64), 0

    def add(self, nonzeros, cells):
        self.nonzeros += nonzeros
        self.cells += cells

    def state(self):
        """0 unknown, 1 dead so far, 2 alive."""
        return (self.nonzeros > 0) + np.int64(self.cells > 0)

    def density(self):
        """0 unknown, else a step of half a nat of log odds, 4 to 35."""
        if not self.cells:
            return np.zeros_like(self.nonzeros)
        share = (self.nonzeros + 1 << 12) // (self.cells + 2)
        return _tables()[1][np.clip(share, 1, 4095)] + 2560 >> 7


class _Stream:
    """One stream, in either direction: the coder's state, and what is around `_cells`."""

    def __init__(self, raw, compiled):
        compiled = numba is not None if compiled is None else compiled
        self.function = _compiled() if compiled else _cells
        self.box = np.asarray if compiled else np.ndarray.tolist  # lists are faster in Python
        self.decoding, self.written = raw is not None, bytearray()
        state = np.zeros(SPENT + len(PARTS), np.int64)
        state[HIGH], state[DECODING] = MASK, self.decoding
        if self.decoding:
            state[VALUE] = int.from_bytes(raw[:5].ljust(5, b"\0"), "big")
            state[AT], state[END] = 5, len(raw)
            self.raw = np.frombuffer(raw, np.uint8).copy() if compiled else raw
        self.state = self.box(state)
        self.tables = [self.box(table) for table in _tables()]
        self.seen = self.box(np.full(CONTEXTS, 1 << 29))  # probability 1/2, none seen
        self.weight = self.box(np.full(WEIGHTS, 65536 // 2))

    def cells(self, layer, live, kind, smallest, width, row_context, column_context):
        """Code the cells of `layer` where the rows and columns of live = two index arrays meet."""
        rows, columns = live
        kept = [self.box(np.zeros(n, np.int64)) for n in (2, *3 * [len(columns)])]
        given = [self.box(np.array(a, np.int64)) for a in (row_context, column_context)]
        step = max(1, CHUNK // len(columns))
        for first in range(0, len(rows), step):
            where = np.ix_(rows[first : first + step], columns)
            levels = layer[where].astype(np.int64)
            flat = self.box(levels.reshape(-1))
            if self.decoding:
                data = self.raw
            else:  # a decision costs 17 bits at the most
                size = levels.size * (width + 2) * 17 // 8 + 16
                data = bytearray(size) if self.function is _cells else np.empty(size, np.uint8)
                self.state[AT] = 0
            self.function(
                self.state, data, *self.tables, self.seen, self.weight, flat, first, len(columns),
                kind, smallest, width, *given, *kept,
            )  # fmt: skip
            if self.decoding:
                if self.state[AT] > self.state[END] + 5:  # see _tail: no use to go on
                    raise CoderError("the input ends before its content does")
                layer[where] = np.reshape(flat, levels.shape)
            else:
                self.written += bytes(data[: self.state[AT]])

    def numbers(self, values, width, context, state=0):
        """Numbers from 0 to 2^width; state: for each, 0 to 2, or one for all."""
        column = np.array(values, np.int64).reshape(-1, 1)
        live = np.arange(len(column)), np.arange(1)
        self.cells(column, live, _SIDE, 1, width, state + np.zeros(len(column)), [context])
        return column[:, 0]

    def _tail(self):
        """The fewest last bytes, 0 to 5, such that any that follow as zeros lie in the interval."""
        low, high = int(self.state[LOW]), int(self.state[HIGH])
        for n in range(6):
            unit = 1 << 40 - 8 * n
            value = -(-low // unit) * unit
            if value <= high:
                return value, n
        raise AssertionError

    def finish(self):
        value, n = self._tail()
        return bytes(self.written) + value.to_bytes(5, "big")[:n]

    def check_end(self):
        value, n = self._tail()
        if self.state[VALUE] != value or self.state[END] != self.state[AT] - 5 + n:
            raise CoderError("the input does not end where its content does")


@functools.cache
def _tables():
    """squash, stretch, rate, cost: see FORMAT.md. Integers throughout, so the same everywhere."""
    one = 1 << 64
    step = 18518942588666869715  # round(2^64 e^(1/256))
    power, half = one, []
    for _ in range(3072):
        half.append((power << 16) // (power + one))
        power = power * step >> 64
    squash = [65536 - p for p in half[:0:-1]] + half  # of x / 256 at x + 3071
    stretch, x = [], 0
    for p in range(4096):
        while squash[x] < 16 * p + 8:
            x += 1
        stretch.append(x - 3071)
    rate = [(1 << 17) // (2 * n + 3) for n in range(256)]
    cost = [_cost(p) for p in squash]
    return [np.array(table, np.int64) for table in (squash, stretch, rate, cost)]


def _cost(p):
    """-log2(p / 2^16) in 2^-16 bits: the digits of a logarithm, by squaring."""
    length = p.bit_length()
    x, digits = p << 31 - length, 0  # in [2^30, 2^31)
    for _ in range(16):
        x = x * x >> 30
        digits = digits * 2 + (x >> 31)
        x >>= x >> 31
    return (17 - length << 16) - digits


def _cells(
    s, data, squash, stretch, rate, cost, seen, weight, levels, first, columns, kind, smallest,
    width, row_context, column_context, total, column_count, column_size, column_sum,
):  # fmt: skip
    """Code rows of cells, from row `first` of their layer on: `levels`, `columns` a row.

    Plain integers and flat sequences only: lists and bytes, or arrays under numba. All shifts of
    negative numbers round down, and all numbers stay under 2^63.
    """
    low, high, value, at, end, decoding = s[0], s[1], s[2], s[3], s[4], s[5]
    count, size = total[0], total[1]
    half = 1 << width >> 1
    part_of = (6, 6) if kind == 7 else (7, 9)  # of the header and liveness, all is theirs
    t = m = mean = ma = mb = wa = wb = shift = 0  # defined everywhere, for numba
    cell = -1
    for r in range(first, first + len(levels) // columns):
        # Densities so far, of 2^12: of the layer, then of the row and the column, which begin at
        # the layer's as if after 8 cells. Bayesian in form: the row's odds times the column's.
        p0 = (2 * count + 1 << 12) // (2 * r * columns + 2)
        x0 = stretch[p0]
        nr, mr, vr, last = 0, 0, 0, 0
        for c in range(columns):
            cell += 1
            level = levels[cell]
            nc = column_count[c]
            xr = stretch[((nr << 12) + 8 * p0) // (c + 8)]
            xc = stretch[((nc << 12) + 8 * p0) // (r + 8)]
            both = xr + xc - x0 + 7168 >> 6
            a = kind << 12 | xr + 2560 >> 7 << 6 | xc + 2560 >> 7
            b = 32768 + (both << 6 | column_context[c] + row_context[r])
            w, part = 0, part_of[0]
            bit = 1 if level else 0
            depth, node = -1, 1  # -1: significance; then the bits of the magnitude, then the sign
            while True:
                # Predict: log odds by one context, or of two the mean, or mixed by weights.
                sa = seen[a]
                x = xa = stretch[sa >> 18]
                if b:
                    sb = seen[b]
                    xb = stretch[sb >> 18]
                    if w:
                        wa, wb = weight[w], weight[w + 1]
                        x = wa * xa + wb * xb >> 16
                        if x > 3071:
                            x = 3071
                        elif x < -3071:
                            x = -3071
                    else:
                        x = xa + xb >> 1
                p = squash[x + 3071]
                # Code.
                middle = low + ((high - low) * p >> 16)
                if decoding:
                    bit = 1 if value <= middle else 0
                if bit:
                    high = middle
                    s[part] += cost[3071 + x]
                else:
                    low = middle + 1
                    s[part] += cost[3071 - x]
                while (low ^ high) < 4294967296:  # the top bytes are the same
                    if decoding:
                        value = (value & 4294967295) << 8 | (data[at] if at < end else 0)
                    else:
                        data[at] = low >> 32
                    at += 1
                    low = (low & 4294967295) << 8
                    high = (high & 4294967295) << 8 | 255
                # Learn.
                goal = bit << 22
                n = sa & 255
                seen[a] = sa + ((goal - (sa >> 8)) * rate[n] >> 16 << 8) + (n < 255)
                if b:
                    n = sb & 255
                    seen[b] = sb + ((goal - (sb >> 8)) * rate[n] >> 16 << 8) + (n < 255)
                    if w:
                        error = (bit << 16) - p
                        weight[w] = wa + (xa * error >> shift)
                        weight[w + 1] = wb + (xb * error >> shift)
                # What comes next.
                if depth >= 0:
                    node = node << 1 | bit
                elif bit:
                    t = (level if level > 0 else -level) - smallest
                    mc = column_size[c]
                    mean = (2 * size + half) // (2 * count + 2)
                    m3 = 3 * mean
                    qr = (mr + m3 << 4) // (nr + 3) >> width  # of the row, in sixteenths of the
                    qc = (mc + m3 << 4) // (nc + 3) >> width  # largest; of the column; of both
                    qm = (mr + mc + m3 << 3) // (nr + nc + 3) >> width
                    ma = 49152 + (qr << 8 | qc << 4)
                    mb = 53248 + (both >> 2 << 10 | qm << 7 | kind << 4)
                    part = part_of[1]
                else:
                    break
                depth += 1
                if depth < width:
                    bit = t >> width - 1 - depth & 1
                    if depth < 4:
                        a, b = ma + node, mb + node
                        w, shift = 2 + 2 * (depth << 3 | kind), 16
                    else:
                        a, b = 118784 + (node if depth < 8 else 0), 0
                    continue
                if depth == width:
                    t = node - (1 << width)
                    m = t + smallest
                    bit = 0
                    if kind < 7:
                        # The side to which the column's sum leans, and how far in quarters of the
                        # mean, on a log scale; then the row's.
                        mean += smallest
                        v = column_sum[c]
                        n = (v if v > 0 else -v) * 4 // mean
                        lean = 0 if v > 0 else 8
                        while n and lean & 7 < 7:
                            n >>= 1
                            lean += 1
                        n = m << 3 >> width
                        a = 119040 + ((n if n < 7 else 7) << 7 | lean << 3 | kind)
                        n = (vr if vr > 0 else -vr) * 4 // mean
                        lean = 0 if vr > 0 else 8
                        while n and lean & 7 < 7:
                            n >>= 1
                            lean += 1
                        n = 3 * (c if columns <= 32 else 32) + last
                        b = 120064 + (n << 7 | lean << 3 | kind)
                        w, shift, part = 66 + 2 * kind, 14, 8
                        bit = 1 if level < 0 else 0
                        continue
                last = 1 + bit
                level = -m if bit else m
                levels[cell] = level
                nr += 1
                mr += t
                vr += level
                column_count[c] = nc + 1
                column_size[c] += t
                column_sum[c] += level
                count += 1
                size += t
                break
    total[0], total[1] = count, size
    s[0], s[1], s[2], s[3] = low, high, value, at


@functools.cache
def _compiled():
    try:
        return numba.njit(cache=True)(_cells)
    except RuntimeError:  # nowhere to write the cache
        return numba.njit(_cells)
