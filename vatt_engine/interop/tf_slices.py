"""Tensors that a checkpoint stores in parts: where each part lies, as the index writes it.

A part stands under a binary key of its own: 0, the name, and where it lies, in TensorFlow's "ordered code", whose bytes
sort as the values do. Source: tensorflow/core/lib/strings/ordered_code.cc and util/saved_tensor_slice_util.cc.
"""

from __future__ import annotations

from vatt_engine.interop.tf_wire import integer, octets, read_fields, signed

Extents = tuple[tuple[int, int], ...]  # start and length along each axis; length -1: all of it


def read_extents(message: bytes) -> Extents:
    """A TensorSliceProto."""
    found = []
    for field, value in read_fields(message):
        if field == 1:
            start, length = 0, -1
            for part, number in read_fields(octets(value)):
                if part == 1:
                    start = signed(integer(number))
                elif part == 2:
                    length = signed(integer(number))
            found.append((start, length))
    return tuple(found)


def read_slice_key(key: bytes) -> tuple[str, Extents]:
    """The name and the place of a part, from its key."""
    name, place = _read_string(key, 1)
    axes, place = _read_number(key, place)
    found = []
    for _ in range(min(axes, len(key))):
        start, place = _read_signed(key, place)
        length, place = _read_signed(key, place)
        found.append((start, length))
    if place != len(key) or len(found) != axes:
        raise ValueError(f"the key of a part must hold {axes} places, got {key!r}")
    return name.decode("utf-8"), tuple(found)


def _read_string(key: bytes, place: int) -> tuple[bytes, int]:
    """Ends with 0 1; 0 255 stands for the byte 0, and 255 0 for 255."""
    found = bytearray()
    while place < len(key):
        pair = key[place : place + 2]
        if pair == b"\0\1":
            return bytes(found), place + 2
        if pair[:1] in (b"\0", b"\xff"):
            if pair not in (b"\0\xff", b"\xff\0"):
                break
            place += 1
        found += pair[:1]
        place += 1
    raise ValueError(f"the key of a part must hold a whole name, got {key!r}")


def _read_number(key: bytes, place: int) -> tuple[int, int]:
    """A byte that counts the others, which are the number, the highest first."""
    size = key[place] if place < len(key) else 255
    if size > 8 or place + 1 + size > len(key):
        raise ValueError(f"the key of a part must hold whole numbers, got {key!r}")
    return int.from_bytes(key[place + 1 : place + 1 + size], "big"), place + 1 + size


def _read_signed(key: bytes, place: int) -> tuple[int, int]:
    """As many bytes as the first one has leading ones (of a negative number: zeros); behind them the number's bits."""
    head = int.from_bytes(key[place : place + 2].ljust(2, b"\0"), "big")
    negative = not head >> 15
    marks = head ^ 0xFFFF if negative else head
    size = 0
    while size < 10 and marks >> (15 - size) & 1:
        size += 1
    data = key[place : place + size]
    if not data or len(data) < size:
        raise ValueError(f"the key of a part must hold whole numbers, got {key!r}")
    bits = 7 * size  # behind the `size` marks, the first of which is the sign
    value = int.from_bytes(data, "big") & ((1 << bits) - 1)
    return value - (1 << bits) if negative else value, place + size
