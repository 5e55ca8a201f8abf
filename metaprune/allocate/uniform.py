"""The same share of every axis."""

from dataclasses import dataclass

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import by_share


@ALLOCATORS.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Allocator):
    """Keep the same share of every axis, the largest that meets the limits. What rounding leaves is given back."""

    def _sizes(self, problem: Problem) -> Sizes:
        return by_share(problem, lambda share: {axis.name: share for axis in problem.axes})
