"""The same share of every axis."""

from dataclasses import dataclass

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes


@ALLOCATORS.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Allocator):
    """Keep the same share of every axis, the largest that meets the limits. What rounding leaves is given back."""

    def _sizes(self, problem: Problem) -> Sizes:
        # Sizes change only where share * size passes an integer, so 40 halvings find the share exactly enough.
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            low, high = (share, high) if problem.fits(_at(problem, share)) else (low, share)
        return _at(problem, low)


def _at(problem: Problem, share: float) -> Sizes:
    return problem.sizes({axis.name: share * axis.size for axis in problem.axes})
