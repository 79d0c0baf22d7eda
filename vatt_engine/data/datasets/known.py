"""The known datasets by name, and how their annotations and a folder of media become a manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from vatt_engine.data.datasets.actions import hmdb51, imagenet, kinetics, moments, ucf101
from vatt_engine.data.datasets.captioned import howto100m, msrvtt, youcook2
from vatt_engine.data.datasets.sounds import audioset, esc50
from vatt_engine.data.datasets.source import (
    AUDIO,
    IMAGES,
    VIDEO,
    Content,
    LeftOut,
    MediaFolder,
    Source,
    annotation_files,
    plain,
    text_lines,
)
from vatt_engine.data.manifest import Sample, write_manifest
from vatt_engine.data.rows import ManifestError

MISSING, REPEATED = "no file", "a file that an earlier row names"


class Dataset(NamedTuple):
    """A dataset: its reader, its splits, the suffixes of its media, how many classes it has, its annotation files."""

    read: Callable[[Source, str], Content]
    splits: tuple[str, ...]
    suffixes: tuple[str, ...]
    num_classes: int | None
    files: str


def _folds(count: int) -> tuple[str, ...]:
    return tuple(f"{name}{fold}" for fold in range(1, count + 1) for name in ("train", "test"))


TRAIN_VAL, TRAIN_VAL_TEST = ("train", "val"), ("train", "val", "test")
AUDIOSET = ("balanced_train", "unbalanced_train", "eval")
MSRVTT = ("train9k", "test1k", "train7k", *TRAIN_VAL_TEST)
KINETICS = "train.csv, val.csv, test.csv, or `path label` lists"
DATASETS = {
    "howto100m": Dataset(howto100m, ("train",), VIDEO, None, "HowTo100M_v1.csv; caption.json or raw_caption.json"),
    "audioset": Dataset(audioset, AUDIOSET, VIDEO + AUDIO, 527, "<split>_segments.csv; class_labels_indices.csv"),
    "kinetics400": Dataset(kinetics, TRAIN_VAL_TEST, VIDEO, 400, KINETICS),
    "kinetics600": Dataset(kinetics, TRAIN_VAL_TEST, VIDEO, 600, KINETICS),
    "kinetics700": Dataset(kinetics, TRAIN_VAL_TEST, VIDEO, 700, KINETICS),
    "moments": Dataset(moments, TRAIN_VAL, VIDEO, 339, "<training, validation>Set.csv; moments_categories.txt"),
    "ucf101": Dataset(ucf101, _folds(3), VIDEO, 101, "trainlist0N.txt, testlist0N.txt; classInd.txt"),
    "hmdb51": Dataset(hmdb51, _folds(3), VIDEO, 51, "<class>_test_splitN.txt"),
    "esc50": Dataset(esc50, _folds(5), AUDIO, 50, "esc50.csv"),
    "youcook2": Dataset(youcook2, TRAIN_VAL, VIDEO, None, "youcookii_annotations_trainval.json"),
    "msrvtt": Dataset(msrvtt, MSRVTT, VIDEO, None, "MSRVTT_data.json; MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv"),
    "imagenet": Dataset(imagenet, TRAIN_VAL, IMAGES, 1000, "no files: train/<wnid>/ and val/<wnid>/ in --media"),
}


@dataclass
class Imported:
    """A manifest that was written, and what is not in it.

    `left_out` counts by reason the rows of `missing`, a JSONL file of where each stands, its name and the reason.
    """

    split: str
    manifest: Path
    missing: Path
    num_samples: int = 0
    num_classes: int | None = None
    left_out: Counter[str] = field(default_factory=Counter)


def import_dataset(
    name: str,
    *,
    media: str | Path,
    out: str | Path,
    annotations: Iterable[str | Path] = (),
    splits: Iterable[str] = (),
    classes: str | Path | None = None,
    whole_videos: bool = False,
) -> Iterator[Imported]:
    """Write OUT/<split>.jsonl, OUT/<split>.missing.jsonl and, where labels are numbers with names, OUT/classes.txt.

    Args:
        name: one of DATASETS.
        media: the folder that holds the files, at any depth.
        out: the folder for the manifests.
        annotations: the annotation files, or folders of them.
        splits: of the dataset; all of them if none is named.
        classes: a class list, one name per line, for Kinetics files that do not name all classes.
        whole_videos: AudioSet's and Kinetics' files are whole videos, and the samples parts of them.

    Raises:
        ManifestError: with `file:line:`, or with the record where a JSON file has no lines to speak of; no annotation
            file of the right name, an unknown split, none of a split's files exists, or another class list in `out`.

    >>> list(import_dataset("esc50", annotations=["meta"], media="audio", out="esc50"))  # doctest: +SKIP
    """
    dataset, out = DATASETS[name], Path(out)
    for split in (splits := tuple(splits) or dataset.splits):
        if split not in dataset.splits:
            raise ManifestError(f"{name}: split must be one of {', '.join(dataset.splits)}, got {split!r}.")
    names = None if classes is None else [text for _, text in text_lines(Path(classes))]
    source = Source(name, annotation_files(annotations), MediaFolder(media, dataset.suffixes), names, whole_videos)
    for split in splits:
        content = dataset.read(source, split)
        out.mkdir(parents=True, exist_ok=True)
        if content.classes is not None:
            _write_classes(out / "classes.txt", content.classes)
        result = Imported(split, out / f"{split}.jsonl", out / f"{split}.missing.jsonl")
        result.num_classes = None if content.classes is None else len(content.classes)
        with result.missing.open("w") as missing:
            write_manifest(result.manifest, _samples(source, content, result, missing))
        yield result


def _samples(source: Source, content: Content, result: Imported, missing: TextIO) -> Iterator[Sample]:
    """The entries that have a file of their own; the rest goes to `missing`."""
    classes, seen, absent = frozenset(map(plain, content.classes or ())), set(), ""
    for entry in content.entries:
        reason = entry.reason if isinstance(entry, LeftOut) else ""
        if not reason:
            path = source.media.find(entry, classes)
            part = (path, entry.start, entry.end)
            reason = MISSING if path is None else REPEATED if part in seen else ""
            seen.add(part)
        if reason:
            absent = absent or entry.name
            result.left_out[reason] += 1
            missing.write(json.dumps({"at": entry.at, "name": entry.name, "reason": reason}) + "\n")
        else:
            media = source.media.root / path
            yield Sample(result.num_samples, 0, media, entry.captions, entry.label, 0, entry.start, entry.end)
            result.num_samples += 1
    if not (result.num_samples or absent):
        raise ManifestError(f"{source.dataset}: annotations must hold rows of {result.split}, got none.")
    if not result.num_samples:
        text = f"got none of {result.left_out[MISSING]} (the first is {absent!r})"
        raise ManifestError(f"{source.media.root}: media must hold files of {source.dataset} {result.split}, {text}.")


def _write_classes(path: Path, names: list[str]) -> None:
    text = "".join(f"{name}\n" for name in names)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        hint = "Give all annotation files at once, or --classes with the full list, or another --out."
        raise ManifestError(f"{path}: the class list must be that of this import, got another one. {hint}")
    path.write_text(text, encoding="utf-8")
