"""Our reader against ffmpeg's own output, file by file: `python -m benchmarks.oracle FOLDER` (needs Debian's ffmpeg).

For every media file below the folder, windows of vatt_engine.data.media are compared with what the programs ffmpeg and
ffprobe decode: pictures by content, so that a wrong number, a mirrored or a turned picture is seen, and sound by
correlation, so that a shift or a dropout is seen. Windows begin at 0, in the middle (which needs a seek) and near the
end, at the file's own rate and at 12.5 and 10 frames per second. `--prepared` compares `vatt prepare`'s shards of the
same files with the raw reading instead. The exit status is 1 if a file differs and no rule of oracle_rules.py explains
it. FOLDER/sources.json may give the revision of each folder in it, {"owner+name": "commit"}, for `--results`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

if not __package__:  # called as a file, `benchmarks/oracle.py FOLDER`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.oracle_check import DIFFERS, Row, check
from benchmarks.oracle_ffmpeg import version
from benchmarks.oracle_prepared import check_prepared
from benchmarks.oracle_table import page

RAW = "Windows of vatt_engine against ffmpeg's own output"
PREPARED = "Shards of `vatt prepare` against the raw reading"

SUFFIXES = """
    264 3g2 3gp aac ac3 aif aifc aiff amr ape asf au avi caf dff divx dsf dts dv eac3 ec3 f4v flac flv gif h264 h265
    hevc ivf m1v m2ts m2v m4a m4b m4v mj2 mjpeg mjpg mka mkv mov mp2 mp3 mp4 mpc mpeg mpg mts mxf nut oga ogg ogm ogv
    opus ra rm spx swf ts tta vob voc w64 wav webm wma wmv wtv wv
"""


def media_files(folder: Path) -> list[Path]:
    """The files below a folder whose suffix is that of picture or sound in time, in order."""
    known = set(SUFFIXES.split())
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix[1:].lower() in known)


def check_all(folder: Path, paths: Iterable[Path], workers: int) -> Iterator[Row]:
    """The row of each file, as they are done; a file that crashes its process is given a row that says so."""
    todo = list(paths)
    while todo:
        with ProcessPoolExecutor(workers, get_context("spawn"), _calm) as pool:
            futures = {pool.submit(check, path, str(path.relative_to(folder))): path for path in todo}
            todo = []
            for future in as_completed(futures):
                path = futures[future]
                try:
                    yield future.result()
                except BrokenProcessPool:
                    todo.append(path)
                except Exception as error:  # the reader's or the oracle's own: a difference to look at, not the end
                    yield Row(str(path.relative_to(folder)), DIFFERS, f"{type(error).__name__}: {error}")
        if todo and workers == 1:
            first = todo.pop(0)
            yield Row(str(first.relative_to(folder)), DIFFERS, "its process died")
        workers = 1  # alone, so that the one that crashes is known


def _kept(path: Path | None) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def _write(rows: list[Row], options: argparse.Namespace) -> None:
    import av

    libraries = "FFmpeg's libavcodec " + ".".join(map(str, av.library_versions["libavcodec"]))
    programs = f"PyAV {av.__version__} ({libraries}) and ffmpeg {version()}."
    name, title = ("prepared", PREPARED) if options.prepared else ("raw", RAW)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.md").write_text(page(rows, options.folder, title, programs), encoding="utf-8")


def _calm() -> None:
    torch.set_num_threads(1)
    import av.logging

    av.logging.set_level(av.logging.PANIC)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="walked at any depth")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--prepared", action="store_true", help="compare prepared shards with the raw reading")
    parser.add_argument("--results", type=Path, help="write the table into this folder, as Markdown")
    parser.add_argument(
        "--rows", type=Path, help="keep the rows in this JSONL file; what agrees there is not done again"
    )
    options = parser.parse_args(arguments)
    paths = media_files(options.folder)
    rows = [row for row in _kept(options.rows) if row.verdict != DIFFERS]
    done = {row.path for row in rows}
    paths = [path for path in paths if str(path.relative_to(options.folder)) not in done]
    count = len(rows) + len(paths)
    with TemporaryDirectory() as work:
        if options.prepared:
            found = check_prepared(options.folder, paths, Path(work), options.workers)
        else:
            found = check_all(options.folder, paths, options.workers)
        for row in found:
            rows.append(row)
            said = ": ".join(filter(None, (row.path, row.verdict, row.detail)))
            print(f"{len(rows)}/{count} {said}", flush=True)
            if options.rows:
                options.rows.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
            if options.results:
                _write(rows, options)  # each time: hours of work may be stopped at any row
    print(", ".join(f"{count} {verdict}" for verdict, count in Counter(row.verdict for row in rows).items()))
    return int(any(row.verdict == DIFFERS for row in rows))


if __name__ == "__main__":
    sys.exit(main())
