"""An adaptive binary range coder for integer weights, sparse or dense, of 2 to 16 bits.

A layer is a matrix of levels: output channels by inputs. It is coded as flags of the rows and
columns that have a non-zero (the live ones), then row by row their cells: whether the level is
zero; if not, its magnitude, counted from the layer's smallest, as a bit tree; then its sign. Each
of these binary decisions is predicted from two contexts, probabilities that move towards each
outcome: after n uses by about 1/n of their error, and always by at least 1/257 of it. The log odds
of the two are averaged, or mixed by weights that learn (Mahoney, PAQ6, 2005; Data Compression
Explained, 2013, section 4.3.2). An arithmetic coder without carries (the same, section 3.2) writes
the decision. FORMAT.md, section 5, specifies all of it. Only integers decide, so that every machine
decodes the same.

Encoding and decoding share one function, `_cells`: plain Python that numba compiles if it is
installed. The bytes are the same, 20 to 50 times faster.

Measured (benchmarks/coder.py): bytes of the course report's int8 weights after compaction, 498,710
cells with 96,502 non-zeros; and of the same network at 4 and 2 bits with one scale per row. Each
line is one change to the first; + is worse.

    this coder                                              109,835   69,799   26,606
    significance in one context: density of row, of column     +214     +216     +126
    magnitudes in one context: mean of row, of column          +309     +308        0
    signs in one context: lean of the column                   +285     +339     +164
    signs not modelled                                         +832     +855     +374
    all log odds averaged: no weights                          +232     +307      +59
    all log odds mixed: weights for significance, too            +7       +7      +27
    no channel groups: layers do not predict one another        +47      +47       +8
    magnitudes from 1 up, not from the smallest                +105      -24        0
    low bits of magnitudes (the 5th on) in one context         +472        0        0
    adaptation at a fixed 1/32                               +1,378   +1,067     +803
    adaptation from 1/n to 1/64                                +231     +108     +134
    two adaptations averaged, 1/n and 1/32 (as VVC does)       +271     +250     +242
    left out, for their time, code or tables:
    a third context each: group of the row, mean of both        -76      -20      +11
    a last stage that corrects the probability (SSE)            -42      -21      -11
    weights for each node of the tree                            -7       +2        0
    a live row without a non-zero yet must still have one       +43      +33      +16
"""

import functools

import numpy as np

try:  # optional: the same function, compiled, writes the same bytes
    import numba
    import numba.extending
except ImportError:
    numba = None
COMPILED = numba is not None  # what `compiled` is by default

PARTS = ("liveness", "significance", "signs", "magnitudes")  # what bytes are spent on
LARGEST = 32767  # magnitude of a level
# Kinds of arrays: the roles of layers, vectors of floats, and the coder's own header and flags.
STEM, EXPAND, DEPTHWISE, PROJECT, HEAD, CLASSIFIER, VALUES, _HEADER = range(8)
CHUNK = 1 << 16  # cells at a time (or one row): bounds what is allocated beside the arrays

# The state vector of a coder stream: the ends of the interval, the stream's bits there, the
# position of the next byte, the stream's length, 1 if decoding, and from SPENT on the cost of each
# of PARTS in 2^-16 bits.
LOW, HIGH, VALUE, POSITION, END, DECODING, SPENT = range(7)
SPENT_LIVENESS, SPENT_SIGNIFICANCE, SPENT_SIGNS, SPENT_MAGNITUDES = range(SPENT, SPENT + 4)
MASK = (1 << 40) - 1  # 40-bit ends: times a 16-bit probability they stay under 63 bits
LOW_BYTES, TOP_BYTE = (1 << 32) - 1, 1 << 32  # of an end: its lower four bytes; where the fifth is
# Where the contexts of each sort of decision begin, as FORMAT.md, section 5.6, names them: S1 and
# S2 of significance, M1 and M2 of the magnitude's first four bits, L of its further bits, G1 and
# G2 of the sign. CONTEXTS: how many there are.
S1, S2, M1, M2, L, G1, G2, CONTEXTS = 0, 32768, 49152, 53248, 118784, 119040, 120064, 132736
# Where the weight pairs begin, two numbers each; 0 stands for no pair.
WEIGHTS_M, WEIGHTS_G, WEIGHTS = 2, 66, 82
# Hints of the header's and the flags' numbers: over the density hints of columns, which are 4 to
# 35, and apart, since what is known of a channel (0 to 2) is added.
HINT_RANGES, HINT_BITS, HINT_SMALLEST, HINT_LIVE_ROWS, HINT_LIVE_COLUMNS = 40, 44, 48, 52, 56
MAX_USES = 255  # of a context, that are told apart
MAX_LOG_ODDS = 3071  # in 1/256 nat
# Make log odds positive, which are -2340 to 2307, and sums of two of them less a third.
OFFSET, OFFSET_BOTH = 2560, 7168


