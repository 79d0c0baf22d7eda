"""Readers of video sets with captions: HowTo100M, YouCook2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vatt_engine.data.datasets.entries import Content, Entry, LeftOut
from vatt_engine.data.datasets.source import SPLIT_WORDS, Source, names_any, video_and_span
from vatt_engine.data.manifest import Caption, checked_caption
from vatt_engine.data.rows import ManifestError, check_keys, fault, is_unicode, json_members
from vatt_engine.schema import short

YOUCOOK_SUBSETS = {"train": "training", "val": "validation"}
YOUCOOK_COLUMNS = ("video_id", "start", "end", "text")


def howto100m(source: Source, split: str) -> Content:
    """The videos of `HowTo100M_v1.csv` with their captions from `caption.json` or `raw_caption.json`.

    The JSON is read video by video. A caption whose times cannot be used is left out; a video without one stays.
    """
    videos_path, path = source.file("HowTo100M_v1.csv"), source.file("caption.json", "raw_caption.json")
    videos = {row["video_id"]: line for line, row in source.table(videos_path, ("video_id",))}

    def entries() -> Iterator[Entry | LeftOut]:
        with source.opened(path) as file:
            for line, video, value in json_members(path, file):
                if videos.pop(video, None) is None:
                    continue
                at, captions = f"{path}:{line}", []
                for i, caption in enumerate(_howto_captions(path, line, video, value)):
                    try:
                        captions.append(checked_caption(path, line, "", *caption))
                    except ManifestError:
                        yield LeftOut(at, f"{video}, caption {i}", "a caption without text or without usable times")
                yield Entry(at, video, (video,), captions=tuple(captions))
        for video, line in videos.items():
            yield Entry(f"{videos_path}:{line}", video, (video,))

    return Content(None, entries())


def _howto_captions(path: Path, line: int, video: str, value: Any) -> Iterator[tuple[Any, Any, Any]]:
    keys = ("text", "start", "end")
    if not isinstance(value, dict):
        raise fault(path, line, video, f"be an object of text, start and end, got {short(value)}")
    check_keys(path, line, f"{video}.", value, None, keys)
    for key in keys:
        if not isinstance(value[key], list) or len(value[key]) != len(value["text"]):
            text = f"be a list, as long as text, got {short(value[key])}"
            raise fault(path, line, f"{video}.{key}", text)
    return zip(*(value[key] for key in keys))


def youcook2(source: Source, split: str) -> Content:
    """`youcookii_annotations_trainval.json`: each annotated segment is a sample, its sentences the captions.

    Without it a JSON file of the same form under another name, or a table with the columns video_id, start, end and
    text, as MIL-NCE's `validation_youcook.csv`, whose name says the split.
    """
    official = "youcookii_annotations_trainval.json"
    found = source.all_files(official) or source.all_files("youcook*.json", "yc2*.json")
    tables = [] if found else [path for path in _youcook_tables(source) if names_any(path, SPLIT_WORDS[split])]
    if len(tables) == 1:
        return Content(None, _by_segment(_youcook_table_rows(source, tables[0])))
    if len(found) != 1:
        raise source.lacks(f"one file {official}", found or tables)
    return Content(None, _by_segment(_youcook_segments(source, found[0], YOUCOOK_SUBSETS[split])))


def _youcook_segments(source: Source, path: Path, subset: str) -> Iterator[Entry]:
    database = member(path, "the file", source.once(Source.json, path), "database", dict)
    for video, record in database.items():
        if member(path, video, record, "subset", str) != subset:
            continue
        for i, annotation in enumerate(member(path, video, record, "annotations", list)):
            at = f"{video}.annotations[{i}]"
            segment = member(path, at, annotation, "segment", list)
            if len(segment) != 2:
                raise fault(path, at, "segment", f"be a start and an end, got {short(segment)}")
            caption = checked_caption(path, at, "", member(path, at, annotation, "sentence", str), *segment)
            if caption.end <= caption.start:
                raise fault(path, at, "segment", f"end later than {caption.start:g}, got {caption.end:g}")
            yield _segment(f"{path}:{at}", video, caption)


def _youcook_tables(source: Source) -> list[Path]:
    return [path for path in source.all_files("*.csv") if set(YOUCOOK_COLUMNS).issubset(source.header(path))]


def _youcook_table_rows(source: Source, path: Path) -> Iterator[Entry]:
    for line, row in source.table(path, YOUCOOK_COLUMNS):
        video, start, end = video_and_span(path, line, row, YOUCOOK_COLUMNS[:3])
        yield _segment(f"{path}:{line}", video, Caption(row["text"], start, end))


def _segment(at: str, video: str, caption: Caption) -> Entry:
    return Entry(at, video, (video,), captions=(caption,), start=caption.start, end=caption.end)


def _by_segment(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Entries of the same seconds of a video as one, with the captions of all: no sentence is lost."""
    together: dict[tuple[str, float, float | None], Entry] = {}
    for entry in entries:
        key = (entry.name, entry.start, entry.end)
        first = together.get(key)
        together[key] = entry if first is None else first._replace(captions=first.captions + entry.captions)
    yield from together.values()


def member(path: Path, at: str, record: Any, key: str, kind: type) -> Any:
    """A member of a JSON object that must be of a kind."""
    if not isinstance(record, dict):
        raise fault(path, at, "the record", f"be an object, got {short(record)}")
    check_keys(path, at, "", record, None, (key,))
    value = record[key]
    if not isinstance(value, kind) or (kind is str and not is_unicode(value)):
        names = {dict: "an object", list: "a list", str: "text"}
        raise fault(path, at, key, f"be {names[kind]}, got {short(value)}")
    return value
