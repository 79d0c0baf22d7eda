"""Readers of action and image sets, one class per file: Kinetics, Moments in Time, UCF101, HMDB51, ImageNet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vatt_engine.data.datasets.source import (
    Content,
    Entry,
    Source,
    class_number,
    numbered,
    table,
    text_lines,
    video_and_span,
    whole_number,
)
from vatt_engine.data.rows import fault

KINETICS_SPLITS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
HANDSTAND = ("HandStand", "Handstand")  # UCF101's lists, class index and files do not agree


def kinetics(source: Source, split: str) -> Content:
    """CSV `label,youtube_id,time_start,time_end,split[,is_cc]` (a test set may have no labels), or `path label` lists.

    Classes are numbered in alphabetical order, over all the files given.
    """
    files = source.all_files("*.csv", "*.txt", "*.list")
    tables = [file for file in files if "youtube_id" in next(text_lines(file), (1, ""))[1]]
    if not tables:
        return _path_label_list(source, files, split)
    columns = ("youtube_id", "time_start", "time_end", "split")

    def rows() -> Iterator[tuple[Path, int, dict[str, str]]]:
        return ((path, line, row) for path in tables for line, row in table(path, columns))

    names = source.classes or sorted({row["label"] for _, _, row in rows() if row.get("label")})
    numbers = {name: number for number, name in enumerate(names)}

    def entries() -> Iterator[Entry]:
        for path, line, row in rows():
            if row["split"].strip() in KINETICS_SPLITS[split]:
                video, start, end = video_and_span(path, line, row, columns[:3])
                label = row.get("label") or None
                number = class_number(path, line, "label", label, numbers) if label else None
                s, e = int(start), int(end)
                stems = (f"{video}_{s:06d}_{e:06d}", f"{video}_{s}_{e}", video)
                entry = Entry(f"{path}:{line}", stems[0], stems, (split, label) if label else (split,), number)
                yield entry._replace(stems=(video,), start=start, end=end) if source.whole_videos else entry

    return Content(names or None, entries())


def _path_label_list(source: Source, lists: list[Path], split: str) -> Content:
    """`path label` on each line; the file with the split in its name, or the only one."""
    if len(lists) > 1:
        lists = [file for file in lists if split in file.name.lower()]
    if len(lists) != 1:
        raise source.lacks(f"a CSV with a column youtube_id, or one list of the split {split}", source.files)
    path, classes = lists[0], source.classes

    def entries() -> Iterator[Entry]:
        for line, text in text_lines(path):
            last = text.replace(",", " ").replace(";", " ").split()[-1:]
            name = text[: -len("".join(last))].rstrip(" \t,;")
            if not last or not name:
                raise fault(path, line, "the row", f"be a path and a class number, got {text[:60]!r}")
            number = whole_number(path, line, "the class number", last[0])
            if classes is not None and number >= len(classes):
                raise fault(path, line, "the class number", f"be below {len(classes)}, got {number}")
            stems = (source.media.stem(name),)
            yield Entry(f"{path}:{line}", name, stems, tuple(name.split("/")[:-1]), number)

    return Content(classes, entries())


def moments(source: Source, split: str) -> Content:
    """`trainingSet.csv` or `validationSet.csv` (file, class, votes for and against) and `moments_categories.txt`."""
    kind = {"train": "training", "val": "validation"}[split]
    path, names = source.file(f"{kind}Set.csv"), source.file("moments_categories.txt")
    pairs = ((line, *text.rpartition(",")) for line, text in text_lines(names))
    numbers = numbered(names, ((line, number.strip(), name) for line, name, _, number in pairs))

    def entries() -> Iterator[Entry]:
        for line, row in table(path, (), ("filename", "label", "positive", "negative")):
            number = class_number(path, line, "label", row["label"], numbers)
            stems = (source.media.stem(row["filename"]),)
            yield Entry(f"{path}:{line}", row["filename"], stems, (kind, row["label"]), number)

    return Content(list(numbers), entries())


def ucf101(source: Source, split: str) -> Content:
    """`trainlist0N.txt` (`Class/file.avi 1`) or `testlist0N.txt` (`Class/file.avi`), and `classInd.txt` from 1."""
    path, names = source.file(f"{split[:-1]}list0{split[-1]}.txt"), source.file("classInd.txt")
    numbers = numbered(names, _ucf_classes(names))

    def entries() -> Iterator[Entry]:
        for line, text in text_lines(path):
            name, _, given = text.partition(" ")
            folder = name.rpartition("/")[0].replace(*HANDSTAND)
            number = class_number(path, line, "the class", folder, numbers)
            if given and whole_number(path, line, "the class number", given.strip()) != number + 1:
                raise fault(path, line, "the class number", f"be {number + 1} for {folder}, got {given.strip()}")
            stem = source.media.stem(name)
            stems = (stem, stem.replace(*HANDSTAND), stem.replace(*reversed(HANDSTAND)))
            yield Entry(f"{path}:{line}", name, stems, (folder,), number)

    return Content(list(numbers), entries())


def _ucf_classes(path: Path) -> Iterator[tuple[int, str, str]]:
    for line, text in text_lines(path):
        number, _, name = text.partition(" ")
        yield line, str(whole_number(path, line, "the class number", number) - 1), name.strip().replace(*HANDSTAND)


def hmdb51(source: Source, split: str) -> Content:
    """`<class>_test_splitN.txt`, a file per class: `file.avi 1` to train, 2 to test, 0 for neither."""
    ending, wanted = f"_test_split{split[-1]}.txt", "1" if split.startswith("train") else "2"
    files = {file.name.removesuffix(ending): file for file in source.all_files(f"*{ending}")}
    if not files:
        raise source.lacks(f"files <class>{ending}", source.files)

    def entries() -> Iterator[Entry]:
        for number, (name, path) in enumerate(sorted(files.items())):
            for line, text in text_lines(path):
                file, _, use = text.rpartition(" ")
                if use not in ("0", "1", "2") or not file:
                    raise fault(path, line, "the row", f"be a file and 0, 1 or 2, got {text[:60]!r}")
                if use == wanted:
                    yield Entry(f"{path}:{line}", file, (source.media.stem(file.strip()),), (name,), number)

    return Content(sorted(files), entries())


def imagenet(source: Source, split: str) -> Content:
    """`train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG` below the media folder; classes in the order of their wnids."""
    images = sorted(path for paths in source.media.paths.values() for path in paths)
    placed = [(path, path.split("/")) for path in images if path.count("/") >= 2]
    names = sorted({parts[-2] for _, parts in placed if parts[-3] in ("train", "val")})
    numbers = {name: number for number, name in enumerate(names)}

    def entries() -> Iterator[Entry]:
        for path, parts in placed:
            if parts[-3] == split:
                stems = (source.media.stem(parts[-1]),)
                yield Entry(path, path, stems, (split, parts[-2]), numbers[parts[-2]])

    return Content(names or None, entries())
