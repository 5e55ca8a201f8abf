"""Weights times what they read and what the loss says of them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaprune.criteria._activations import entry_norms, judged_reads, over_units, read_moments, relative_mean
from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._gradients import free_weights, gradients_of_groups
from metaprune.errors import ConfigError
from metaprune.graph import Entries, Network
from metaprune.graph.reads import Read


@CRITERIA.register("gblm")
@dataclass(frozen=True, kw_only=True)
class Gblm(Criterion):
    """Sum of `|w| * (||x|| + G)` over the weights that read a unit, with the norm `G` of each weight's gradients::

        G = sqrt(sum_samples (scale * dL_sample/dw)^2)

    or with `order` 1 the sum of their absolute values. Relative to the mean of the axis, averaged over the layers that
    read it. Axes that no weight reads (the dimensions of query and key) are left out, and kept. An entry of a weight is
    worth `|w_ij| * (||x_j|| + G_ij)`, as in the paper.

    Source: Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models, 2023,
    arXiv:2311.04902, section 3, over the units of an axis, or entry by entry.

    Args:
        samples: Whose gradients are taken, one by one, at least 1.
        scale: Of gradients against activations, at least 0.
        order: Of the norm of the gradients, 1 or 2.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "gradients"})
    samples: int = 128
    scale: float = 100.0
    order: int = 2
    entrywise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1 or self.scale < 0 or self.order not in (1, 2):
            raise ConfigError(
                "`samples >= 1`, `scale >= 0` and `order` 1 or 2 must hold, but they are "
                f"{self.samples}, {self.scale} and {self.order}."
            )

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        reads = judged_reads(network)
        every = [read for group in reads.values() for read in group]
        moments, samples = read_moments(network, calibration, every)
        gradient = self._gradient_norms(network, calibration, {read.binding[0] for read in every})

        def worth(read: Read) -> Tensor:
            weight = network.weights[read.binding[0]].detach().double().cpu().abs()
            norm = read.along((moments[read].energy_N / samples).sqrt(), weight.shape)
            return over_units(network, read, weight * (norm + gradient[read.binding[0]]))

        return {axis: relative_mean([worth(read) for read in group]) for axis, group in reads.items()}

    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        norms, weights = entry_norms(entries, calibration), entries.weights
        gradient = self._gradient_norms(entries.network, calibration, set(norms))
        return {name: weights[name].double().cpu().abs() * (norm + gradient[name]) for name, norm in norms.items()}

    def _gradient_norms(self, network: Network, calibration: Calibration, names: set[str]) -> dict[str, Tensor]:
        """Norm over the samples of the scaled gradient of every weight, float64."""
        weights = free_weights(network)
        total = {name: torch.zeros(network.shapes[name], dtype=torch.float64) for name in names}
        for _, gradients in gradients_of_groups(network, calibration, weights, 1, self.samples):
            for name in names & gradients.keys():
                total[name] += (self.scale * gradients[name].double().cpu()).abs().pow(self.order)
        return {name: sums.pow(1 / self.order) for name, sums in total.items()}
