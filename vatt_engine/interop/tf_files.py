"""Which files a path to a TensorFlow checkpoint means, and what a path that means none of them is instead."""

from __future__ import annotations

import re
from pathlib import Path

from vatt_engine.interop.tf_table import FOOTER, MAGIC, Entries, describe, read_table

_DATA = re.compile(r"\.data-\d{5}-of-\d{5}$")
_ZIP, _HDF5 = b"PK\x03\x04", b"\x89HDF"


class CheckpointFileError(ValueError):
    """A file that cannot be read as a checkpoint; the message is one line and begins with it."""


def is_tf_checkpoint(path: Path) -> bool:
    """Whether a path looks like a TensorFlow checkpoint, or was meant to be one."""
    if path.is_dir():
        ours = any((path / name).exists() for name in ("config.json", "config.yaml", "checkpoints", "zero"))
        theirs = (one for one in path.iterdir() if one.suffix in (".index", ".meta", ".pb") or _DATA.search(one.name))
        return not ours and any(theirs)
    named = path.suffix in (".index", ".meta", ".ckpt", ".h5", ".keras", ".pb") or _DATA.search(path.name)
    return bool(named) or path.is_file() or _index(path).exists() or any(_data_files(path))


def find_prefix(path: Path) -> Path:
    """The prefix of the checkpoint's files.

    Raises:
        CheckpointFileError: there is no checkpoint, or there are several.
    """
    if path.is_dir():
        return _of_folder(path)
    prefix = path
    if path.suffix == ".index":
        prefix = path.with_suffix("")
    elif match := _DATA.search(path.name):
        prefix = path.with_name(path.name[: match.start()])
    if _index(prefix).exists():
        return prefix
    if path.suffix == ".meta":
        text = "must be a checkpoint, got TF1's description of a graph, which holds no weights"
        raise CheckpointFileError(f"{path}: the file {text}. The weights stand in {path.stem}.index and .data-*.")
    if path.is_file() and not _DATA.search(path.name):
        raise CheckpointFileError(f"{path}: the path must be a checkpoint's prefix or .index, got {_kind(path)}.")
    hint = ""
    if files := _data_files(prefix):
        hint = f" {files[0].name} is there without it: a checkpoint is both."
    elif path.parent.is_dir() and (others := _indexes(path.parent)):
        hint = f" There are {_listed(others)}."
    raise CheckpointFileError(f"{_index(prefix)}: the checkpoint's index must exist, got no such file.{hint}")


def read_index(path: Path) -> Entries:
    """The keys and values of an index file.

    Raises:
        CheckpointFileError: it is damaged, or no index.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - FOOTER))
            whole = int.from_bytes(file.read()[-8:], "little") == MAGIC
            file.seek(0)
            return read_table(file.read() if whole else file.read(4096))
    except OSError as error:
        raise CheckpointFileError(f"{path}: the index must be readable, got {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointFileError(f"{path}: {error}.") from error


def _of_folder(folder: Path) -> Path:
    found = _indexes(folder)
    if len(found) == 1:
        return found[0].with_suffix("")
    if found:
        raise CheckpointFileError(
            f"{folder}: the folder must hold one checkpoint, got {_listed(found)}. Name one of them."
        )
    if (folder / "saved_model.pb").exists():
        text = "must hold a checkpoint of a trainer, got a SavedModel, whose variables have other names"
    elif metas := sorted(folder.glob("*.meta")):
        text = f"must hold a checkpoint's .index and .data-*, got {metas[0].name}, TF1's description of a graph"
    elif files := sorted(path for path in folder.iterdir() if _DATA.search(path.name)):
        text = f"must hold a checkpoint's .index, got {files[0].name} without one"
    else:
        text = "must hold a TensorFlow checkpoint, got no .index file"
    raise CheckpointFileError(f"{folder}: the folder {text}.")


def _index(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def _indexes(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.index") if path.is_file())


def _data_files(prefix: Path) -> list[Path]:
    if not prefix.parent.is_dir():
        return []
    names = (path for path in prefix.parent.iterdir() if path.name.startswith(f"{prefix.name}."))
    return sorted(path for path in names if _DATA.search(path.name))


def _listed(paths: list[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:8])
    return shown if len(paths) <= 8 else f"{shown} and {len(paths) - 8} more"


def _kind(path: Path) -> str:
    """What a file that is no part of a checkpoint looks like."""
    with path.open("rb") as file:
        start = file.read(4096)
        file.seek(max(0, file.seek(0, 2) - 8))
        end = file.read(8)
    if int.from_bytes(end, "little") == MAGIC:
        return "a table without .index in its name (a checkpoint of TF1's first format, or a renamed file)"
    for mark, kind in ((_ZIP, "a zip archive (.npz, .keras, .pt)"), (_HDF5, "an HDF5 file of Keras")):
        if start.startswith(mark):
            return kind
    return describe(start)
