"""How far a unit lies above what the sparsity of its layer says can go."""

from dataclasses import dataclass

from torch import Tensor

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._norms import relative_norm
from metaprune.errors import ConfigError
from metaprune.graph import Network


@CRITERIA.register("pq")
@dataclass(frozen=True, kw_only=True)
class Pq(Criterion):
    """Norm of a unit over the norm at which the PQ index of its axis would cut::

        I = 1 - d^(1/q - 1/p) |w|_p / |w|_q,   r = d (1 - I)^(q p / (q - p)),   cut after the d - r smallest norms

    So one threshold of 1 for all axes takes from each what its own sparsity allows, and none is held to a share.

    Source: Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective, ICLR 2023, arXiv:2302.05601,
    equations 1 and 2 with eta = 0, gamma = 1, over units with the norm of criterion ``l2``.
    Differs from it: the paper cuts each layer at its own number; here the number sets the scale of the scores.

    Args:
        p: Order of the smaller norm, in (0, q).
        q: Order of the larger one.
    """

    p: float = 0.5
    q: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.p < self.q:
            raise ConfigError(f"`0 < p < q` must hold, but p={self.p} and q={self.q}. 0.5 and 1 are the paper's.")

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return {axis: self._relative(norm_U) for axis, norm_U in relative_norm(network, 2).items()}

    def _relative(self, norm_U: Tensor) -> Tensor:
        removable = len(norm_U) - retained(pq_index(norm_U, self.p, self.q), len(norm_U), self.p, self.q)
        place = min(removable, len(norm_U) - 1.0)
        low, part = int(place), place - int(place)
        ordered = norm_U.sort().values
        at = ordered[low] * (1 - part) + ordered[min(low + 1, len(ordered) - 1)] * part
        return norm_U / at.clamp_min(1e-12 * float(ordered[-1]) + 1e-300)


def pq_index(norm_U: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """Sparsity of a vector, in [0, 1 - d^(1/q - 1/p)]: 0 if all entries are equal, largest if all but one are zero.

    >>> import torch
    >>> pq_index(torch.ones(8)), round(pq_index(torch.eye(50)[0]), 6)
    (0.0, 0.98)
    """
    size_U = norm_U.double().abs()
    large = size_U.max()
    if large == 0:
        return 0.0
    size_U = size_U / large
    ratio = (size_U.pow(p).sum() ** (1 / p)) / (size_U.pow(q).sum() ** (1 / q))
    return max(0.0, float(1 - len(size_U) ** (1 / q - 1 / p) * ratio))


def retained(index: float, count: int, p: float = 0.5, q: float = 1.0) -> float:
    """How many of `count` entries a vector of this PQ index needs, at least (the paper's lower bound, eta = 0)."""
    return count * (1 - index) ** (q * p / (q - p))
