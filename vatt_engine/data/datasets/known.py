"""The known datasets by name, and how their annotations and a folder of media become a manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from vatt_engine.data.datasets.actions import hmdb51, kinetics, moments, ucf101
from vatt_engine.data.datasets.captioned import howto100m, youcook2
from vatt_engine.data.datasets.entries import Content, Entry, LeftOut
from vatt_engine.data.datasets.images import imagenet
from vatt_engine.data.datasets.media_folder import AUDIO, IMAGES, VIDEO, MediaFolder, plain_names
from vatt_engine.data.datasets.msrvtt import msrvtt
from vatt_engine.data.datasets.sounds import audioset, esc50
from vatt_engine.data.datasets.source import NotThere, Source, Watch, annotation_files
from vatt_engine.data.manifest import Sample, write_manifest
from vatt_engine.data.rows import ManifestError, opened
from vatt_engine.refusals import Refusals

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
KINETICS_FILES = "train.csv, val.csv, test.csv, or `path label` lists"
MSRVTT_FILES = "MSRVTT_data.json, or *_videodatainfo.json; MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv"
IMAGENET_FILES = "none for train/<wnid>/ and val/<wnid>/ in --media; LOC_val_solution.csv, ... for a flat val/"
DATASETS = {
    "howto100m": Dataset(howto100m, ("train",), VIDEO, None, "HowTo100M_v1.csv; caption.json or raw_caption.json"),
    "audioset": Dataset(audioset, AUDIOSET, VIDEO + AUDIO, 527, "<split>_segments.csv; class_labels_indices.csv"),
    "kinetics400": Dataset(kinetics, TRAIN_VAL_TEST, VIDEO, 400, KINETICS_FILES),
    "kinetics600": Dataset(kinetics, TRAIN_VAL_TEST, VIDEO, 600, KINETICS_FILES),
    "kinetics700": Dataset(kinetics, TRAIN_VAL_TEST, VIDEO, 700, KINETICS_FILES),
    "moments": Dataset(moments, TRAIN_VAL, VIDEO, 339, "<training, validation>Set.csv; moments_categories.txt"),
    "ucf101": Dataset(ucf101, _folds(3), VIDEO, 101, "trainlist0N.txt, testlist0N.txt; classInd.txt"),
    "hmdb51": Dataset(hmdb51, _folds(3), VIDEO, 51, "<class>_test_splitN.txt"),
    "esc50": Dataset(esc50, _folds(5), AUDIO, 50, "esc50.csv"),
    "youcook2": Dataset(youcook2, TRAIN_VAL, VIDEO, None, "youcookii_annotations_trainval.json"),
    "msrvtt": Dataset(msrvtt, MSRVTT, VIDEO, None, MSRVTT_FILES),
    "imagenet": Dataset(imagenet, TRAIN_VAL, IMAGES, 1000, IMAGENET_FILES),
}


@dataclass
class Imported:
    """A split: the manifest that was written and what is not in it, or why there is none.

    Args:
        split: its name.
        manifest: JSONL, the samples.
        missing: JSONL, what the annotations name and the manifest does not hold: where it stands, its name, the reason.
        absent: why nothing was imported; empty where something was.
        num_samples: rows of the manifest.
        num_classes: None where the samples have no labels, or their classes no names.
        labelled: whether any sample has a label.
        left_out: rows of `missing`, counted by reason.
    """

    split: str
    manifest: Path
    missing: Path
    absent: str = ""
    num_samples: int = 0
    num_classes: int | None = None
    labelled: bool = False
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
    watch: Watch | None = None,
) -> Iterator[Imported]:
    """Write OUT/<split>.jsonl, OUT/<split>.missing.jsonl and, where labels are numbers with names, OUT/classes.txt.

    Args:
        name: one of DATASETS.
        media: the folder that holds the files, at any depth.
        out: the folder for the manifests.
        annotations: the annotation files, or folders that hold them at any depth.
        splits: of the dataset, all of which must be there; none: those that are there.
        classes: a class list, one name per line, for Kinetics files that do not name all classes.
        whole_videos: AudioSet's and Kinetics' files are whole videos, and the samples parts of them.
        watch: is told of the bytes and files that are read.

    Raises:
        ManifestError: all that the arguments lack, at once; nothing is there at all; or, when the other splits are
            written, what is wrong with the rest: a file, with `file:line:`, or with the record where a JSON file has no
            lines to speak of; another class list in `out`; of splits that were named no rows or no media.

    >>> list(import_dataset("esc50", annotations=["meta"], media="audio", out="esc50"))  # doctest: +SKIP
    """
    source = _source(name, media, annotations, tuple(splits), classes, whole_videos, watch)
    contents = _contents(source)
    Path(out).mkdir(parents=True, exist_ok=True)
    absent, faults = [], []
    for split, content in contents.items():
        result = Imported(split, Path(out, f"{split}.jsonl"), Path(out, f"{split}.missing.jsonl"))
        try:
            if isinstance(content, ManifestError):
                raise content
            _write(source, content, result)
        except NotThere as refusal:
            result.absent = str(refusal)
            absent.append(result)
        except ManifestError as refusal:
            faults.append(str(refusal))
        else:
            yield result
    if source.asked or len(absent) == len(contents):
        faults += [result.absent for result in absent]
        absent = []
    yield from absent
    _refuse(faults, ManifestError)


def _refuse(texts: Iterable[str], kind: type[ManifestError]) -> None:
    """Raise one error with what is wrong with several splits, if anything is; ten folds are not told one by one."""
    texts = list(dict.fromkeys(texts))
    if texts:
        more = [f"... and {len(texts) - 3} more of the kind"] if len(texts) > 3 else []
        raise kind("\n".join([*texts[:3], *more]))


def _source(
    name: str,
    media: str | Path,
    annotations: Iterable[str | Path],
    splits: tuple[str, ...],
    classes: str | Path | None,
    whole_videos: bool,
    watch: Watch | None,
) -> Source:
    """What the arguments name; all that is wrong with them is told at once."""
    dataset, refusals = DATASETS[name], Refusals()
    for split in splits:
        if split not in dataset.splits:
            refusals.add(f"{name}: split must be one of {', '.join(dataset.splits)}, got {split!r}.")
    names = refusals.of(_class_list, classes) if classes is not None else None
    files = [refusals.of(annotation_files, [path]) for path in annotations]
    count = watch and _count_files(Path(media), watch)
    folder = refusals.of(MediaFolder, media, dataset.suffixes, count)
    refusals.settle(ManifestError)
    files = tuple(dict.fromkeys(file for found in files for file in found))
    return Source(name, files, folder, names, whole_videos, splits, watch)


def _class_list(path: str | Path) -> list[str]:
    with opened(Path(path), "classes") as file:
        return [text.strip() for text in file if text.strip()]


def _count_files(media: Path, watch: Watch) -> Callable[[int], None]:
    """From the number of files found so far to the number of new ones."""
    told = 0

    def count(total: int) -> None:
        nonlocal told
        watch(media, total - told, None)
        told = total

    return count


def _contents(source: Source) -> dict[str, Content | ManifestError]:
    """The splits to import, or why one cannot be. Those the user has named must all have their files."""
    read, contents = DATASETS[source.dataset].read, {}
    for split in source.asked or DATASETS[source.dataset].splits:
        try:
            contents[split] = read(source, split)
        except ManifestError as refusal:
            contents[split] = refusal
    absent = [content for content in contents.values() if isinstance(content, NotThere)]
    if source.asked or len(absent) == len(contents):
        _refuse(map(str, absent), NotThere)
    return contents


def _write(source: Source, content: Content, result: Imported) -> None:
    """Write the files of a split."""
    if content.classes is not None:
        _write_classes(result.manifest.with_name("classes.txt"), content.classes)
    with result.missing.open("w", encoding="utf-8") as missing:
        write_manifest(result.manifest, _samples(source, content, result, missing))
    if content.classes is not None and result.labelled:
        result.num_classes = len(content.classes)


def _samples(source: Source, content: Content, result: Imported, missing: TextIO) -> Iterator[Sample]:
    """The entries that have a file of their own; the rest goes to `missing`."""
    classes, seen, absent = plain_names(content.classes), set(), ""
    for entry in content.entries:
        reason = entry.reason if isinstance(entry, LeftOut) else ""
        if not reason:
            path = source.media.find(entry, classes)
            reason = MISSING if path is None else REPEATED if _is_repeated(path, entry, seen) else ""
        if reason:
            absent = absent or entry.name
            result.left_out[reason] += 1
            missing.write(json.dumps({"at": entry.at, "name": entry.name, "reason": reason}) + "\n")
        else:
            media = source.media.root / path
            yield Sample(result.num_samples, 0, media, entry.captions, entry.label, 0, entry.start, entry.end)
            result.num_samples += 1
            result.labelled = result.labelled or entry.label is not None
    if not (result.num_samples or absent):
        raise NotThere(f"{source.dataset}: annotations must hold rows of {result.split}, got none.")
    if not result.num_samples:
        text = f"got none of {result.left_out.total()} (the first is {absent!r})"
        raise NotThere(f"{source.media.root}: media must hold files of {source.dataset} {result.split}, {text}.")


def _is_repeated(path: str, entry: Entry, seen: set[int]) -> bool:
    """Whether an earlier entry was the same part of the same file.

    The parts are kept as hashes of 64 bits, not as names: a set may have millions. Of two million parts two different
    ones have the same hash with a chance of 1 to 10 million.
    """
    part = hash((path, entry.start, entry.end))
    if part in seen:
        return True
    seen.add(part)
    return False


def _write_classes(path: Path, names: list[str]) -> None:
    text = "".join(f"{name}\n" for name in names)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        hint = "Give all annotation files at once, or --classes with the full list, or another --out."
        raise ManifestError(f"{path}: the class list must be that of this import, got another one. {hint}")
    path.write_text(text, encoding="utf-8")
