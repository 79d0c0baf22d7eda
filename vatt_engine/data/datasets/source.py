"""What a dataset's reader is given (annotation files, a folder of media) and what it gives back (entries)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vatt_engine.data.manifest import Caption
from vatt_engine.data.rows import ManifestError, check_keys, csv_rows, fault, is_unicode, opened, seconds
from vatt_engine.schema import nearest

VIDEO = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "flv", "3gp", "ogv", "ts", "wmv")
AUDIO = ("wav", "flac", "ogg", "opus", "m4a", "mp3", "aac")
IMAGES = ("jpeg", "jpg", "png")


Row = tuple[int, dict[str, str]]


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


class MediaFolder:
    """The media files under a folder, found in one walk that asks the disk about folders only.

    Args:
        root: the folder; links to folders are followed.
        suffixes: of the files to see, the best first, in lower case.
    """

    def __init__(self, root: str | Path, suffixes: tuple[str, ...]):
        self.root, self.suffixes = Path(root), suffixes
        if not self.root.is_dir():
            raise ManifestError(f"{root}: media must be a folder, got {'a file' if self.root.exists() else 'nothing'}.")

    @cached_property
    def paths(self) -> dict[str, list[str]]:
        """Paths below the root, by the file's name without its suffix."""
        paths: dict[str, list[str]] = {}
        folders, seen = [""], set()
        while folders:
            folder = folders.pop()
            status = os.stat(self.root / folder)
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link into its own parent
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}{entry.name}"
                    if not is_unicode(path):
                        continue  # no manifest can name it
                    if entry.is_dir():
                        folders.append(f"{path}/")
                    elif (stem := self.stem(entry.name)) != entry.name:
                        paths.setdefault(stem, []).append(path)
        return paths

    def stem(self, name: str) -> str:
        """The last part of a path without its suffix, or two of them (`x.mp4.webm`)."""
        stem = name.rpartition("/")[2]
        for _ in range(2):
            head, _, suffix = stem.rpartition(".")
            stem = head if head and suffix.lower() in self.suffixes else stem
        return stem

    def find(self, entry: Entry, classes: frozenset[str]) -> str | None:
        """The file of an entry, below the root: that in the most of its folders, then of the best suffix.

        None lies in the folder of another class; `classes` are names as `plain` writes them.
        """
        wanted = {plain(folder) for folder in entry.folders}
        for stem in entry.stems:
            fits = []
            for path in self.paths.get(stem, ()):
                folders = [plain(folder) for folder in path.split("/")[:-1]]
                if wanted and folders and folders[-1] in classes and folders[-1] not in wanted:
                    continue
                suffix = self.suffixes.index(path.rpartition(".")[2].lower())
                fits.append((-len(wanted.intersection(folders)), suffix, path))
            if fits:
                return min(fits)[2]
        return None


@dataclass(frozen=True)
class Source:
    """The annotation files of a dataset, its media, and what the user says about both.

    `classes` are the names of a class list of the user's; `whole_videos`: the files are the videos of which the
    annotations name parts, not those parts.
    """

    dataset: str
    files: tuple[Path, ...]
    media: MediaFolder
    classes: list[str] | None = None
    whole_videos: bool = False

    def file(self, *patterns: str) -> Path:
        """The one annotation file with such a name, in capitals or not."""
        found = self.all_files(*patterns)
        if len(found) != 1:
            hint = " Name the one to read." if len(found) > 1 else ""
            raise self.lacks(f"one file {' or '.join(patterns)}", found or self.files, hint)
        return found[0]

    def all_files(self, *patterns: str) -> list[Path]:
        return [file for file in self.files if any(fnmatch(file.name.lower(), p.lower()) for p in patterns)]

    def lacks(self, wanted: str, got: Iterable[Path], hint: str = "") -> ManifestError:
        names = ", ".join(sorted(path.name for path in got)[:8]) or "nothing"
        return ManifestError(f"{self.dataset}: annotations must hold {wanted}, got {names}.{hint}")


def annotation_files(names: Iterable[str | Path]) -> tuple[Path, ...]:
    """The files, and those in the folders, that a user names."""
    paths = [Path(name) for name in names]
    return tuple(file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the lines that hold any, without white space around it."""
    with opened(path, "annotations") as file:
        for line, text in enumerate(file, 1):
            if text := text.strip():
                yield line, text


def table(path: Path, columns: Iterable[str], header: tuple[str, ...] = (), **dialect: Any) -> Iterator[Row]:
    """(line, cells) of a CSV file that must have these columns; its first row names them unless `header` does."""
    with opened(path, "annotations") as file:
        rows = csv_rows(path, file, header, **dialect)
        if not header:
            line, names = next(rows, (1, {}))
            check_keys(path, line, "column ", names, None, columns)
        yield from rows


def video_and_span(path: Path, line: int, row: dict[str, str], columns: Iterable[str]) -> tuple[str, float, float]:
    """The id of a video, and start and end in it, from the columns so called."""
    name, first, last = columns
    start, end = (seconds(path, line, key, row[key]) for key in (first, last))
    if end <= start:
        raise fault(path, line, last, f"be later than {first} ({start:g}), got {end:g}", "Are they swapped?")
    if not (video := row[name].strip()):
        raise fault(path, line, name, "be given, got nothing")
    return video, start, end


def numbered(path: Path, rows: Iterable[tuple[int, str, str]]) -> dict[str, int]:
    """Class numbers by name from (line, number, name); together the numbers must be 0 to n - 1."""
    numbers: dict[str, int] = {}
    lines: dict[int, int] = {}
    for line, number, name in rows:
        value = whole_number(path, line, "the class number", number)
        if name in numbers or value in lines:
            raise fault(path, line, "the class", f"be given once, got {name!r} with the number {value} again")
        numbers[name] = value
        lines[value] = line
    for expected, value in enumerate(sorted(lines)):
        if value != expected:
            raise fault(path, lines[value], "the class numbers", f"leave none out, got {value} but no {expected}")
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def whole_number(path: Path, line: int, field: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise fault(path, line, field, f"be a whole number >= 0, got {text[:60]!r}")
    return int(text)


def class_number(path: Path, line: int, field: str, name: str, numbers: dict[str, int]) -> int:
    if name not in numbers:
        hint = nearest(name, numbers)
        text = f"be one of the {len(numbers)} classes, got {name[:60]!r}"
        raise fault(path, line, field, text, hint if hint.startswith("Did") else "")
    return numbers[name]


def plain(name: str) -> str:
    """A class name as folders spell it in many ways: `hurling (sport)`, `hurling_(sport)`."""
    return re.sub(r"[\W_]", "", name.lower())
