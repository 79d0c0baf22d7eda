"""Lists of other tools, `path class` on each line: those of mmaction2, SlowFast, TSN and their like.

They have no header and many names. A list is known by its first line; which split it is of, its name says. Between path
and class there may be a number of frames, where the path is a folder of them. What the classes are called follows from
the folders, if over all lists each number has a folder of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vatt_engine.data.datasets.entries import Content, Entry
from vatt_engine.data.datasets.source import SPLIT_WORDS, Source, is_whole_number, names_any, whole_number
from vatt_engine.data.rows import fault, first_line

SUFFIXES = (".txt", ".csv", ".list", ".lst", "")
LAST_CELL = re.compile(r"^(.*?)[\s,;]+([^\s,;]+)$")


class ListRow(NamedTuple):
    """A line: what it calls its file, and a class number."""

    line: int
    name: str
    number: int


def looks_like_a_list(source: Source, path: Path) -> bool:
    suffixes = path.name.removesuffix(".gz").rpartition(".")
    if f".{suffixes[2]}".lower() not in SUFFIXES and suffixes[1]:
        return False
    found = LAST_CELL.match(first_line(path))
    return found is not None and is_whole_number(found[2]) and not is_whole_number(found[1])


def all_lists(source: Source) -> tuple[Path, ...]:
    """The annotation files that are such lists."""
    lists = [path for path in source.all_files("*") if looks_like_a_list(source, path)]
    return tuple(lists)


def list_of(source: Source, split: str, words: Iterable[str], wanted: str) -> Path:
    """The list of a split: the one whose name says so, or the only one, if the user asks for that split alone.

    Args:
        words: how names call the split.
        wanted: what there must be, for the message.
    """
    lists = source.once(all_lists)
    named = [path for path in lists if names_any(path, words)]
    hint = ""
    if not named and len(lists) == 1 and not _says_a_split(lists[0]):
        if source.asked == (split,):
            return lists[0]
        hint = "Say its split with --split."
    if len(named) != 1:
        raise source.lacks(wanted, named, hint)
    return named[0]


def _says_a_split(path: Path) -> bool:
    return any(names_any(path, words) for words in SPLIT_WORDS.values())


def list_rows(source: Source, path: Path) -> Iterator[ListRow]:
    """The rows of a list; its paths may hold spaces and commas."""
    numbers = source.once(_numbers_before_the_class, path)
    for line, text in source.lines(path):
        found = LAST_CELL.match(text)
        if found is None:
            raise fault(path, line, "the row", f"be a path and a class number, got {text[:60]!r}")
        number = whole_number(path, line, "the class number", found[2])
        name = found[1]
        for _ in range(numbers):
            shorter = LAST_CELL.match(name)
            name = shorter[1] if shorter else name
        yield ListRow(line, name, number)


def _numbers_before_the_class(source: Source, path: Path) -> int:
    """How many numbers stand between path and class: those of frames, which only a folder of frames has.

    A file's name with numbers behind it is another thing, several classes for instance, and refused.
    """
    fewest, most = 9, 0
    for line, text in source.lines(path):
        cells = re.split(r"[\s,;]+", text)
        count = 0
        while count < len(cells) - 2 and is_whole_number(cells[-2 - count]):
            count += 1
        before = cells[-2 - count] if len(cells) > 1 else ""
        if count and source.media.stem(before) != before.rpartition("/")[2]:
            text = f"be a path and one class number, got {text[:60]!r}"
            raise fault(path, line, "the row", text, "Lists of several classes per file are not read.")
        fewest, most = min(fewest, count), max(most, count)
    return fewest if fewest == most else 0


def list_names(source: Source) -> list[str] | None:
    """The user's class names, or the folders of the lists, if each class of 0 to n - 1 has one of its own."""
    if source.classes is not None:
        return source.classes
    folders: dict[int, str] = {}
    for path in source.once(all_lists):
        for row in list_rows(source, path):
            folder = row.name.rpartition("/")[0].rpartition("/")[2]
            if not folder or folders.setdefault(row.number, folder) != folder:
                return None
    if len(set(folders.values())) < len(folders) or sorted(folders) != list(range(len(folders))):
        return None
    return [folders[number] for number in range(len(folders))]


def list_content(source: Source, path: Path, more_stems: Callable[[str], Iterable[str]] = lambda stem: ()) -> Content:
    """The split that a list holds.

    Args:
        more_stems: other names that the file of a stem may have.
    """
    names = source.once(list_names)

    def entries() -> Iterator[Entry]:
        for line, name, number in list_rows(source, path):
            if names is not None and number >= len(names):
                raise fault(path, line, "the class number", f"be below {len(names)}, got {number}")
            stem = source.media.stem(name)
            folders = (*name.split("/")[:-1], *([] if names is None else [names[number]]))
            yield Entry(f"{path}:{line}", name, (stem, *more_stems(stem)), folders, number)

    return Content(names, entries())
