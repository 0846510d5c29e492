"""The frame: what `pack` wrote comes back; all else is refused by a named error, in one line."""

import random
import struct
import subprocess
import sys
import zlib

import pytest

from lib.nnz import frame
from lib.nnz.frame import (
    ChecksumMismatch,
    FormatError,
    LimitExceeded,
    Malformed,
    NotNNZ,
    Truncated,
    UnsupportedVersion,
    pack,
    unpack,
)

TAGS = frame.VERSIONS[1]
SMALL = dict(zip(TAGS, [b"meta", b"", b"\0" * 7, b"NNZ", bytes(range(32))], strict=True))


def seal(table, version=1, count=None, reserved=0, length=None):
    """A file of any (tag, payload, declared length) with every CRC right."""
    body = b"".join(
        struct.pack("<4sII", tag, size, zlib.crc32(tag + payload)) for tag, payload, size in table
    )
    total = 20 + len(body) + sum(len(payload) for _, payload, _ in table)
    count = len(table) if count is None else count
    head = frame.MAGIC + struct.pack(
        "<HBBI", version, count, reserved, total if length is None else length
    )
    crc = struct.pack("<I", zlib.crc32(head + body))
    return head + crc + body + b"".join(payload for _, payload, _ in table)


def rows(sections=SMALL):
    return [(tag.encode(), payload, len(payload)) for tag, payload in sections.items()]


def refuse(data, error=FormatError, **limit):
    with pytest.raises(error) as caught:
        unpack(data, **limit)
    assert type(caught.value) is not FormatError  # always one of the named ones
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 300


def test_round_trip():
    rng = random.Random(0)
    for _ in range(200):
        sections = {tag: rng.randbytes(rng.choice([0, 1, 2, 50, 3000])) for tag in TAGS}
        data = pack(sections)
        assert unpack(data) == sections
        assert list(unpack(data)) == list(TAGS)
        assert len(data) == 20 + 12 * len(TAGS) + sum(map(len, sections.values()))


def test_pack_is_the_layout_of_the_text():
    assert pack(SMALL) == seal(rows())


@pytest.mark.parametrize("tags", [TAGS[:-1], TAGS[::-1], (*TAGS, "MORE"), ()])
def test_pack_refuses_other_sections(tags):
    with pytest.raises(Malformed):
        pack(dict.fromkeys(tags, b""))


def test_every_truncation():
    data = pack(SMALL)
    for size in range(len(data)):
        refuse(data[:size], Truncated)


def test_every_bit_flip():
    data = pack(SMALL)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refuse(bytes(damaged))


def test_random_mutations():
    rng = random.Random(1)
    data = pack(SMALL)
    for _ in range(5000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at, size = rng.randrange(len(data)), rng.randint(0, 12)
            damaged[at : at + size] = rng.randbytes(rng.choice([size, size, rng.randint(0, 12)]))
        if damaged != data:
            refuse(bytes(damaged))


@pytest.mark.parametrize(
    "data",
    [
        b"PK\3\4" + bytes(100),
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"\x80\x02ctorch\n",
        b"weights",
        b"\0",
    ]
    + [random.Random(seed).randbytes(500) for seed in range(20)]
    + [pack(SMALL).replace(b"\r\n", b"\n")],
)
def test_foreign_files(data):
    refuse(data, NotNNZ)


def test_future_version_is_named_before_its_checksum():
    refuse(seal(rows(), version=4), UnsupportedVersion)
    refuse(seal(rows(), version=0), UnsupportedVersion)


def test_a_reader_of_one_version_refuses_the_other():
    assert unpack(pack(SMALL), version=1) == SMALL
    refuse(pack(SMALL), UnsupportedVersion, version=2)
    refuse(pack(dict.fromkeys(frame.VERSIONS[2], b"")), UnsupportedVersion, version=1)
    refuse(seal(rows(), version=2), Malformed)  # the sections of the other


@pytest.mark.parametrize(
    "data",
    [
        seal(rows(), reserved=1),
        seal(rows()[:-1]),
        seal([*rows(), (b"MORE", b"", 0)]),
        seal(rows(), count=0),
        seal(rows()[::-1]),
        seal([rows()[0], *rows()[:-1]]),  # a section twice
        seal([*rows()[:-1], (b"\xff\0\n ", b"", 0)]),
        seal([(tag, payload, size + 1) for tag, payload, size in rows()]),
        seal([(tag, payload, 0xFFFFFFFF) for tag, payload, _ in rows()]),
        seal([(tag, payload, 0) for tag, payload, _ in rows()]),
        pack(SMALL) + b"\0",
        seal([], count=5),
        seal(rows()[:1], count=5),  # the table would run past the end
    ],
)
def test_intact_but_illegal(data):
    refuse(data, Malformed)


def test_payload_is_bound_to_its_tag():
    swapped = seal(rows())
    crc = struct.pack("<I", zlib.crc32(b"meta"))
    refuse(swapped.replace(struct.pack("<I", zlib.crc32(b"METAmeta")), crc), ChecksumMismatch)


def test_limit():
    data = pack(SMALL)
    assert unpack(data, limit=len(data)) == SMALL
    refuse(data, LimitExceeded, limit=len(data) - 1)
    refuse(seal(rows(), length=0xFFFFFFFF), LimitExceeded)


def test_pack_refuses_lengths_over_32_bits(monkeypatch):
    monkeypatch.setattr(frame, "MAX_LENGTH", len(pack(SMALL)))
    pack(SMALL)
    with pytest.raises(LimitExceeded):
        pack({**SMALL, "SVAL": b"x"})


def test_decoder_needs_no_torch_and_the_frame_no_numpy():
    code = (
        "import sys, lib.nnz.frame; assert 'numpy' not in sys.modules;"
        "import lib.nnz.v1, lib.nnz.v3; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_that_is_nested_as_deep_as_the_text_asks_is_accepted():
    nested = []
    for _ in range(99):
        nested = [nested]
    assert frame.parse_canonical(frame.canonical(nested), "META") == nested
    for deeper in ([nested], {"a": nested}, [1, nested]):
        with pytest.raises(Malformed, match="section META is nested over 100 deep"):
            frame.parse_canonical(frame.canonical(deeper), "META")
