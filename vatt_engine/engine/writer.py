"""Checkpoints written beside training: a thread copies what only updates change, then hashes, writes and commits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vatt_engine.engine import checkpoint
from vatt_engine.engine.peers import Meeting


class CheckpointWriter:
    """Writes checkpoints in the background, at most one at a time; on several ranks, each writes its share.

    The tensors are copied into host memory that is kept for the next time (pinned where they come from a GPU): at once,
    or, those that last, by the thread, for which `settle` waits. A save that comes while one is being written
    waits for it, and says so. A write that fails leaves the older checkpoints as they are, and training goes on to the
    next save.

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
        self._copied = threading.Event()  # by the newest thread
        self._copied.set()
        self._path: Path | None = None
        self._error: OSError | None = None  # of the newest save
        self._news: list[str] = []

    def save(
        self,
        run_dir: str | Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        lasts: Callable[[str, str], bool] = lambda group, name: False,
    ) -> None:
        """Begin to write what is to be saved; what became of it is told by `news` or `finish`.

        Args:
            run_dir: run folder; on several ranks one that all of them see.
            step: number of finished steps.
            tensors: groups of named tensors, on several ranks the `checkpoint.share` of this one.
            state: JSON values.
            lasts: whether nobody changes the tensor of this group and name before `settle` returns.
        """
        if self._thread is not None and self._thread.is_alive():
            start = time.perf_counter()
            self._thread.join()
            waited = time.perf_counter() - start
            self._news.append(f"step {step}: training waited {waited:.1f} s for the checkpoint before to be written")
        self.join()
        meeting = self._next_meeting()
        now, later = {}, {}
        for group, values in tensors.items():
            for name, value in values.items():
                (later if lasts(group, name) else now)[group, name] = value
        self._copy(now)
        side = None
        if device := next((value.device for value in later.values() if value.is_cuda), None):
            side = torch.cuda.Stream(device)  # copies beside the next step, after what is queued for this one
            side.wait_stream(torch.cuda.current_stream(device))
        self._copied.clear()

        begin = threading.Event()  # so that `start` does not wait until the thread first lets go of Python

        def write() -> None:
            begin.wait()
            torch.set_num_threads(1)  # of this thread: the others are training's
            self._error = None
            try:
                with torch.cuda.stream(side):
                    self._copy(later)
                self._copied.set()
                copies = {group: {name: self._copies[group, name] for name in tensors[group]} for group in tensors}
                self._path = checkpoint.save(run_dir, step, copies, dict(state), keep=self.keep, meeting=meeting)
            except (OSError, MemoryError, RuntimeError) as error:  # the host's memory may be full as well
                self._error = error if isinstance(error, OSError) else OSError(str(error))
                if meeting is not None:
                    meeting.fail(str(error))
            finally:
                self._copied.set()

        # A daemon on several ranks: one whose peers have died must not wait for their word before it can end.
        self._thread = threading.Thread(target=write, daemon=meeting is not None)
        self._thread.start()
        begin.set()

    def settle(self) -> None:
        """Wait until the tensors of the newest `save` may change."""
        self._copied.wait()

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

    def _copy(self, live: Mapping[tuple[str, str], Tensor]) -> None:
        for place, value in live.items():
            copy = self._copies.get(place)
            if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                self._copies[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        if live:
            copies, values = [self._copies[place] for place in live], [value.detach() for value in live.values()]
            torch._foreach_copy_(copies, values, non_blocking=True)
        for device in {value.device for value in live.values() if value.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