class CoderError(ValueError):
    """The bytes are not what `encode` writes for these shapes, kinds and groups."""


def encode(layers, kinds, groups=None, *, compiled: bool | None = None) -> bytes:
    """Return the bytes of layers: 2-D integer arrays (output channels, inputs).

    layers: levels of -32767 to 32767. kinds: one of STEM to VALUES for each layer; layers of a kind
    share statistics. groups: for each layer the channel groups of its rows and of its columns, any
    hashable or None for no group. Layers that name the same group have the same channels there, in
    the same order, and help predict one another. compiled: by numba; None: COMPILED.

    Raises ValueError for what the coder cannot hold.
    """
    layers = [np.asarray(layer) for layer in layers]
    for layer in layers:
        if layer.ndim != 2 or layer.dtype.kind not in "iu":
            raise ValueError("a layer must be a 2-D array of integers")
        if layer.size and (layer.max() > LARGEST or layer.min() < -LARGEST):
            raise ValueError(f"a level's magnitude is over {LARGEST}")
    layers = [layer.astype(np.int32, copy=False) for layer in layers]
    stream = _Stream(None, compiled)
    _code(stream, layers, [layer.shape for layer in layers], kinds, groups)
    return stream.finish()


def decode(raw: bytes, shapes, kinds, groups=None, *, compiled: bool | None = None):
    """Return the layers, int32 arrays of the given shapes (rows, columns).

    kinds, groups, compiled: as for `encode`. Takes time and memory linear in the shapes, whatever
    the bytes are. Raises CoderError unless these are the bytes that `encode` writes for the layers.
    """
    return _decode(raw, shapes, kinds, groups, compiled)[0]


