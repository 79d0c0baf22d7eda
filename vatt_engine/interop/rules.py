"""How weights from elsewhere become ours: rules, the copying, and a report that leaves nothing out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
SHOWN = 4  # names of a kind in a message


class Source(NamedTuple):
    """One of their variables: its possible names relative to the module, and its shape."""

    names: tuple[str, ...]
    shape: Shape


class Rule(NamedTuple):
    """Our parameter `name` is `join` of their variables `sources`."""

    name: str
    sources: tuple[Source, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    scope: str = ""  # a component that the official TensorFlow name must have, when any name has it


@dataclass
class ImportReport:
    """What an import did, by name; `unused` are their names, `missing` and `misshaped` ours with the reason."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every parameter was loaded and every variable used."""
        return not (self.missing or self.misshaped or self.unused)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for kind in ("missing", "misshaped", "unused"):
            names = getattr(self, kind)
            lines += [f"{kind}: {name}" for name in names[:SHOWN]]
            lines += [f"{kind}: and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        return "\n  ".join(lines)


class Match(NamedTuple):
    """A rule, our tensor that it makes, and the keys of the variables that it is made of."""

    rule: Rule
    target: Tensor
    keys: tuple[str, ...]

    def read(self, variables: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The rule's variables."""
        return [np.asarray(variables[key]) for key in self.keys]

    def misshaped(self, shapes: Sequence[Shape]) -> list[str]:
        """What is wrong with variables of these shapes."""
        return [
            f"{self.rule.name} (from {key}: {list(shape)}, expected {list(source.shape)})"
            for source, key, shape in zip(self.rule.sources, self.keys, shapes)
            if tuple(shape) != source.shape
        ]


def match(
    targets: Mapping[str, Tensor],
    rules: Iterable[Rule],
    variables: Mapping[str, np.ndarray],
    find: Callable[[Rule, Source], str | None],
) -> tuple[list[Match], ImportReport]:
    """Which variables make which of our tensors, without reading them; what is missing, and what is not used."""
    left, found, report = dict(targets), [], ImportReport()
    for rule in rules:
        target = left.pop(rule.name)
        keys = [find(rule, source) for source in rule.sources]
        absent = [source.names[0] for source, key in zip(rule.sources, keys) if key is None]
        if absent:
            report.missing.append(f"{rule.name} (from {', '.join(absent)})")
        else:
            found.append(Match(rule, target, tuple(keys)))
    report.missing += [f"{name} (no counterpart there)" for name in left]
    report.unused = sorted(set(variables).difference(*(one.keys for one in found)))
    return found, report


def shape_of(variables: Mapping[str, np.ndarray], key: str) -> Shape:
    """The shape of a variable, which a mapping that reads files tells without reading it."""
    tell = getattr(variables, "shape", None)
    return tuple(tell(key)) if callable(tell) else np.shape(variables[key])


@torch.no_grad()
def fill(
    model: nn.Module,
    rules: Iterable[Rule],
    variables: Mapping[str, np.ndarray],
    find: Callable[[Rule, Source], str | None],
    *,
    where: str,
    strict: bool,
    adapt: Callable[[Match], list[np.ndarray] | None] = lambda match: None,
) -> ImportReport:
    """Copy `variables` into `model` by `rules`.

    Args:
        find: the name of a rule's source among the variables, or None.
        where: what error messages start with.
        strict: raise unless every parameter is loaded and every variable is used.
        adapt: gives arrays to take in place of a rule's own, or None.

    Raises:
        ValueError: with the report, when `strict` and something is missing, unused or of another shape, before anything
            is copied; nothing could be loaded at all.
    """
    matches, report = match(model.state_dict(), rules, variables, find)
    adapted: dict[str, list[np.ndarray]] = {}
    fitting = []
    for one in matches:
        arrays = adapt(one)
        if arrays is not None:
            adapted[one.rule.name] = arrays
        shapes = [shape_of(variables, key) for key in one.keys] if arrays is None else [x.shape for x in arrays]
        if wrong := one.misshaped(shapes):
            report.misshaped += wrong
        else:
            fitting.append(one)
    report.loaded = [one.rule.name for one in fitting]
    if strict and not report.complete:
        raise ValueError(f"{where}: variables must match the {type(model).__name__} one to one, got\n  {report}")
    if not any(one.keys for one in fitting):
        names = ", ".join(sorted(variables)[:2])
        got = f"none among {len(variables)}, such as {names}" if names else "no variables"
        raise ValueError(f"{where}: variables must hold some of the {type(model).__name__}'s, got {got}.")
    for one in fitting:
        arrays = adapted.get(one.rule.name) or one.read(variables)
        # torch warns of arrays that must not be written to.
        one.target.copy_(torch.from_numpy(np.require(one.rule.join(arrays), requirements=("C", "W"))))
    return report


def under(inner: Iterable[Rule], ours: str, theirs: str = "", scope: str = "") -> Iterable[Rule]:
    """Rules of a part, named from the whole: `ours` before our names, `theirs` before theirs."""
    for rule in inner:
        sources = tuple(Source(tuple(theirs + name for name in s.names), s.shape) for s in rule.sources)
        yield Rule(f"{ours}.{rule.name}" if ours else rule.name, sources, rule.join, scope or rule.scope)


def same(name: str, theirs: str | Sequence[str], tensor: Tensor) -> Rule:
    """Our parameter is theirs as it is, under the first of its names that is there."""
    names = (theirs,) if isinstance(theirs, str) else tuple(theirs)
    return Rule(name, (Source(names, tuple(tensor.shape)),), lambda arrays: arrays[0])


def named(variables: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A torch state dict as arrays; half precision becomes float32, which holds it exactly."""
    half = (torch.float16, torch.bfloat16)
    return {
        name: (tensor.float() if tensor.dtype in half else tensor).detach().cpu().numpy()
        for name, tensor in variables.items()
    }


def first_of(variables: Mapping[str, np.ndarray]) -> Callable[[Rule, Source], str | None]:
    """A `find` by exact names."""
    return lambda _, source: next((name for name in source.names if name in variables), None)
