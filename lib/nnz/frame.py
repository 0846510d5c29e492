"""The frame of a `.nnz` file: header, section table, payloads (FORMAT.md, section 2).

The frame knows nothing of tensors. What it promises: a file that `unpack` accepts has exactly the
bytes that `pack` wrote; any truncation and any single flipped bit is refused with certainty, other
damage with a probability of 1 - 2^-32, always by one of the errors below.
"""
# ruff: noqa: N818 - the errors are named for what happened, and share FormatError as suffix

import struct
import zlib

MAGIC = b"\x89NNZ\r\n\x1a\n"  # a byte that is not ASCII, both line ends: text-mode copies show
HEADER = struct.Struct("<8sHBBII")  # magic, version, section count, reserved, file length, CRC-32
ENTRY = struct.Struct("<4sII")  # tag, payload length, CRC-32 of tag and payload
VERSIONS = {  # version -> its sections, in file order
    1: ("META", "SVAL", "SIDX", "DENS", "HASH"),
    2: ("NETW", "CODE", "SIDE"),
}
MAX_LENGTH = (1 << 32) - 1  # bytes of a file, and of the decoded tensors: lengths are 32-bit
LIMIT = 1 << 30  # bytes, the default of what a caller accepts, of the same two


class FormatError(ValueError):
    """A file that is not a valid `.nnz`; the message is one line. Always one of the six below."""


class NotNNZ(FormatError):
    """The magic is foreign: some other kind of file."""


class UnsupportedVersion(FormatError):
    """A `.nnz` of a version that this reader does not know."""


class Truncated(FormatError):
    """The file ends before its declared length."""


class LimitExceeded(FormatError):
    """A declared size is over a limit; nothing of that size was allocated."""


class ChecksumMismatch(FormatError):
    """A CRC-32, or the SHA-256 of the content, does not agree: the file is damaged."""


class Malformed(FormatError):
    """The bytes are intact but break a rule of FORMAT.md."""


def pack(sections: dict[str, bytes]) -> bytes:
    """A file of these payloads; the tags, in order, must be those of one of VERSIONS.

    Raises Malformed for other tags, LimitExceeded over MAX_LENGTH.
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
    """The payloads by tag, as views of `data`; nothing is copied. version: the only one accepted.

    Raises a FormatError for anything but a whole, undamaged file of at most `limit` bytes.
    """
    data = memoryview(data).cast("B")
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise NotNNZ("not a .nnz file: foreign magic")
    if len(data) < HEADER.size:
        raise Truncated(f"truncated: {len(data)} bytes, less than a header")
    _, found, count, reserved, length, crc = HEADER.unpack_from(data)
    known = VERSIONS if version is None else (version,)
    if found not in known:
        raise UnsupportedVersion(f"version {found}; this reader knows {', '.join(map(str, known))}")
    if length > limit:
        raise LimitExceeded(f"declares {length} bytes, over the limit of {limit}")
    if len(data) < length:
        raise Truncated(f"truncated: {len(data)} bytes of {length}")
    if len(data) > length:
        raise Malformed(f"{len(data) - length} bytes after the declared end")
    tags = VERSIONS[found]
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
        raise Malformed(f"version {found} has the sections {' '.join(tags)}, found {named}")
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


def inflate(stream, payload, limit: int, section: str) -> bytes:
    """The whole text of a zlib.decompressobj, of at most `limit` bytes: it stops there. What
    follows is left in its unused_data. Raises Malformed or LimitExceeded."""
    try:
        text = stream.decompress(payload, limit + 1)
    except zlib.error as error:
        raise Malformed(f"section {section} does not inflate: {error}") from None
    if len(text) > limit:
        raise LimitExceeded(f"section {section} inflates to more than {limit} bytes")
    if not stream.eof:
        raise Malformed(f"section {section} is not a whole compressed stream")
    return text
