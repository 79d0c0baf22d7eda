"""What the programs `ffmpeg` and `ffprobe` say of a media file: every picture with its time, and the sound as one line.

The reader under test decodes through PyAV, by seeking, in windows. Here another build of FFmpeg decodes the whole file
from its beginning, in one go, and nothing of vatt_engine takes part. Pictures are kept as fingerprints, since a file of
a minute in full size would need gigabytes.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

RATE = 48_000  # Hz of the sound that is compared
GRID = 32  # a fingerprint has at most GRID x GRID cells of RGB
CELL = 6  # and a cell at least so many pixels a side: how sharp edges of colour become RGB is a matter of taste
HOLE = 0.1  # seconds; ffmpeg's aresample, too, fills gaps from here on (min_hard_comp) and ignores smaller ones
TREMOR = 0.002  # seconds; what containers round, and what adds up of it
TIME_LIMIT = 600  # seconds for one call of ffmpeg
# Like the reader: colours interpolated, the mean of the channels instead of a sum that may clip, one float per sample.
TO_RGB = "showinfo=checksum=0,scale=flags=area+full_chroma_int+accurate_rnd{},format=rgb24"
# Where a colour sample lies among its four pixels. Before FFmpeg 7 the scaler did not ask the picture, and centred it.
SITES = {"left": ":in_h_chr_pos=0:in_v_chr_pos=128", "topleft": ":in_h_chr_pos=0:in_v_chr_pos=0"}
TO_MONO = f"ashowinfo,aresample={RATE}:rematrix_maxval=1.0,aformat=sample_fmts=flt:channel_layouts=mono"


class FFmpegError(RuntimeError):
    """ffmpeg or ffprobe makes nothing of the file; the message is the last thing that it said."""


class Pictures(NamedTuple):
    """All pictures of a track in the order of output.

    `times` [N] float64 in seconds of the container's clock, `prints` [N, rows, columns, 3] float16 (0 to 255), `sizes`
    as (height, width) of each picture after rotation, `interlaced` whether any picture is marked so.
    """

    times: Tensor
    prints: Tensor
    sizes: list[tuple[int, int]]
    interlaced: bool

    @property
    def step(self) -> float:
        """The usual distance of two pictures in seconds."""
        steps = self.times.diff()
        return float(steps.median()) if len(steps) else 0.04

    @property
    def end(self) -> float:
        return float(self.times.max()) + max(self.step, 0.0)


Frame = tuple[int | None, int, int]


class Piece(NamedTuple):
    """A stretch of sound without a hole: samples [first, last) of the line, the first of them at `time`."""

    time: float
    first: int
    last: int


class Sound(NamedTuple):
    """A whole track as mono float32 at RATE, and when its stretches sound, in seconds of the container's clock.

    `frames` are (time in samples or None, rate, number of samples) of each decoded frame.
    """

    samples: Tensor
    pieces: list[Piece]
    frames: list[Frame]

    @property
    def start(self) -> float:
        return self.pieces[0].time

    @property
    def end(self) -> float:
        return max(piece.time + (piece.last - piece.first) / RATE for piece in self.pieces)

    def window(self, time: float, count: int) -> tuple[Tensor, Tensor]:
        """Samples [count] from `time` on, zero where there are none, and a mask [count] of where there are some."""
        wave, mask = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
        for piece in self.pieces:
            offset = round((piece.time - time) * RATE)
            begin, end = max(offset, 0), min(offset + piece.last - piece.first, count)
            if begin < end:
                wave[begin:end] = self.samples[piece.first + begin - offset : piece.first + end - offset]
                mask[begin:end] = True
        return wave, mask


@dataclass(frozen=True)
class Truth:
    """A file as ffmpeg decodes it. `complaints` are its error messages; a sound file has none."""

    path: Path
    container: str
    streams: dict[str, dict[str, Any]]  # "video" and "audio" as ffprobe describes them
    promised: float | None  # seconds of the container's clock at which the file says that it ends
    pictures: Pictures | None
    sound: Sound | None
    complaints: list[str]
    second_0: float | None = None  # on the container's clock, where a rule says so
    drift: float = 0.0  # seconds by which sound may be off, since the stored times are off from the samples
    any_length: bool = False  # whether the file's own length is no more than a guess
    noise: float = 35.0  # dB of signal to noise; two resamplers at other phases differ next to the Nyquist rate

    @property
    def zero(self) -> float:
        """Second 0 of the windows: the first picture or the first sample, whichever is earlier."""
        if self.second_0 is not None:
            return self.second_0
        starts = [float(self.pictures.times.min())] if self.pictures else []
        return min([*starts, self.sound.start] if self.sound else starts)

    @property
    def duration(self) -> float:
        ends = [track.end for track in (self.pictures, self.sound) if track]
        if self.pictures and len(self.pictures.times) == 1:  # a still picture: nothing but the file tells
            ends.append(float(self.pictures.times[0]) + float(self.streams["video"].get("duration", 0)))
        return max(ends) - self.zero


def truth(path: Path, streams: dict[str, int]) -> Truth:
    """Decode a file with ffmpeg.

    Args:
        path: any media file.
        streams: which "video" and which "audio" stream, counted from 0 within their kind; none without such a key.

    Raises:
        FFmpegError: it decodes neither.
    """
    told = _probed(path, "-show_streams", "-show_format")
    described = {}
    for kind, number in streams.items():
        same = [stream for stream in told.get("streams", []) if stream.get("codec_type") == kind]
        if number < len(same):
            described[kind] = same[number]
    complaints: list[str] = []
    pictures = sound = None
    if "video" in streams:
        site = SITES.get(described.get("video", {}).get("chroma_location", ""), "")
        pictures = _pictures(path, f"0:v:{streams['video']}", TO_RGB.format(site), complaints)
    if "audio" in streams:
        sound = _sound(path, f"0:a:{streams['audio']}", complaints)
    if pictures is None and sound is None:
        raise FFmpegError(_plain(complaints[-1], path) if complaints else "no picture and no sound")
    name, promised = told["format"]["format_name"], _promised(told["format"], described)
    return Truth(path, name, described, promised, pictures, sound, complaints)


def _promised(container: dict[str, Any], streams: dict[str, dict[str, Any]]) -> float | None:
    """The latest end that the container tells of itself or, as Matroska does in a tag, of a stream."""
    tags = [stream.get("tags", {}).get("DURATION", "") for stream in streams.values()]
    clocks = [re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", tag) for tag in tags]
    ends = [sum(float(clock[i]) * 60 ** (3 - i) for i in (1, 2, 3)) for clock in clocks if clock]
    if "duration" in container:
        ends.append(float(container.get("start_time", 0)) + float(container["duration"]))
    return max(ends, default=None)


def decoding_times(path: Path) -> list[float]:
    """When each packet of the first video stream is decoded, in order; packets without content or time left out."""
    packets = _probed(path, "-select_streams", "v:0", "-show_entries", "packet=dts_time,size").get("packets", [])
    return [float(one["dts_time"]) for one in packets if "dts_time" in one and one.get("size") != "0"]


def _probed(path: Path, *options: str) -> dict[str, Any]:
    """What ffprobe says about a file."""
    command = ["ffprobe", "-v", "error", *options, "-of", "json", f"file:{path}"]
    run = subprocess.run(command, capture_output=True, timeout=TIME_LIMIT)
    if run.returncode:
        said = run.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise FFmpegError(_plain(said[-1], path))
    return json.loads(run.stdout)


def _plain(message: str, path: Path) -> str:
    """A message of ffmpeg without the path and the addresses in memory, which differ from machine to machine."""
    return re.sub(r" @ 0x[0-9a-f]+", "", message.replace(f"file:{path}: ", ""))


def version() -> str:
    """The version of ffmpeg."""
    run = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    return run.stdout.split()[2]


def _pictures(path: Path, stream: str, filters: str, complaints: list[str]) -> Pictures | None:
    options = ["-fps_mode", "passthrough", "-vf", filters, "-c:v", "ppm", "-f", "image2pipe"]
    prints, sizes = [], []
    with tempfile.TemporaryFile() as log:
        with _decoding(path, stream, options, log) as output:
            for picture in _ppm(output):
                sizes.append((picture.shape[0], picture.shape[1]))
                prints.append(fingerprint(picture, cells_of(*sizes[0])).half())
        lines = _log_lines(log, complaints)
    times, base, interlaced = [], 1.0, False
    for line in lines:
        if found := re.search(r"config in time_base: (\d+)/(\d+)", line):
            base = int(found[1]) / int(found[2])
        elif found := re.search(r"showinfo.* n: *\d+ pts: *(-?\d+|NOPTS) .* i:(\w)", line):
            times.append(int(found[1]) * base if found[1] != "NOPTS" else (times[-1] if times else 0.0))
            interlaced = interlaced or found[2] != "P"
    count = min(len(times), len(prints))
    if not count:
        return None
    ordered = torch.tensor(times[:count], dtype=torch.float64).cummax(0).values
    return Pictures(ordered, torch.stack(prints[:count]), sizes[:count], interlaced)


def _sound(path: Path, stream: str, complaints: list[str]) -> Sound | None:
    with tempfile.TemporaryFile() as log:
        with _decoding(path, stream, ["-af", TO_MONO, "-f", "f32le"], log) as output:
            content = bytearray(output.read())
        lines = _log_lines(log, complaints)
    samples = torch.frombuffer(content, dtype=torch.float32) if len(content) >= 4 else torch.zeros(0)
    frames = []
    for line in lines:
        if found := re.search(r"showinfo.* n:\d+ pts:(-?\d+|NOPTS) .* rate:(\d+) nb_samples:(\d+)", line):
            frames.append((None if found[1] == "NOPTS" else int(found[1]), int(found[2]), int(found[3])))
    if not frames or not len(samples):
        return None
    # A waveform of the reader has no other values; decoders of floats may give some.
    return Sound(samples.nan_to_num().clamp(-1, 1), pieces_of(frames, len(samples)), frames)


def pieces_of(frames: list[Frame], num_samples: int, *, patience: float = math.inf) -> list[Piece]:
    """Stretches without a hole; a jump of the times that is smaller than HOLE, too, is one if it stays for `patience`.

    Args:
        frames: see Sound.
        num_samples: of all of them, at RATE.
        patience: seconds.
    """
    starts, done, expected, late = [], 0.0, None, 0.0
    for number, (stamp, rate, count) in enumerate(frames):
        time = stamp / rate if stamp is not None else expected or 0.0
        jump = 0.0 if expected is None else time - expected
        late = late + count / rate if abs(jump) > TREMOR else 0.0
        if expected is None or abs(jump) > HOLE:
            starts.append((time, round(done)))
            expected, late = time, 0.0
        elif late >= patience:  # it has stayed: the hole is where the jump began
            first = number
            while late - frames[first][2] / frames[first][1] > 1e-9:
                late -= frames[first][2] / frames[first][1]
                first -= 1
            back = sum(length * RATE / speed for _, speed, length in frames[first:number])
            starts.append(((frames[first][0] or 0) / frames[first][1], round(done - back)))
            expected, late = time, 0.0
        expected += count / rate
        done += count * RATE / rate
    ends = [first for _, first in starts[1:]] + [num_samples]
    return [Piece(time, min(first, num_samples), min(last, num_samples)) for (time, first), last in zip(starts, ends)]


def stored_times(path: Path) -> list[float]:
    """The time that the container stores for each picture, in the order of the decoder's output; of the first track."""
    frames = _probed(path, "-select_streams", "v:0", "-show_entries", "frame=pts_time").get("frames", [])
    return [float(frame["pts_time"]) for frame in frames if "pts_time" in frame]


