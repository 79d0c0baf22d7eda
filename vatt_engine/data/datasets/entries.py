"""What the reader of a dataset gives back: the rows of a split, and the names of its classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vatt_engine.data.manifest import Caption


class Entry(NamedTuple):
    """A row of the annotations.

    `at` is where it stands; `name` what it calls its file; `stems` what that may be called on disk without its suffix,
    the surest first; `folders` those it should lie in, of which the last is its class.
    """

    at: str
    name: str
    stems: Iterable[str]
    folders: tuple[str, ...] = ()
    label: int | tuple[int, ...] | None = None
    captions: tuple[Caption, ...] = ()
    start: float = 0.0
    end: float | None = None


class LeftOut(NamedTuple):
    """Something that the manifest does not hold, and why."""

    at: str
    name: str
    reason: str


class Content(NamedTuple):
    """A split: its entries, read as they are asked for, and the names of the classes where it has numbers."""

    classes: list[str] | None
    entries: Iterator[Entry | LeftOut]
