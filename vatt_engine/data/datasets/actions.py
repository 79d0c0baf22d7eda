"""Readers of action sets, one class per file: Kinetics, Moments in Time, UCF101, HMDB51."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vatt_engine.data.datasets.entries import Content, Entry
from vatt_engine.data.datasets.lists import all_lists, list_content, list_of
from vatt_engine.data.datasets.source import (
    SPLIT_WORDS,
    Source,
    class_number,
    names_any,
    numbered,
    video_and_span,
    whole_number,
)
from vatt_engine.data.rows import fault, first_line

KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
HANDSTAND = ("HandStand", "Handstand")  # UCF101's lists, class index and files do not agree
UCF_FILE = re.compile(r"v_(\w+)_g\d+_c\d+")


def kinetics(source: Source, split: str) -> Content:
    """CSV `label,youtube_id,time_start,time_end,split[,is_cc]` (a test set may have no labels), or `path label` lists.

    Classes are numbered in alphabetical order, over all the files given. Where there is no column `split`, the name of
    the file says it.
    """
    tables = source.once(_kinetics_tables)
    if not tables:
        wanted = f"a CSV with a column youtube_id, or one `path label` list of the split {split}"
        return list_content(source, list_of(source, split, SPLIT_WORDS[split], wanted))
    names = source.once(_kinetics_classes)
    numbers = {name: number for number, name in enumerate(names)}

    def entries() -> Iterator[Entry]:
        for path in tables:
            for line, row in source.table(path, KINETICS_COLUMNS):
                if not _is_of_split(path, row.get("split"), split):
                    continue
                video, start, end = video_and_span(path, line, row, KINETICS_COLUMNS)
                label = row.get("label") or None
                number = class_number(path, line, "label", label, numbers) if label else None
                s, e = int(start), int(end)
                stems = (f"{video}_{s:06d}_{e:06d}", f"{video}_{s}_{e}", video)
                entry = Entry(f"{path}:{line}", stems[0], stems, (split, label) if label else (split,), number)
                yield entry._replace(stems=(video,), start=start, end=end) if source.whole_videos else entry

    return Content(names or None, entries())


def _kinetics_tables(source: Source) -> tuple[Path, ...]:
    files = source.all_files("*.csv", "*.txt", "*.list", "*.tsv")
    return tuple(file for file in files if "youtube_id" in first_line(file))


def _kinetics_classes(source: Source) -> list[str]:
    if source.classes is not None:
        return source.classes
    rows = (row for path in source.once(_kinetics_tables) for _, row in source.table(path, KINETICS_COLUMNS))
    return sorted({row["label"] for row in rows if row.get("label")})


def _is_of_split(path: Path, given: str | None, split: str) -> bool:
    words = SPLIT_WORDS[split]
    return names_any(path, words) if given is None else given.strip() in words


def moments(source: Source, split: str) -> Content:
    """`trainingSet.csv` or `validationSet.csv` (file, class, votes for and against) and `moments_categories.txt`.

    Of a row the first two cells are needed. mmaction2's lists are read where these files are not.
    """
    kind = {"train": "training", "val": "validation"}[split]
    if not source.all_files(f"{kind}Set.csv") and source.once(all_lists):
        wanted = f"{kind}Set.csv, or one `path label` list of the split {split}"
        return list_content(source, list_of(source, split, SPLIT_WORDS[split], wanted))
    path, names = source.file(f"{kind}Set.csv"), source.file("moments_categories.txt")
    pairs = ((line, *text.rpartition(",")) for line, text in source.lines(names))
    numbers = numbered(names, ((line, number.strip(), name) for line, name, _, number in pairs))

    def entries() -> Iterator[Entry]:
        for line, cells in source.cells(path):
            if len(cells) < 2:
                raise fault(path, line, "the row", f"have a file and a class, got {','.join(cells)[:60]!r}")
            name, label = cells[0].strip(), cells[1].strip()
            if line == 1 and label not in numbers and source.media.stem(name) == name:
                continue  # a header, which names no file
            number = class_number(path, line, "label", label, numbers)
            yield Entry(f"{path}:{line}", name, (source.media.stem(name),), (kind, label), number)

    return Content(list(numbers), entries())


def ucf101(source: Source, split: str) -> Content:
    """`trainlist0N.txt` (`Class/file.avi 1`) or `testlist0N.txt` (`Class/file.avi`), and `classInd.txt` from 1.

    Copies that number the test lists too, that count from 0 or that leave the folder out are read; where there are
    none, mmaction2's lists of the split.
    """
    name = f"{split[:-1]}list0{split[-1]}.txt"
    if not source.all_files(name) and source.once(all_lists):
        wanted = f"{name}, or one list like ucf101_{split[:-1]}_split_{split[-1]}_videos.txt"
        return list_content(source, list_of(source, split, (_fold_list(split),), wanted), _both_handstands)
    path, names = source.file(name), source.file("classInd.txt")
    numbers = source.once(_ucf_classes, names)

    def entries() -> Iterator[Entry]:
        first = None  # the number of the first class in this list
        for line, text in source.lines(path):
            name, _, given = text.partition(" ")
            found = UCF_FILE.search(name)
            folder = name.rpartition("/")[0] or (found[1] if found else "")
            folder = folder.replace(*HANDSTAND)
            number = class_number(path, line, "the class", folder, numbers)
            if given:
                value = whole_number(path, line, "the class number", given.strip())
                first = int(value != number) if first is None else first
                if value != number + first:
                    raise fault(path, line, "the class number", f"be {number + first} for {folder}, got {value}")
            stem = source.media.stem(name)
            yield Entry(f"{path}:{line}", name, (stem, *_both_handstands(stem)), (folder,), number)

    return Content(list(numbers), entries())


def _both_handstands(stem: str) -> tuple[str, str]:
    return stem.replace(*HANDSTAND), stem.replace(*reversed(HANDSTAND))


def _ucf_classes(source: Source, path: Path) -> dict[str, int]:
    def rows() -> Iterator[tuple[int, str, str]]:
        for line, text in source.lines(path):
            number, _, name = text.partition(" ")
            value = whole_number(path, line, "the class number", number)
            yield line, str(value - 1), name.strip().replace(*HANDSTAND)

    return numbered(path, rows())


def _fold_list(split: str) -> str:
    """How the names of lists call a fold, as a regular expression; mmaction2 calls the test files `val`."""
    kind = "train" if split.startswith("train") else "(?:val|test)"
    return rf"{kind}_?split_?{split[-1]}(?!\d)"


def hmdb51(source: Source, split: str) -> Content:
    """`<class>_test_splitN.txt`, a file per class: `file.avi 1` to train, 2 to test, 0 for neither.

    Where there are none, mmaction2's lists of the split are read.
    """
    ending, wanted = f"_test_split{split[-1]}.txt", "1" if split.startswith("train") else "2"
    found = source.all_files(f"*{ending}")
    if not found:
        lists = f"files <class>{ending}, or one list like hmdb51_{split[:-1]}_split_{split[-1]}_videos.txt"
        return list_content(source, list_of(source, split, (_fold_list(split),), lists))
    files = {file.name.lower().removesuffix(".gz").removesuffix(ending): file for file in found}
    if len(files) < len(found):
        raise source.lacks(f"one file <class>{ending} per class", found)

    def entries() -> Iterator[Entry]:
        for number, (name, path) in enumerate(sorted(files.items())):
            for line, text in source.lines(path):
                file, _, use = text.rpartition(" ")
                if use not in ("0", "1", "2") or not file:
                    raise fault(path, line, "the row", f"be a file and 0, 1 or 2, got {text[:60]!r}")
                if use == wanted:
                    yield Entry(f"{path}:{line}", file, (source.media.stem(file.strip()),), (name,), number)

    return Content(sorted(files), entries())
