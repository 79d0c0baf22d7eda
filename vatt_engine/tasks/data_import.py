"""`vatt data import NAME`: manifests of a known dataset from its annotation files and a folder of its media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vatt_engine.data.datasets import DATASETS, Imported, import_dataset
from vatt_engine.schema import PathText
from vatt_engine.tasks.flags import parse_flags
from vatt_engine.tasks.progress import Reading
from vatt_engine.tasks.results import check_writable

Name = Literal[tuple(DATASETS)]


@dataclass(frozen=True, kw_only=True)
class DataImportConfig:
    """Reads a dataset's annotation files as they are distributed, and looks for its media at any depth of a folder.

    Writes OUT/SPLIT.jsonl, a manifest; OUT/SPLIT.missing.jsonl, what is not in it and why; and OUT/classes.txt, the
    name of class i on line i + 1, where the labels are numbers with names.

    Args:
        name: the dataset.
        media: the folder of its media files.
        out: the folder for the manifests.
        annotations: its annotation files, or folders that hold them at any depth.
        split: the splits to import, all of which must be there; those that are there if none is named.
        classes: a class list, one name per line, for Kinetics files that do not name every class.
        whole_videos: the files of AudioSet or Kinetics are whole videos; samples are the annotated parts of them.
    """

    name: Name
    media: PathText
    out: PathText
    annotations: tuple[PathText, ...] = ()
    split: tuple[str, ...] = ()
    classes: PathText | None = None
    whole_videos: bool = False


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(usage())
    config = parse_flags(DataImportConfig, argv, prog="vatt data import", positional=("name",))
    check_writable(config.out, "vatt data import")
    with Reading() as reading:
        splits = import_dataset(
            config.name,
            media=config.media,
            out=config.out,
            annotations=config.annotations,
            splits=config.split,
            classes=config.classes,
            whole_videos=config.whole_videos,
            watch=reading,
        )
        for split in splits:
            reading.say(_described(split, config.name))
    return 0


def usage() -> str:
    """The datasets, a line each: annotation files and splits."""
    width = max(map(len, DATASETS))
    rows = ((name, dataset.files, ", ".join(dataset.splits)) for name, dataset in DATASETS.items())
    lines = (f"  {name:<{width}}  {files}  [{splits}]" for name, files, splits in rows)
    return "\n".join(["NAME, its annotation files and its splits:", *lines, ""])


def _described(split: Imported, name: str) -> str:
    """What became of a split, a line for each thing to know."""
    if split.absent:
        return f"{split.split} is not imported: {split.absent}"
    lines = [f"{split.manifest}: {split.num_samples} samples" + _classes(split, DATASETS[name].num_classes)]
    lines += [f"{split.missing}: {count} left out, {reason}" for reason, count in split.left_out.items()]
    return "\n".join(lines)


def _classes(split: Imported, expected: int | None) -> str:
    if expected is not None and not split.labelled:
        return " without labels"
    if split.num_classes is None or split.num_classes == expected:
        return "" if split.num_classes is None else f" of {expected} classes"
    return f" of {split.num_classes} classes (not {expected}: are all annotation files there?)"
