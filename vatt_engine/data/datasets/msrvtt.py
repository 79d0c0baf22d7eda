"""The reader of MSR-VTT: videos and sentences of one or two JSON files, and tables that choose among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vatt_engine.data.datasets.captioned import member
from vatt_engine.data.datasets.entries import Content, Entry
from vatt_engine.data.datasets.source import Source
from vatt_engine.data.manifest import Caption, checked_caption
from vatt_engine.data.rows import check_keys, check_seconds, fault
from vatt_engine.schema import short

WHOLE = "MSRVTT_data.json"
HALVES = {"train_val_videodatainfo.json": "train and val", "test_videodatainfo.json": "test"}


class Video(NamedTuple):
    """A video of a JSON file: where it stands, how long it is in seconds, its split, and what is said of it."""

    at: str
    end: float
    split: str
    captions: list[Caption]


def msrvtt(source: Source, split: str) -> Content:
    """`MSRVTT_data.json`, or the official files of 2016, `train_val_videodatainfo.json`, `test_videodatainfo.json`.

    For the splits of the 1k-A protocol there is a CSV that lists their videos. `test1k` has the sentences of
    `MSRVTT_JSFUSION_test.csv`, one per video; the others all twenty.
    """
    if split in ("train", "val", "test"):
        videos = source.once(_videos)
        chosen = {name: video.captions for name, video in videos.items() if video.split == split}
        places = {name: videos[name].at for name in chosen}
    else:
        table = source.file("MSRVTT_JSFUSION_test.csv" if split == "test1k" else f"MSRVTT_train.{split[-2:]}.csv")
        videos = source.once(_videos)
        chosen, places = _of_table(source, table, videos, sentences=split == "test1k")

    def entries() -> Iterator[Entry]:
        for name, captions in chosen.items():
            yield Entry(places[name], name, (name,), captions=tuple(captions))

    return Content(None, entries())


def _json_files(source: Source) -> list[Path]:
    """The file of all videos, or else those of parts of them."""
    files = source.all_files(WHOLE)
    files = files or source.all_files("*videodatainfo*.json")
    if not files:
        raise source.lacks(f"{WHOLE}, or {' and '.join(HALVES)}")
    return files


def _videos(source: Source) -> dict[str, Video]:
    """All videos, with their sentences."""
    videos: dict[str, Video] = {}
    for path in _json_files(source):
        data = source.json(path)
        own = _videos_of(path, data)
        for name in own:
            if name in videos:
                text = f"be in one file, got {short(name)} in {videos[name].at.rpartition(':')[0]} too"
                raise fault(path, own[name].at.rpartition(":")[2], "video_id", text, "Name the files to read.")
        for i, sentence in enumerate(member(path, "the file", data, "sentences", list)):
            at = f"sentences[{i}]"
            name, text = (member(path, at, sentence, key, str) for key in ("video_id", "caption"))
            if name not in own:
                raise fault(path, at, "video_id", f"be one of videos, got {short(name)}")
            own[name].captions.append(checked_caption(path, at, "", text, 0, own[name].end))
        videos |= own
    return videos


def _videos_of(path: Path, data: Any) -> dict[str, Video]:
    videos: dict[str, Video] = {}
    for i, record in enumerate(member(path, "the file", data, "videos", list)):
        at = f"videos[{i}]"
        name, split = (member(path, at, record, key, str) for key in ("video_id", "split"))
        check_keys(path, at, "", record, None, ("start time", "end time"))
        start, end = (check_seconds(path, at, key, record[key]) for key in ("start time", "end time"))
        if end <= start:
            raise fault(path, at, "end time", f"be later than start time ({start:g}), got {end:g}")
        if name in videos:
            raise fault(path, at, "video_id", f"be given once, got {short(name)} again")
        split = "val" if split == "validate" else split
        videos[name] = Video(f"{path}:{at}", round(end - start, 3), split, [])
    return videos


def _of_table(
    source: Source, table: Path, videos: dict[str, Video], sentences: bool
) -> tuple[dict[str, list[Caption]], dict[str, str]]:
    """Captions, and place in the table, of the videos that it lists; sentences of one video stay together.

    A video that is not in the one JSON file of two leaves the split out; with both of them it is a mistake.
    """
    chosen: dict[str, list[Caption]] = {}
    places: dict[str, str] = {}
    files = source.once(_json_files)
    for line, row in source.table(table, ("video_id", "sentence") if sentences else ("video_id",)):
        name = row["video_id"].strip()
        if name not in videos:
            absent = [half for half in HALVES if not source.all_files(half)]
            if not source.all_files(WHOLE) and absent:
                wanted = f"{absent[0]}, for {name} of {table.name}"
                raise source.lacks(wanted)
            known = " or ".join(file.name for file in files)
            raise fault(table, line, "video_id", f"be one of {known}, got {short(name)}")
        places.setdefault(name, f"{table}:{line}")
        if sentences:
            caption = checked_caption(table, line, "", row["sentence"], 0, videos[name].end)
            chosen.setdefault(name, []).append(caption)
        else:
            chosen[name] = videos[name].captions
    return chosen, places
