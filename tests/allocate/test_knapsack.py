"""The knapsack is what trying everything finds."""

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprune.allocate.knapsack import Numbers, knapsack


def brute_force(values: list[Numbers], costs: list[Numbers], limit: float) -> float | None:
    """Least sum of values under the limit."""
    sums = [
        sum(value_L[level] for value_L, level in zip(values, levels))
        for levels in product(*(range(len(value_L)) for value_L in values))
        if sum(cost_L[level] for cost_L, level in zip(costs, levels)) <= limit
    ]
    return min(sums, default=None)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), items=st.integers(1, 6), levels=st.integers(1, 6), share=st.floats(0, 1),
    whole=st.integers(2, 1000), unit=st.sampled_from([1, 640, 10**6]),
)  # fmt: skip
def test_it_equals_brute_force_for_whole_costs(
    seed: int, items: int, levels: int, share: float, whole: int, unit: int
) -> None:
    random = np.random.default_rng(seed)
    values = [random.random(levels) for _ in range(items)]
    costs = [unit * random.integers(0, whole, levels).astype(float) for _ in range(items)]
    limit = share * sum(float(cost_L.max()) for cost_L in costs)
    chosen, expected = knapsack(values, costs, limit), brute_force(values, costs, limit)
    if chosen is None:
        assert expected is None
        return
    assert sum(cost_L[level] for cost_L, level in zip(costs, chosen)) <= limit
    assert sum(value_L[level] for value_L, level in zip(values, chosen)) == pytest.approx(expected, abs=1e-12)


def test_whole_costs_are_counted_in_their_common_divisor() -> None:
    """The first two items fill the limit; in thousandths of it, each rounded up, they would not fit."""
    costs = [np.array([0.0, 640 * count]) for count in (1, 2, 3)]
    values = [np.array([2.0, 0]), np.array([2.0, 0]), np.array([3.0, 0])]
    assert knapsack(values, costs, 3 * 640, bins=1000) == [1, 1, 0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 1))
def test_costs_of_any_kind_are_rounded_up(seed: int, share: float) -> None:
    """What it finds holds the limit, and is no worse than the best under a limit lower by one bin an item."""
    random = np.random.default_rng(seed)
    values, costs = [random.random(5) for _ in range(5)], [random.random(5) for _ in range(5)]
    low, high = (sum(float(pick(cost_L)) for cost_L in costs) for pick in (np.min, np.max))
    limit = low + share * (high - low)
    chosen = knapsack(values, costs, limit, bins=1000)
    assert chosen is not None
    assert sum(cost_L[level] for cost_L, level in zip(costs, chosen)) <= limit + 1e-12
    tighter = brute_force(values, costs, limit - 5 * (limit - low) / 1000)
    assert tighter is None or sum(value_L[level] for value_L, level in zip(values, chosen)) <= tighter + 1e-12


def test_more_room_is_never_worse() -> None:
    random = np.random.default_rng(0)
    values, costs = [random.random(6) for _ in range(8)], [random.integers(0, 50, 6).astype(float) for _ in range(8)]
    sums = []
    for limit in range(60, 300, 7):
        chosen = knapsack(values, costs, limit)
        assert chosen is not None
        sums.append(sum(value_L[level] for value_L, level in zip(values, chosen)))
    assert sums == sorted(sums, reverse=True)


def test_nothing_fits() -> None:
    assert knapsack([np.zeros(2)], [np.array([3.0, 4.0])], 2.9) is None


def test_large_ones_are_fast() -> None:
    """Seconds are far above the 80 ms that it takes, for machines that do other things too."""
    random = np.random.default_rng(0)
    values = [np.sort(random.random(65))[::-1] for _ in range(128)]
    costs = [np.sort(random.random(65)) for _ in range(128)]
    start = time.perf_counter()
    assert knapsack(values, costs, 50.0) is not None
    assert time.perf_counter() - start < 2
