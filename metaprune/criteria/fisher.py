"""Diagonal of the Fisher information of gates on units."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._gradients import entry_changes, free_weights, gate_gradients, gradients_of_groups
from metaprune.errors import ConfigError
from metaprune.graph import Entries, Network


@CRITERIA.register("fisher")
@dataclass(frozen=True, kw_only=True)
class Fisher(Criterion):
    """How much the loss rises when a gate on a unit closes, to second order, with the Fisher information as curvature::

        score(u) = group / 2 * sum_{layers reading u} mean_groups (sum_{w of layer reading u} w * dL/dw)^2

    With ``group=1`` this is half the mean of squares of each sample's gradient, as in the paper; means over groups
    times their size estimate the same where the mean gradient is small, as in a trained network, and cost less. A unit
    that no weight reads (a dimension of query and key) is scored through the weights that make it. An entry of a weight
    is worth `group / 2 * mean_groups (w * dL/dw)^2`.

    Source: Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, arXiv:1801.05787,
    equation 9; gates through the weights that read a unit, layers added.

    Args:
        group: Samples whose gradients are averaged before they are squared, at least 1.
        samples: How many are looked at, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "gradients"})
    additive: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True
    group: int = 4
    samples: int = 1024

    def __post_init__(self) -> None:
        if self.group < 1 or self.samples < 1:
            raise ConfigError(
                f"`group >= 1` and `samples >= 1` must hold, but they are {self.group} and {self.samples}."
            )

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        weights = free_weights(network)
        axes = [axis for axis in network.axes if axis.prunable]
        totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
        seen = 0
        for count, gradients in gradients_of_groups(network, calibration, weights, self.group, self.samples):
            changes = network.sum_over_units({name: weights[name].detach() * g for name, g in gradients.items()})
            for axis in axes:
                signed = {entry.binding: entry.total_U for entry in changes[axis.name]}
                totals[axis.name] += count**2 / 2 * gate_gradients(axis, signed).square().sum(0)
            seen += count
        return {name: total_U / max(seen, 1) for name, total_U in totals.items()}

    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        return entry_changes(
            entries, calibration, self.group, self.samples, lambda count, change: count**2 / 2 * change.square()
        )
