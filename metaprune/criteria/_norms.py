"""Norms of units over all their parameters."""

import torch
from torch import Tensor

from metaprune.criteria._base import Scores
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
