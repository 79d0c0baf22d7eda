"""What stops a run: signals, and losses that are not numbers."""

from __future__ import annotations

import os
import signal
from types import FrameType


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on; the message says why."""


class StopSignals:
    """While entered, Ctrl-C and SIGTERM ask for a stop instead of killing; a second signal exits at once.

    `received` is None or the signal's number; the exit code of a run it ended is 128 + number (130, 143).

    >>> with StopSignals() as stop:
    ...     stop.received is None
    True
    """

    watched = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        self.previous = {number: signal.signal(number, self.handle) for number in self.watched}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        # os.write, because a handler may run inside a print of the main program
        os.write(2, f"\n{name}: finishing the step, then saving; once more exits at once.\n".encode())
