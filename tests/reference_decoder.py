"""A slow, readable decoder of `.nnz` files, written from FORMAT.md alone.

    python tests/reference_decoder.py FILE.nnz      lists the tensors of a file

It shares nothing with lib/nnz/ and needs only Python's standard library. Each function names the
section of FORMAT.md that it implements. It is meant to be read beside that text, and to be compared
with the fast decoder. It asserts the CRCs, the SHA-256 of the content and what section 5 calls
legal, and otherwise trusts its input: a program must make all checks of section 6, as lib/nnz/
does.

Tensors are lists of integers in C order: levels as they are, floats as their 32 bits.
"""

import hashlib
import json
import re
import struct
import sys
import zlib
from pathlib import Path

FORMAT = Path(__file__).resolve().parent.parent / "FORMAT.md"


def decode(raw: bytes) -> dict[str, list[int]]:
    """Return {name: elements} of a file of any version."""
    return decode_version_1(raw) if raw[8] == 1 else decode_quantized(raw)[0]


# ---- Section 2: the frame ------------------------------------------------------------------------


def read_frame(raw: bytes) -> dict[str, bytes]:
    """Section 2: return the payloads by tag."""
    magic, version, count, reserved, length, header_crc = struct.unpack_from("<8sHBBII", raw)
    assert magic == b"\x89NNZ\r\n\x1a\n" and version in (1, 2, 3) and reserved == 0
    assert length == len(raw)
    start = 20 + 12 * count
    assert zlib.crc32(raw[:16] + raw[20:start]) == header_crc
    payloads = {}
    for i in range(count):
        tag, size, crc = struct.unpack_from("<4sII", raw, 20 + 12 * i)
        payload = raw[start : start + size]
        assert zlib.crc32(tag + payload) == crc
        payloads[tag.decode()] = payload
        start += size
    assert start == len(raw)
    return payloads


class Bits:
    """Section 1: a bit string, from the least significant bit of the first byte on."""

    def __init__(self, data: bytes):
        self.left = int.from_bytes(data, "little")

    def number(self, bits: int) -> int:
        number = self.left % 2**bits
        self.left //= 2**bits
        return number


def varint(data) -> int:
    """Section 4: the next varint of an iterator over bytes."""
    byte = next(data)
    return byte % 128 + (128 * varint(data) if byte >= 128 else 0)


# ---- Section 3: version 1 ------------------------------------------------------------------------

ELEMENT_BYTES = {
    "float32": 4, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1
}  # fmt: skip


