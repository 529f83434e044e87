"""Sets of options in which every two values meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any


def pairwise(options: Mapping[str, tuple]) -> Iterator[dict[str, Any]]:
    """Option sets in which every two values of different options meet at least once (greedy, deterministic)."""
    names = list(options)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]}
    while missing:
        (a, x), (b, y) = min(missing, key=repr)
        case = {a: x, b: y}
        for name in names:
            if name not in case:
                gain = {
                    value: sum(
                        ((n, case[n]), (name, value)) in missing or ((name, value), (n, case[n])) in missing
                        for n in case
                    )
                    for value in options[name]
                }
                case[name] = max(options[name], key=gain.__getitem__)
        missing -= {((p, case[p]), (q, case[q])) for p, q in itertools.combinations(names, 2)}
        yield {name: case[name] for name in names}