def part_sizes(raw: bytes, shapes, kinds, groups=None, *, compiled: bool | None = None):
    """Return {part: bytes} for each of PARTS; they add up to len(raw).

    Each decision costs -log2 of its probability; the sums are rounded by largest remainder. The
    header counts as liveness. Arguments and errors are those of `decode`.
    """
    spent = [int(v) for v in _decode(raw, shapes, kinds, groups, compiled)[1].state[SPENT:]]
    total = max(sum(spent), 1)
    parts = [v * len(raw) // total for v in spent]
    by_remainder = sorted(range(len(parts)), key=lambda i: -(spent[i] * len(raw) % total))
    for i in by_remainder[: len(raw) - sum(parts)]:
        parts[i] += 1
    return dict(zip(PARTS, parts, strict=True))


def encode_values(arrays) -> bytes:
    """Return the bytes of 1-D integer arrays of -32767 to 32767, such as quantized biases."""
    columns = [np.asarray(array).reshape(-1, 1) for array in arrays]
    return encode(columns, [VALUES] * len(columns))


def decode_values(raw: bytes, sizes) -> list[np.ndarray]:
    """Return the int32 arrays of these sizes that `encode_values` wrote. Raises CoderError."""
    columns = decode(raw, [(n, 1) for n in sizes], [VALUES] * len(sizes))
    return [column[:, 0] for column in columns]


def _decode(raw, shapes, kinds, groups, compiled):
    stream = _Stream(bytes(raw), compiled)
    layers = [np.zeros((int(rows), int(columns)), np.int32) for rows, columns in shapes]
    _code(stream, layers, [layer.shape for layer in layers], kinds, groups)
    stream.check_end()
    return layers, stream


def _code(stream, layers, shapes, kinds, groups):
    """Code layers in either direction: `layers` are to be written, or are zeros to be filled."""
    groups = [(None, None)] * len(shapes) if groups is None else groups
    if not len(kinds) == len(groups) == len(shapes):
        raise ValueError("layers, kinds and groups must be of one length")
    if any(kind not in range(_HEADER) for kind in kinds):
        raise ValueError(f"a kind must be of 0 to {_HEADER - 1}")
    histories = {}
    for shape, names in zip(shapes, groups, strict=True):
        for size, name in zip(shape, names, strict=True):
            if name is None:
                continue
            if len(histories.setdefault(name, _GroupHistory(size)).nonzeros) != size:
                raise ValueError(f"layers of group {name!r} differ in its size")

    if not layers:
        return
    range_codes, smallest_codes = zip(*map(_magnitude_codes, layers), strict=True)
    range_codes = stream.numbers(range_codes, 4, HINT_RANGES)
    (bits,) = stream.numbers([_bits_for(smallest_codes)], 4, HINT_BITS)
    smallest_codes = stream.numbers(smallest_codes, int(bits), HINT_SMALLEST)

    for i, layer in enumerate(layers):
        row_and_column = [
            _GroupHistory(size) if name is None else histories[name]
            for size, name in zip(shapes[i], groups[i], strict=True)
        ]
        alive = layer != 0
        nonzeros = [0, 0]  # per row, per column
        if range_codes[i]:
            live = [
                np.flatnonzero(stream.numbers(
                    alive.any(1 - axis), 0, hint, row_and_column[axis].seen()
                ))
                for axis, hint in enumerate((HINT_LIVE_ROWS, HINT_LIVE_COLUMNS))
            ]  # fmt: skip
            if min(map(len, live)) == 0:
                raise CoderError("a layer that lives without a live row or column")
            stream.cells(
                layer, live, kinds[i], int(smallest_codes[i]) + 1, int(range_codes[i]) - 1,
                np.zeros(len(live[0])), row_and_column[1].density_hints()[live[1]],
            )  # fmt: skip
            nonzeros = [np.count_nonzero(layer, 1 - axis) for axis in range(2)]
            if any((n > 0).sum() != len(index) for n, index in zip(nonzeros, live, strict=True)):
                raise CoderError("a live row or column without a non-zero")
        if stream.decoding and _magnitude_codes(layer) != (range_codes[i], smallest_codes[i]):
            raise CoderError("levels that are not what the header says")
        for history, n, cells in zip(row_and_column, nonzeros, shapes[i][::-1], strict=True):
            history.add(n, cells)
    if bits != _bits_for(smallest_codes):
        raise CoderError("a header that is longer than it needs")


def _magnitude_codes(layer):
    """Return what the header says of a layer's non-zero magnitudes: (range code, smallest code).

    These are 1 + the number of bits of (largest - smallest), and smallest - 1. Both are 0 where all
    levels are 0.
    """
    magnitudes = np.abs(layer[layer != 0])
    if not magnitudes.size:
        return 0, 0
    smallest, largest = int(magnitudes.min()), int(magnitudes.max())
    if largest > LARGEST:
        raise CoderError(f"a level's magnitude is over {LARGEST}")
    return 1 + (largest - smallest).bit_length(), smallest - 1


def _bits_for(smallest_codes):
    """Return how many bits the header takes for each smallest code."""
    return int(max([1, *smallest_codes]) - 1).bit_length()


class _GroupHistory:
    """The layers coded so far, seen from a channel group: non-zeros and cells per channel."""

    def __init__(self, size):
        self.nonzeros, self.cells = np.zeros(size, np.int64), 0

    def add(self, nonzeros, cells):
        self.nonzeros += nonzeros
        self.cells += cells

    def seen(self):
        """Return a number per channel: 0 nothing known, 1 only zeros so far, 2 has a non-zero."""
        return (self.nonzeros > 0) + np.int64(self.cells > 0)

    def density_hints(self):
        """Return a hint per channel: 0 nothing known, else its log odds by half nats, 4 to 35."""
        if not self.cells:
            return np.zeros_like(self.nonzeros)
        share = (self.nonzeros + 1 << 12) // (self.cells + 2)
        _, stretch, _, _ = _tables()
        return stretch[np.clip(share, 1, 4095)] + OFFSET >> 7


class _Stream:
    """A coder stream, in either direction: the coder's state, and everything around `_cells`."""

    def __init__(self, raw, compiled):
        compiled = COMPILED if compiled is None else compiled
        self.code_cells = _compiled() if compiled else _cells
        self.sequence = np.asarray if compiled else np.ndarray.tolist  # lists: faster in Python
        self.decoding, self.written = raw is not None, bytearray()
        state = np.zeros(SPENT + len(PARTS), np.int64)
        state[HIGH], state[DECODING] = MASK, self.decoding
        if self.decoding:
            state[VALUE] = int.from_bytes(raw[:5].ljust(5, b"\0"), "big")
            state[POSITION], state[END] = 5, len(raw)
            self.raw = np.frombuffer(raw, np.uint8).copy() if compiled else raw
        self.state = self.sequence(state)
        self.tables = [self.sequence(table) for table in _tables()]
        self.contexts = self.sequence(np.full(CONTEXTS, 1 << 29))  # probability 1/2, never used
        self.weights = self.sequence(np.full(WEIGHTS, 65536 // 2))

    def cells(self, layer, live, kind, smallest, width, row_hints, column_hints):
        """Code the cells of `layer` where live rows and columns (two index arrays) meet.

        Their non-zero magnitudes are smallest to smallest + 2^width - 1.
        """
        rows, columns = live
        sums = [self.sequence(np.zeros(n, np.int64)) for n in (2, *3 * [len(columns)])]
        hints = [self.sequence(np.array(a, np.int64)) for a in (row_hints, column_hints)]
        chunk = max(1, CHUNK // len(columns))
        for first in range(0, len(rows), chunk):
            where = np.ix_(rows[first : first + chunk], columns)
            levels = layer[where].astype(np.int64)
            flat = self.sequence(levels.reshape(-1))
            if self.decoding:
                data = self.raw
            else:  # a decision costs 17 bits at the most
                size = levels.size * (width + 2) * 17 // 8 + 16
                data = bytearray(size) if self.code_cells is _cells else np.empty(size, np.uint8)
                self.state[POSITION] = 0
            self.code_cells(
                self.state, data, *self.tables, self.contexts, self.weights, flat, first,
                len(columns), kind, smallest, width, *hints, *sums,
            )  # fmt: skip
            if self.decoding:
                if self.state[POSITION] > self.state[END] + 5:  # see _end: no use to go on
                    raise CoderError("the stream ends before its content does")
                layer[where] = np.reshape(flat, levels.shape)
            else:
                self.written += bytes(data[: self.state[POSITION]])

    def numbers(self, values, width, column_hint, row_hints=0):
        """Code numbers of 0 to 2^width; row_hints: 0 to 2 for each of them, or one for all."""
        column = np.array(values, np.int64).reshape(-1, 1)
        live = np.arange(len(column)), np.arange(1)
        row_hints = row_hints + np.zeros(len(column))
        self.cells(column, live, _HEADER, 1, width, row_hints, [column_hint])
        return column[:, 0]

    def _end(self):
        """Return (value, n): the fewest last bytes, 0 to 5, that identify the interval.

        Whatever follows them as zeros lies in the interval.
        """
        low, high = int(self.state[LOW]), int(self.state[HIGH])
        for n in range(6):
            unit = 1 << 40 - 8 * n
            value = -(-low // unit) * unit
            if value <= high:
                return value, n
        raise AssertionError

    def finish(self):
        """Return the bytes of the whole stream."""
        value, n = self._end()
        return bytes(self.written) + value.to_bytes(5, "big")[:n]

    def check_end(self):
        """Raise CoderError unless the stream ends as `finish` would have ended it."""
        value, n = self._end()
        if self.state[VALUE] != value or self.state[END] != self.state[POSITION] - 5 + n:
            raise CoderError("the stream does not end where its content does")


@functools.cache
def _tables():
    """Return the tables squash, stretch, adaptation (FORMAT.md, section 5.2) and cost, int64.

    They are computed in integers throughout, so that they are the same everywhere. cost is that of
    an outcome of log odds x, in 2^-16 bits, at x + MAX_LOG_ODDS; it only serves `part_sizes`.
    """
    one = 1 << 64
    factor = 18518942588666869715  # round(2^64 e^(1/256))
    power, half = one, []
    for _ in range(MAX_LOG_ODDS + 1):
        half.append((power << 16) // (power + one))
        power = power * factor >> 64
    squash = [65536 - p for p in half[:0:-1]] + half  # of x / 256 at x + MAX_LOG_ODDS
    stretch, x = [], 0
    for p in range(4096):
        while squash[x] < 16 * p + 8:
            x += 1
        stretch.append(x - MAX_LOG_ODDS)
    adaptation = [(1 << 17) // (2 * n + 3) for n in range(MAX_USES + 1)]
    cost = [_cost(p) for p in squash]
    return [np.array(table, np.int64) for table in (squash, stretch, adaptation, cost)]


def _cost(p):
    """Return -log2(p / 2^16) in 2^-16 bits: the digits of a logarithm, by squaring."""
    length = p.bit_length()
    x, digits = p << 31 - length, 0  # in [2^30, 2^31)
    for _ in range(16):
        x = x * x >> 30
        digits = digits * 2 + (x >> 31)
        x >>= x >> 31
    return (17 - length << 16) - digits


def _cells(
    state, data, squash, stretch, adaptation, cost, contexts, weights, levels, first, columns, kind,
    smallest, width, row_hints, column_hints, totals, column_count, column_over, column_sum,
):  # fmt: skip
    """Code rows of cells, `columns` levels per row, from row `first` of their array on.

    One function, for speed: a call per decision would take as long as the decision in plain Python.
    Plain integers and flat sequences only: lists and bytes, or arrays under numba. All shifts of
    negative numbers round down, and all numbers stay under 2^63. FORMAT.md, sections 5.4 and 5.6,
    specifies this computation; its names are in brackets where they differ.

    The coder:
        low, high, value    the ends of the interval, and the stream's bits there
        position, end       of the next byte in `data`; of the stream
        x, xa, xb           log odds of a 1, in 1/256 nat: the prediction; of either context [a, b]
        p                   probability of a 1, in 2^-16 [P]
        a, b                numbers of the two contexts; b = 0: only one
        sa, sb              what they hold: probability in 2^-22, shifted left by 8, | times used
        uses                times that a context was used, up to MAX_USES [n]
        w, wa, wb, shift    number of the pair of weights (0: average), the pair, how fast it learns
        part                where in `state` the cost of the decision is added up
    Of the array so far; (magnitude - smallest) is called the magnitude's excess, `over`:
        count, over_sum     non-zeros, and the sum of their excesses [count, total]
        nr, mr, vr          of this row: non-zeros, sum of excesses, sum of levels
        last                sign of the row's last non-zero: 0 none yet, 1 positive, 2 negative
        nc, mc              the same as nr, mr of this column
        column_count, column_over, column_sum   the same as nr, mr, vr of all columns [nc, mc, vc]
        density, x_layer    share of non-zeros in the rows above, in 2^-12 [d]; its log odds
    The cell:
        xr, xc, both        log odds of a non-zero by the row, by the column, by both (in 1/4 nat,
                            from 0)
        mean, mean3         mean excess so far (and of magnitudes, for the sign); 3 times that
        qr, qc, qm          mean excess of the row, of the column, of both, as shares of 2^width
        depth, node         -1: significance; 0 to width - 1: bit of the excess; width: sign. The
                            node of the bit tree
        m1, m2              contexts M1 and M2 of the magnitude, but for the node
        size, place         the magnitude in eighths of the largest; column and last sign, for G2
    """
    low, high, value = state[LOW], state[HIGH], state[VALUE]
    position, end, decoding = state[POSITION], state[END], state[DECODING]
    count, over_sum = totals[0], totals[1]
    half = 1 << width >> 1
    significance_part, magnitude_part = SPENT_SIGNIFICANCE, SPENT_MAGNITUDES
    if kind == _HEADER:
        significance_part = magnitude_part = SPENT_LIVENESS
    over = magnitude = mean = m1 = m2 = wa = wb = shift = 0  # defined everywhere, for numba
    cell = -1
    for r in range(first, first + len(levels) // columns):
        # The row's and the column's density start from the layer's, weighted as 8 cells. The
        # two are combined as Bayes does: the odds of the row times those of the column.
        density = (2 * count + 1 << 12) // (2 * r * columns + 2)
        x_layer = stretch[density]
        nr, mr, vr, last = 0, 0, 0, 0
        for c in range(columns):
            cell += 1
            level = levels[cell]
            nc = column_count[c]
            xr = stretch[((nr << 12) + 8 * density) // (c + 8)]
            xc = stretch[((nc << 12) + 8 * density) // (r + 8)]
            both = xr + xc - x_layer + OFFSET_BOTH >> 6
            a = S1 + (kind << 12 | xr + OFFSET >> 7 << 6 | xc + OFFSET >> 7)
            b = S2 + (both << 6 | column_hints[c] + row_hints[r])
            w, part = 0, significance_part
            bit = 1 if level else 0
            depth, node = -1, 1  # -1: significance; then the bits of the magnitude, then the sign
            while True:
                # Predict: log odds by one context, or of two the mean, or mixed by weights.
                sa = contexts[a]
                x = xa = stretch[sa >> 18]
                if b:
                    sb = contexts[b]
                    xb = stretch[sb >> 18]
                    if w:
                        wa, wb = weights[w], weights[w + 1]
                        x = wa * xa + wb * xb >> 16
                        if x > MAX_LOG_ODDS:
                            x = MAX_LOG_ODDS
                        elif x < -MAX_LOG_ODDS:
                            x = -MAX_LOG_ODDS
                    else:
                        x = xa + xb >> 1
                p = squash[x + MAX_LOG_ODDS]
                # Code.
                middle = low + ((high - low) * p >> 16)
                if decoding:
                    bit = 1 if value <= middle else 0
                if bit:
                    high = middle
                    state[part] += cost[MAX_LOG_ODDS + x]
                else:
                    low = middle + 1
                    state[part] += cost[MAX_LOG_ODDS - x]
                while (low ^ high) < TOP_BYTE:  # the top bytes are the same
                    if decoding:
                        byte = data[position] if position < end else 0
                        value = (value & LOW_BYTES) << 8 | byte
                    else:
                        data[position] = low >> 32
                    position += 1
                    low = (low & LOW_BYTES) << 8
                    high = (high & LOW_BYTES) << 8 | 255
                # Learn.
                goal = bit << 22
                uses = sa & 255
                change = (goal - (sa >> 8)) * adaptation[uses] >> 16
                contexts[a] = sa + (change << 8) + (uses < MAX_USES)
                if b:
                    uses = sb & 255
                    change = (goal - (sb >> 8)) * adaptation[uses] >> 16
                    contexts[b] = sb + (change << 8) + (uses < MAX_USES)
                    if w:
                        error = (bit << 16) - p
                        weights[w] = wa + (xa * error >> shift)
                        weights[w + 1] = wb + (xb * error >> shift)
                # What comes next.
                if depth >= 0:
                    node = node << 1 | bit
                elif bit:
                    over = (level if level > 0 else -level) - smallest
                    mc = column_over[c]
                    mean = (2 * over_sum + half) // (2 * count + 2)
                    mean3 = 3 * mean
                    qr = (mr + mean3 << 4) // (nr + 3) >> width  # of the row, in sixteenths of the
                    qc = (mc + mean3 << 4) // (nc + 3) >> width  # largest; of the column; of both
                    qm = (mr + mc + mean3 << 3) // (nr + nc + 3) >> width
                    m1 = M1 + (qr << 8 | qc << 4)
                    m2 = M2 + (both >> 2 << 10 | qm << 7 | kind << 4)
                    part = magnitude_part
                else:
                    break
                depth += 1
                if depth < width:
                    bit = over >> width - 1 - depth & 1
                    if depth < 4:
                        a, b = m1 + node, m2 + node
                        w, shift = WEIGHTS_M + 2 * (depth << 3 | kind), 16
                    else:
                        a, b = L + (node if depth < 8 else 0), 0
                    continue
                if depth == width:
                    over = node - (1 << width)
                    magnitude = over + smallest
                    bit = 0
                    if kind != _HEADER:
                        mean += smallest
                        size = magnitude << 3 >> width
                        if size > 7:
                            size = 7
                        a = G1 + (size << 7 | _lean(column_sum[c], mean) << 3 | kind)
                        place = 3 * (c if columns <= 32 else 32) + last
                        b = G2 + (place << 7 | _lean(vr, mean) << 3 | kind)
                        w, shift, part = WEIGHTS_G + 2 * kind, 14, SPENT_SIGNS
                        bit = 1 if level < 0 else 0
                        continue
                last = 1 + bit
                level = -magnitude if bit else magnitude
                levels[cell] = level
                nr += 1
                mr += over
                vr += level
                column_count[c] = nc + 1
                column_over[c] += over
                column_sum[c] += level
                count += 1
                over_sum += over
                break
    totals[0], totals[1] = count, over_sum
    state[LOW], state[HIGH], state[VALUE], state[POSITION] = low, high, value, position


def _lean(total, mean):
    """Return which sign a sum of levels leans to (8: not positive), and how far, 0 to 7.

    That is counted in quarters of the mean magnitude, on a log scale.
    """
    quarters = (total if total > 0 else -total) * 4 // mean
    lean = 0 if total > 0 else 8
    while quarters and lean & 7 < 7:
        quarters >>= 1
        lean += 1
    return lean


if numba is not None:
    _lean = numba.extending.register_jitable(_lean)  # itself, and compiled where _cells calls it


@functools.cache
def _compiled():
    try:
        return numba.njit(cache=True)(_cells)
    except RuntimeError:  # nowhere to write the cache
        return numba.njit(_cells)
