"""Magnitudes that can be compared over layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._norms import relative_norm
from metaprune.graph import Network


@CRITERIA.register("lamp")
@dataclass(frozen=True, kw_only=True)
class Lamp(Criterion):
    """Squared norm of a unit over the sum of those of all units of its axis that are at least as large::

        score(u) = |w_u|^2 / sum_{v: |w_v| >= |w_u|} |w_v|^2

    The largest unit of every axis has score 1, so that one threshold for all axes never empties one.

    Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, arXiv:2010.07611,
    equation 4, over units with the norm of criterion ``l2``.
    """

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return {axis: lamp(norm_U) for axis, norm_U in relative_norm(network, 2).items()}


def lamp(norm_U: Tensor) -> Tensor:
    """The LAMP score of each norm; equal ones have equal scores.

    >>> import torch
    >>> lamp(torch.tensor([1.0, 2.0, 2.0])).tolist()
    [0.1111111111111111, 0.5, 0.5]
    """
    energy_U = norm_U.double().square()
    order = energy_U.argsort(descending=True, stable=True)
    total_U = energy_U[order].cumsum(0)
    # Of equal ones, all see the sum that ends with the last of them.
    last_U = torch.searchsorted(-energy_U[order], -energy_U, right=True) - 1
    return energy_U / total_U[last_U].clamp_min(1e-300)
