"""Version 1 of the .nnz file: bit-for-bit round trips, the reference decoder beside the fast one,
refusals by name."""

import hashlib
import json
import random
import re
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import reference_decoder

from lib.nnz.frame import (
    ChecksumMismatch,
    FormatError,
    LimitExceeded,
    Malformed,
    Truncated,
    pack,
    unpack,
)
from lib.nnz.v1 import META_LIMIT, decode, encode, part_sizes

SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (1, 1, 1), (16, 8, 1, 1), (9, 1, 3, 3), (2,) * 8]
SHAPES += [(256, 3), (257, 3), (3, 65536), (3, 65537), (65537, 1)]
SPECIAL = np.array([0x80000000, 0x7FC00000, 0xFFC12345, 0x7F800001, 1, 0xFF800000], np.uint32)
FORMAT = (Path(__file__).parent.parent / "FORMAT.md").read_text()
FORMAT = FORMAT[FORMAT.index("## 8.") : FORMAT.index("## 9.")]  # the example of version 1


def random_tensor(rng, dtype, bits, shape, density):
    if dtype == "float32":
        full = rng.integers(0, 1 << 32, shape, dtype=np.uint32)  # NaN payloads and all
        full = np.where(rng.random(shape) < 0.3, rng.choice(SPECIAL, shape), full)
        return np.asarray(np.where(rng.random(shape) < density, full, 0), np.uint32).view(
            np.float32
        )
    full = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    full = np.where(full == 0, -(1 << (bits - 1)), full)  # the lowest level too
    return np.where(rng.random(shape) < density, full, 0).astype(dtype)


