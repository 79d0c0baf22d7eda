"""What a dataset's reader is given: annotation files, a folder of media, and how both are read."""

from __future__ import annotations

import csv
import filecmp
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from vatt_engine.data.datasets.media_folder import AUDIO, IMAGES, VIDEO, MediaFolder, walk
from vatt_engine.data.rows import (
    ManifestError,
    check_keys,
    csv_cells,
    csv_rows,
    fault,
    first_line,
    opened,
    parse_json,
    seconds,
)
from vatt_engine.schema import nearest

T = TypeVar("T")
Row = tuple[int, dict[str, str]]
DELIMITERS = (",", ";", "\t")
SPLIT_WORDS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}  # of names and columns


class NotThere(ManifestError):
    """What a split is made from is not among the files: other splits may be imported all the same."""


class Watch(Protocol):
    """Is told how far a file, or a folder, has been read."""

    def __call__(self, what: Path, more: int, total: int | None) -> None:
        """`more` bytes of `total`, or more files of a folder, whose number nobody knows (None)."""


@dataclass(frozen=True)
class Source:
    """The annotation files of a dataset, its media, and what the user says about both.

    Args:
        dataset: its name, for messages.
        files: all annotation files; which of them are read, their names and contents decide.
        media: the folder of media.
        classes: the names of a class list of the user's.
        whole_videos: the files are the videos of which the annotations name parts, not those parts.
        asked: the splits that the user has named; none: whatever there is.
        watch: is told of bytes as they are read.
    """

    dataset: str
    files: tuple[Path, ...]
    media: MediaFolder
    classes: list[str] | None = None
    whole_videos: bool = False
    asked: tuple[str, ...] = ()
    watch: Watch | None = None
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, make: Callable[..., T], *args: Any) -> T:
        """`make(self, *args)`, made when it is first asked for: what several splits need is read once."""
        key = (make, args)
        if key not in self._made:
            self._made[key] = make(self, *args)
        return self._made[key]

    def file(self, *patterns: str) -> Path:
        """The one annotation file with such a name, in capitals or not."""
        found = self.all_files(*patterns)
        if len(found) != 1:
            raise self.lacks(f"one file {' or '.join(patterns)}", found)
        return found[0]

    def all_files(self, *patterns: str) -> list[Path]:
        """Those with such a name, packed by gzip or not; of copies that are the same byte for byte the first."""
        found: list[Path] = []
        for file in self.files:
            name = file.name.lower().removesuffix(".gz")
            if any(fnmatch(name, pattern.lower()) for pattern in patterns) and not _is_copy(file, found):
                found.append(file)
        return found

    def lacks(self, wanted: str, several: Iterable[Path] = (), hint: str = "") -> NotThere:
        """The error that a file is not among the annotations, or that several are and one must be named."""
        several = list(several)
        names = list(dict.fromkeys(str(file) if several else file.name for file in several or self.files))
        got = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        hint = "Name the one to read." if several else hint
        return NotThere(f"{self.dataset}: annotations must hold {wanted}, got {got or 'nothing'}. {hint}".rstrip())

    def opened(self, path: Path) -> AbstractContextManager[TextIO]:
        if first_line(path).startswith("version https://git-lfs"):
            text = "annotations must be the file itself, got a Git LFS pointer to it. Run `git lfs pull` there."
            raise ManifestError(f"{path}: {text}")
        watch, size = self.watch, path.stat().st_size if path.is_file() else 0
        return opened(path, "annotations", watch and (lambda count: watch(path, count, size)))

    def lines(self, path: Path) -> Iterator[tuple[int, str]]:
        """(line, text) of the lines that hold any, without white space around it."""
        with self.opened(path) as file:
            for line, text in enumerate(file, 1):
                if text := text.strip():
                    yield line, text

    def cells(self, path: Path, **dialect: Any) -> Iterator[tuple[int, list[str]]]:
        """(line, cells) of a CSV file, whose first row need not name the columns."""
        with self.opened(path) as file:
            yield from csv_cells(path, file, **dialect)

    def header(self, path: Path, delimiter: str = ",") -> list[str]:
        """The cells of the first line."""
        return [cell.strip() for cell in next(csv.reader([first_line(path)], delimiter=delimiter), [])]

    def table(self, path: Path, columns: Iterable[str]) -> Iterator[Row]:
        """(line, cells) of a CSV file that has these columns among others, behind `,`, `;` or tabs."""
        columns = list(columns)
        fits = (mark for mark in DELIMITERS if set(columns).issubset(self.header(path, mark)))
        with self.opened(path) as file:
            rows = csv_rows(path, file, columns, delimiter=next(fits, ","))
            line, names = next(rows, (1, {}))
            check_keys(path, line, "column ", names, None, columns)
            yield from rows

    def json(self, path: Path) -> Any:
        with self.opened(path) as file:
            return parse_json(path, 1, "the file", file.read())


def _is_copy(file: Path, others: Iterable[Path]) -> bool:
    return any(file.name == other.name and filecmp.cmp(file, other, shallow=False) for other in others)


def annotation_files(names: Iterable[str | Path]) -> tuple[Path, ...]:
    """The files that a user names, and those at any depth of the folders; neither media nor hidden files."""
    files: list[Path] = []
    for name in map(Path, names):
        if not name.is_dir():
            if not name.exists():
                raise ManifestError(f"{name}: annotations must be files or folders, got no such file.")
            files.append(name)
            continue
        for folder, entry in walk(name):
            suffix = entry.name.rpartition(".")[2].lower()
            if not entry.name.startswith(".") and suffix not in VIDEO + AUDIO + IMAGES:
                files.append(name / folder / entry.name)
    return tuple(sorted(dict.fromkeys(files), key=lambda file: (len(file.parts), file)))


def names_any(path: Path, words: Iterable[str]) -> bool:
    """Whether a word stands in a file's name, at the beginning of a word there: `val` in `k_val_list`."""
    return re.search(rf"(?<![a-z])(?:{'|'.join(words)})", path.name.lower()) is not None


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


def is_whole_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def whole_number(path: Path, line: int, field: str, text: str) -> int:
    if not is_whole_number(text):
        raise fault(path, line, field, f"be a whole number >= 0, got {text[:60]!r}")
    return int(text)


def class_number(path: Path, line: int, field: str, name: str, numbers: dict[str, int]) -> int:
    if name not in numbers:
        hint = nearest(name, numbers)
        text = f"be one of the {len(numbers)} classes, got {name[:60]!r}"
        raise fault(path, line, field, text, hint if hint.startswith("Did") else "")
    return numbers[name]
