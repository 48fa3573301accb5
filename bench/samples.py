"""Statistics of measured times, and the order in which variants are measured."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

Variant = TypeVar("Variant")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of the values that `share` of them do not exceed (nearest rank).

    Raises:
        ValueError: There are no values, or the share is not above 0 and at most 1.
    """
    if not values:
        raise ValueError("there are no values")
    if not 0 < share <= 1:
        raise ValueError(f"{share} is no share")
    return sorted(values)[math.ceil(share * len(values)) - 1]


def p50(values: Sequence[float]) -> float:
    """Return the median.

    Raises:
        StatisticsError: There are no values.
    """
    return statistics.median(values)


def ratio_spread(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest ratio of pairs that were measured one right after the other.

    Raises:
        ValueError: They are not as many, or none.
    """
    ratios = [above / below for above, below in zip(numerator, denominator, strict=True)]
    return min(ratios), max(ratios)


def rounds(variants: Sequence[Variant], count: int, chance: random.Random) -> Iterator[tuple[int, Sequence[Variant]]]:
    """Yield the number of each round and all variants in an order of its own, so that drift meets all alike.

    Round 0 comes before the `count` that are asked for and is for warming up.
    """
    for number in range(count + 1):
        yield number, chance.sample(variants, len(variants))
