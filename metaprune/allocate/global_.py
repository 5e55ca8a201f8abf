"""One threshold for all axes."""

from dataclasses import dataclass

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import by_threshold, ranked


@ALLOCATORS.register("global")
@dataclass(frozen=True, kw_only=True)
class Global(Allocator):
    """Rank all units of all axes together and remove from the bottom until the limits hold.

    Scores that estimate the rise of the loss are ranked per cost, others as they are
    (:func:`metaprune.allocate._paths.ranked`).
    """

    def _sizes(self, problem: Problem) -> Sizes:
        return by_threshold(problem, ranked(problem))
