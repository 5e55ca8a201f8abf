"""One threshold for all axes, and a number of units that every axis keeps."""

from dataclasses import dataclass

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import by_share, by_threshold, ranked
from metaprune.errors import ConfigError

_LAST = 1e-6  # share of an axis that the threshold leaves whole; below one unit until all others have their minimum


@ALLOCATORS.register("global_mt")
@dataclass(frozen=True, kw_only=True)
class GlobalMinimumThreshold(Allocator):
    """Take the shares that one threshold for all scores removes, and scale them until the limits hold with a minimum.

    With `s` the share of an axis that one threshold removes, its removed share is `min(cap, a s)`, with one `a` for all
    axes, and the cap that leaves it the minimum: water-filling, exact in one bisection. Axes that the threshold leaves
    whole lose units last, and only where the others, at their minimum, cost too much.

    Source: Gupta et al., Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning,
    2022, arXiv:2209.14624, section 3.
    Differs from it: the threshold is the one that meets the limits, and `a` scales costs, not counts; scores that
    estimate the rise of the loss are ranked per cost, as by `global`; units are fewer than weights, so that the minimum
    is ten times the paper's.

    Args:
        minimum: Units that every axis keeps at least, as a share of the units of all axes, in [0, 1].
    """

    minimum: float = 0.005

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= 1:
            raise ConfigError(f"`0 <= minimum <= 1` must hold, but minimum={self.minimum}. 0.005 is a good start.")

    def _sizes(self, problem: Problem) -> Sizes:
        sizes = by_threshold(problem, ranked(problem))
        least = self.minimum * sum(axis.size for axis in problem.axes)
        places = {axis.name: problem.network.index(axis.name) for axis in problem.axes}
        removed = {axis.name: max(1 - sizes[places[axis.name]] / axis.size, _LAST) for axis in problem.axes}
        cap = {axis.name: max(0.0, 1 - least / axis.size) for axis in problem.axes}
        most = max((cap[name] / share for name, share in removed.items()), default=1.0)

        def shares(place: float) -> dict[str, float]:
            return {name: 1 - min(cap[name], (1 - place) * most * share) for name, share in removed.items()}

        return by_share(problem, shares)
