"""One level of every item, at the least value that a limit on the cost allows: the multiple-choice knapsack.

Array suffixes: L levels of an item, B bins of cost.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
BINS = 10_000


def knapsack(values: Sequence[Numbers], costs: Sequence[Numbers], limit: float, bins: int = BINS) -> list[int] | None:
    """Choose one level of every item so that the sum of values is least and the sum of costs is at most `limit`.

    Dynamic programming over the cost in `bins` steps. What each level costs beyond the cheapest of its item is rounded
    up, so that the limit holds whatever the rounding; the answer is exact for the rounded costs, hence exact for whole
    numbers that fit into the bins when they are counted in their greatest common divisor. Takes items x levels x bins
    additions and items x bins numbers of memory.

    Args:
        values: What is to be small, shape (L,) each; L may differ.
        costs: Likewise.
        limit: Largest sum of costs.
        bins: Steps of cost, at least 1.

    Returns:
        The place of the chosen level of each item; ties go to the cheapest, then to the first. None if nothing fits.

    >>> knapsack([np.array([5.0, 1, 0]), np.array([4.0, 0])], [np.array([0.0, 2, 3]), np.array([0.0, 2])], 3)
    [2, 0]
    """
    room = limit - sum(float(cost_L.min()) for cost_L in costs)
    if room < 0:
        return None
    extra = [cost_L - cost_L.min() for cost_L in costs]
    unit = _common_divisor(extra)
    if unit and room <= unit * bins:
        bins, step = int(room / unit), unit  # whole numbers that fit: nothing is rounded
    else:
        step = room / bins if room else 1.0
    steps = [np.ceil(np.minimum(cost_L / step, bins + 1) - 1e-9).astype(np.int64) for cost_L in extra]
    chosen = [_useful(value_L, step_L, bins) for value_L, step_L in zip(values, steps, strict=True)]
    tables = [np.zeros(bins + 1)]  # least value of the items so far, at each cost
    for value_L, step_L, levels in zip(values, steps, chosen):
        tables.append(_with_item(tables[-1], value_L, step_L, levels))
    return _way_back(tables, values, steps, chosen)


def _common_divisor(costs: Sequence[Numbers]) -> float:
    """The greatest one of whole numbers, 1 if all are 0; 0 if they are not whole."""
    every = np.concatenate([np.zeros(1), *costs])
    if (every != np.rint(every)).any() or every.max() >= 2**53:
        return 0.0
    return float(np.gcd.reduce(every.astype(np.int64))) or 1.0


def _useful(value_L: Numbers, step_L: npt.NDArray[np.int64], bins: int) -> list[int]:
    """Levels that no cheaper one beats, cheapest first."""
    order = np.lexsort((np.arange(len(value_L)), value_L, step_L))
    best, out = np.inf, []
    for level in order.tolist():
        if value_L[level] < best and step_L[level] <= bins:
            best = value_L[level]
            out.append(level)
    return out


def _with_item(table_B: Numbers, value_L: Numbers, step_L: npt.NDArray[np.int64], levels: list[int]) -> Numbers:
    out_B, buffer_B = np.full(len(table_B), np.inf), np.empty(len(table_B))
    for level in levels:
        start = int(step_L[level])
        candidate = np.add(table_B[: len(table_B) - start], value_L[level], out=buffer_B[start:])
        np.minimum(out_B[start:], candidate, out=out_B[start:])
    return out_B


def _way_back(
    tables: list[Numbers], values: Sequence[Numbers], steps: list[npt.NDArray[np.int64]], chosen: list[list[int]]
) -> list[int]:
    """The levels that led to the best entry: those whose sum, made in the same way, is the same number."""
    place = int(np.argmin(tables[-1]))
    out = []
    for k in range(len(values) - 1, -1, -1):
        level = next(
            level
            for level in chosen[k]
            if steps[k][level] <= place
            and tables[k][place - steps[k][level]] + values[k][level] == tables[k + 1][place]
        )
        out.append(level)
        place -= int(steps[k][level])
    return out[::-1]