class _decoding:
    """One stream of a file on its way through ffmpeg, as a binary output; `log` takes what ffmpeg says."""

    def __init__(self, path: Path, stream: str, options: list[str], log: IO[bytes]):
        head = ["ffmpeg", "-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info", "-copyts"]
        self.command = [*head, "-i", f"file:{path}", "-map", stream, *options, "-"]
        self.log = log

    def __enter__(self) -> IO[bytes]:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self.log, bufsize=1 << 20)
        return self.process.stdout

    def __exit__(self, *_: object) -> None:
        self.process.stdout.close()
        self.process.wait(TIME_LIMIT)


def _log_lines(log: IO[bytes], complaints: list[str]) -> list[str]:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    complaints += [line for line in lines if ("[error]" in line or "[fatal]" in line) and "non monoton" not in line]
    return lines


def _ppm(output: IO[bytes]) -> Iterator[Tensor]:
    """Pictures [H, W, 3] uint8 of a stream of PPM files, which tell their size."""
    while output.readline().strip() == b"P6":
        width, height = map(int, output.readline().split())
        output.readline()
        content = output.read(width * height * 3)
        if len(content) < width * height * 3:
            return
        yield torch.frombuffer(bytearray(content), dtype=torch.uint8).view(height, width, 3)


def cells_of(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the fingerprint of a picture."""
    return min(max(height // CELL, 1), GRID), min(max(width // CELL, 1), GRID)


def fingerprint(picture: Tensor, cells: tuple[int, int]) -> Tensor:
    """A picture [H, W, 3] as the mean colours of equal areas, [rows, columns, 3] float32."""
    height, width, _ = picture.shape
    rows = (_areas(height, cells[0]) @ picture.reshape(height, -1).float()).view(-1, width, 3)
    return torch.einsum("cw,rwk->rck", _areas(width, cells[1]), rows)


@lru_cache(maxsize=64)
def _areas(size: int, parts: int) -> Tensor:
    """The share of each of `size` pixels in each of `parts` equal areas, [parts, size]."""
    edges = torch.arange(parts + 1, dtype=torch.float64) * size / parts
    pixels = torch.arange(size, dtype=torch.float64)
    upper, lower = torch.minimum(edges[1:, None], pixels + 1), torch.maximum(edges[:-1, None], pixels)
    return ((upper - lower).clamp_min(0) * parts / size).float()
