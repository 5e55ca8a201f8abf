"""Norms of a unit's weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.graph import Network


def relative_norm(network: Network, power: int) -> Scores:
    """Norm of each unit's slice of every parameter, relative to the mean of its axis, averaged over the parameters.

    Relative, because layers of different width and kernel have norms of different scale; averaged, so that an axis
    bound to many parameters is not favoured over one bound to few.
    """
    names = [name for name, _ in network.model.named_parameters()]

    def powers(weight: Tensor) -> Tensor:
        return weight.to(torch.float64, copy=True).abs_().pow_(power)

    sums = network.sum_over_units(network.weights, names, powers)
    scores = {}
    for axis in network.axes:
        if axis.prunable:
            norms = [entry.total_U.pow(1 / power) for entry in sums[axis.name]]
            relative = [norm_U / norm_U.mean().clamp_min(1e-300) for norm_U in norms]
            scores[axis.name] = torch.stack(relative).mean(0) if relative else torch.ones(axis.size).double()
    return scores


@CRITERIA.register("l1")
@dataclass(frozen=True, kw_only=True)
class L1(Criterion):
    """Sum of absolute weights of a unit.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710.
    Differs from it: every parameter slice of the unit counts, not the filter alone; each is taken relative to the mean
    of its axis, and the slices are averaged.
    """

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return relative_norm(network, 1)


@CRITERIA.register("l2")
@dataclass(frozen=True, kw_only=True)
class L2(Criterion):
    """Euclidean norm of the weights of a unit.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710, with the 2-norm; groups as
    in Fang et al., DepGraph, CVPR 2023, arXiv:2301.12900.
    Differs from them: each slice is taken relative to the mean of its axis, and the slices are averaged.
    """

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return relative_norm(network, 2)
