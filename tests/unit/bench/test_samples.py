"""The statistics of the benchmark."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import samples

times = st.lists(st.floats(min_value=1e-6, max_value=1e3), min_size=1, max_size=50)


@given(times, st.floats(min_value=0.01, max_value=1))
def test_a_percentile_is_a_value_that_its_share_does_not_exceed(values: list[float], share: float) -> None:
    found = samples.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values) + 1e-9


def test_percentiles_of_a_hundred() -> None:
    values = [float(value) for value in range(1, 101)]
    random.Random(1).shuffle(values)
    assert [samples.percentile(values, share) for share in (0.01, 0.5, 0.9, 0.99, 1)] == [1, 50, 90, 99, 100]


@pytest.mark.parametrize("share", [0, -0.5, 1.01])
def test_a_share_is_above_none_and_at_most_all(share: float) -> None:
    with pytest.raises(ValueError, match="no share"):
        samples.percentile([1.0], share)


def test_no_values_have_no_percentile_and_no_median() -> None:
    with pytest.raises(ValueError, match="no values"):
        samples.percentile([], 0.5)
    with pytest.raises(statistics.StatisticsError):
        samples.p50([])


def test_the_median_is_not_moved_by_one_slow_measurement() -> None:
    assert samples.p50([1.0, 1.1, 0.9, 500.0, 1.0]) == 1.0


def test_ratios_are_of_pairs_measured_side_by_side() -> None:
    assert samples.ratio_spread([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (1.0, 3.0)
    with pytest.raises(ValueError, match="zip"):
        samples.ratio_spread([1.0], [1.0, 2.0])


def test_each_round_has_all_variants_and_the_first_is_for_warming_up() -> None:
    found = list(samples.rounds(("a", "b", "c"), 20, random.Random(7)))
    assert [number for number, _ in found] == list(range(21))
    assert all(sorted(order) == ["a", "b", "c"] for _, order in found)
    assert len({tuple(order) for _, order in found}) > 1


def test_a_seed_gives_the_same_orders_again() -> None:
    first, second = (list(samples.rounds("abc", 10, random.Random(3))) for _ in range(2))
    assert first == second
