"""Depth: the branches whose removal loses least in sum, by an exact knapsack."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._branches import Branch, Outputs, find_branches, require_depth, sizes_without
from metaprune.allocate.knapsack import knapsack
from metaprune.errors import ConfigError


@ALLOCATORS.register("laptop")
@dataclass(frozen=True, kw_only=True)
class Laptop(Allocator):
    """Drop whole residual branches, those whose losses at the network's output add up to least.

    What the output loses without each branch alone is measured; losses are taken to add up, and what the branches cost
    does, so that the choice is a knapsack. For one limit it is solved exactly, where costs count in at most 10,000
    steps of their greatest common divisor, else with costs rounded up to such steps. With several, each is solved for,
    and branches are added by loss until all hold. Widths stay as they are, and scores play no part. Floors bound
    widths; a branch that must stay is one whose modules are frozen (``freeze=``).

    Source: Zhang et al., LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models, 2024,
    arXiv:2404.11098, equation 6.
    Differs from it: the loss is that of measure.distortion, for classifiers the KL divergence of their class scores in
    place of a squared error.

    Args:
        batches: At most so many are looked at, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    whole: ClassVar[bool] = True
    batches: int = 8

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ConfigError(f"`batches >= 1` must hold, but batches={self.batches}. 8 is a good start.")

    def _sizes(self, problem: Problem) -> Sizes:
        branches = find_branches(problem)
        require_depth(problem, branches)
        outputs = Outputs(problem, self.batches)
        losses = {branch: outputs.loss([branch]) for branch in branches}
        sets = [_completed(problem, dropped, losses) for dropped in _knapsacks(problem, losses)]
        return sizes_without(problem, min(sets, key=lambda dropped: sum(losses[branch] for branch in dropped)))


def _knapsacks(problem: Problem, losses: dict[Branch, float]) -> Iterator[list[Branch]]:
    """The branches to drop for each limit alone."""
    network, branches = problem.network, list(losses)
    dense = network.cost(problem.full)
    fewer = [network.cost(sizes_without(problem, [branch])) for branch in branches]
    for quantity, limit in problem.limits.items():
        savings = np.array([dense[quantity] - cost[quantity] for cost in fewer], float)
        values = [np.array([losses[branch], 0.0]) for branch in branches]
        kept = knapsack(
            values, [np.array([0.0, saving]) for saving in savings], limit - (dense[quantity] - savings.sum())
        )
        yield [branch for branch, level in zip(branches, kept or [0] * len(branches), strict=True) if level == 0]


def _completed(problem: Problem, dropped: list[Branch], losses: dict[Branch, float]) -> list[Branch]:
    """Drop more until all limits hold, and take back what need not go, the most valuable first."""
    left = sorted((branch for branch in losses if branch not in dropped), key=lambda branch: losses[branch])
    dropped = list(dropped)
    while not problem.fits(sizes_without(problem, dropped)):
        dropped.append(left.pop(0))
    for branch in sorted(dropped, key=lambda branch: -losses[branch]):
        rest = [other for other in dropped if other != branch]
        if problem.fits(sizes_without(problem, rest)):
            dropped = rest
    return dropped
