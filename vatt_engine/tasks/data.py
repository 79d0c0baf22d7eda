"""`vatt data SUBCOMMAND`: what is done with datasets before training."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from vatt_engine.schema import ConfigError, nearest

SUBCOMMANDS = {  # subcommand -> (module with `main(argv) -> exit code`, what it does)
    "check": ("vatt_engine.tasks.data_check", "decode a whole set, and say what of it can be used"),
    "import": ("vatt_engine.tasks.data_import", "manifests of a known dataset from its annotation files"),
    "merge": ("vatt_engine.tasks.data_merge", "one index for the parts that `vatt prepare --part` made"),
}


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<8}{text}" for name, (_, text) in SUBCOMMANDS.items()]
        print("\n".join(["usage: vatt data SUBCOMMAND ...", "", *lines]))
        return 0 if argv else 2
    if argv[0] not in SUBCOMMANDS:
        hint = nearest(argv[0], SUBCOMMANDS)
        names = ", ".join(SUBCOMMANDS)
        raise ConfigError(f"vatt data: the subcommand must be one of {names}, got {argv[0]!r}. {hint}")
    return importlib.import_module(SUBCOMMANDS[argv[0]][0]).main(argv[1:])
