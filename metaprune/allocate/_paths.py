"""Ways from the dense network down: the first place on one that fits.

Everything falls along a way, so bisection finds it exactly.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from metaprune.allocate._base import Problem, Sizes

Numbers = npt.NDArray[np.float64]
Shares = Mapping[str, float]  # axis name -> share of its units that stay


def ranked(problem: Problem) -> dict[str, Numbers]:
    """Values by which units of all axes are ranked together.

    Scores that estimate the rise of the loss are taken per cost: over the largest share of a limit that one unit saves
    where no other has left, the order in which a continuous knapsack is emptied. Other scores are taken as they are.
    """
    scores = {axis.name: problem.scores[axis.name].numpy() for axis in problem.axes}
    return {name: score_U / _saving(problem, name) for name, score_U in scores.items()} if problem.additive else scores


def _saving(problem: Problem, name: str) -> float:
    """Largest share of a limit that one unit of an axis costs in the largest network."""
    without = problem.full.copy()
    without[problem.network.index(name)] -= 1
    most, less = problem.network.cost(problem.full), problem.network.cost(without)
    return max(max((most[q] - less[q]) / limit for q, limit in problem.limits.items()), 1e-12)


def by_threshold(problem: Problem, values: Mapping[str, Numbers]) -> Sizes:
    """Remove units in the order of their values, over all axes, until the limits hold; ties as axes and units stand.

    Args:
        problem: The problem.
        values: Axis name -> value of each unit, smallest first or in any order.
    """
    owner, value = [], []
    for axis in problem.axes:
        value.append(np.sort(values[axis.name]))
        owner.append(np.full(axis.size, problem.network.index(axis.name)))
    gone = np.concatenate(owner)[np.argsort(np.concatenate(value), kind="stable")]

    def after(removed: int) -> Sizes:
        count = np.bincount(gone[:removed], minlength=len(problem.full))
        return problem.sizes({axis.name: axis.size - count[problem.network.index(axis.name)] for axis in problem.axes})

    low, high = 0, len(gone)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.fits(after(middle)) else (middle + 1, high)
    return after(low)


def by_share(problem: Problem, shares_at: Callable[[float], Shares]) -> Sizes:
    """The largest shares on a way that fit; where none does, the lowest ones, all shrunk alike until they do.

    Args:
        problem: The problem.
        shares_at: Shares at a place in [0, 1]; none falls as the place rises.
    """

    def at(place: float) -> Sizes:
        shares, scale = shares_at(max(0.0, 2 * place - 1)), min(1.0, 2 * place)
        return problem.sizes({axis.name: scale * shares[axis.name] * axis.size for axis in problem.axes})

    # Sizes change only where a share times a size passes an integer, so 50 halvings find the place exactly enough.
    low, high = 0.0, 1.0
    for _ in range(50):
        place = (low + high) / 2
        low, high = (place, high) if problem.fits(at(place)) else (low, place)
    return at(low)
