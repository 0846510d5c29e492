"""The frame of a `.nnz` file: header, section table and payloads (FORMAT.md, section 2).

`unpack` accepts a file only if it has exactly the bytes that `pack` wrote. It refuses every
truncation and every single flipped bit with certainty, and other damage with a probability of
1 - 2^-32, always with one of the errors below. The frame knows nothing about tensors.

At the end of the module are the tools that several sections are read and written with: canonical
JSON, inflating, varints.
"""
# ruff: noqa: N818 - the errors are named for what happened, and share FormatError as base

import json
import struct
import zlib

MAGIC = b"\x89NNZ\r\n\x1a\n"  # as PNG has it: copying the file as text changes these bytes
HEADER = struct.Struct("<8sHBBII")  # magic, version, section count, reserved, file length, CRC-32
ENTRY = struct.Struct("<4sII")  # tag, payload length, CRC-32 of tag and payload
VERSIONS = {  # version -> its sections, in file order
    1: ("META", "SVAL", "SIDX", "DENS", "HASH"),
    2: ("NETW", "CODE", "SIDE"),
    3: ("NETW", "CODE", "REST"),
}
MAX_LENGTH = (1 << 32) - 1  # bytes of a file, and of its decoded tensors: lengths are 32-bit
MAX_DEPTH = 100  # of arrays and objects in JSON
LIMIT = 1 << 30  # bytes of a file, and of its decoded tensors, that a reader accepts by default


class FormatError(ValueError):
    """The file is not a valid `.nnz`: the base of the six errors below, of one line each."""


class NotNNZ(FormatError):
    """The file does not begin with the magic: it is of some other kind."""


class UnsupportedVersion(FormatError):
    """The file is a `.nnz` of a version that this reader does not know."""


class Truncated(FormatError):
    """The file ends before its declared length."""


class LimitExceeded(FormatError):
    """A declared size is over a limit; nothing of that size has been allocated."""


class ChecksumMismatch(FormatError):
    """A CRC-32 or the SHA-256 of the content does not match: the file is damaged."""


class Malformed(FormatError):
    """The bytes are undamaged but break a rule of FORMAT.md."""


def pack(sections: dict[str, bytes]) -> bytes:
    """Return the file of these payloads, {tag: payload}, in the version that has these tags.

    Raises Malformed if no version in VERSIONS has exactly these tags in this order, LimitExceeded
    if the file would be longer than MAX_LENGTH.
    """
    tags = tuple(sections)
    version = next((v for v, known in VERSIONS.items() if known == tags), None)
    if version is None:
        raise Malformed(f"no version has the sections {' '.join(map(repr, tags))}")
    payloads = [bytes(payload) for payload in sections.values()]
    length = HEADER.size + len(tags) * ENTRY.size + sum(map(len, payloads))
    if length > MAX_LENGTH:
        raise LimitExceeded(f"a file of {length} bytes, over the limit of {MAX_LENGTH}")
    table = b"".join(
        ENTRY.pack(tag.encode(), len(payload), _section_crc(tag, payload))
        for tag, payload in zip(tags, payloads, strict=True)
    )
    head = HEADER.pack(MAGIC, version, len(tags), 0, length, 0)[:-4]
    crc = zlib.crc32(table, zlib.crc32(head))
    return b"".join([head, crc.to_bytes(4, "little"), table, *payloads])


