"""One media file to the tracks of a shard; and the worker process of `vatt prepare`, which may crash or be killed."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vatt_engine.data.encode import write_pictures, write_sound
from vatt_engine.data.media import Media
from vatt_engine.data.shards import replace_synced, write_synced
from vatt_engine.data.streams import ROUNDING, MediaError, MediaLimits, Reach

LIMITS = MediaLimits(max_frames=10_000_000)  # a whole file is one window here
FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
)  # not the fault of the file that is being read


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
        {"video": {"frames", "width", "height"} or None, "audio": {"samples"} or None, "duration": seconds}.

    Raises:
        MediaError: the file cannot be used.
    """
    media = Media(job["path"], LIMITS)
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
        video = {"frames": num_frames, "width": width, "height": height}
    if media.info.has_audio:
        sound = media.sound(start, round(duration * rate), rate, reached)
        count = write_sound(folder / f"{job['key']}.flac", watched(sound), sample_rate=rate, codec="flac")
        audio = {"samples": count} if count else None
    media.check_reached(start, reached)
    if not (video or audio):
        raise MediaError(job["path"], "the file must give pictures or sound, got neither.")
    return {"video": video, "audio": audio, "duration": duration}


def main() -> None:
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
        os.write(reports, b"\n")


def _outcome(job: dict, settings: dict, folder: Path, alive: Callable[[], None]) -> dict[str, Any]:
    try:
        return transcode(job, settings, folder, alive)
    except MediaError as error:
        return {"reason": error.reason}
    except Exception as error:  # an encoder's: the next file may go well
        if getattr(error, "errno", None) in FULL:
            sys.exit(f"{folder.parent}: {os.strerror(error.errno)}.")
        return {"reason": f"the file must be one that can be encoded, got {type(error).__name__}: {error}"}
