"""Distance to the geometric median of the filters of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metaprune.criteria._activations import relative_mean
from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.graph import Axis, Network


@CRITERIA.register("fpgm")
@dataclass(frozen=True, kw_only=True)
class Fpgm(Criterion):
    """Sum of the distances of a unit's filter to those of all other units of its axis.

    A unit that is near to all others can be replaced by them. The filter of a unit is its slice of the weights that
    make it; where several layers make it, each one's distances are taken relative to their mean, and averaged. An axis
    that no weight with further dimensions makes is left out, and kept.

    Source: He et al., Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration,
    CVPR 2019, arXiv:1811.00250, equation 7.
    """

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        scores = {}
        for axis in network.axes:
            filters = _filters(network, axis) if axis.prunable else []
            if filters:
                scores[axis.name] = relative_mean([torch.cdist(rows_UD, rows_UD).sum(1) for rows_UD in filters])
        return scores


def _filters(network: Network, axis: Axis) -> list[Tensor]:
    """What each weight that makes the units has for each of them, one row a unit, float64, shape (U, entries)."""
    filters = []
    values, index = network.layout.trace.parameters, network.index(axis.name)
    for name, dim in axis.bindings:
        if values[name].parameter and len(network.shapes[name]) > 1 and (name, dim) not in axis.consumers:
            ranks = network.layout.units_along(values[name].dims[dim], index)
            assert ranks is not None
            rank_N = torch.from_numpy(ranks)
            order = rank_N.argsort(stable=True)[int((rank_N < 0).sum()) :]
            rows = network.weights[name].detach().movedim(dim, 0)[order]
            filters.append(rows.reshape(axis.size, -1).double().cpu())
    return filters