def decode_version_1(raw: bytes) -> dict[str, list[int]]:
    """Section 3: return {name: elements}, each element the unsigned number that its bytes are."""
    payloads = read_frame(raw)
    text = zlib.decompress(payloads["META"])
    directory = json.loads(text)
    values, indices, dense = (iter(payloads[tag]) for tag in ("SVAL", "SIDX", "DENS"))
    tensors, sha = {}, hashlib.sha256(text)

    def take(data, count):
        return bytes(next(data) for _ in range(count))

    def add(name, elements, element_bytes):
        tensors[name] = elements
        for element in elements:  # section 3.5
            sha.update(element.to_bytes(element_bytes, "little"))

    for name, dtype, shape, bits, nonzeros in directory["sparse"]:
        levels = Bits(take(values, (nonzeros * bits + 7) // 8))  # section 3.2
        positions, size = [0] * nonzeros, 1
        for dimension in shape:  # section 3.3
            size *= dimension
            index_bytes = next(
                n for n, most in ((0, 1), (1, 2**8), (2, 2**16), (4, 2**32)) if dimension <= most
            )
            for k in range(nonzeros):
                index = int.from_bytes(take(indices, index_bytes), "little")
                positions[k] = positions[k] * dimension + index
        elements = [0] * size
        for position in positions:
            level = levels.number(bits)
            if level >= 2 ** (bits - 1):  # negative: extend the sign to the whole element
                level += 2 ** (8 * ELEMENT_BYTES[dtype]) - 2**bits
            elements[position] = level
        add(name, elements, ELEMENT_BYTES[dtype])
    for name, dtype, shape in directory["dense"]:  # section 3.4
        size = 1
        for dimension in shape:
            size *= dimension
        width = ELEMENT_BYTES[dtype]
        add(name, [int.from_bytes(take(dense, width), "little") for _ in range(size)], width)
    assert all(next(data, None) is None for data in (values, indices, dense))
    assert sha.digest() == payloads["HASH"]
    return tensors


# ---- Section 4: versions 2 and 3 -----------------------------------------------------------------


def decode_quantized(raw: bytes) -> tuple[dict[str, list[int]], dict]:
    """Section 4: return ({name: elements}, the description)."""
    payloads = read_frame(raw)
    text, description, widths, parent, content = read_description(payloads["NETW"])
    layers, scale_names = network(description, iter(widths))

    shapes = [(shape[0], product(shape[1:])) for _, shape, _, _ in layers]
    levels = decode_levels(  # section 4.3
        payloads["CODE"], shapes, [kind for _, _, kind, _ in layers], [x[3] for x in layers]
    )
    if "SIDE" in payloads:
        data, padded = payloads["SIDE"], False
    else:
        levels, carried = undo_order(levels, [x[3] for x in layers])
        data, padded = carried + payloads["REST"], not payloads["REST"]
    side = iter(data)  # section 4.4
    flag_dead = next(side)
    stored = [[any(row) or not flag_dead for row in layer] for layer in levels]
    scales = read_vectors(side, [sum(rows) for rows in stored])
    biases = read_vectors(side, [len(rows) for rows in stored])
    (act_scales,) = read_vectors(side, [len(scale_names)])
    left = bytes(side)
    assert not left or padded and not any(left)

    tensors = {}  # section 4.2
    for (name, *_), layer, rows, scale, bias in zip(
        layers, levels, stored, scales, biases, strict=True
    ):
        left = iter(scale)
        tensors[f"{name}.weight"] = [level for row in layer for level in row]
        tensors[f"{name}.weight_scale"] = [next(left) if row else float_bits(1.0) for row in rows]
        tensors[f"{name}.bias"] = bias
    tensors |= {name: [scale] for name, scale in zip(scale_names, act_scales, strict=True)}

    sha = hashlib.sha256(text + widths + parent)  # section 4.5
    for name, elements in tensors.items():
        code = "h" if name.endswith(".weight") else "I"  # of the module struct: int16, or 32 bits
        sha.update(struct.pack(f"<{len(elements)}{code}", *elements))
    assert sha.digest() == content
    return tensors, description


def dictionary() -> bytes:
    """Section 4.1: return the preset dictionary, which stands in the text."""
    text = FORMAT.read_text()
    found = re.search(r"zdict.*?```json\n(.*?)\n```", text, re.S)[1].encode()
    assert hashlib.sha256(found).hexdigest() in text
    return found


def read_description(payload: bytes):
    """Section 4.1: return (JSON text, its value, widths, SHA-256 of the parent, of the content)."""
    stream = zlib.decompressobj(-15, zdict=dictionary())
    text = stream.decompress(payload)
    rest = stream.unused_data
    return text, json.loads(text), rest[:-64], rest[-64:-32], rest[-32:]


def network(description: dict, widths) -> tuple[list, list[str]]:
    """Sections 4.1 and 4.2: return (layers, names of the activation scales).

    widths: an iterator over the bytes of the widths. A layer is (name, shape of the weight, kind,
    (row group, column group)).
    """
    settings, act_bits = description["settings"], description["quantization"]["act_bits"]
    layers, places = [], ["image", "features.0.2"]
    channels, stream = varint(widths), "S0"
    layers.append(("features.0.0", (channels, 3, 3, 3), 0, (stream, None)))
    for i, block in enumerate(settings["blocks"], 1):
        expand, residual, prefix = block["expand"], block["residual"], f"features.{i}"
        hidden = varint(widths) if expand else channels
        out = channels if residual else varint(widths)
        inner = f"H{i}" if expand else stream
        after = stream if residual else f"S{i}"
        e = int(expand)
        if expand:
            layers.append((f"{prefix}.conv.0.0", (hidden, channels, 1, 1), 1, (inner, stream)))
        layers.append((f"{prefix}.conv.{e}.0", (hidden, 1, 3, 3), 2, (inner, None)))
        layers.append((f"{prefix}.conv.{e + 1}", (out, hidden, 1, 1), 3, (after, inner)))
        if residual and act_bits < 8:
            places.append(f"{prefix}.input")
        places.append(f"{prefix}.conv.0.2")
        if expand:
            places.append(f"{prefix}.conv.1.2")
        if residual:
            places.append(f"{prefix}.addend")
        places.append(f"{prefix}.stream")
        channels, stream = out, after
    n, head, classes = len(settings["blocks"]), varint(widths), settings["classes"]
    layers.append((f"features.{n + 1}.0", (head, channels, 1, 1), 4, ("T", stream)))
    layers.append(("classifier.1", (classes, head), 5, (None, "T")))
    places += [f"features.{n + 1}.2", "pooled"]
    assert next(widths, None) is None
    return layers, [f"{place}.step" for place in places] if act_bits != 32 else []


def product(numbers) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def undo_order(levels: list, groups: list[tuple]) -> tuple[list, bytes]:
    """Section 4.6: return (levels, the carried bytes): the channels in the order of their keys."""
    members = {}  # group -> [(layer, 0 for rows or 1 for columns)]
    for i, pair in enumerate(groups):
        for axis, group in enumerate(pair):
            if group:
                members.setdefault(group, []).append((i, axis))
    orders, digits, radices = {}, [], []
    for group, places in members.items():
        keys = None
        for i, axis in places:
            lines = list(zip(*levels[i], strict=True)) if axis else levels[i]
            if groups[i][1 - axis]:
                lines = [sorted(line) for line in lines]
            keys = keys or [[] for _ in lines]
            for key, line in zip(keys, lines, strict=True):
                key.extend(line)
        keys = [[-sum(map(abs, key)), *key] for key in keys]
        orders[group] = sorted(range(len(keys)), key=keys.__getitem__)
        in_order = [keys[channel] for channel in orders[group]]
        numbers = [in_order.index(key) for key in keys if keys.count(key) == 1]
        assert [keys.count(key) > 1 for key in keys] == sorted(keys.count(key) > 1 for key in keys)
        twins = keys[len(numbers) :]
        assert twins == sorted(twins)
        for i, number in enumerate(numbers):
            digits.append(sum(later < number for later in numbers[i:]))
            radices.append(len(numbers) - i)

    data, i = b"", 0
    while i < len(digits):
        chunk, size = 0, 1  # the number, and the product of the radices
        while i < len(digits) and size < 2**4096:
            chunk += digits[i] * size
            size *= radices[i]
            i += 1
        data += chunk.to_bytes((size.bit_length() - 1) // 8, "little")

    ordered = []
    for layer, (row_group, column_group) in zip(levels, groups, strict=True):
        rows = orders.get(row_group, range(len(layer)))
        columns = orders.get(column_group, range(len(layer[0])))
        ordered.append([[layer[r][c] for c in columns] for r in rows])
    return ordered, data


def read_vectors(side, sizes: list[int]) -> list[list[int]]:
    """Section 4.4: return a set of vectors of these sizes, floats as their bits.

    side: an iterator over the bytes of `SIDE`.
    """
    stream_length, tail_length = varint(side), varint(side)
    stream = bytes(next(side) for _ in range(stream_length))
    low_bits = Bits(bytes(next(side) for _ in range(tail_length)))
    lengths = [len(sizes), len(sizes), *sizes]
    columns = decode_levels(  # section 5.9
        stream, [(n, 1) for n in lengths], [6] * len(lengths), [(None, None)] * len(lengths)
    )
    forms, cuts, *vectors = [[row[0] for row in column] for column in columns]
    out = []
    for form, cut, vector in zip(forms, cuts, vectors, strict=True):
        numbers = [number * 2**cut + low_bits.number(cut) for number in vector]
        out.append([float_of_form(number, form) for number in numbers])
    assert low_bits.left == 0
    return out


def float_of_form(v: int, form: int) -> int:
    """Section 4.4: return the bits of the float32 that stands for the number v."""
    if form > 0:
        sign, q = (1, -1 - v) if v < 0 else (0, v)
        return sign * 2**31 + q * 2 ** (24 - form)
    return float_bits(v * 2.0 ** (-150 - form))


def float_bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


# ---- Section 5: the coder ------------------------------------------------------------------------


def make_tables() -> tuple[dict, list, list]:
    """Section 5.2: return squash, stretch and adaptation."""
    half, power = [], 2**64
    for _ in range(3072):
        half.append(power * 65536 // (power + 2**64))
        power = power * 18518942588666869715 // 2**64
    squash = {x: half[x] if x >= 0 else 65536 - half[-x] for x in range(-3071, 3072)}
    stretch, x = [], -3071
    for q in range(4096):
        while squash[x] < 16 * q + 8:
            x += 1
        stretch.append(x)
    adaptation = [2**17 // (2 * n + 3) for n in range(256)]
    return squash, stretch, adaptation


SQUASH, STRETCH, ADAPTATION = make_tables()


class Decoder:
    """Sections 5.3 to 5.6: the state of a coder. Contexts and weights have tuples as names."""

    def __init__(self, raw: bytes):
        """Section 5.3: the registers, contexts and weights at the start."""
        self.raw, self.shifts = raw, 0
        self.low, self.high = 0, 2**40 - 1
        self.value = int.from_bytes((raw + bytes(5))[:5], "big")
        self.contexts = {}  # name -> [p, n]
        self.weights = {}  # name -> [w0, w1]

    def decision(self, names, weights=None, shift=16) -> int:
        """Section 5.4: decode one bit in the contexts A and B, or in A alone."""
        contexts = [self.contexts.setdefault(name, [2**21, 0]) for name in names]
        log_odds = [STRETCH[p // 1024] for p, _ in contexts]
        if weights is None:
            x = sum(log_odds) // len(log_odds)
        else:
            pair = self.weights.setdefault(weights, [32768, 32768])
            x = (pair[0] * log_odds[0] + pair[1] * log_odds[1]) // 65536
            x = max(-3071, min(3071, x))
        probability = SQUASH[x]
        middle = self.low + (self.high - self.low) * probability // 65536
        bit = int(self.value <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low // 2**32 == self.high // 2**32:
            byte = self.raw[self.shifts + 5] if self.shifts + 5 < len(self.raw) else 0
            self.low = self.low % 2**32 * 256
            self.high = self.high % 2**32 * 256 + 255
            self.value = self.value % 2**32 * 256 + byte
            self.shifts += 1
        for context in contexts:
            p, n = context
            context[:] = p + (bit * 2**22 - p) * ADAPTATION[n] // 65536, min(n + 1, 255)
        if weights is not None:
            for i in range(2):
                pair[i] += log_odds[i] * (bit * 65536 - probability) // 2**shift
        return bit

    def check_end(self) -> None:
        """Section 5.5: the bytes have the only length, and the only end, that they may have."""
        n = next(n for n in range(6) if self.end(n) <= self.high)
        assert len(self.raw) == self.shifts + n and self.value == self.end(n)

    def end(self, n: int) -> int:
        """Section 5.5: the smallest multiple of 2^(40 - 8n) that is at least low."""
        unit = 2 ** (40 - 8 * n)
        return (self.low + unit - 1) // unit * unit

    def array(self, rows, columns, kind, smallest, width, row_hints, column_hints):
        """Section 5.6: decode an array of cells; return it as a list of rows."""
        levels = [[0] * columns for _ in range(rows)]
        count = total = 0
        for r in range(rows):
            d = (2 * count + 1) * 4096 // (2 * r * columns + 2)
            for c in range(columns):
                left = [v for v in levels[r][:c] if v]
                above = [levels[i][c] for i in range(r) if levels[i][c]]
                nr, nc = len(left), len(above)
                xr = STRETCH[(4096 * nr + 8 * d) // (c + 8)]
                xc = STRETCH[(4096 * nc + 8 * d) // (r + 8)]
                both = (xr + xc - STRETCH[d] + 7168) // 64
                significant = self.decision((
                    ("S1", kind, (xr + 2560) // 128, (xc + 2560) // 128),
                    ("S2", both, column_hints[c] + row_hints[r]),
                ))  # fmt: skip
                if not significant:
                    continue

                mr = sum(abs(v) - smallest for v in left)
                mc = sum(abs(v) - smallest for v in above)
                mean = (2 * total + 2**width // 2) // (2 * count + 2)
                qr = 16 * (mr + 3 * mean) // (nr + 3) // 2**width
                qc = 16 * (mc + 3 * mean) // (nc + 3) // 2**width
                qm = 8 * (mr + mc + 3 * mean) // (nr + nc + 3) // 2**width
                node = 1
                for i in range(width):
                    if i < 4:
                        bit = self.decision(
                            (("M1", qr, qc, node), ("M2", both // 4, qm, kind, node)),
                            ("M", i, kind),
                        )  # fmt: skip
                    else:
                        bit = self.decision([("L", node if i < 8 else 0)])
                    node = 2 * node + bit
                magnitude = node - 2**width + smallest

                negative = 0
                if kind != 7:
                    mean += smallest
                    last = 0 if not left else 1 if left[-1] > 0 else 2
                    size = min(7, 8 * magnitude // 2**width)
                    negative = self.decision(
                        (("G1", size, lean(sum(above), mean), kind),
                         ("G2", c if columns <= 32 else 32, last, lean(sum(left), mean), kind)),
                        ("G", kind), 14,
                    )  # fmt: skip
                levels[r][c] = -magnitude if negative else magnitude
                count += 1
                total += magnitude - smallest
        return levels

    def numbers(self, n, width, hint, seen=None) -> list[int]:
        """Section 5.7: decode n numbers of 0 to 2^width."""
        return [row[0] for row in self.array(n, 1, 7, 1, width, seen or [0] * n, [hint])]


def lean(v: int, mean: int) -> int:
    """Section 5.6: which sign a sum of levels leans to, and how far."""
    return (0 if v > 0 else 8) + min(7, (4 * abs(v) // mean).bit_length())


def decode_levels(raw: bytes, shapes, kinds, groups) -> list[list[list[int]]]:
    """Section 5.7: decode a coder stream; return its layers, each a list of rows.

    shapes, kinds and groups have (rows, columns), kind and (row group, column group) of each layer.
    """
    if not shapes:
        assert raw == b""
        return []
    decoder = Decoder(raw)
    range_codes = decoder.numbers(len(shapes), 4, 40)
    (header_bits,) = decoder.numbers(1, 4, 44)
    smallest_codes = decoder.numbers(len(shapes), header_bits, 48)
    assert header_bits == max(0, max(smallest_codes) - 1).bit_length()
    history = {}  # group -> (non-zeros of each channel, cells per channel)
    layers = []
    for shape, kind, names, range_code, smallest_code in zip(
        shapes, kinds, groups, range_codes, smallest_codes, strict=True
    ):
        rows, columns = shape
        layer = [[0] * columns for _ in range(rows)]
        known = [history.get(name, ([0] * n, 0)) for name, n in zip(names, shape, strict=True)]
        if range_code:
            live = []
            for axis, (nonzeros, cells) in enumerate(known):  # steps 4a and 4b
                seen = [0 if not cells else 2 if n else 1 for n in nonzeros]
                flags = decoder.numbers(shape[axis], 0, 52 + 4 * axis, seen)
                live.append([i for i, flag in enumerate(flags) if flag])
            column_hints = []  # step 4c
            for i in live[1]:
                z, t = known[1][0][i], known[1][1]
                share = min(4095, max(1, (z + 1) * 4096 // (t + 2)))
                column_hints.append((STRETCH[share] + 2560) // 128 if t else 0)
            cells = decoder.array(
                len(live[0]), len(live[1]), kind, smallest_code + 1, range_code - 1,
                [0] * len(live[0]), column_hints,
            )  # fmt: skip
            for r, row in zip(live[0], cells, strict=True):
                for c, level in zip(live[1], row, strict=True):
                    layer[r][c] = level
            assert all(any(row) for row in cells) and all(any(x) for x in zip(*cells, strict=True))
        magnitudes = [abs(level) for row in layer for level in row if level] or [1]
        spread = max(magnitudes) - min(magnitudes)
        assert max(magnitudes) <= 32767 and smallest_code == min(magnitudes) - 1
        assert range_code == (1 + spread.bit_length() if any(map(any, layer)) else 0)
        by_axis = layer, [[row[c] for row in layer] for c in range(columns)]
        for axis, name in enumerate(names):
            if name is not None:
                nonzeros, cells = history.get(name, ([0] * shape[axis], 0))
                added = [sum(level != 0 for level in line) for line in by_axis[axis]]
                history[name] = (
                    [a + b for a, b in zip(nonzeros, added, strict=True)], cells + shape[1 - axis]
                )  # fmt: skip
        layers.append(layer)
    decoder.check_end()
    return layers


if __name__ == "__main__":
    for tensor, values in decode(Path(sys.argv[1]).read_bytes()).items():
        nonzeros = sum(value != 0 for value in values)
        print(f"{tensor:32s} {len(values):9,d} elements, {nonzeros:,} of them not zero")
