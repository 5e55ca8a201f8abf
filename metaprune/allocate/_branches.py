"""Residual branches as units: what they cost, and what the output loses without them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaprune.allocate._base import Problem, Sizes
from metaprune.errors import BudgetError
from metaprune.graph.blocks import Block
from metaprune.graph.record import tensors_in
from metaprune.graph.verify import leaving_out
from metaprune.measure import distortion
from metaprune.modes import evaluating
from metaprune.task import on_calibration_data


@dataclass(frozen=True)
class Branch:
    """A residual branch that may leave whole.

    Attributes:
        block: What leaves.
        places: Of the axes that lie in it alone, in the network's order.
    """

    block: Block
    places: tuple[int, ...]


def find_branches(problem: Problem) -> tuple[Branch, ...]:
    """The branches of a network in which an axis that may be cut lies; a cost knows the others to stay."""
    network = problem.traced
    parameters = dict(network.model.named_parameters())
    axes = {axis.name: {name for name, _ in axis.bindings if name in parameters} for axis in problem.axes}
    found = []
    for block in network.blocks:
        inside = [
            network.index(name)
            for name, bound in axes.items()
            if [op.index for op in network.joins.get(name, ())] == [block.join] and bound <= set(block.parameters)
        ]
        if inside:
            found.append(Branch(block, tuple(inside)))
    return tuple(found)


def sizes_without(problem: Problem, dropped: Collection[Branch]) -> Sizes:
    """Sizes of the network without some branches."""
    sizes = problem.full.copy()
    for branch in dropped:
        sizes[list(branch.places)] = 0
    return sizes


def require_depth(problem: Problem, branches: Sequence[Branch]) -> None:
    """Without all branches, the limits hold.

    Raises:
        BudgetError: They do not.
    """
    least = problem.network.cost(sizes_without(problem, branches))
    for quantity, limit in problem.limits.items():
        if least[quantity] > limit:
            raise BudgetError(
                f"{quantity} must reach {limit:.12g}, but without all {len(branches)} residual branches they are "
                f"{least[quantity]:.12g}. Raise the budget, or take an allocator of widths."
            )


class Outputs:
    """What the network's output loses without branches, on the calibration data."""

    def __init__(self, problem: Problem, batches: int) -> None:
        self.problem = problem
        self.batches = problem.first(batches)

    @cached_property
    def dense(self) -> list[Tensor]:
        """The outputs of the whole network."""
        return self._run(())

    def loss(self, dropped: Collection[Branch]) -> float:
        """Mean divergence from the whole network: in nats of class scores, else relative to the mean square."""
        pairs = zip(self.dense, self._run(dropped), strict=True)
        return float(np.mean([distortion(whole, cut) for whole, cut in pairs]))

    def _run(self, dropped: Collection[Branch]) -> list[Tensor]:
        network, task = self.problem.traced, self.problem.task
        assert task is not None
        outputs: list[Any] = []
        with evaluating(network.model):
            for batch in self.batches:
                with on_calibration_data(), leaving_out(network.layout, [branch.block for branch in dropped]):
                    outputs.append(task.outputs(network.model, batch))
        return [tensor.float() for tensor in tensors_in(outputs) if torch.is_floating_point(tensor)]
