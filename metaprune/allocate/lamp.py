"""One threshold for scores that say what a unit is of its axis."""

from dataclasses import dataclass

import numpy as np

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import Numbers, by_threshold


@ALLOCATORS.register("lamp")
@dataclass(frozen=True, kw_only=True)
class LampGlobal(Allocator):
    """Rank all units by the square of their score over that of all units of their axis that are at least as large.

    Works with any scores that are in proportion to a magnitude; the scale of an axis plays no part, and its best unit
    is worth 1. Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021,
    arXiv:2010.07611, equation 4.
    """

    def _sizes(self, problem: Problem) -> Sizes:
        return by_threshold(problem, {axis.name: lamp(problem.scores[axis.name].numpy()) for axis in problem.axes})


def lamp(score_U: Numbers) -> Numbers:
    """Squares over the sums of the squares that are at least as large.

    >>> lamp(np.array([1.0, 2.0, 3.0])).round(3).tolist()
    [0.071, 0.308, 1.0]
    """
    square_U = (score_U / max(float(score_U.max()), 1e-300)) ** 2
    ascending = np.sort(square_U)
    total = np.cumsum(ascending[::-1])[::-1]  # of this one and all above
    return np.asarray(square_U / np.maximum(total[np.searchsorted(ascending, square_U)], 1e-300))
