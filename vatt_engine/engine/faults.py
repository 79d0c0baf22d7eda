"""What stops a run or sets it back: signals, losses that are not numbers, losses that jump, memory that runs out."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from statistics import median
from types import FrameType

from vatt_engine.output import say

OUT_OF_MEMORY = (
    "the GPU's memory must hold the step, got out of memory. Three settings help, in this order: --engine.accumulate "
    "(twice as many, smaller parts of the batch; same result), --engine.precision bf16, --data.batch-size (fewer "
    "negatives: another result)."
)


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on; the message says why."""


class StopRequested(BaseException):
    """A signal asked for a stop where nothing had to be finished first."""


class StopSignals:
    """While entered, Ctrl-C, SIGTERM and SIGUSR1 ask for a stop instead of killing; `received` is the first's number.

    Until `begin` there is nothing to save, and a signal ends what runs at once. From then on it is finished first, but
    for what is `interruptible`. More signals change nothing, as launchers and schedulers send several; only a second
    Ctrl-C, of a person and not of torchrun, exits at once, which loses what is not saved. The exit code of a run that
    a signal ended is 128 + number: 130, 143 or 138.

    Python gives signals to the main thread alone, so in another one (of a sweep's agent, Ray, some notebooks) nothing
    is watched, which is said once per process.

    Raises:
        StopRequested: where a signal came and nothing has to be finished.

    >>> with StopSignals() as stop:
    ...     stop.received is None
    True
    """

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    said = False  # that this process cannot watch

    def __init__(self) -> None:
        self.received: int | None = None
        self.begun = self._waiting = False

    def __enter__(self) -> StopSignals:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in self.watched}
        elif not StopSignals.said:
            StopSignals.said = True
            say(
                "note: training runs outside the main thread, so signals are not handled: Ctrl-C and SIGTERM end it as "
                "they would any program, and what came after the newest checkpoint is lost."
            )
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            if handler is not None:  # None: set by a library in C, which Python cannot set again
                signal.signal(number, handler)

    def begin(self) -> None:
        """From here on there is something to finish and to save."""
        self.begun = True

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """What runs inside, like a wait for data or an evaluation, may be cut short; what follows is still finished."""
        self._waiting = True
        try:
            if self.received is not None:
                raise StopRequested(signal.Signals(self.received).name)
            yield
        finally:
            self._waiting = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            if self.received == number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
                os._exit(128 + number)
            return
        self.received = number
        what = "finishing the step, then saving" if self.begun else "stopping"
        more = "; once more exits at once" if number == signal.SIGINT else ""
        # os.write, because a handler may run inside a print of the main program
        os.write(2, f"\n{name}: {what}{more}.\n".encode())
        if self._waiting or not self.begun:
            raise StopRequested(name)


class SpikeGuard:
    """Finds a loss that is `factor` times the median of the last `window` ones; silent until half of them are there.

    A loss that jumps is not remembered, so it does not raise the median.

    Args:
        factor: 0 finds none.
        most: how often in a row a run may go back to the same checkpoint.

    >>> guard = SpikeGuard(3.0, window=4)
    >>> [guard.jumps(loss) for loss in (1.0, 1.1, 4.0, 1.0)]
    [False, False, True, False]
    """

    def __init__(self, factor: float, *, window: int = 100, most: int = 3) -> None:
        self.factor, self.least, self.most = factor, window // 2, most
        self.losses: deque[float] = deque(maxlen=window)
        self.went_back: list[int] = []  # to these steps

    def jumps(self, loss: float) -> bool:
        """Whether the loss of this step jumps; one that is not finite does not: its step was skipped."""
        if not math.isfinite(loss):
            return False
        if self.factor and len(self.losses) >= self.least and loss > self.factor * median(self.losses):
            return True
        self.losses.append(loss)
        return False

    def count(self, step: int) -> None:
        """Note that the run went back to the checkpoint of `step`.

        Raises:
            TrainingStopped: too often.
        """
        self.went_back.append(step)
        if self.went_back[-self.most :] == [step] * self.most:
            raise TrainingStopped(
                f"engine.spike_factor: the loss must not jump again, got {self.most} jumps in a row after step {step}, "
                "each with other data. Lower the learning rate, or clip gradients with --optim.clip-norm."
            )
