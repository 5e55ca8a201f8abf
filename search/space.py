"""What a campaign may choose from, and what it can cost, before anything runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from metaprune.allocate import ALLOCATORS, Problem, Sizes
from metaprune.budget import QUANTITIES
from metaprune.errors import BudgetError
from metaprune.graph import Axis, Network
from metaprune.planning import reachable_limits
from metaprune.search.settings import CHOICES, Settings


@dataclass(frozen=True, eq=False)
class Space:
    """Levels of every axis, branches that may leave, and outer choices.

    Args:
        network: The traced network, without what the user froze.
        settings: The campaign.
        branches: Names of the residual branches that some allocator may drop whole.
    """

    network: Network
    settings: Settings
    branches: tuple[str, ...]

    @classmethod
    def of(cls, network: Network, settings: Settings) -> "Space":
        """The space of a campaign.

        Raises:
            ConfigError: The network has no axis that may be cut.
            BudgetError: A budget or limit is out of reach even at the lowest floor; the smallest cost is named.
        """
        whole = any(ALLOCATORS[name].whole for name in (*settings.choices.allocator, *settings.baselines))
        branches = tuple(block.name for block in network.blocks) if whole else ()
        space = cls(network, settings, branches)
        for target in settings.choices.budgets:
            budget = settings.budget(target)
            try:
                reachable_limits(
                    network, budget, floor=space.floor, round_to=space.round_to, grid=settings.space.grid
                )  # fmt: skip
            except BudgetError as error:
                raise BudgetError(
                    f"no network of this space has {budget}: {error} `metaprune search space` prints what can be had."
                ) from error
        return space

    @property
    def floor(self) -> float:
        """The lowest floor that can be chosen."""
        return min(self.settings.choices.floor)

    @property
    def round_to(self) -> int:
        """The finest alignment that can be chosen."""
        return min(self.settings.choices.round_to)

    @property
    def problem(self) -> Problem:
        """Legal sizes without any limit."""
        scores = {axis.name: torch.zeros(axis.size) for axis in self.network.axes if axis.prunable}
        return Problem(
            self.network, scores, {}, floor=self.floor, round_to=self.round_to, grid=self.settings.space.grid
        )  # fmt: skip

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that may be cut."""
        return self.problem.axes

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Smallest and largest cost that a network of this space can have, by quantity.

        Costs grow with every size, so the ends are those of all axes at once.
        """
        problem = self.problem
        rows = [problem.smallest, problem.full]
        if self.branches:
            rows.insert(0, self._without_branches(problem.smallest))
        costs = self.network.cost_many(np.stack(rows))
        return {name: (int(costs[name][0]), int(costs[name][-1])) for name in QUANTITIES}

    def _without_branches(self, smallest: Sizes) -> Sizes:
        sizes = smallest.copy()
        for k, axis in enumerate(self.network.axes):
            if axis.prunable and axis.droppable:
                sizes[k] = 0
        return sizes

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        dense = self.network.cost()
        problem = self.problem
        axes = [
            {"name": axis.name, "kind": axis.kind, "size": axis.size, "levels": problem.levels(axis).tolist()}
            for axis in problem.axes
        ]
        choices = self.settings.choices
        return {
            "axes": axes,
            "frozen": [
                {"name": axis.name, "size": axis.size, "reason": axis.reason}
                for axis in self.network.axes
                if not axis.prunable
            ],
            "branches": list(self.branches),
            "configurations_log10": round(_log10(len(axis["levels"]) for axis in axes), 1),
            "choices": {
                "budget": (
                    {name: list(ends) for name, ends in choices.budget.items()}
                    if isinstance(choices.budget, Mapping)
                    else list(choices.budget)
                ),
                **{name: list(getattr(choices, name)) for name in CHOICES},
            },
            "ranges": {
                name: {"least": least, "most": most, "least_share": least / max(1, dense[name])}
                for name, (least, most) in self.ranges().items()
            },
        }


def _log10(counts: Iterable[int]) -> float:
    return float(sum(np.log10(count) for count in counts))
