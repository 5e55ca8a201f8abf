"""One threshold for all axes."""

from dataclasses import dataclass

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import by_threshold


@ALLOCATORS.register("global")
@dataclass(frozen=True, kw_only=True)
class Global(Allocator):
    """Rank all units of all axes together and remove from the bottom until the limits hold.

    Scores that estimate the rise of the loss are ranked per cost: a unit's score over the largest share of a limit that
    its removal saves in the dense network, the order in which a continuous knapsack is emptied. Other scores are ranked
    as they are.
    """

    def _sizes(self, problem: Problem) -> Sizes:
        return by_threshold(
            problem,
            {
                axis.name: score_U / _saving(problem, axis.name) if problem.additive else score_U
                for axis in problem.axes
                for score_U in [problem.scores[axis.name].numpy()]
            },
        )


def _saving(problem: Problem, name: str) -> float:
    """Largest share of a limit that one unit of an axis costs in the dense network."""
    without = problem.full.copy()
    without[problem.network.index(name)] -= 1
    dense, less = problem.network.cost(), problem.network.cost(without)
    return max(max((dense[q] - less[q]) / limit for q, limit in problem.limits.items()), 1e-12)
