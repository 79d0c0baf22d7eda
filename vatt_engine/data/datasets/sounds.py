"""Readers of sound sets: AudioSet (many classes per clip) and ESC-50 (five folds)."""

from __future__ import annotations

from collections.abc import Iterator

from vatt_engine.data.datasets.source import (
    Content,
    Entry,
    Source,
    class_number,
    numbered,
    table,
    video_and_span,
    whole_number,
)
from vatt_engine.data.rows import fault


def audioset(source: Source, split: str) -> Content:
    """`{balanced_train,unbalanced_train,eval}_segments.csv` and `class_labels_indices.csv`."""
    path, names = source.file(f"{split}_segments.csv"), source.file("class_labels_indices.csv")
    columns = ("index", "mid", "display_name")
    classes = [(line, *(row[column] for column in columns)) for line, row in table(names, columns)]
    numbers = numbered(names, ((line, index, mid) for line, index, mid, _ in classes))
    titles = {mid: title for _, _, mid, title in classes}

    def entries() -> Iterator[Entry]:
        header = ("YTID", "start_seconds", "end_seconds", "positive_labels")
        for line, row in table(path, (), header, comment="#", skipinitialspace=True):
            video, start, end = video_and_span(path, line, row, header[:3])
            mids = row["positive_labels"].split(",")
            label = {class_number(path, line, "positive_labels", mid.strip(), numbers) for mid in mids}
            entry = Entry(f"{path}:{line}", video, _audioset_stems(video, start, end), (), tuple(sorted(label)))
            yield entry._replace(stems=(video,), start=start, end=end) if source.whole_videos else entry

    return Content([titles[mid] for mid in numbers], entries())


def _audioset_stems(video: str, start: float, end: float) -> Iterator[str]:
    """The names that downloaders give to the cut segment: times in ms or s, or a Y (an id may begin with a dash)."""
    for unit in (1000, 1):
        s, e = round(start * unit), round(end * unit)
        yield from (f"{video}_{s}_{e}", f"{video}_{s}", f"{video}_{s:06d}_{e:06d}", f"{video}_{s:06d}")
    yield from (f"{video}_{start:.3f}", f"{video}_{start:.1f}", f"Y{video}", video)


def esc50(source: Source, split: str) -> Content:
    """`esc50.csv`: `testN` is fold N, `trainN` the other four."""
    path, fold, training = source.file("esc50.csv"), int(split[-1]), split.startswith("train")
    rows = table(path, ("filename", "fold", "target", "category"))
    clips = [(line, row, whole_number(path, line, "fold", row["fold"])) for line, row in rows]
    first = {row["category"]: (line, row["target"]) for line, row, _ in reversed(clips)}
    numbers = numbered(path, sorted((line, target, name) for name, (line, target) in first.items()))

    def entries() -> Iterator[Entry]:
        for line, row, own in clips:
            if not 1 <= own <= 5:
                raise fault(path, line, "fold", f"be 1 to 5, got {own}")
            if whole_number(path, line, "target", row["target"]) != numbers[row["category"]]:
                text = f"be {numbers[row['category']]} for {row['category']}, got {row['target']}"
                raise fault(path, line, "target", text)
            if (own == fold) != training:
                stems = (source.media.stem(row["filename"]),)
                yield Entry(f"{path}:{line}", row["filename"], stems, (), numbers[row["category"]])

    return Content(list(numbers), entries())
