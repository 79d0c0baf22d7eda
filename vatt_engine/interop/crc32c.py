"""CRC-32C, the checksum of TensorFlow's checkpoints: by the native module where it is built, else by NumPy.

The sum is a remainder of polynomials over {0, 1}, and so linear. NumPy's way uses that: the data is a table of rows.
The rows are added up, each moved on by the length of those behind it; one row is left, whose sum is that of the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

POLYNOMIAL = 0x82F63B78  # its bits reversed, as in the registers here
WIDE, NARROW = 8192, 64  # words of four bytes in a row


def crc32c(data: bytes | memoryview | np.ndarray, crc: int = 0) -> int:
    """The sum of contiguous bytes, going on from the sum `crc` of what stands before them.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    >>> crc32c(b"6789", crc32c(b"12345")) == crc32c(b"123456789")
    True
    """
    native = _native()
    return crc32c_numpy(data, crc) if native is None else native(data, crc)


def masked(crc: int) -> int:
    """A sum as it is stored: rotated, plus a constant, so that sums of data with sums in it stay good ones."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c_numpy(data: bytes | memoryview | np.ndarray, crc: int = 0) -> int:
    """`crc32c` without the native module."""
    array = np.ascontiguousarray(data) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    flat = array.reshape(-1).view(np.uint8)
    register, start = crc ^ 0xFFFFFFFF, 0
    for width in (WIDE, NARROW):
        rows = (len(flat) - start) // (4 * width)
        if rows >= 2:
            end = start + rows * 4 * width
            row = _add_rows(flat[start:end].view("<u4").reshape(rows, width), width, register)
            # The row's own sum starts from zero: the register of what came before is in its first word.
            register, start = _remainder(row, 0), end
    return _by_byte(flat[start:], register) ^ 0xFFFFFFFF


def _remainder(row: np.ndarray, register: int) -> int:
    """The register after the words of a row."""
    if len(row) > NARROW:
        row = _add_rows(row.reshape(-1, NARROW), NARROW, register)
        register = 0
    return _by_byte(row.view(np.uint8), register)


def _add_rows(rows: np.ndarray, width: int, register: int) -> np.ndarray:
    """One row with the remainder of all of them, the register before them included."""
    low, high = _moved(width)
    total = rows[0].astype(np.uint32)
    total[0] ^= np.uint32(register)
    halves = total.view(np.uint16)
    moved, other = np.empty_like(total), np.empty_like(total)
    for row in rows[1:]:
        np.take(low, halves[0::2], out=moved, mode="clip")
        np.take(high, halves[1::2], out=other, mode="clip")
        np.bitwise_xor(moved, other, out=total)
        np.bitwise_xor(total, row, out=total)
    return total.astype("<u4")


def _by_byte(data: np.ndarray, register: int) -> int:
    table = _byte_table()
    for byte in data.tobytes():
        register = (register >> 8) ^ table[(register ^ byte) & 0xFF]
    return register


@functools.cache
def _byte_table() -> list[int]:
    """The register after each byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


@functools.cache
def _moved(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each low and each high half of a word stands after `width` more words."""
    images = [1 << bit for bit in range(32)]  # of the single bits
    for _ in range(32):  # one bit further each time: one word
        images = [(image >> 1) ^ (POLYNOMIAL if image & 1 else 0) for image in images]
    for _ in range(width.bit_length() - 1):  # twice as far each time; widths are powers of two
        images = [_apply(images, image) for image in images]
    tables = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1 << 16, np.uint32)
        for bit, image in enumerate(half):
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ np.uint32(image)
        tables.append(table)
    return tables[0], tables[1]


def _apply(images: list[int], word: int) -> int:
    found = 0
    for bit, image in enumerate(images):
        if word >> bit & 1:
            found ^= image
    return found


@functools.cache
def _native() -> Callable[[object, int], int] | None:
    try:
        from vatt_engine._C import crc32c as native
    except ImportError:  # not built, or built before this function was there
        return None
    return native
