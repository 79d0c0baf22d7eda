"""Readers of video sets with captions: HowTo100M, YouCook2, MSR-VTT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vatt_engine.data.datasets.source import Content, Entry, LeftOut, Source, table, text_lines
from vatt_engine.data.manifest import Caption, checked_caption
from vatt_engine.data.rows import (
    ManifestError,
    check_keys,
    check_seconds,
    fault,
    is_unicode,
    json_members,
    opened,
    parse_json,
)
from vatt_engine.schema import short


def howto100m(source: Source, split: str) -> Content:
    """The videos of `HowTo100M_v1.csv` with their captions from `caption.json` or `raw_caption.json`.

    The JSON is read video by video. A caption whose times cannot be used is left out; a video without one stays.
    """
    videos_path, path = source.file("HowTo100M_v1.csv"), source.file("caption.json", "raw_caption.json")
    videos = {row["video_id"]: line for line, row in table(videos_path, ("video_id",))}

    def entries() -> Iterator[Entry | LeftOut]:
        with opened(path, "annotations") as file:
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
    """`youcookii_annotations_trainval.json`: each annotated segment is a sample, its sentence the caption."""
    path = source.file("youcookii_annotations_trainval.json")
    subset = {"train": "training", "val": "validation"}[split]
    database = _member(path, "the file", _json_file(path), "database", dict)

    def entries() -> Iterator[Entry]:
        for video, record in database.items():
            if _member(path, video, record, "subset", str) != subset:
                continue
            for i, annotation in enumerate(_member(path, video, record, "annotations", list)):
                at = f"{video}.annotations[{i}]"
                segment = _member(path, at, annotation, "segment", list)
                if len(segment) != 2:
                    raise fault(path, at, "segment", f"be a start and an end, got {short(segment)}")
                caption = checked_caption(path, at, "", _member(path, at, annotation, "sentence", str), *segment)
                if caption.end <= caption.start:
                    raise fault(path, at, "segment", f"end later than {caption.start:g}, got {caption.end:g}")
                part = {"captions": (caption,), "start": caption.start, "end": caption.end}
                yield Entry(f"{path}:{at}", video, (video,), **part)

    return Content(None, entries())


def msrvtt(source: Source, split: str) -> Content:
    """`MSRVTT_data.json`, and for the splits of the 1k-A protocol the CSV that lists their videos.

    `test1k` has one sentence per video, that of `MSRVTT_JSFUSION_test.csv`; the others all twenty.
    """
    path = source.file("MSRVTT_data.json")
    data = _json_file(path)
    ends, splits = _msrvtt_videos(path, data)
    sentences: dict[str, list[Caption]] = {video: [] for video in ends}
    for i, sentence in enumerate(_member(path, "the file", data, "sentences", list)):
        at = f"sentences[{i}]"
        video, text = (_member(path, at, sentence, key, str) for key in ("video_id", "caption"))
        if video not in ends:
            raise fault(path, at, "video_id", f"be one of videos, got {short(video)}")
        sentences[video].append(checked_caption(path, at, "", text, 0, ends[video]))
    if split in ("train", "val", "test"):
        chosen = [(f"{path}:videos[{i}]", video, None) for i, video in enumerate(ends) if splits[video] == split]
    else:
        name = "MSRVTT_JSFUSION_test.csv" if split == "test1k" else f"MSRVTT_train.{split[-2:]}.csv"
        chosen = _msrvtt_rows(source.file(name), ends, split == "test1k")

    def entries() -> Iterator[Entry]:
        for at, video, caption in chosen:
            yield Entry(at, video, (video,), captions=(caption,) if caption else tuple(sentences[video]))

    return Content(None, entries())


def _msrvtt_videos(path: Path, data: Any) -> tuple[dict[str, float], dict[str, str]]:
    """How long each video lasts, and its split."""
    ends: dict[str, float] = {}
    splits: dict[str, str] = {}
    for i, record in enumerate(_member(path, "the file", data, "videos", list)):
        at = f"videos[{i}]"
        video, split = (_member(path, at, record, key, str) for key in ("video_id", "split"))
        check_keys(path, at, "", record, None, ("start time", "end time"))
        start, end = (check_seconds(path, at, key, record[key]) for key in ("start time", "end time"))
        if end <= start:
            raise fault(path, at, "end time", f"be later than start time ({start:g}), got {end:g}")
        if video in ends:
            raise fault(path, at, "video_id", f"be given once, got {short(video)} again")
        ends[video] = round(end - start, 3)
        splits[video] = "val" if split == "validate" else split
    return ends, splits


def _msrvtt_rows(path: Path, ends: dict[str, float], sentence: bool) -> Iterator[tuple[str, str, Caption | None]]:
    delimiter = ";" if ";" in next(text_lines(path), (1, ""))[1] else ","
    columns = ("video_id", "sentence") if sentence else ("video_id",)
    for line, row in table(path, columns, delimiter=delimiter):
        video = row["video_id"]
        if video not in ends:
            raise fault(path, line, "video_id", f"be one of MSRVTT_data.json, got {short(video)}")
        yield f"{path}:{line}", video, Caption(row["sentence"], 0.0, ends[video]) if sentence else None


def _json_file(path: Path) -> Any:
    with opened(path, "annotations") as file:
        return parse_json(path, 1, "the file", file.read())


def _member(path: Path, at: str, record: Any, key: str, kind: type) -> Any:
    """A member of a JSON object that must be of a kind."""
    if not isinstance(record, dict):
        raise fault(path, at, "the record", f"be an object, got {short(record)}")
    check_keys(path, at, "", record, None, (key,))
    value = record[key]
    if not isinstance(value, kind) or (kind is str and not is_unicode(value)):
        names = {dict: "an object", list: "a list", str: "text"}
        raise fault(path, at, key, f"be {names[kind]}, got {short(value)}")
    return value
