"""Strict conversion between trees of frozen dataclasses and plain dicts, and YAML files with line numbers.

Every error is a ConfigError by one grammar: `<where>: <a.b> must <expectation>, got <value>. <hint>`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")

PATH = "a path of the user's"
PathText = Annotated[str, PATH]  # a field that names a file or folder; `~` at its beginning is the home folder

MAX_YAML_BYTES = 1 << 20
MAX_YAML_NODES = 10_000  # counted after aliases are expanded, so an alias bomb ends here
MAX_YAML_DEPTH = 32


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, which key, and what was expected."""


def to_dict(config: Any) -> Any:
    """A dataclass tree as plain dicts, lists, strings, numbers, booleans and None.

    >>> Point = dataclasses.make_dataclass("Point", [("x", int, 0)])
    >>> to_dict(Point(x=3))
    {'x': 3}
    """
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(
    cls: type[T],
    mapping: Mapping[str, Any],
    *,
    where: str = "config",
    base: T | None = None,
    lines: Mapping[str, int] | None = None,
) -> T:
    """Build a dataclass from a plain dict, refusing every key and value its annotations do not allow.

    Args:
        cls: dataclass whose fields are dataclasses, int, float, bool, str, Path, Literal, tuple[...], dict[str, X]
            or unions of these (X | None).
        mapping: the values; a `-` in a key is read as `_`.
        where: what error messages start with, for example the file's name.
        base: an instance that gives the fields (at every depth) which `mapping` leaves out; else the class's defaults.
        lines: line number of each dotted key, for messages `<where>:<line>: ...`; see load_yaml.

    Raises:
        ConfigError: unknown key, missing required key, wrong type, NaN or infinity, value refused by the dataclass.

    >>> Point = dataclasses.make_dataclass("Point", [("x", int, 0)])
    >>> from_dict(Point, {"x": 3}, where="run.yaml")
    Point(x=3)
    """
    return _Source(where, lines or {}).build(cls, mapping, "", base)


def replace(config: T, changes: Mapping[str, Any], *, where: str = "override") -> T:
    """A copy of a dataclass tree with the dotted keys of `changes` set; errors as from_dict.

    >>> Point = dataclasses.make_dataclass("Point", [("x", int, 0)])
    >>> replace(Point(x=3), {"x": 4})
    Point(x=4)
    """
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: {key} must not be set together with the whole of {section}, got both.")
        if name in node:
            raise ConfigError(f"{where}: {key} must not be set together with one of its fields, got both.")
        node[name] = value
    return from_dict(type(config), nested, where=where, base=config)


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint of an error about an unknown name: the closest known one, or all of them.

    >>> nearest("sedd", ["seed", "steps"])
    "Did you mean 'seed'?"
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Known names: {', '.join(known)}."


