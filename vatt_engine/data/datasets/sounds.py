"""Readers of sound sets: AudioSet (many classes per clip) and ESC-50 (five folds)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vatt_engine.data.datasets.entries import Content, Entry, LeftOut
from vatt_engine.data.datasets.source import (
    Source,
    class_number,
    is_whole_number,
    numbered,
    video_and_span,
    whole_number,
)
from vatt_engine.data.rows import check_keys, fault

AUDIOSET_COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
LABEL_COLUMNS = ("index", "mid", "display_name")
NO_ID = "no id: a spreadsheet wrote an error in its place"


class Segment(NamedTuple):
    """A row of AudioSet: its line, its first three cells by column, and the cells that hold its labels."""

    line: int
    row: dict[str, str]
    labels: list[str]


def audioset(source: Source, split: str) -> Content:
    """`{balanced_train,unbalanced_train,eval}_segments.csv` and `class_labels_indices.csv`.

    The header row may be a comment, as distributed, or bare, or absent. Rows whose id a spreadsheet took for a formula
    (an id may begin with a dash) are left out.
    """
    path, names = source.file(f"{split}_segments.csv"), source.file("class_labels_indices.csv")
    titles = source.once(_audioset_classes, names)
    numbers = {mid: number for number, mid in enumerate(titles)}

    def entries() -> Iterator[Entry | LeftOut]:
        for line, row, labels in _segments(source, path):
            if row["YTID"].startswith("#"):
                yield LeftOut(f"{path}:{line}", f"{row['YTID']} from {row['start_seconds']} s", NO_ID)
                continue
            video, start, end = video_and_span(path, line, row, AUDIOSET_COLUMNS[:3])
            mids = [mid for cell in labels for part in cell.split(",") if (mid := part.strip(' "'))]
            if not mids:
                raise fault(path, line, "positive_labels", "be given, got nothing")
            label = {class_number(path, line, "positive_labels", mid, numbers) for mid in mids}
            entry = Entry(f"{path}:{line}", video, _audioset_stems(video, start, end), (), tuple(sorted(label)))
            yield entry._replace(stems=(video,), start=start, end=end) if source.whole_videos else entry

    return Content(list(titles.values()), entries())


def _segments(source: Source, path: Path) -> Iterator[Segment]:
    """The rows of a segments file.

    A copy that lost its quotes has one label per cell. So labels are all cells from their column on, unless the header
    names further columns behind it.
    """
    places, open_end = dict(zip(AUDIOSET_COLUMNS, range(4))), True
    for line, cells in source.cells(path, skipinitialspace=True):
        names = [cell.strip().lstrip("# ") for cell in cells]
        if AUDIOSET_COLUMNS[0] in names:
            check_keys(path, line, "column ", [*filter(None, names)], None, AUDIOSET_COLUMNS)
            places = {name: names.index(name) for name in AUDIOSET_COLUMNS}
            open_end = not any(names[places["positive_labels"] + 1 :])
        elif not cells[0].startswith("#") or _is_spoilt(cells):
            if len(cells) <= max(places.values()):
                text = f"have {len(places)} cells ({', '.join(places)}), got {len(cells)}"
                raise fault(path, line, "the row", text)
            begin = places["positive_labels"]
            row = {name: cells[places[name]].strip() for name in AUDIOSET_COLUMNS[:3]}
            yield Segment(line, row, cells[begin:] if open_end else cells[begin : begin + 1])


def _is_spoilt(cells: list[str]) -> bool:
    """Whether a row that begins as a comment is one of `#NAME?`: its next two cells are numbers."""
    return len(cells) > 2 and all(cell.strip().replace(".", "", 1).isdigit() for cell in cells[1:3])


def _audioset_classes(source: Source, path: Path) -> dict[str, str]:
    """Names by mid, in the order of their numbers. The header may be absent; a name may hold commas without quotes."""
    places, rows, titles = dict(zip(LABEL_COLUMNS, range(3))), [], {}
    for line, cells in source.cells(path):
        cells = [cell.strip() for cell in cells]
        if line == 1 and not is_whole_number(cells[0]):
            check_keys(path, line, "column ", cells, None, LABEL_COLUMNS)
            places = {name: cells.index(name) for name in LABEL_COLUMNS}
            continue
        if len(cells) < 3:
            raise fault(path, line, "the row", f"have 3 cells ({', '.join(LABEL_COLUMNS)}), got {len(cells)}")
        index, mid, title = (cells[places[name]] for name in LABEL_COLUMNS)
        rows.append((line, index, mid))
        titles[mid] = ",".join(cells[2:]).rstrip(",") if places["display_name"] == 2 else title
    return {mid: titles[mid] for mid in numbered(path, rows)}


def _audioset_stems(video: str, start: float, end: float) -> Iterator[str]:
    """The names that downloaders give to the cut segment: times in ms or s, or a Y (an id may begin with a dash)."""
    for unit in (1000, 1):
        s, e = round(start * unit), round(end * unit)
        yield from (f"{video}_{s}_{e}", f"{video}_{s}", f"{video}_{s:06d}_{e:06d}", f"{video}_{s:06d}")
    yield from (f"{video}_{start:.3f}", f"{video}_{start:.1f}", f"Y{video}", video)


def esc50(source: Source, split: str) -> Content:
    """`esc50.csv`: `testN` is fold N, `trainN` the other four."""
    path, fold, training = source.file("esc50.csv"), int(split[-1]), split.startswith("train")
    clips = source.once(_esc50_rows, path)
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


def _esc50_rows(source: Source, path: Path) -> list[tuple[int, dict[str, str], int]]:
    rows = source.table(path, ("filename", "fold", "target", "category"))
    return [(line, row, whole_number(path, line, "fold", row["fold"])) for line, row in rows]
