"""How weights from elsewhere become ours: rules, the copying, and a report that leaves nothing out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


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
            lines += [f"{kind}: {name}" for name in getattr(self, kind)]
        return "\n  ".join(lines)


@torch.no_grad()
def fill(
    model: nn.Module,
    rules: Iterable[Rule],
    variables: Mapping[str, np.ndarray],
    find: Callable[[Rule, Source], str | None],
    *,
    where: str,
    strict: bool,
    adapt: Callable[[Rule, list[np.ndarray], Tensor], list[np.ndarray]] = lambda rule, arrays, target: arrays,
) -> ImportReport:
    """Copy `variables` into `model` by `rules`.

    Args:
        find: the name of a rule's source among the variables, or None.
        where: what error messages start with.
        strict: raise unless every parameter is loaded and every variable is used.
        adapt: changes a rule's arrays before their shapes are compared, given our tensor.

    Raises:
        ValueError: with the whole report, when `strict` and something is missing, unused or of another shape.
    """
    targets, used, report = model.state_dict(), set(), ImportReport()
    for rule in rules:
        target = targets.pop(rule.name)
        keys = [find(rule, source) for source in rule.sources]
        if None in keys:
            absent = [source.names[0] for source, key in zip(rule.sources, keys) if key is None]
            report.missing.append(f"{rule.name} (from {', '.join(absent)})")
            continue
        used.update(keys)
        arrays = adapt(rule, [np.asarray(variables[key]) for key in keys], target)
        wrong = [
            f"{rule.name} (from {key}: {list(array.shape)}, expected {list(source.shape)})"
            for source, key, array in zip(rule.sources, keys, arrays)
            if array.shape != source.shape
        ]
        if wrong:
            report.misshaped += wrong
            continue
        target.copy_(torch.as_tensor(np.ascontiguousarray(rule.join(arrays))))
        report.loaded.append(rule.name)
    report.missing += [f"{name} (no counterpart there)" for name in targets]
    report.unused = sorted(set(variables) - used)
    if strict and not report.complete:
        raise ValueError(f"{where}: variables must match the {type(model).__name__} one to one, got\n  {report}")
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
