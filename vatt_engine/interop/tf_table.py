"""TensorFlow's sorted tables, the form of a checkpoint's index: keys and values in blocks, each with a checksum.

    block ... block, metaindex block, index block, footer
    block      entries, their restart places, kind (0: plain, 1: Snappy), masked CRC-32C of all that
    entry      bytes shared with the key before, further bytes of the key, bytes of the value, the latter two
    footer     place and size of the metaindex block and of the index block, zeros, a magic number: 48 bytes

The index block's values are the places of the others. It is LevelDB's format; source: tensorflow/core/lib/io/format.cc
and table_format.txt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from vatt_engine.interop.crc32c import crc32c, masked
from vatt_engine.interop.tf_wire import read_varint, uncompress, write_varint

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
TRAILER = 5  # kind and checksum behind each block
BLOCK = 1 << 18  # bytes from which a block is closed, TensorFlow's choice for indexes
RESTART = 16  # entries after which a key is written whole

Entries = list[tuple[bytes, bytes]]


def read_table(data: bytes) -> Entries:
    """The keys and values of a table, in order.

    Raises:
        ValueError: what is wrong, without the file.
    """
    footer = data[-FOOTER:]
    if len(data) < FOOTER or int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError(f"the file must be a TensorFlow index, got {describe(data)}")
    handles, place = [], 0
    for _ in range(2):
        offset, place = read_varint(footer[:-8], place)
        size, place = read_varint(footer[:-8], place)
        handles.append((offset, size))
    if any(footer[place:-8]):
        raise ValueError("the last 48 bytes must be filled up with zeros, got others")
    (meta, index), entries = handles, []
    _read_block(data, *meta)  # TensorFlow leaves it empty; read for its checksum
    for _, handle in _read_block(data, *index):
        offset, place = read_varint(handle, 0)
        size, place = read_varint(handle, place)
        if place != len(handle):
            raise ValueError("an entry of the index block must be a place and a size, got more")
        entries += _read_block(data, offset, size)
    for (before, _), (after, _) in itertools.pairwise(entries):
        if before >= after:
            raise ValueError(f"keys must rise from block to block, got {after!r} behind {before!r}")
    return entries


def describe(data: bytes) -> str:
    """The first bytes of a file as an error message shows them."""
    if not data:
        return "an empty file"
    start = data.lstrip()[:40].partition(b"\n")[0].strip()
    if start and start.isascii() and start.decode("ascii").isprintable():
        page = ", a web page (of a login, or an error)" if start[:1] == b"<" else ""
        return f"one that starts with {start.decode('ascii')!r}{page}"
    return "one without the mark at its end: it is cut, or of another kind"


def _read_block(data: bytes, offset: int, size: int) -> Entries:
    if offset + size + TRAILER > len(data) - FOOTER:
        raise ValueError(f"a block must lie within the file, got {size} bytes at {offset} of {len(data)}")
    block, trailer = data[offset : offset + size], data[offset + size : offset + size + TRAILER]
    if masked(crc32c(trailer[:1], crc32c(block))) != int.from_bytes(trailer[1:], "little"):
        raise ValueError(f"the block at {offset} must have its checksum, got another: the file is damaged")
    if trailer[0] > 1:
        raise ValueError(f"the block at {offset} must be plain or Snappy's, got kind {trailer[0]}")
    return _read_entries(uncompress(block) if trailer[0] else block)


def _read_entries(block: bytes) -> Entries:
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if len(block) < 4 or end < 0:
        raise ValueError(f"a block must hold its {restarts} restart places, got {len(block)} bytes")
    entries: Entries = []
    place, key = 0, b""
    while place < end:
        shared, place = read_varint(block, place)
        further, place = read_varint(block, place)
        size, place = read_varint(block, place)
        if shared > len(key) or further + size > end - place:
            raise ValueError(f"an entry must lie within its block, got {shared} + {further} + {size} bytes at {place}")
        before, key = key, key[:shared] + block[place : place + further]
        place += further
        if entries and key <= before:
            raise ValueError(f"keys must rise, got {key!r} behind {before!r}")
        entries.append((key, block[place : place + size]))
        place += size
    return entries


def write_table(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The table of entries whose keys rise; undo of `read_table`."""
    out, index, block = bytearray(), [], _Block()
    for key, value in entries:
        block.add(key, value)
        if block.size >= BLOCK:
            index.append((block.last, _append(out, block)))
            block = _Block()
    if block.count:
        index.append((block.last, _append(out, block)))
    meta, handles = _append(out, _Block()), _Block(restart=1)
    for key, handle in index:
        handles.add(key, handle)
    footer = meta + _append(out, handles)
    out += footer.ljust(FOOTER - 8, b"\0") + MAGIC.to_bytes(8, "little")
    return bytes(out)


class _Block:
    """A block in the making."""

    def __init__(self, restart: int = RESTART) -> None:
        self.body, self.restarts, self.count, self.last, self.restart = bytearray(), [0], 0, b"", restart

    @property
    def size(self) -> int:
        return len(self.body) + 4 * len(self.restarts) + 4

    def add(self, key: bytes, value: bytes) -> None:
        shared = 0
        if self.count and self.count % self.restart == 0:
            self.restarts.append(len(self.body))
        elif self.count:
            limit = min(len(key), len(self.last))
            while shared < limit and key[shared] == self.last[shared]:
                shared += 1
        self.body += write_varint(shared) + write_varint(len(key) - shared) + write_varint(len(value))
        self.body += key[shared:] + value
        self.count, self.last = self.count + 1, key

    def content(self) -> bytes:
        places = [*self.restarts, len(self.restarts)]
        return bytes(self.body) + b"".join(place.to_bytes(4, "little") for place in places)


def _append(out: bytearray, block: _Block) -> bytes:
    """Append a block with its trailer; returns its place and size."""
    content, offset = block.content(), len(out)
    sealed = content + b"\0"
    out += sealed + masked(crc32c(sealed)).to_bytes(4, "little")
    return write_varint(offset) + write_varint(len(content))
