"""The bytes below TensorFlow's checkpoints: varints, protocol buffers' fields, and Snappy.

Only what a checkpoint needs, in a few lines each; everything that is read is checked against the bytes that are there,
since they come from a file that may be damaged. A fault is a ValueError that says what was expected; the caller adds
the file.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_EXPANSION = 22  # of Snappy: its longest copy makes 64 bytes from 3


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """An unsigned number of at most 64 bits, seven of them a byte, the lowest first: (number, place behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("a number must end within its block, got the block's end")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, place
    raise ValueError("a number must have at most 64 bits, got more")


def write_varint(value: int) -> bytes:
    """Undo of `read_varint`."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer in their order: (number, an unsigned integer or bytes)."""
    place = 0
    while place < len(message):
        tag, place = read_varint(message, place)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field must have a number from 1, got 0")
        if kind == 0:
            value, place = read_varint(message, place)
            yield number, value
            continue
        if kind == 2:
            size, place = read_varint(message, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field must be of a known kind, got {kind}")
        if size > len(message) - place:
            raise ValueError(f"field {number} must end within its message, got {size} bytes")
        part = message[place : place + size]
        place += size
        yield number, part if kind == 2 else int.from_bytes(part, "little")


def write_field(number: int, value: int | bytes, *, fixed32: bool = False) -> bytes:
    """One field; an integer as a varint or, with `fixed32`, as four bytes."""
    if isinstance(value, bytes):
        return write_varint(number << 3 | 2) + write_varint(len(value)) + value
    if fixed32:
        return write_varint(number << 3 | 5) + value.to_bytes(4, "little")
    return write_varint(number << 3) + write_varint(value)


def signed(value: int) -> int:
    """A field's integer as the int64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


def integer(value: int | bytes) -> int:
    """A field's value that must be an integer."""
    if isinstance(value, bytes):
        raise ValueError("a field must be an integer, got bytes")
    return value


def octets(value: int | bytes) -> bytes:
    """A field's value that must be bytes."""
    if not isinstance(value, bytes):
        raise ValueError("a field must be bytes, got an integer")
    return value


def uncompress(data: bytes) -> bytes:
    """Undo of Snappy's raw format: literals, and copies of what is already there.

    Source: google/snappy, format_description.txt.

    >>> uncompress(bytes([5, 0]) + b"a" + bytes([1, 1]))
    b'aaaaa'
    """
    size, place = read_varint(data, 0)
    if size > MAX_EXPANSION * len(data):
        raise ValueError(f"a Snappy block of {len(data)} bytes must stay below {MAX_EXPANSION} times that, got {size}")
    out = bytearray()
    while place < len(data):
        tag = data[place]
        kind, upper = tag & 3, tag >> 2
        place += 1
        if kind == 0:
            length = upper + 1
            if upper >= 60:  # the length stands in the next one to four bytes
                length = int.from_bytes(_part(data, place, upper - 59), "little") + 1
                place += upper - 59
            out += _part(data, place, length)
            place += length
        else:
            width = (1, 2, 4)[kind - 1]
            offset = int.from_bytes(_part(data, place, width), "little")
            place += width
            length = upper + 1
            if kind == 1:
                offset, length = offset | (upper >> 3) << 8, (upper & 7) + 4
            if not 0 < offset <= len(out):
                raise ValueError(f"a Snappy copy must begin within what is there, got {offset} bytes back")
            while length > 0:  # what is copied may reach into what the copy makes
                piece = out[-offset:][:length] if offset >= length else bytes(out[-offset:])
                out += piece
                length -= len(piece)
        if len(out) > size:
            break
    if len(out) != size:
        raise ValueError(f"a Snappy block must give the {size} bytes that it promises, got {len(out)}")
    return bytes(out)


def _part(data: bytes, place: int, size: int) -> bytes:
    if size > len(data) - place:
        raise ValueError(f"a Snappy block must hold its {size} bytes from {place} on, got {len(data)} in all")
    return data[place : place + size]