def unpack(
    data: bytes, limit: int = LIMIT, version: int | None = None
) -> dict[str, memoryview]:
    """Return the payloads of a file, {tag: payload}, as views of `data`; nothing is copied.

    version: the only version to accept; None accepts all of VERSIONS. Raises a FormatError for
    anything but a whole, undamaged file of at most `limit` bytes.
    """
    data = memoryview(data).cast("B")
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise NotNNZ("not a .nnz file: foreign magic")
    if len(data) < HEADER.size:
        raise Truncated(f"truncated: {len(data)} bytes, less than a header")
    _, declared, count, reserved, length, crc = HEADER.unpack_from(data)
    known = VERSIONS if version is None else (version,)
    if declared not in known:
        raise UnsupportedVersion(
            f"version {declared}; this reader knows {', '.join(map(str, known))}"
        )
    if length > limit:
        raise LimitExceeded(f"declares {length} bytes, over the limit of {limit}")
    if len(data) < length:
        raise Truncated(f"truncated: {len(data)} bytes of {length}")
    if len(data) > length:
        raise Malformed(f"{len(data) - length} bytes after the declared end")
    tags = VERSIONS[declared]
    if reserved or count != len(tags):
        raise Malformed(f"header: {count} sections, reserved {reserved}, not {len(tags)} and 0")
    start = HEADER.size + count * ENTRY.size
    if start > length:
        raise Malformed(f"header: {length} bytes cannot hold {count} sections")
    if zlib.crc32(data[HEADER.size : start], zlib.crc32(data[: HEADER.size - 4])) != crc:
        raise ChecksumMismatch("header or section table is damaged (CRC-32)")

    table = list(ENTRY.iter_unpack(data[HEADER.size : start]))
    named = [tag for tag, _, _ in table]
    if named != [tag.encode() for tag in tags]:
        raise Malformed(f"version {declared} has the sections {' '.join(tags)}, found {named}")
    if start + sum(size for _, size, _ in table) != length:
        raise Malformed("section lengths do not add up to the file length")
    sections = {}
    for tag, (_, size, section_crc) in zip(tags, table, strict=True):
        sections[tag] = data[start : start + size]
        start += size
        if _section_crc(tag, sections[tag]) != section_crc:
            raise ChecksumMismatch(f"section {tag} is damaged (CRC-32)")
    return sections


def _section_crc(tag, payload):
    return zlib.crc32(payload, zlib.crc32(tag.encode()))


def canonical(value) -> bytes:
    """Return a value as canonical JSON (FORMAT.md, section 3.1).

    Raises Malformed for what is not JSON: NaN and infinities too.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from None
    return text.encode()


def parse_canonical(text: bytes, section: str):
    """Return the value of canonical JSON. Raises Malformed, naming the section, for other text."""
    try:
        value = json.loads(text)
        again = canonical(value)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"section {section} is not legal JSON: {error}") from None
    if again != text:  # also catches duplicate keys
        raise Malformed(f"section {section} is not canonical JSON")
    level = [[value]]  # arrays and objects, a level deeper at each turn
    for _ in range(MAX_DEPTH + 1):
        inside = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for values in inside for y in values if isinstance(y, dict | list)]
    if level:
        raise Malformed(f"section {section} is nested over {MAX_DEPTH} deep")
    return value


def inflate(stream, payload, limit: int, section: str) -> bytes:
    """Return the text of the whole stream that a `zlib.decompressobj` finds in a payload.

    limit: of the text, in bytes. Bytes after the stream are left in `stream.unused_data`.

    Raises Malformed for a stream that is damaged or not whole, LimitExceeded for a longer text, of
    which no more than limit + 1 bytes are made.
    """
    try:
        text = stream.decompress(payload, limit + 1)
    except zlib.error as error:
        raise Malformed(f"section {section} does not inflate: {error}") from None
    if len(text) > limit:
        raise LimitExceeded(f"section {section} inflates to more than {limit} bytes")
    if not stream.eof:
        raise Malformed(f"section {section} is not a whole compressed stream")
    return text


def varint(number: int) -> bytes:
    """Return a number of 0 or more as a varint: seven bits per byte, the lowest bits first.

    The top bit of a byte says that another byte follows (FORMAT.md, section 4).
    """
    out = []
    while number >> 7:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


class Reader:
    """Reads bytes and varints from a section's payload, front to back; raises Malformed."""

    def __init__(self, payload, section: str):
        self.payload, self.section, self.position = payload, section, 0

    def bytes(self, count: int):
        """Return the next `count` bytes."""
        if count > len(self.payload) - self.position:
            raise Malformed(f"section {self.section} ends early")
        self.position += count
        return self.payload[self.position - count : self.position]

    def varint(self) -> int:
        """Return the next varint: at most 2^32 - 1, and no longer than it needs to be."""
        value = 0
        for shift in range(0, 35, 7):
            (byte,) = self.bytes(1)
            value |= (byte & 127) << shift
            if byte < 128:
                if (byte or not shift) and value >> 32 == 0:
                    return value
                break
        raise Malformed(f"section {self.section}: an illegal number")

    def end(self) -> None:
        """Raise Malformed if bytes are left."""
        left = len(self.payload) - self.position
        if left:
            raise Malformed(f"section {self.section}: {left} bytes too many")
