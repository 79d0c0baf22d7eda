"""What a command needs is checked at once and told at once: one refusal with several lines, not one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vatt_engine.schema import ConfigError

T = TypeVar("T")


class Refusals:
    """Collects what is wrong with the parts of a request.

    >>> refusals = Refusals()
    >>> refusals.of(int, "x"), refusals.of(int, "7")
    (None, 7)
    >>> refusals.settle()
    Traceback (most recent call last):
    vatt_engine.schema.ConfigError: invalid literal for int() with base 10: 'x'
    """

    def __init__(self) -> None:
        self._texts: dict[str, None] = {}  # the same text once, in the order in which they came

    def of(self, make: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """`make(...)`, or None where it refuses, by ValueError or OSError; `settle` then tells why."""
        try:
            return make(*args, **options)
        except (ValueError, OSError) as error:
            self.add(describe(error))
            return None

    def add(self, text: str) -> None:
        self._texts[text] = None

    def settle(self, kind: type[ValueError] = ConfigError) -> None:
        """Raise one error of this kind with all that was refused, a line each, if anything was."""
        if self._texts:
            raise kind("\n".join(self._texts))


def describe(error: Exception) -> str:
    """An error as the user should read it: its own words, or the file and what the system says about it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or type(error).__name__}."
    if isinstance(error, ModuleNotFoundError):
        return f"vatt: the package {error.name} must be installed, got none. Run `pip install {error.name}`."
    return str(error) or type(error).__name__
