"""The reader of ImageNet: images in class folders, or flat ones whose classes a list knows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vatt_engine.data.datasets.entries import Content, Entry
from vatt_engine.data.datasets.lists import list_rows, looks_like_a_list
from vatt_engine.data.datasets.source import (
    SPLIT_WORDS,
    NotThere,
    Source,
    class_number,
    is_whole_number,
    names_any,
    whole_number,
)
from vatt_engine.data.rows import fault, first_line

WNID = re.compile(r"n\d{8}")
CLASS_LINE = re.compile(r"(n\d{8})(\s.*)?$")
KAGGLE_COLUMNS = ("ImageId", "PredictionString")
VAL_IMAGE = "ILSVRC2012_val_{:08d}"  # line i of a list without names is of image i
VAL_FILE = re.compile(r"ILSVRC2012_val_\d{8}")
TRUTH_HINT = "Give LOC_val_solution.csv, or the devkit's ground truth and meta.mat, with --annotations."


class Labelled(NamedTuple):
    """An image by its name, and its class: a wnid, or the number that a list gives."""

    at: str
    name: str
    wnid: str | None
    number: int | None


def imagenet(source: Source, split: str) -> Content:
    """`train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG` below the media folder; classes in the order of their wnids.

    Images of a split may also lie flat, if the annotations have a list of it: Kaggle's `LOC_val_solution.csv`, the
    devkit's `ILSVRC2012_validation_ground_truth.txt` with `meta.mat`, a file of one wnid per line, `path class` lists.
    """
    folders = source.once(_class_folders)
    path = _list_of(source, split)
    names = source.once(_class_names)
    if path is None and not folders.get(split):
        raise _nothing(source, split)
    numbers = {name: number for number, name in enumerate(names)}

    def placed() -> Iterator[Entry]:
        for image, wnid in folders[split]:
            yield Entry(image, image, (source.media.stem(image),), (split, wnid), numbers[wnid])

    def listed(path: Path) -> Iterator[Entry]:
        for at, name, wnid, number in _labelled(source, path):
            place, _, line = at.rpartition(":")
            if wnid is not None:
                number = class_number(Path(place), int(line), "the class", wnid, numbers)
            elif names and number >= len(names):
                raise fault(Path(place), int(line), "the class number", f"be below {len(names)}, got {number}")
            stems = (source.media.stem(name),)
            yield Entry(at, name, stems, (split, wnid) if wnid else (split,), number)

    return Content(names or None, placed() if path is None else listed(path))


def _class_folders(source: Source) -> dict[str, list[tuple[str, str]]]:
    """(path below the media folder, wnid) of the images whose class is known without a list, by split.

    The media folder may itself be that of a split. Training images have their wnid in their name too.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(source.media):
        parts = (source.media.root.resolve().name, *path.split("/"))
        wnid = WNID.match(parts[-1])
        if len(parts) > 2 and parts[-3] in ("train", "val"):
            found.setdefault(parts[-3], []).append((path, parts[-2]))
        elif parts[-2] == "train" and wnid:
            found.setdefault("train", []).append((path, wnid[0]))
    return found


def _class_names(source: Source) -> list[str]:
    """All wnids that folders and annotations know, sorted: of the whole set that is the order everybody uses."""
    if source.classes is not None:
        return source.classes
    names = {wnid for images in source.once(_class_folders).values() for _, wnid in images}
    for path in source.all_files("*.txt"):
        found = CLASS_LINE.match(first_line(path))
        if found and not names_any(path, SPLIT_WORDS["val"]):
            lines = [CLASS_LINE.match(text) for _, text in source.lines(path)]
            names.update(line[1] for line in lines if line)
    for split in ("train", "val"):
        path = _list_of(source, split)
        if path is not None:
            names.update(row.wnid for row in _labelled(source, path) if row.wnid)
    return sorted(names)


