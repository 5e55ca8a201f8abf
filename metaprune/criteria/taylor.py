"""First-order Taylor expansion of the loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._gradients import entry_changes, free_weights, gate_gradients, gradients_of_groups
from metaprune.errors import ConfigError
from metaprune.graph import Axis, Entries, Network


@CRITERIA.register("taylor")
@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """How much the loss changes, to first order, when what a unit feeds to its consumers is set to zero.

    For each layer that reads the unit, the change is the sum of weight times gradient over the weights that read it.
    Its absolute value is averaged over small groups of samples, by their sizes, and added over the layers::

        score(u) = sum_layers mean_groups | sum_{w of layer reading u} w * dL/dw |

    Source: Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017,
    arXiv:1611.06440, equation 7, with the activation gates expressed through the weights that read them.
    Differs from it: the changes of several layers are added in absolute value, so that those of a residual stream,
    which is read by many, cannot cancel; and the layers' norms play no part. A unit that no weight reads (a dimension
    of query and key) is scored through the weights that make it. An entry of a weight is worth
    `mean_groups |w * dL/dw|`.

    Args:
        group: Samples whose gradients are averaged before the absolute value is taken, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "gradients"})
    additive: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True
    group: int = 16

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ConfigError(f"`group >= 1` must hold, but group={self.group}. 16 is a good start.")

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        weights = free_weights(network)
        axes = [axis for axis in network.axes if axis.prunable]
        totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
        seen = 0
        for count, gradients in gradients_of_groups(network, calibration, weights, self.group):
            changes = network.sum_over_units({name: weights[name].detach() * g for name, g in gradients.items()})
            for axis in axes:
                totals[axis.name] += count * _change(
                    axis, {entry.binding: entry.total_U for entry in changes[axis.name]}
                )
            seen += count
        return {name: total_U / max(seen, 1) for name, total_U in totals.items()}

    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        return entry_changes(entries, calibration, self.group, None, lambda count, change: count * change.abs())


def _change(axis: Axis, signed: dict[tuple[str, int], Tensor]) -> Tensor:
    """Absolute change of the loss by unit: over the layers that read it, or one of those that make it."""
    gates = gate_gradients(axis, signed).abs()
    return gates.sum(0) if axis.consumers or not len(gates) else gates.mean(0)
