"""TensorFlow 2 checkpoints, read without TensorFlow: `<prefix>.index` and `<prefix>.data-00000-of-00001`.

The index is a sorted table (see `tf_table`) from a tensor's name to its type, shape, place and checksum; the data files
hold the numbers one after the other. A tensor is read, and its checksum compared, when it is asked for: of a training
checkpoint two thirds are the optimizer's. Source: tensorflow/core/util/tensor_bundle and protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vatt_engine.interop.crc32c import crc32c, masked
from vatt_engine.interop.tf_files import CheckpointFileError, find_prefix, read_index
from vatt_engine.interop.tf_slices import Extents, read_extents, read_slice_key
from vatt_engine.interop.tf_table import describe
from vatt_engine.interop.tf_wire import integer, octets, read_fields, read_varint, signed

VERSION = 1  # of the format, the one that TensorFlow has had since 2016
STRING, BFLOAT16 = 7, 14
# DataType in tensorflow/core/framework/types.proto; the quantized ones are given as the integers that they store.
TYPES = {
    1: "f4", 2: "f8", 3: "i4", 4: "u1", 5: "i2", 6: "i1", 8: "c8", 9: "i8", 10: "?", 11: "i1", 12: "u1", 13: "i4",
    15: "i2", 16: "u2", 17: "u2", 18: "c16", 19: "f2", 22: "u4", 23: "u8", BFLOAT16: "u2",
}  # fmt: skip
OTHERS = {20: "resource", 21: "variant", 24: "float8_e5m2", 25: "float8_e4m3fn", 29: "int4", 30: "uint4"}


class Entry(NamedTuple):
    """What the index says of a tensor or of a part of one; `slices` are the parts, where it is stored in parts."""

    type: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    slices: tuple[Extents, ...]


class TFCheckpoint(Mapping[str, np.ndarray]):
    """Name -> array of a TensorFlow checkpoint; `read_tf_checkpoint` gives one.

    Arrays are new ones each time, in this machine's byte order. bfloat16 comes as float32, strings as an object array
    of bytes.

    Raises:
        CheckpointFileError: (a ValueError) a tensor's bytes are damaged, or of a type that cannot be read.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix, self.index = prefix, prefix.with_name(f"{prefix.name}.index")
        self._entries: dict[str, Entry] = {}
        self._parts: dict[tuple[str, Extents], Entry] = {}
        table = read_index(self.index)
        try:
            self.num_shards, self._order = _read_header(dict(table[:1]).get(b"", b""))
            for key, value in table[1:]:
                if key[:1] == b"\0":
                    name, extents = read_slice_key(key)
                    self._parts[name, extents] = _read_entry(value)
                else:
                    self._entries[key.decode("utf-8")] = _read_entry(value)
            for name, entry in (*self._entries.items(), *((key[0], part) for key, part in self._parts.items())):
                self._check(name, entry)
        except ValueError as error:
            raise CheckpointFileError(f"{self.index}: {error}.") from error
        self._check_files()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        array = self._join(name, entry) if entry.slices else self._read(name, entry)
        return _widened(array) if entry.type == BFLOAT16 else array

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self._entries[name].shape

    # ------------------------------------------------------------------------------------ what the index promises

    def _check(self, name: str, entry: Entry) -> None:
        if not 0 <= entry.shard < self.num_shards:
            raise ValueError(f"{name} must be in one of {self.num_shards} data files, got number {entry.shard}")
        for extents in entry.slices:
            if (name, extents) not in self._parts:
                raise ValueError(f"{name} must have all its parts, got none for {extents}")
        there = sum(math.prod(self._parts[name, extents].shape) for extents in entry.slices)
        if entry.slices and there < math.prod(entry.shape):
            raise ValueError(f"{name} of shape {list(entry.shape)} must be covered by its parts, got {there} elements")
        if entry.type in TYPES and not entry.slices:
            wanted = math.prod(entry.shape) * np.dtype(TYPES[entry.type]).itemsize
            if entry.size != wanted:
                raise ValueError(f"{name} of shape {list(entry.shape)} must have {wanted} bytes, got {entry.size}")

    def _check_files(self) -> None:
        needed: dict[int, int] = {}
        for entry in (*self._entries.values(), *self._parts.values()):
            needed[entry.shard] = max(needed.get(entry.shard, 0), entry.offset + entry.size)
        for shard, size in needed.items():
            path = self._shard(shard)
            try:
                there = path.stat().st_size
            except OSError as error:
                reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
                raise CheckpointFileError(
                    f"{path}: the data file must stand beside the index, got {reason}."
                ) from error
            if there < size:
                with path.open("rb") as file:
                    start = file.read(64)
                found = f", {describe(start)}" if start.lstrip()[:1] == b"<" else ""
                text = f"must have the {size} bytes that the index tells of, got {there}{found}: it is cut"
                raise CheckpointFileError(f"{path}: the data file {text}.")

    def _shard(self, number: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{number:05d}-of-{self.num_shards:05d}")

    # ------------------------------------------------------------------------------------ the numbers

    def _read(self, name: str, entry: Entry) -> np.ndarray:
        if entry.type != STRING and entry.type not in TYPES:
            kind = OTHERS.get(entry.type, f"of number {entry.type}")
            raise CheckpointFileError(f"{self.index}: {name} must be of a type that NumPy has, got type {kind}.")
        path = self._shard(entry.shard)
        try:
            raw = _read_bytes(path, entry)
            if entry.type == STRING:
                return _read_strings(raw.tobytes(), entry, self._order)
            if masked(crc32c(raw)) != entry.crc:
                raise ValueError("must have its checksum, got another: the data file is damaged")
            if TYPES[entry.type] == "?":
                return (raw != 0).reshape(entry.shape)
            stored = raw.view(np.dtype(TYPES[entry.type]).newbyteorder(self._order))
            return stored.astype(stored.dtype.newbyteorder("="), copy=False).reshape(entry.shape)
        except OSError as error:
            raise CheckpointFileError(f"{path}: the data file must be readable, got {error.strerror}.") from error
        except ValueError as error:
            raise CheckpointFileError(f"{path}: {name} {error}.") from error

    def _join(self, name: str, entry: Entry) -> np.ndarray:
        """A tensor out of its parts, which must cover it."""
        whole, covered = None, np.zeros(entry.shape, bool)
        for extents in entry.slices:
            part = self._parts[name, extents]
            try:
                place = _place(extents, entry.shape)
                if part.type != entry.type or part.shape != covered[place].shape:
                    raise ValueError(f"a part of shape {list(covered[place].shape)}, got {list(part.shape)}")
            except ValueError as error:
                raise CheckpointFileError(f"{self.index}: {name} must have {error}.") from error
            array = self._read(name, part)
            whole = np.empty(entry.shape, array.dtype) if whole is None else whole
            whole[place], covered[place] = array, True
        if whole is None or not covered.all():
            raise CheckpointFileError(f"{self.index}: {name} must be covered by its parts, got gaps.")
        return whole


def read_tf_checkpoint(path: str | Path) -> TFCheckpoint:
    """A TensorFlow 2 checkpoint (or a bundle of TF1's Saver) as a lazy mapping from names to arrays.

    Args:
        path: its prefix, its `.index`, one of its `.data-*`, or a folder with no other checkpoint in it.

    Raises:
        CheckpointFileError: (a ValueError) there is none, it is of another kind, newer than this reader, or damaged;
            one line that begins with the file. Every checksum is compared: the index's here, a tensor's when it is
            read.

    >>> read_tf_checkpoint("ckpt-500000")["save_counter/.ATTRIBUTES/VARIABLE_VALUE"]  # doctest: +SKIP
    array(50)
    """
    return TFCheckpoint(find_prefix(Path(path)))


def _read_header(message: bytes) -> tuple[int, str]:
    """Of the whole checkpoint: the number of data files, and the byte order."""
    shards, order, least, bad = 0, "<", 0, []
    if not message:
        raise ValueError("the index must begin with a header, got none")
    for field, value in read_fields(message):
        if field == 1:
            shards = integer(value)
        elif field == 2:
            order = "<>"[integer(value) == 1]
        elif field == 3:
            for part, number in read_fields(octets(value)):
                if part == 2:
                    least = integer(number)
                elif part == 3:
                    bad += [number] if isinstance(number, int) else _packed(number)
    if least > VERSION or VERSION in bad:
        raise ValueError(f"the format must be of version {VERSION}, got one that asks for {max(least, VERSION + 1)}")
    if not 1 <= shards < 100_000:
        raise ValueError(f"the header must tell of one or more data files, got {shards}")
    return shards, order


def _packed(data: bytes) -> list[int]:
    numbers, place = [], 0
    while place < len(data):
        number, place = read_varint(data, place)
        numbers.append(number)
    return numbers


def _read_entry(message: bytes) -> Entry:
    numbers, shape, slices = dict.fromkeys((1, 3, 4, 5, 6), 0), (), []
    for field, value in read_fields(message):
        if field == 2:
            shape = _read_shape(octets(value))
        elif field == 7:
            slices.append(read_extents(octets(value)))
        elif field in numbers:
            numbers[field] = signed(integer(value))
    kind, shard, offset, size, crc = numbers.values()
    if min(offset, size) < 0:
        raise ValueError(f"a tensor must have a place and a size of at least 0, got {offset} and {size}")
    return Entry(kind, shape, shard, offset, size, crc, tuple(slices))


def _read_shape(message: bytes) -> tuple[int, ...]:
    sizes = []
    for field, value in read_fields(message):
        if field == 2:
            size = 0
            for part, number in read_fields(octets(value)):
                size = signed(integer(number)) if part == 1 else size
            sizes.append(size)
        elif field == 3 and integer(value):
            raise ValueError("a tensor must have a known number of axes, got none")
    if min(sizes, default=0) < 0:
        raise ValueError(f"a shape must have sizes of at least 0, got {sizes}")
    return tuple(sizes)


def _place(extents: Extents, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a part lies in the whole."""
    if len(extents) != len(shape):
        raise ValueError(f"parts of {len(shape)} axes, got {len(extents)}")
    bounds = [(0, size) if length < 0 else (start, start + length) for (start, length), size in zip(extents, shape)]
    if any(not 0 <= start <= end <= size for (start, end), size in zip(bounds, shape)):
        raise ValueError(f"parts within its shape {list(shape)}, got {extents}")
    return tuple(slice(*bound) for bound in bounds)


def _read_bytes(path: Path, entry: Entry) -> np.ndarray:
    raw = np.empty(entry.size, np.uint8)
    with path.open("rb") as file:
        file.seek(entry.offset)
        there = file.readinto(memoryview(raw))
    if there != entry.size:
        raise ValueError(f"must have {entry.size} bytes, got the end of the file after {there}")
    return raw


def _read_strings(raw: bytes, entry: Entry, order: str) -> np.ndarray:
    """Lengths as varints, their checksum, the bytes. The checksums count lengths as four bytes (eight if they must)."""
    count, place, lengths, summed = math.prod(entry.shape), 0, [], b""
    if count > len(raw):
        raise ValueError(f"must hold {count} strings, got {len(raw)} bytes")
    native = "little" if order == "<" else "big"
    for _ in range(count):
        length, place = read_varint(raw, place)
        lengths.append(length)
        summed += length.to_bytes(4 if length < 1 << 32 else 8, native)
    crc, stored = crc32c(summed), raw[place : place + 4]
    if len(stored) < 4 or int.from_bytes(stored, native) != masked(crc):
        raise ValueError("must have the checksum of its lengths, got another: the data file is damaged")
    place += 4
    if sum(lengths) != len(raw) - place:
        raise ValueError(f"must have {sum(lengths)} bytes in its strings, got {len(raw) - place}")
    if masked(crc32c(raw[place:], crc32c(stored, crc))) != entry.crc:
        raise ValueError("must have its checksum, got another: the data file is damaged")
    found = np.empty(count, object)
    for number, length in enumerate(lengths):
        found[number] = raw[place : place + length]
        place += length
    return found.reshape(entry.shape)


def _widened(array: np.ndarray) -> np.ndarray:
    """bfloat16's bits as float32, of which they are the upper half."""
    return np.left_shift(array, 16, dtype=np.uint32, casting="unsafe").reshape(array.shape).view(np.float32)