def random_dense(rng, dtype, shape):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = rng.integers(0, 2 if dtype == "bool" else 256, size, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def check_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def check_round_trip(meta, sparse, dense, bits):
    data = encode(meta, sparse, dense, bits)
    meta2, sparse2, dense2, bits2 = decode(data)
    assert meta2 == meta and bits2 == bits
    check_same(sparse2, sparse)
    check_same(dense2, dense)
    assert encode(meta2, sparse2, dense2, bits2) == data
    sizes = part_sizes(data)
    assert list(sizes) == ["values", "indices", "dense", "metadata", "frame"]
    assert sum(sizes.values()) == len(data)
    assert sizes["dense"] == sum(array.nbytes for array in dense.values())
    assert all(array.flags.writeable for array in [*sparse2.values(), *dense2.values()])
    return data


def small_file():
    sparse = {
        "w": np.array([[0, -3, 0], [7, 0, 1]], np.int8),
        "f": np.array([0, np.nan, -0.0, 2], np.float32),
        "i": np.array([-2048, 0, 2047], np.int16),
    }
    dense = {"b": np.array([True, False]), "n": np.array(5)}
    return {"a": [1, 0.5, None, "é"]}, sparse, dense, {"w": 4, "f": 32, "i": 12}


def seal(directory, values=b"", indices=b"", dense=b"", content=b"", text=None):
    """A file with every CRC right, and the SHA-256 of `content`, from parts that may be illegal."""
    if text is None:
        text = json.dumps(directory, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(text + content).digest()
    return pack({
        "META": zlib.compress(text), "SVAL": values, "SIDX": indices, "DENS": dense, "HASH": digest
    })  # fmt: skip


def one(row, values=b"", indices=b"", content=b""):
    return seal({"dense": [], "meta": {}, "sparse": [row]}, values, indices, b"", content)


def refuse(data, error=FormatError, match=None, **limit):
    with pytest.raises(error, match=match) as caught:
        decode(data, **limit)
    assert type(caught.value) is not FormatError and "\n" not in str(caught.value)


CASES = [("int8", bits) for bits in range(2, 9)] + [("int16", bits) for bits in range(2, 17)]
CASES += [("float32", 32)]


@pytest.mark.parametrize(("dtype", "bits"), CASES)
def test_round_trip_of_every_width(dtype, bits):
    rng = np.random.default_rng(bits)
    sparse = {
        f"{shape} {density}": random_tensor(rng, dtype, bits, shape, density)
        for shape in SHAPES
        for density in ((0, 0.04, 0.5, 1) if np.prod(shape) < 2000 else (0.001,))
    }
    check_round_trip({"bits": bits}, sparse, {}, dict.fromkeys(sparse, bits))


def test_round_trip_of_random_networks():
    rng = np.random.default_rng(0)
    dense_types = ["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
    for _ in range(60):
        sparse, dense, bits = {}, {}, {}
        for k in range(rng.integers(0, 6)):
            dtype, width = CASES[rng.integers(len(CASES))]
            shape = tuple(int(n) for n in rng.integers(0, 7, rng.integers(0, 5)))
            sparse[f"s{9 - k}"] = random_tensor(rng, dtype, width, shape, rng.choice([0, 0.1, 1]))
            bits[f"s{9 - k}"] = width
        for k in range(rng.integers(0, 6)):
            shape = tuple(int(n) for n in rng.integers(0, 7, rng.integers(0, 5)))
            dense[f"d{9 - k}"] = random_dense(rng, rng.choice(dense_types), shape)
        data = check_round_trip({"scale": rng.random()}, sparse, dense, bits)
        slow = reference_decoder.decode_version_1(data)
        for name, array in [*sparse.items(), *dense.items()]:
            unsigned = array.reshape(-1).view(f"u{array.dtype.itemsize}")
            assert slow[name] == unsigned.tolist()


def test_many_chunks_agree_with_numpy():
    rng = np.random.default_rng(2)
    sparse = {"w": random_tensor(rng, "int8", 5, (300, 700), 0.95)}  # more than CHUNK non-zeros
    check_round_trip({}, sparse, {}, {"w": 5})


def test_any_memory_layout_goes_in():
    array = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    dense = np.array([1.5, -2], ">f4")
    _, sparse2, dense2, _ = decode(encode({}, {"w": array.T[::2]}, {"b": dense}, {"w": 8}))
    assert (sparse2["w"] == array.T[::2]).all() and (dense2["b"] == [1.5, -2]).all()


def test_meta_survives_or_is_refused():
    meta = {"b": {"z": -0.0, "a": [1e-5, 1e300, 2**70, True, None, "\x7f\ud800🙂\n"]}, "a": ""}
    assert decode(encode(meta, {}, {}, {}))[0] == meta
    for bad in ({1: "a"}, {"a": (1, 2)}, [1], None):
        with pytest.raises(Malformed):
            encode(bad, {}, {}, {})
    for value in (float("nan"), np.zeros(1), b"x"):
        with pytest.raises(Malformed):
            encode({"a": value}, {}, {}, {})
    with pytest.raises(LimitExceeded):
        encode({"a": "x" * META_LIMIT}, {}, {}, {})


@pytest.mark.parametrize(
    ("array", "bits"),
    [
        (np.array([8, 1], np.int8), 4),
        (np.array([-9, 1], np.int8), 4),
        (np.array([1], np.int8), 9),
        (np.array([1], np.int16), 17),
        (np.array([1], np.int16), 1),
        (np.array([1], np.float32), 8),
        (np.array([1], np.int8), 32),
        (np.array([1.0]), 32),
        (np.zeros((1,) * 9, np.int8), 8),
    ],
)
def test_encoder_refuses_what_a_file_cannot_hold(array, bits):
    with pytest.raises(Malformed):
        encode({}, {"w": array}, {}, {"w": bits})


def test_encoder_refuses_names():
    w = np.ones(1, np.int8)
    for sparse, dense, bits in (
        ({"w": w}, {}, {}),
        ({}, {}, {"w": 8}),
        ({"w": w}, {"w": w}, {"w": 8}),
        ({"": w}, {}, {"": 8}),
        ({}, {"x" * 256: w}, {}),
        ({}, {3: w}, {}),
        ({}, {"c": np.ones(1, np.complex64)}, {}),
    ):
        with pytest.raises(Malformed):
            encode({}, sparse, dense, bits)


def test_every_truncation_and_every_bit_flip():
    data = encode(*small_file())
    for size in range(len(data)):
        refuse(data[:size], Truncated)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refuse(bytes(damaged))


def mutate(rng, data):
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(data) + 1), rng.randint(0, 3)
        damaged[at : at + size] = rng.randbytes(rng.choice([size, size, rng.randint(0, 3)]))
    return bytes(damaged)


def inflates_to(stream, text):  # another deflation of the same JSON is legal
    try:
        return zlib.decompress(stream) == text
    except zlib.error:
        return False


def test_mutations_behind_right_checksums():
    rng = random.Random(3)
    parts = {tag: bytes(payload) for tag, payload in unpack(encode(*small_file())).items()}
    text = zlib.decompress(parts["META"])
    content = b"".join(a.tobytes() for part in small_file()[1:3] for a in part.values())
    payload = [parts["SVAL"], parts["SIDX"], parts["DENS"], content]
    assert decode(seal(None, *payload, text=text))[0] == small_file()[0]
    for _ in range(1500):  # payloads: only the SHA-256 and the rules are left to notice
        tag = rng.choice(list(parts))
        changed = mutate(rng, parts[tag])
        if changed == parts[tag] or (tag == "META" and inflates_to(changed, text)):
            continue
        refuse(pack({**parts, tag: changed}))
    accepted = 0
    for _ in range(3000):  # the directory, with its SHA-256 right too
        at = rng.randrange(len(text))
        changed = bytearray(text)
        changed[at : at + rng.randint(0, 2)] = rng.choice(
            [b"0", b"9", b"[", b"]", b"-1", b'"', b"1e9"]
        )
        try:
            decoded = decode(seal(None, *payload, text=bytes(changed)), limit=1 << 20)
        except FormatError as error:
            assert type(error) is not FormatError and "\n" not in str(error)
        else:  # harmless: a name or a number in `meta`
            accepted += 1
            assert zlib.decompress(unpack(encode(*decoded))["META"]) == changed
    assert accepted < 1500


W = ["w", "int8", [3, 300], 8, 2]  # u8 rows, u16 columns
GOOD = bytes([0, 2, 1, 0, 43, 1])  # (0, 1), (2, 299)
DECODED = bytes([0, 5]) + bytes(897) + b"\xff"


def test_illegal_contents():
    decode(one(W, b"\5\xff", GOOD, DECODED))
    refuse(one(W, b"\5\xff", GOOD, DECODED[::-1]), ChecksumMismatch)
    for values, indices in (
        (b"\5\0", GOOD),  # a stored zero
        (b"\5", GOOD),
        (b"\5\xff\1", GOOD),
        (b"\5\xff", GOOD[:-1]),
        (b"\5\xff", GOOD + b"\0"),
        (b"\5\xff", bytes([0, 3, 1, 0, 43, 1])),  # row 3 of 3
        (b"\5\xff", bytes([0, 2, 1, 0, 44, 1])),  # column 300 of 300
        (b"\5\xff", bytes([2, 0, 43, 1, 1, 0])),  # descending
        (b"\5\xff", bytes([2, 2, 1, 0, 1, 0])),  # twice
    ):
        refuse(one(W, values, indices, DECODED), Malformed)
    refuse(one(["w", "int8", [2], 4, 1], b"\x15", b"\0", b"\5\0"), Malformed)  # padding
    refuse(one(["w", "float32", [], 32, 1], bytes(4), b"", bytes(4)), Malformed)  # +0.0
    bools = {"dense": [["b", "bool", [2]]], "meta": {}, "sparse": []}
    decode(seal(bools, dense=b"\0\1", content=b"\0\1"))
    refuse(seal(bools, dense=b"\0\2", content=b"\0\2"), Malformed)
    refuse(seal(bools, dense=b"\0", content=b"\0"), Malformed)


@pytest.mark.parametrize(("what", "rows"), [
    ("a tensor name must be a string", [[3, *W[1:]], ["", *W[1:]], ["x" * 256, *W[1:]]]),
    ("is not of int8, int16, float32", [
        ["w", "int9", *W[2:]], ["w", None, *W[2:]], ["w", ["int8"], *W[2:]]]),
    ("a shape must be a list of at most 8", [["w", "int8", 3, 8, 2], ["w", "int8", [1] * 9, 8, 0]]),
    ("a dimension must be an integer", [
        ["w", "int8", [-1], 8, 0], ["w", "int8", [True, 2], 8, 0], ["w", "int8", [2.0], 8, 0],
        ["w", "int8", [2**33], 8, 0]]),
    ("an illegal number of bits", [
        ["w", "int8", [2], 1, 0], ["w", "int8", [2], 9, 0], ["w", "int8", [2], 8.0, 0],
        ["w", "float32", [2], 16, 0]]),
    ("an illegal number of non-zeros", [
        ["w", "int8", [2], 8, 3], ["w", "int8", [2], 8, -1], ["w", "int8", [2], 8, False],
        ["w", "int8", [0], 8, 1]]),
    ("a directory row must be a list of 5", [["w", "int8", [2], 8], [*W, 0], "wibits", {}, None]),
])  # fmt: skip
def test_illegal_rows(what, rows):
    for row in rows:
        refuse(one(row), Malformed, what)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"1", b"null", b'"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000,
        b'{"dense":[],"meta":{}}',
        b'{"dense":[],"extra":0,"meta":{},"sparse":[]}',
        b'{"dense":[],"meta":[],"sparse":[]}',
        b'{"dense":{},"meta":{},"sparse":[]}',
        b'{"dense":[], "meta":{},"sparse":[]}',
        b'{"meta":{},"dense":[],"sparse":[]}',
        b'{"dense":[],"meta":{},"sparse":[]}\n',
        b'{"dense":[],"meta":{"a":1,"a":1},"sparse":[]}',
        b'{"dense":[],"meta":{"a":NaN},"sparse":[]}',
        b'{"dense":[],"meta":{"a":1e999},"sparse":[]}',
        b'{"dense":[],"meta":{"a":1.50},"sparse":[]}',
        '{"dense":[],"meta":{"a":"é"},"sparse":[]}'.encode(),
        '{"dense":[],"meta":{},"sparse":[]}'.encode("utf-16"),
        b'{"dense":[["a","bool",[0]],["a","bool",[0]]],"meta":{},"sparse":[]}',
    ],
)  # fmt: skip
def test_illegal_json(text):
    refuse(seal(None, text=text), Malformed)


