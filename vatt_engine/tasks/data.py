"""`vatt data <verb>`: work on sets of data."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from vatt_engine.schema import ConfigError, nearest

VERBS = {  # verb -> (module with `main(argv) -> exit code`, what it does)
    "merge": ("vatt_engine.tasks.data_merge", "join the indexes of the parts that `vatt prepare --part` made"),
}


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
        print("\n".join(["usage: vatt data VERB ...", "", *lines]), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] not in VERBS:
        hint = nearest(argv[0], VERBS)
        raise ConfigError(f"vatt data: the verb must be one of {', '.join(VERBS)}, got {argv[0]!r}. {hint}")
    return importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])