def _list_of(source: Source, split: str) -> Path | None:
    """The list of a split's images and classes, the surest kind first; None without one."""
    words = SPLIT_WORDS[split]
    tables, truths, synsets, lists = [], [], [], []
    for path in source.all_files("*.csv", "*.txt", "*.lst", "*.list"):
        if not names_any(path, words):
            continue
        first = first_line(path)
        if set(KAGGLE_COLUMNS).issubset(source.header(path)):
            tables.append(path)
        elif is_whole_number(first):
            truths.append(path)
        elif WNID.fullmatch(first):
            synsets.append(path)
        elif looks_like_a_list(source, path) and not _is_running(source, path):
            lists.append(path)
    for found in (tables, synsets, truths if split == "val" else [], lists):
        if len(found) > 1:
            raise source.lacks(f"one list of the split {split}", found)
        if found:
            return found[0]
    return None


def _is_running(source: Source, path: Path) -> bool:
    """Whether the numbers of a list only count its lines, as the challenge's `ImageSets` do: those are no classes."""
    return all(row.number == count for count, row in enumerate(list_rows(source, path), 1))


def _labelled(source: Source, path: Path) -> Iterator[Labelled]:
    """The images that a list knows."""
    first = first_line(path)
    if set(KAGGLE_COLUMNS).issubset(source.header(path)):
        for line, row in source.table(path, KAGGLE_COLUMNS):
            found = WNID.match(row["PredictionString"].strip())
            if found is None:
                text = f"begin with a wnid, got {row['PredictionString'][:60]!r}"
                raise fault(path, line, "PredictionString", text)
            yield Labelled(f"{path}:{line}", row["ImageId"].strip(), found[0], None)
    elif is_whole_number(first) or WNID.fullmatch(first):
        wnids = source.once(_devkit_wnids) if is_whole_number(first) else None
        for number, (line, text) in enumerate(source.lines(path), 1):
            wnid = text if wnids is None else wnids.get(whole_number(path, line, "the class", text))
            if wnid is None or not WNID.fullmatch(wnid):
                wanted = "a wnid" if wnids is None else "an ILSVRC2012_ID of meta.mat"
                raise fault(path, line, "the class", f"be {wanted}, got {text[:60]!r}")
            yield Labelled(f"{path}:{line}", VAL_IMAGE.format(number), wnid, None)
    else:
        for line, name, number in list_rows(source, path):
            found = WNID.search(name.rpartition("/")[0])
            yield Labelled(f"{path}:{line}", name, found and found[0], number)


def _devkit_wnids(source: Source) -> dict[int, str]:
    """wnids by ILSVRC2012_ID, which is another order than that of the wnids: only the devkit's `meta.mat` knows it."""
    if not source.all_files("meta.mat"):
        raise source.lacks("the devkit's meta.mat, which says what the numbers of its ground truth are")
    from scipy.io.matlab import MatReadError, loadmat

    path = source.file("meta.mat")
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except (MatReadError, NotImplementedError, ValueError, KeyError, TypeError, IndexError, OSError) as refusal:
        raise fault(path, 1, "the file", f"be that of the ILSVRC2012 devkit, got an error: {refusal}") from refusal


def _nothing(source: Source, split: str) -> NotThere:
    """The error that there are no images of a split whose class is known: it says what lies there instead."""
    folders = Counter(path.rpartition("/")[0] for path in source.media)
    split_folders = {folder for folder in folders if (folder or source.media.root.name).rpartition("/")[2] == split}
    shown = sorted(split_folders) or [folder for folder, _ in folders.most_common(3)]
    got = ", ".join(f"{folders[folder]:,} images in {folder or 'the folder'} itself" for folder in shown)
    flat_val = split == "val" and any(VAL_FILE.match(path.rpartition("/")[2]) for path in source.media)
    text = f"{source.media.root}: media must hold images in {split}/<wnid>/"
    return NotThere(f"{text}, got {got or 'no images'}. {TRUTH_HINT if flat_val else ''}".rstrip())
