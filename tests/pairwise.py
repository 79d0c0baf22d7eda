"""Few test cases in which any two options meet with any of their values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations in which any two values of any two options meet at least once."""
    draw = random.Random(0)

    def enumerated(name: str) -> list[tuple[str, int]]:
        return [(name, i) for i in range(len(options[name]))]

    left = {
        pair
        for one, other in itertools.combinations(options, 2)
        for pair in itertools.product(enumerated(one), enumerated(other))
    }
    rows = []
    while left:
        seed = dict(draw.choice(sorted(left)))
        candidates = [{name: draw.randrange(len(values)) for name, values in options.items()} | seed for _ in range(50)]
        best = max(candidates, key=lambda row: sum(pair in left for pair in itertools.combinations(row.items(), 2)))
        left.difference_update(itertools.combinations(best.items(), 2))
        rows.append({name: options[name][i] for name, i in best.items()})
    return rows
