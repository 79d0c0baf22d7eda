"""TensorFlow 2 checkpoints, written without TensorFlow: one data file, and the index beside it.

Tensors are written as they come, and only their places are kept. Source: tensorflow/core/util/tensor_bundle.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vatt_engine.interop.crc32c import crc32c, masked
from vatt_engine.interop.tf_bundle import STRING, TYPES, VERSION
from vatt_engine.interop.tf_table import write_table
from vatt_engine.interop.tf_wire import write_field, write_varint

_NUMBERS = {np.dtype(name): number for number, name in TYPES.items() if number not in (11, 12, 13, 14, 15, 16)}


class BundleWriter:
    """Writes `<prefix>.data-00000-of-00001`, and at the end `<prefix>.index`; nothing is there before the end.

    Raises:
        OSError: the disk is full or not writable.

    >>> with BundleWriter(Path("ckpt-1")) as bundle:
    ...     bundle.add("save_counter", np.int64(1))
    """

    def __init__(self, prefix: Path) -> None:
        self.data = prefix.with_name(f"{prefix.name}.data-00000-of-00001")
        self.index = prefix.with_name(f"{prefix.name}.index")
        self._entries: dict[bytes, bytes] = {}
        self._end = 0

    def __enter__(self) -> BundleWriter:
        self._file = _partial(self.data).open("wb")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._file.close()
        try:
            if kind is None:
                # One data file, little-endian, a format that every reader knows.
                header = write_field(1, 1) + write_field(3, write_field(1, VERSION))
                table = write_table([(b"", header), *sorted(self._entries.items())])
                _partial(self.index).write_bytes(table)
                os.replace(_partial(self.data), self.data)
                os.replace(_partial(self.index), self.index)
        finally:
            for path in (self.data, self.index):
                _partial(path).unlink(missing_ok=True)

    def add(self, key: str, array: np.ndarray) -> None:
        """Write a tensor of numbers or booleans.

        Raises:
            ValueError: a key twice, or a type that TensorFlow has not.
        """
        array = np.asarray(array, order="C")
        number = _NUMBERS.get(array.dtype)
        if number is None:
            raise ValueError(f"{self.data}: {key} must be of a type that TensorFlow has, got {array.dtype}.")
        content = array.astype(array.dtype.newbyteorder("<"), copy=False)
        self._append(key, number, array.shape, memoryview(content.reshape(-1)).cast("B"), None)

    def add_text(self, key: str, text: bytes) -> None:
        """Write a scalar string."""
        lengths = len(text).to_bytes(4, "little")
        sealed = masked(crc32c(lengths)).to_bytes(4, "little")
        crc = crc32c(text, crc32c(sealed, crc32c(lengths)))
        self._append(key, STRING, (), write_varint(len(text)) + sealed + text, crc)

    def _append(self, key: str, number: int, shape: tuple[int, ...], content, crc: int | None) -> None:
        name = key.encode()
        if not name or name in self._entries:
            raise ValueError(f"{self.data}: a tensor must have a name of its own, got {key!r} twice.")
        self._file.write(content)
        sizes = b"".join(write_field(2, write_field(1, size) if size else b"") for size in shape)
        entry = write_field(1, number) + write_field(2, sizes)
        for field, value in ((4, self._end), (5, len(content))):
            entry += write_field(field, value) if value else b""
        crc = crc32c(content) if crc is None else crc
        self._entries[name] = entry + write_field(6, masked(crc), fixed32=True)
        self._end += len(content)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")
