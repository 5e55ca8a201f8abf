"""One threshold for all axes."""

from dataclasses import dataclass

import numpy as np

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes


@ALLOCATORS.register("global")
@dataclass(frozen=True, kw_only=True)
class Global(Allocator):
    """Rank all units of all axes together and remove from the bottom until the limits hold.

    Scores that estimate the rise of the loss are ranked per cost: a unit's score over the largest share of a limit that
    its removal saves in the dense network, the order in which a continuous knapsack is emptied. Other scores are ranked
    as they are.
    """

    def _sizes(self, problem: Problem) -> Sizes:
        names, values = [], []
        for axis in problem.axes:
            score_U = np.sort(problem.scores[axis.name].numpy())
            names.append(np.full(axis.size, problem.network.index(axis.name)))
            values.append(score_U / _saving(problem, axis.name) if problem.additive else score_U)
        owner = np.concatenate(names)[np.argsort(np.concatenate(values), kind="stable")]

        def after(removed: int) -> Sizes:
            gone = np.bincount(owner[:removed], minlength=len(problem.full))
            return problem.sizes(
                {axis.name: axis.size - gone[problem.network.index(axis.name)] for axis in problem.axes}
            )

        low, high = 0, len(owner)  # cost falls with every removal: the first count that fits, by bisection
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if problem.fits(after(middle)) else (middle + 1, high)
        return after(low)


def _saving(problem: Problem, name: str) -> float:
    """Largest share of a limit that one unit of an axis costs in the dense network."""
    without = problem.full.copy()
    without[problem.network.index(name)] -= 1
    dense, less = problem.network.cost(), problem.network.cost(without)
    return max(max((dense[q] - less[q]) / limit for q, limit in problem.limits.items()), 1e-12)
