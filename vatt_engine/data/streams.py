"""A media file, or a member of a shard, as FFmpeg shall open it: within limits, from local files alone.

Every failure of FFmpeg leaves here as a MediaError that names the file.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from vatt_engine.data.manifest import Member
from vatt_engine.faults import raise_if_of_code

ROUNDING = 1e-3  # seconds; times in mkv, webm and flv are rounded to 1 ms
MEMBER_SUFFIXES = {"video": (".mp4", ".webm", ".avi"), "audio": (".flac",)}  # what of a shard is opened
MEMBER_FORMATS = "mov,matroska,avi,flac"  # as what, by FFmpeg's names


class MediaError(ValueError):
    """A media file that cannot be used, as `path: reason`."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What a file may ask for before anything is decoded.

    Args:
        max_pixels: height x width of a frame.
        max_seconds: length of the file.
        max_bytes: size of the file.
        max_frames: frames (or audio packets) decoded for one window, from the key frame before it on.
    """

    max_pixels: int = 8192 * 8192
    max_seconds: float = 12 * 3600.0
    max_bytes: int = 1 << 36
    max_frames: int = 100_000

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_seconds", "max_bytes", "max_frames"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MediaLimits: {name} must be above 0, got {getattr(self, name)}.")


DEFAULT_LIMITS = MediaLimits()


class Reach(NamedTuple):
    """How far a track was decoded: to `end` (give or take `slack`) of the wanted `stop`, in seconds, and in units.

    `holed`: a stretch within the window has no frames or samples. `heard`: of sound, the first sample of each stretch
    that the track has, and the one behind its last.
    """

    end: float
    slack: float
    stop: float
    num_got: int
    num_wanted: int
    unit: str
    holed: bool = False
    heard: tuple[tuple[int, int], ...] = ()


class Source:
    """A file whose tracks are read by time; `zero` is its first presentation time, which the reader sets.

    Or a member of a shard, read where it lies, with one track alone; `path` then only names it. Every failure of FFmpeg
    inside `faults`, of whatever class, leaves as a MediaError; a failure of our own code leaves as it is.
    """

    def __init__(self, path: str | Path, limits: MediaLimits, member: Member | None = None, kind: str | None = None):
        self.path, self.limits, self.zero = Path(path), limits, 0.0
        self.member, self.kinds = member, (kind,) if kind else ("video", "audio")
        file = member.path if member else self.path
        if not os.path.isfile(file):
            what = "a folder" if os.path.isdir(file) else "no such file"
            raise self.error(f"the path must name a file, got {what}.")
        if os.path.getsize(file) == 0:
            raise self.error("the file must hold media, got an empty file.")
        size = member.size if member else os.path.getsize(file)
        if size > limits.max_bytes:
            raise self.error(f"the file must have at most {limits.max_bytes} bytes, got {size}.")
        if member:
            self._check_member(member)
        else:
            self._check_riff(size)

    def _check_riff(self, size: int) -> None:
        """FFmpeg takes a wav or avi that is cut for one that is shorter."""
        with self.faults(), self.path.open("rb") as file:
            head = file.read(8)
        promised = 8 + int.from_bytes(head[4:], "little")
        if head[:4] == b"RIFF" and size + 64 < promised < 0x7FFFF000:  # from there on: written to a pipe, not known
            raise self.error(f"the file must have the {promised} bytes that it promises, got {size}.")

    def _check_member(self, member: Member) -> None:
        """The tar's own header, before the content, must tell what the index does."""
        with self.faults(), member.path.open("rb") as file:
            file.seek(member.offset - tarfile.BLOCKSIZE)
            info = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        names = [self.path.name + suffix for kind in self.kinds for suffix in MEMBER_SUFFIXES[kind]]
        if not info.isreg() or info.name not in names or info.size != member.size:
            text = f"be the file {' or '.join(names)} of {member.size} bytes, got {info.name!r} of {info.size}"
            raise self.error(f"the tar's member must {text}. Is the index of another tar?")
        _check_content(member, self.path)

    @property
    def codec_options(self) -> dict[str, str]:
        """FFmpeg refuses larger frames before it allocates them, also where it looks into a file to describe it."""
        return {"max_pixels": str(self.limits.max_pixels)}

    def error(self, reason: str) -> MediaError:
        return MediaError(self.path, reason)

    @contextmanager
    def faults(self) -> Iterator[None]:
        try:
            yield
        except MediaError:
            raise
        except Exception as error:  # PyAV raises seven classes on damaged files, MemoryError and IndexError among them
            raise_if_of_code(error, "av", "tarfile", doing=f"reading {self.path}")
            text = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
            raise self.error(f"the file must be media that FFmpeg can decode, got {text}.") from error

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The container and its best video and audio stream; whatever a playlist says, only local files are read."""
        import av
        from av.stream import Disposition

        url, local = f"file:{self.path}", {"protocol_whitelist": "file"}
        if self.member:
            begin, end = self.member.offset, self.member.offset + self.member.size
            url = f"subfile,,start,{begin},end,{end},,:file:{self.member.path}"
            local = {"protocol_whitelist": "file,subfile", "format_whitelist": MEMBER_FORMATS}
        tags = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}  # 19 reads any bytes
        with av.open(url, options=self.codec_options, container_options=local, **tags) as container:
            streams = {kind: container.streams.best(kind) for kind in self.kinds}
            if streams.get("video") is not None and streams["video"].disposition & Disposition.attached_pic:
                streams["video"] = None  # the cover of a song
            for kind, stream in streams.items():
                if stream is not None and stream.codec_context is None:
                    raise self.error(f"the {kind} codec must be one that FFmpeg decodes, got an unknown one.")
                if stream is not None and not stream.time_base:  # None in PyAV 18, 0/1 in PyAV 19
                    raise self.error(f"the {kind} must have a unit of time, got none.")
            yield container, {kind: stream for kind, stream in streams.items() if stream is not None}


def read_member(member: Member, path: Path) -> bytearray:
    """The bytes of a member of the sample that `path` names; they must be those that were prepared.

    Decoders do not notice all damage: of flipped bits they often make wrong pictures, of a lost end fewer ones.

    Raises:
        MediaError: the shard cannot be read, or has other bytes.
    """
    content = bytearray(member.size)
    try:
        with member.path.open("rb") as file:
            file.seek(member.offset)
            size = file.readinto(content)
    except OSError as error:
        raise MediaError(path, f"the shard must be readable, got {error.strerror}.") from error
    if not 0 < size == member.size:
        raise MediaError(path, f"the {member.suffix} must have {member.size or 'some'} bytes, got {size}.")
    digest = sha256(content).hexdigest()
    if digest != member.sha256:
        text = f"have the index's SHA-256, {member.sha256[:12]}..., got {digest[:12]}..."
        raise MediaError(path, f"the {member.suffix} must {text}.")
    return content


@lru_cache(maxsize=1 << 16)
def _check_content(member: Member, path: Path) -> None:
    """As read_member; once per member that is as it should be."""
    read_member(member, path)