class _Source:
    """Where the values come from, for messages; and the walk that builds dataclasses from them."""

    def __init__(self, where: str, lines: Mapping[str, int]):
        self.where, self.lines = where, lines

    def error(self, path: str, wanted: str, value: Any, hint: str = "") -> ConfigError:
        text = value if isinstance(value, _Words) else short(value)
        return ConfigError(f"{self.at(path)}: {path or 'the document'} must {wanted}, got {text}. {hint}".rstrip())

    def at(self, path: str) -> str:
        while path and path not in self.lines:  # a missing key is reported at its section
            path = re.sub(r"(^|\.)[^.\[]*$|\[\d+\]$", "", path)
        return f"{self.where}:{self.lines[path]}" if path in self.lines else self.where

    def build(self, cls: type, value: Any, path: str, base: Any = None) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise self.error(path, f"be a mapping of the fields of {cls.__name__}", value)
        hints = typing.get_type_hints(cls, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        given: dict[str, Any] = {}
        for key, item in value.items():
            name = key.replace("-", "_") if isinstance(key, str) else key
            here = f"{path}.{key}".lstrip(".")
            if name not in fields:
                hint = nearest(str(name), fields)
                raise self.error(here, f"be a field of {cls.__name__}", _Words("an unknown key"), hint)
            if name in given:
                raise self.error(here, "be given once", _Words("it twice ('-' and '_' are the same)"))
            given[name] = self.convert(hints[name], item, here, getattr(base, name, None))
        for name, field in fields.items():
            if name in given:
                continue
            if base is not None:
                given[name] = getattr(base, name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise self.error(f"{path}.{name}".lstrip("."), "be given", _Words("nothing"))
        try:
            return cls(**given)
        except ConfigError:
            raise
        except ValueError as refusal:
            raise self.refused(str(refusal), path, fields) from refusal

    def refused(self, message: str, path: str, fields: Iterable[str]) -> ConfigError:
        """The dataclass's own complaint, with the full key and the line in place of its first words."""
        match = re.match(r"(?:[\w.]+: )?(?:\w+\.)*(\w+)(?= must )", message)
        if match is None or match[1] not in fields:
            return ConfigError(f"{self.at(path)}: {path}: {message}".replace(": : ", ": "))
        here = f"{path}.{match[1]}".lstrip(".")
        return ConfigError(f"{self.at(here)}: {here}{message[match.end() :]}")

    def convert(self, hint: Any, value: Any, path: str, base: Any = None) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return self.convert_union(hint, value, path, base)
        if dataclasses.is_dataclass(hint):
            return self.build(hint, value, path, base if isinstance(base, hint) else None)
        if origin is Annotated:
            found = self.convert(args[0], value, path)
            return os.path.expanduser(found) if PATH in args[1:] else found
        if origin is Literal:
            if not any(type(value) is type(choice) and value == choice for choice in args):
                hint = nearest(value, [a for a in args if isinstance(a, str)]) if isinstance(value, str) else ""
                raise self.error(path, expectation(Literal[args]), value, hint if hint.startswith("Did") else "")
            return value
        if origin is tuple and isinstance(value, list | tuple):
            kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
            if len(kinds) != len(value):
                raise self.error(path, expectation(hint), value)
            return tuple(self.convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
        if origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: self.convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
        return self.scalar(hint, value, path)

    def convert_union(self, hint: Any, value: Any, path: str, base: Any) -> Any:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if value is None and len(kinds) < len(typing.get_args(hint)):
            return None
        if len(kinds) == 1:
            return self.convert(kinds[0], value, path, base)
        for kind in sorted(kinds, key=lambda kind: kind is float):  # int before float, so that 3 stays 3
            try:
                return self.convert(kind, value, path, base)
            except ConfigError:
                continue
        raise self.error(path, expectation(hint), value)

    def scalar(self, hint: Any, value: Any, path: str) -> Any:
        if hint is float and type(value) in (int, float):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
        elif hint is Path and isinstance(value, str | Path):
            return Path(value)
        elif hint in (int, str, bool) and type(value) is hint:
            return value
        raise self.error(path, expectation(hint), value)


def with_article(words: str) -> str:
    """Words behind their indefinite article, by the first letter.

    >>> with_article("audio tower")
    'an audio tower'
    """
    return f"{'an' if words[:1].lower() in tuple('aeiou') else 'a'} {words}"


class _Words(str):
    """Text that goes into a message as it is, not as a quoted value."""


def short(value: Any) -> str:
    """A value as messages show it: its repr, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def expectation(hint: Any) -> str:
    """What an annotation asks for, as the words after `must` in a message.

    >>> expectation(int | None)
    'be an integer or null'
    """
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", Path: "a path"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return expectation(args[0])
    if hint in names:
        return f"be {names[hint]}"
    if hint is type(None):
        return "be null"
    if dataclasses.is_dataclass(hint):
        return f"be a mapping of the fields of {hint.__name__}"
    if origin is Literal:
        return f"be one of {', '.join(map(repr, args))}"
    if origin is tuple:
        one = expectation(args[0]).removeprefix("be ")
        return f"be a list, each {one}" if args[-1] is Ellipsis else f"be a list of {len(args)}, each {one}"
    if origin is dict:
        return f"be a mapping of names, each value {expectation(args[1]).removeprefix('be ')}"
    if origin in (typing.Union, types.UnionType):
        return "be " + " or ".join(expectation(kind).removeprefix("be ") for kind in args)
    raise TypeError(f"schema: annotation must be one that from_dict supports, got {hint!r}")


# ---------------------------------------------------------------------------------------------- YAML


class Document(NamedTuple):
    """A YAML file as plain values: `from_dict(cls, values, where=where, lines=lines)`."""

    values: dict[str, Any]
    lines: dict[str, int]
    where: str


def load_yaml(path: str | Path) -> Document:
    """Read one YAML mapping of plain values, remembering the line of each dotted key.

    Only null, true/false, decimal integers, floats (`1e-4` is one), strings, lists and mappings exist here: tags,
    duplicate keys, several documents, merge keys and alias bombs are errors.

    Raises:
        ConfigError: with `file:line:`.

    >>> _ = Path("run.yaml").write_text("engine: {steps: 600}")
    >>> load_yaml("run.yaml").values
    {'engine': {'steps': 600}}
    """
    import yaml

    path, where = Path(path), str(path)
    if not path.is_file():
        raise ConfigError(
            f"{where}: the config file must exist, got {'a folder' if path.is_dir() else 'no such file'}."
        )
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(f"{where}: the config file must be at most {MAX_YAML_BYTES} bytes, got more.")
    loader = _yaml_class(yaml.SafeLoader)
    try:
        root = yaml.compose(content, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark is not None else where
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise ConfigError(f"{at}: the document must be one valid YAML mapping, got an error: {problem}.") from error
    except (ValueError, OverflowError, RecursionError) as error:  # PyYAML lets these out for \UFFFFFFFF or [[[[...
        raise ConfigError(f"{where}: the document must be one valid YAML mapping, got an error: {error}.") from error
    if root is None:
        raise ConfigError(f"{where}: the document must be one valid YAML mapping, got an empty file.")
    tree = _Tree(where)
    values = tree.values(root, "", 0)
    if not isinstance(values, dict):
        raise ConfigError(f"{where}:1: the document must be one valid YAML mapping, got {short(values)}.")
    return Document(values, tree.lines, where)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML text that load_yaml reads back to the same values.

    >>> print(dump_yaml({"lr": 1e-4}), end="")
    lr: 0.0001
    """
    import yaml

    dumper = _yaml_class(yaml.SafeDumper)
    return yaml.dump(dict(values), Dumper=dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _yaml_class(base: type) -> type:
    """PyYAML's safe loader or dumper with the few scalars of YAML 1.2's JSON schema, so `no` and `1:30` are strings."""
    cls = type(f"Plain{base.__name__}", (base,), {"yaml_implicit_resolvers": {}})
    cls.ignore_aliases = lambda self, data: True
    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
        ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ):
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    return cls


class _Tree:
    """YAML nodes -> plain values, with the line of each key and within limits."""

    def __init__(self, where: str):
        self.where, self.lines, self.count = where, {}, 0

    def error(self, node: Any, text: str) -> ConfigError:
        return ConfigError(f"{self.where}:{node.start_mark.line + 1}: {text}")

    def values(self, node: Any, path: str, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_YAML_NODES or depth > MAX_YAML_DEPTH:
            limits = f"{MAX_YAML_NODES} values and {MAX_YAML_DEPTH} levels"
            raise self.error(node, f"{path or 'the document'} must stay under {limits} (aliases expanded), got more.")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "map" and node.id == "mapping":
            return self.mapping(node, path, depth)
        if kind == "seq" and node.id == "sequence":
            return [self.item(child, f"{path}[{i}]", depth) for i, child in enumerate(node.value)]
        if node.id != "scalar" or kind not in ("null", "bool", "int", "float", "str"):
            raise self.error(node, f"{path or 'the document'} must be a plain value, got the tag {node.tag!r}.")
        text = node.value
        try:
            if kind == "str":
                text.encode()
                return text
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "null":
                return None
            return int(text) if kind == "int" else float(text.replace(".inf", "inf").replace(".nan", "nan").lower())
        except (ValueError, KeyError) as error:
            raise self.error(node, f"{path} must be a valid {kind}, got {short(text)}.") from error

    def item(self, node: Any, path: str, depth: int) -> Any:
        self.lines[path] = node.start_mark.line + 1
        return self.values(node, path, depth + 1)

    def mapping(self, node: Any, path: str, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.id != "scalar" or key_node.tag != "tag:yaml.org,2002:str":
                shown = short(key_node.value) if key_node.id == "scalar" else with_article(key_node.id)
                raise self.error(key_node, f"{path or 'the document'} must have names as its keys, got {shown}.")
            key = key_node.value
            here = f"{path}.{key}".lstrip(".")
            if key in result:
                raise self.error(key_node, f"{here} must be given once, got it on line {self.lines[here]} too.")
            self.lines[here] = key_node.start_mark.line + 1
            result[key] = self.values(value_node, here, depth + 1)
        return result
