"""One media file to the tracks of a shard, and the processes that do so for `vatt prepare`, which may crash or hang."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from select import select
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vatt_engine.cpus import openmp_settings
from vatt_engine.data.encode import write_pictures, write_sound
from vatt_engine.data.manifest import Sample
from vatt_engine.data.media import Media
from vatt_engine.data.shards import key_of, replace_synced, write_synced
from vatt_engine.data.streams import ROUNDING, MediaError, MediaLimits, Reach
from vatt_engine.data.waveforms import HOLE, joined
from vatt_engine.faults import raise_if_of_code

PROGRAM = "from vatt_engine.data.transcode import main; main()"
START_SECONDS = 600.0  # for a worker to import what it needs
AHEAD = 64  # files per worker that may wait for a slower one before them
TOLD_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAX_STRETCHES = 1000  # of sound that the index tells apart
LIMITS = MediaLimits(max_frames=10_000_000)  # a whole file is one window here
# Writing fails: not the fault of the file that is being read.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class Codec(NamedTuple):
    """How a codec is encoded: one thread and no frames out of order, so that equal input makes equal bytes."""

    suffix: str
    encoder: str
    crf: int  # what is used when the caller names none
    worst: int
    options: dict[str, str]

    def filled(self, crf: int, gop: int) -> dict[str, str]:
        """The options of one file, as FFmpeg takes them."""
        return {name: value.format(crf=crf, gop=gop) for name, value in self.options.items()} | {"threads": "1"}


_VP9 = {"crf": "{crf}", "b": "0", "g": "{gop}", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0"}
CODECS = {
    # fastdecode, so neither CABAC nor deblocking: 12 % more bytes, but 24 instead of 39 ms of CPU per 32 frames of 256p
    "h264": Codec(".mp4", "libx264", 20, 51, {"crf": "{crf}", "g": "{gop}", "bf": "0", "tune": "fastdecode"}),
    "vp9": Codec(".webm", "libvpx-vp9", 28, 63, _VP9 | {"auto-alt-ref": "0"}),
    "mjpeg": Codec(".avi", "mjpeg", 3, 31, {"qmin": "{crf}", "qmax": "{crf}"}),
}


def transcode(job: dict[str, Any], settings: dict[str, Any], folder: Path, alive: Callable[[], None]) -> dict[str, Any]:
    """Write `<key>.mp4` (.webm, .avi) and `<key>.flac` of a media file, or of a part of it, into a folder.

    Args:
        job: {"key", "path", "start", "end"} of a sample; end may be None.
        settings: the first line of the index to be.
        folder: of the tracks.
        alive: called for every picture and piece of sound.

    Returns:
        {"video": {"frames", "width", "height"} or None, "audio": {"samples"} or None, "duration": seconds}; with
        "aspect" and "heard" as in the index.

    Raises:
        MediaError: the file cannot be used.
    """
    media = Media(job["path"], LIMITS, square_pixels=settings.get("pixel_aspect") == "square")
    reached: dict[str, Reach] = {}
    start, length, fps, rate = job["start"], media.info.duration, settings["fps"], settings["sample_rate"]
    duration = min(length, math.inf if job["end"] is None else job["end"]) - start
    if duration <= 0:
        raise MediaError(job["path"], f"the part must begin within the {length:.3f} s of the file, got {start}.")

    def watched(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        for piece in pieces:
            alive()
            yield piece

    video = audio = None
    if media.info.has_video:
        codec = CODECS[settings["codec"]]
        num_frames = max(1, math.ceil((duration - ROUNDING) * fps))
        pictures = media.pictures(start, num_frames, fps=fps, short_side=settings["short_side"], reached=reached)
        path, options = folder / f"{job['key']}{codec.suffix}", codec.filled(settings["crf"], settings["gop"])
        height, width = write_pictures(path, watched(pictures), fps=fps, codec=codec.encoder, options=options)
        video = {"frames": num_frames, "width": width, "height": height} | _aspect(media, (width, height))
    if media.info.has_audio:
        sound = media.sound(start, round(duration * rate), rate, reached)
        count = write_sound(folder / f"{job['key']}.flac", watched(sound), sample_rate=rate, codec="flac")
        audio = {"samples": count} | _heard(reached["audio"], count, rate) if count else None
    media.check_reached(start, reached)
    if not (video or audio):
        raise MediaError(job["path"], "the file must give pictures or sound, got neither.")
    return {"video": video, "audio": audio, "duration": duration}


def _aspect(media: Media, size: tuple[int, int]) -> dict[str, float]:
    """The shape of the pixels of pictures of this size, where they are not square and stay so."""
    aspect = float(media.info.pixel_aspect)
    if aspect == 1 or media.aspect != 1:
        return {}
    is_turned = (size[0] < size[1]) != (media.info.width < media.info.height)
    return {"aspect": 1 / aspect if is_turned else aspect}


def _heard(reach: Reach, count: int, rate: int) -> dict[str, list]:
    """Where the source has sound, unless that is everywhere."""
    heard = joined(reach.heard, rate)  # what lacks less than a second is whole
    if len(heard) > MAX_STRETCHES:
        heard = [(heard[0][0], heard[-1][1])]
    return {} if len(heard) == 1 and heard[0][0] < HOLE * rate else {"heard": heard}


class Transcoders:
    """`transcode` in processes of their own; one that crashes or is silent too long is replaced, its file rejected.

    Args:
        count: processes.
        settings: the first line of the index to be.
        work: folder of the tracks and of the records, `<key>.json`; a file that has a record is not done again.
        time_limit: seconds without a sign of life.
    """

    def __init__(self, count: int, settings: dict[str, Any], work: Path, time_limit: float):
        self.work, self.count = work, count
        self.workers = [_Worker(settings, work, time_limit) for _ in range(count)]
        self.idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = ThreadPoolExecutor(count, "vatt-prepare")

    def __enter__(self) -> Transcoders:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.end()

    def records(self, samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
        """The record of each sample, in their order: what `transcode` returns, or {"reason"}.

        Raises:
            ChildProcessError: a process cannot start, cannot write, or was told to end.
        """
        rest, waiting = iter(samples), deque()
        while True:
            waiting.extend(
                self.threads.submit(self._record, s) for s in islice(rest, AHEAD * self.count - len(waiting))
            )
            if not waiting:
                return
            yield waiting.popleft().result()

    def _record(self, sample: Sample) -> dict[str, Any]:
        path = self.work / f"{key_of(sample)}.json"
        if not path.exists():
            worker = self.idle.get()
            try:
                reason = worker.ask(sample)
            finally:
                self.idle.put(worker)
            if reason:
                write_synced(path, json.dumps({"reason": reason}))
        return json.loads(path.read_text(encoding="utf-8"))


class _Worker:
    """One process of `main` at a time, started when it is first asked."""

    def __init__(self, settings: dict[str, Any], work: Path, time_limit: float):
        self.arguments, self.work, self.limit = [json.dumps(settings), str(work)], work, time_limit
        self.process: subprocess.Popen | None = None
        self.closed = False

    def ask(self, sample: Sample) -> str | None:
        """Have the tracks and the record of a sample written; or why it has none, if that ended the process."""
        process = self.process or self._start()
        job = {"key": key_of(sample), "path": str(sample.path), "start": sample.start, "end": sample.end}
        with suppress(BrokenPipeError):  # it has ended, which is heard below
            process.stdin.write(json.dumps(job).encode() + b"\n")
        while select([process.stdout], [], [], self.limit)[0]:
            news = os.read(process.stdout.fileno(), 1 << 12)
            if b"\n" in news:
                return None
            if not news:
                return self._cause(self.end())
        process.kill()
        self.end()
        return f"FFmpeg must go on within {self.limit:g} s, got no sign of life."

    def _cause(self, code: int) -> str:
        """What a file did to its process, unless it was something else."""
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if self.closed or code >= 0 or -code in TOLD_TO_END:
            hint = "What it said stands above; the same command goes on from here."
            raise ChildProcessError(f"prepare: a worker must go on until the last file, got {name}. {hint}")
        return f"FFmpeg must survive the file, got {name}."

    def close(self) -> None:
        self.closed = True
        if self.process is not None:
            self.process.kill()

    def _start(self) -> subprocess.Popen:
        root = str(Path(__file__).resolve().parents[2])
        env = os.environ | openmp_settings(os.environ)
        env |= {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        self.process = process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *self.arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,  # Ctrl-C is for the parent
        )
        if self.closed or not (select([process.stdout], [], [], START_SECONDS)[0] and process.stdout.read(1)):
            process.kill()
            self._cause(self.end())
            raise ChildProcessError(f"prepare: a worker must start within {START_SECONDS:g} s, got none.")
        return process

    def end(self) -> int:
        """Wait for the end of the process, if one runs, and remove what it left; its exit code."""
        process, self.process = self.process, None
        if process is None:
            return 0
        code = process.wait()
        process.stdin.close()
        process.stdout.close()
        shutil.rmtree(self.work / f"worker-{process.pid}", ignore_errors=True)
        return code


def main() -> None:
    """`_serve`, which ends by an exception alone; exit code 1 then tells the parent that no file is at fault.

    Python's own way out does not: it waits for the thread that reads the input, gives up, and aborts the process, which
    looks as if FFmpeg had crashed.
    """
    try:
        _serve()
    except SystemExit as end:
        print(end, file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _serve() -> None:
    """Jobs come in as lines of JSON; out goes "." as a sign of life and a new line when a job's record is there.

    The record `<key>.json` is what `transcode` returns, or {"reason"}; it comes after the tracks, each of them whole.
    """
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    reports = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no report
    jobs: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            jobs.put(line)
        os._exit(0)  # the parent has ended: so does this, also in the middle of a file

    threading.Thread(target=listen, daemon=True).start()
    torch.set_num_threads(1)
    own = folder / f"worker-{os.getpid()}"
    own.mkdir(exist_ok=True)
    last = 0.0

    def alive() -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            os.write(reports, b".")

    while True:
        alive()
        job = json.loads(jobs.get())
        record = _outcome(job, settings, own, alive)
        for kind in ("video", "audio"):
            if record.get(kind):
                suffix = CODECS[settings["codec"]].suffix if kind == "video" else ".flac"
                replace_synced(own / f"{job['key']}{suffix}", folder / f"{job['key']}{suffix}")
        write_synced(folder / f"{job['key']}.json", json.dumps(record))
        for left in own.iterdir():
            left.unlink()
        os.write(reports, b"\n")


def _outcome(job: dict, settings: dict, folder: Path, alive: Callable[[], None]) -> dict[str, Any]:
    try:
        return transcode(job, settings, folder, alive)
    except MediaError as error:
        return {"reason": error.reason}
    except Exception as error:  # an encoder's: the next file may go well
        if getattr(error, "errno", None) in FULL:
            sys.exit(f"{folder.parent}: {os.strerror(error.errno)}.")
        raise_if_of_code(error, "av", doing=f"encoding {job['path']}")
        return {"reason": f"the file must be one that can be encoded, got {type(error).__name__}: {error}"}
