"""Command-line flags of a dataclass tree: `--section.field value`, read by tyro, checked by the schema."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from vatt_engine.refusals import Refusals
from vatt_engine.schema import ConfigError, expectation, from_dict, nearest, short, to_dict

T = TypeVar("T")


def parse_flags(config: T | type[T], argv: Sequence[str], *, prog: str, positional: Sequence[str] = ()) -> T:
    """A dataclass with the flags of `argv` set; `--help` prints all of them and exits with code 0.

    Args:
        config: an instance that gives what the flags leave out, or a class whose defaults do.
        argv: words of the command line; `-` and `_` are the same in a flag's name.
        prog: the command, for messages and help.
        positional: fields that may be given without their flag, in this order, before any flag.

    Raises:
        ConfigError: `<prog>: <flag> must <expectation>, got <value>.`

    >>> Point = dataclasses.make_dataclass("Point", [("x", int, 0)])
    >>> parse_flags(Point, ["--x", "3"], prog="vatt")
    Point(x=3)
    """
    import tyro

    cls = config if isinstance(config, type) else type(config)
    known = dict(_flags(cls))
    num_words = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words = list(argv[:num_words])
    flags = [part for word in argv[num_words:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) > len(positional):
        takes = " ".join(name.upper() for name in positional) or "flags only"
        raise ConfigError(f"{prog}: the arguments before the flags must be {takes}, got {words}.")
    args = [part for name, word in zip(positional, words) for part in (f"--{name}", word)]
    refusals = Refusals()
    args += [refusals.of(_checked, word, before, known, prog) for before, word in zip(["", *flags], flags)]
    if isinstance(config, type) and not {"-h", "--help"}.intersection(flags):
        given = {_name(word) for word in args if word}
        for name in _required(config):
            if name not in given:
                refusals.add(f"{prog}: --{name} must {expectation(known[name])}, got nothing.")
    refusals.settle()
    default = {} if isinstance(config, type) else {"default": config}
    options = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = tyro.cli(cls, args=args, prog=prog, config=options, **default)
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(f"{prog}: {_explain(errors.getvalue(), args, known)}") from None
    return from_dict(cls, to_dict(parsed), where=prog)


def _required(cls: type) -> list[str]:
    """Names of the fields without a default."""
    absent, fields = dataclasses.MISSING, dataclasses.fields(cls)
    return [field.name for field in fields if field.default is absent and field.default_factory is absent]


def _flags(cls: type, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names of all fields, with their annotations."""
    hints = typing.get_type_hints(cls)
    found: list[tuple[str, Any]] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        nested = dataclasses.is_dataclass(hint)
        found += _flags(hint, f"{prefix}{field.name}.") if nested else [(f"{prefix}{field.name}", hint)]
    return found


def _checked(word: str, before: str, known: dict[str, Any], prog: str) -> str:
    """The word itself; an unknown flag is refused, and true and false are spelt as tyro does."""
    if word in ("true", "false"):
        hint = known.get(_name(before))
        return word.capitalize() if hint is bool or bool in typing.get_args(hint) else word
    if re.match(r"--?[A-Za-z]", word) and word not in ("-h", "--help") and _name(word) not in known:
        hint = _nearest_flag(_name(word), list(known))
        raise ConfigError(f"{prog}: {word} must be a flag of this command, got an unknown one. {hint}")
    return word


def _name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _nearest_flag(name: str, known: list[str]) -> str:
    """The flag whose last part is nearest, one of the same section first; else what the section has."""
    section, _, own = name.rpartition(".")
    beside = [full for full in known if full.rpartition(".")[0] == section]
    for flags in (beside, known):
        close = nearest(own, [full.rpartition(".")[2] for full in flags])
        for full in flags:
            if close == f"Did you mean '{full.rpartition('.')[2]}'?":
                return f"Did you mean '--{full}'?"
    return f"Known names: --{', --'.join(beside)}." if beside else "See --help for the list."


def _explain(box: str, args: list[str], known: dict[str, Any]) -> str:
    """The refusal that tyro drew a box around, as one line by our grammar."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[│|╭╮╰╯]", "", line).strip() for line in box.strip().splitlines()]
    groups = [" ".join(group.split()) for group in re.split(r".*[-─]{4,}.*", "\n".join(lines))]
    message = next((group for group in groups[1:] if group), groups[0]).removeprefix("Error parsing ")
    refused = re.match(r"([\w.-]+): (?:\w+: )?(?:\w+\.)*(\w+) must (.*)", message)  # by a section's own checks
    if refused:
        name = f"{_name(refused[1])}.{refused[2]}"
        return f"--{name if name in known else refused[2]} must {refused[3]}"
    flag = re.search(r"--[A-Za-z][\w.-]*\w", message)
    if flag is None or _name(flag[0]) not in known:
        return re.sub(r"Unrecognized options: (.*)", r"every word must belong to a flag, got \1.", message)
    hint = known[_name(flag[0])]
    places = [i + 1 for i, word in enumerate(args) if _name(word) == _name(flag[0])]  # the last one counts
    start = places[-1] if places else len(args)
    values = list(itertools.takewhile(lambda word: not re.match(r"--?[A-Za-z]", word), args[start:]))
    got = ", ".join(map(short, values)) or "nothing"
    names = [choice for choice in typing.get_args(hint) if isinstance(choice, str)]
    close = nearest(values[0], names) if names and values else ""
    return (
        f"--{_name(flag[0])} must {expectation(hint)}, got {got}. {close if close.startswith('Did') else ''}".rstrip()
    )
