"""Whose fault an exception is: the input's, which is told and survived, or the code's, which must end the run.

The class alone does not say. For damaged files a library raises whatever it stumbles over, ValueError, IndexError and
MemoryError among them, and a wrong call of ours raises the same. So a class that only wrong code raises is always the
code's. Any other is the input's where the library that reads the input raised it, or where its class speaks of files,
memory, encodings or numbers.
"""

from __future__ import annotations

import traceback
from types import FrameType

# What wrong code raises: a wrong argument, a name that a version of a library lacks, a broken promise.
OF_CODE = (TypeError, AttributeError, NameError, ImportError, AssertionError, NotImplementedError)
OF_INPUT = (OSError, MemoryError, EOFError, UnicodeError, ArithmeticError)


def is_of_input(error: BaseException, *readers: str) -> bool:
    """Whether an exception is about the input that is being read.

    Args:
        error: as it was caught.
        readers: top-level packages that read the input, such as "av". Their own exception classes are always about the
            input: av.error.NotImplementedError is FFmpeg's ENOSYS, not a method that someone forgot.

    >>> is_of_input(OSError("the disk is gone")), is_of_input(AttributeError("no such method"))
    (True, False)
    """
    if any(cls.__module__.partition(".")[0] in readers for cls in type(error).__mro__):
        return True
    if isinstance(error, OF_CODE):
        return False
    # torch has no class of its own for memory that it did not get: a file may promise a million frames.
    out_of_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, OF_INPUT) or out_of_memory or is_raised_in(error, *readers)


def is_raised_in(error: BaseException, *packages: str) -> bool:
    """Whether code of these top-level packages raised an exception; for an argument that it lacks, the caller did."""
    passed = [_package_of(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(passed) and passed[-1] in packages


def raise_if_of_code(error: Exception, *readers: str, doing: str) -> None:
    """End the run for an exception that is not about the input; to be called where it was caught.

    The exception goes on as it is, with a note of what was being read. Only a ValueError, which `vatt` shows as a
    message about bad input and no more, goes on as the cause of a RuntimeError.

    Args:
        error, readers: see is_of_input.
        doing: what was going on, such as "reading clip.mp4".
    """
    if is_of_input(error, *readers):
        return
    if isinstance(error, ValueError):
        text = f"{doing}: got {type(error).__name__}: {error} ({place_of(error)}). No input should cause this."
        raise RuntimeError(text) from error
    if not getattr(error, "__notes__", None):  # of whoever read the input, nearer to the place
        error.add_note(f"It happened while {doing}. No input should cause this.")
    raise error


def place_of(error: BaseException) -> str:
    """The last place in this package that an exception came through, as `file.py:12 in function`.

    >>> place_of(ValueError("not raised"))
    'outside vatt_engine'
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _package_of(frame) == "vatt_engine":
            file = frame.f_code.co_filename.rpartition("/")[2]
            return f"{file}:{line} in {frame.f_code.co_name}"
    return "outside vatt_engine"


def _package_of(frame: FrameType) -> str:
    """Of a function, the top level; what Cython compiled may have no module, but a file such as `av/frame.py`."""
    name = frame.f_globals.get("__name__") or frame.f_code.co_filename.replace("/", ".")
    return name.partition(".")[0]