def test_meta_is_one_whole_zlib_stream():
    parts = dict(unpack(encode(*small_file())))
    good = bytes(parts["META"])
    raw = zlib.compressobj(wbits=-15)
    deflated = raw.compress(zlib.decompress(good)) + raw.flush()
    for payload in (b"", good[:-1], good + b"\0", good + good, good[2:], deflated):
        refuse(pack({**parts, "META": payload}), Malformed)


@pytest.mark.parametrize(
    ("row", "values"),
    [
        (["w", "int8", [1 << 31], 8, 0], b""),
        (["w", "float32", [1 << 28, 1 << 32], 32, 0], b""),
        (["w", "int8", [1 << 32] * 8, 8, 0], b""),
        (["w", "int8", [0] + [1 << 32] * 7, 8, 0], b""),
        (["w", "int8", [1 << 20], 8, 1 << 20], b"\1"),
    ],
)
def test_huge_declared_sizes_are_refused_before_allocation(row, values):
    data = one(row, values)
    tracemalloc.start()
    refuse(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_limits_are_exact():
    data = encode(
        {}, {"w": np.zeros((50, 50), np.int8)}, {"b": np.zeros(25)[:0].astype("f4")}, {"w": 8}
    )
    decode(data, limit=2500)
    refuse(data, LimitExceeded, limit=2499)
    halves = {"a": np.zeros(1000, np.int16), "b": np.zeros(1000, np.int16)}
    data = encode({}, halves, {}, {"a": 8, "b": 8})
    decode(data, limit=4000)
    refuse(data, LimitExceeded, limit=3999)  # each alone would do
    refuse(one(["w", "int8", [1 << 32] * 2, 8, 0]), LimitExceeded, limit=1 << 80)


def test_zlib_bomb_is_refused_early():
    parts = dict(unpack(encode(*small_file())))
    bomb = zlib.compressobj(9)
    stream = b"".join(bomb.compress(b" " * (1 << 20)) for _ in range(64)) + bomb.flush()
    data = pack({**parts, "META": stream})
    tracemalloc.start()
    refuse(data, LimitExceeded)
    assert tracemalloc.get_traced_memory()[1] < 4 * META_LIMIT
    tracemalloc.stop()


def test_reference_size_is_fast():
    rng = np.random.default_rng(5)  # the numbers of the reference network
    sparse = {"w": random_tensor(rng, "int8", 8, (1720, 1280, 1, 1), 0.044)}
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        decode(encode({}, sparse, {}, {"w": 8}))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_example_of_the_text():
    data = bytes.fromhex(re.search(r"```hex\n(.*?)```", FORMAT, re.S)[1])
    text = re.search(r"```json\n(.*?)\n```", FORMAT, re.S)[1]
    meta, sparse, dense, bits = decode(data)
    assert meta == {"classes": ["cat", "dog"]} and bits == {"w": 4}
    assert sparse["w"].dtype == np.int8 and sparse["w"].tolist() == [[0, -3, 0], [7, 0, 1]]
    assert dense["b"].tobytes() == np.array([0.5, -0.0], np.float32).tobytes()
    slow = reference_decoder.decode(data)
    assert slow == {"w": [0, 0xFD, 0, 7, 0, 1], "b": [0x3F000000, 0x80000000]}
    again = encode(meta, sparse, dense, bits)
    assert zlib.decompress(unpack(again)["META"]) == text.encode()
    if "ng" not in zlib.ZLIB_RUNTIME_VERSION:  # zlib-ng deflates differently, which is legal
        assert again == data
    for row in re.findall(r"^\| (\d+)-(\d+) \|.*\| `([0-9A-F ]+)( \.\.\.)?` \|$", FORMAT, re.M):
        first, last, shown = int(row[0]), int(row[1]), bytes.fromhex(row[2])
        assert data[first : last + 1][: len(shown)] == shown
        assert row[3] or len(shown) == last + 1 - first
