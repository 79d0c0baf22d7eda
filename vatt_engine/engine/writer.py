"""Checkpoints written beside training: a copy at the step, and a thread that hashes, writes and commits it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vatt_engine.engine import checkpoint
from vatt_engine.engine.peers import Meeting


class CheckpointWriter:
    """Writes checkpoints in the background, at most one at a time; on several ranks, each writes its share.

    `save` copies the tensors into host memory that is kept for the next time (pinned where they come from a GPU), so
    training stops for the copy alone. A save that comes while one is being written waits for it, and says so. A write
    that fails leaves the older checkpoints as they are, and training goes on to the next save.

    Args:
        keep: how many checkpoints stay, at least 2.

    >>> writer = CheckpointWriter()
    >>> writer.save("run", 500, {"model": {"weight": torch.ones(2)}}, {})
    >>> writer.finish().name
    'step-00000500'
    """

    def __init__(self, *, keep: int = 2):
        self.keep = keep
        self._next_meeting = Meeting.series()
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: OSError | None = None  # of the newest save
        self._news: list[str] = []

    def save(
        self, run_dir: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Copy what is to be saved and begin to write it; what became of it is told by `news` or `finish`.

        Args:
            run_dir: run folder; on several ranks one that all of them see.
            step: number of finished steps.
            tensors: groups of named tensors, the same on all ranks.
            state: JSON values.
        """
        if self._thread is not None and self._thread.is_alive():
            start = time.perf_counter()
            self._thread.join()
            waited = time.perf_counter() - start
            self._news.append(f"step {step}: training waited {waited:.1f} s for the checkpoint before to be written")
        self.join()
        meeting = self._next_meeting()
        if meeting is not None:
            tensors = checkpoint.share(tensors, meeting.rank, meeting.size)
        copies = self._copy(tensors)
        self._thread = threading.Thread(
            target=self._write, args=(run_dir, step, copies, dict(state), meeting), name="vatt-checkpoint"
        )
        self._thread.start()

    def news(self) -> list[str]:
        """What happened since the last call, a line each: a checkpoint is written, or is not, or was waited for."""
        if self._thread is not None and not self._thread.is_alive():
            self.join()
        news, self._news = self._news, []
        return news

    def finish(self) -> Path:
        """Wait until nothing is being written; returns the folder of the newest save.

        Raises:
            OSError: it could not be written; older checkpoints are intact.
        """
        self.join()
        if self._error is not None:
            raise self._error
        return self._path

    def join(self) -> None:
        """Wait until nothing is being written; the outcome is in the news."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is None:
            self._news.append(f"saved {self._path}")
        else:
            reason = " ".join(str(self._error).split())
            text = "the checkpoint could not be written; older ones are intact, the next save tries again"
            self._news.append(f"warning: {text}. {reason}")

    def _copy(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        live = {(group, name): value.detach() for group, values in tensors.items() for name, value in values.items()}
        for place, value in live.items():
            copy = self._copies.get(place)
            if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                self._copies[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        copies = {place: self._copies[place] for place in live}
        if live:
            torch._foreach_copy_(list(copies.values()), list(live.values()), non_blocking=True)
        for device in {value.device for value in live.values() if value.is_cuda}:
            torch.cuda.synchronize(device)
        return {group: {name: copies[group, name] for name in values} for group, values in tensors.items()}

    def _write(self, run_dir: str | Path, step: int, tensors: Any, state: Any, meeting: Meeting | None) -> None:
        self._error = None
        try:
            self._path = checkpoint.save(run_dir, step, tensors, state, keep=self.keep, meeting=meeting)
        except OSError as error:
            self._error = error
