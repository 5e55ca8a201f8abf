"""Rounds, in each of which the sparsity of an axis says how much it may lose."""

from dataclasses import dataclass

import numpy as np

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import Numbers, by_share
from metaprune.errors import ConfigError


@ALLOCATORS.register("sap")
@dataclass(frozen=True, kw_only=True)
class Sap(Allocator):
    """Remove from each axis, round after round, what the PQ index of its remaining scores allows::

        I = 1 - d^(1/q - 1/p) |s|_p / |s|_q,   r = d ((1 + eta)^-1 (1 - I)^p)^(q / (q - p))
        removed of d units: d min(gamma (1 - r/d), beta)

    It stops in the round in which the limits hold, of which only the part is taken that is needed. Where the index
    allows no more (equal scores), or the rounds are over, what is left goes from all axes alike.

    Source: Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective, ICLR 2023, arXiv:2302.05601,
    algorithm 1, with p, q, eta, gamma and beta as there.
    Differs from it: scores are those of the dense network, because nothing is trained between the rounds.

    Args:
        p: Order of the smaller norm, in (0, q).
        q: Order of the larger one.
        eta: What the removed units may have of the p-th power of the kept ones, at least 0.
        gamma: How boldly to follow the index, above 0.
        beta: Largest share of an axis that one round removes, in (0, 1).
        rounds: At most so many, at least 1.
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    rounds: int = 30

    def __post_init__(self) -> None:
        if not 0 < self.p < self.q or self.eta < 0 or self.gamma <= 0 or not 0 < self.beta < 1 or self.rounds < 1:
            raise ConfigError(
                "`0 < p < q`, `eta >= 0`, `gamma > 0`, `0 < beta < 1` and `rounds >= 1` must hold, but they are "
                f"{self.p}, {self.q}, {self.eta}, {self.gamma}, {self.beta} and {self.rounds}."
            )

    def _sizes(self, problem: Problem) -> Sizes:
        ordered = {axis.name: np.sort(problem.scores[axis.name].numpy())[::-1] for axis in problem.axes}
        kept = {name: float(len(scores)) for name, scores in ordered.items()}
        for _ in range(self.rounds):
            after = {name: self._after(ordered[name], count) for name, count in kept.items()}
            if problem.fits(problem.sizes(after)) or after == kept:
                break
            kept = after

        def shares(place: float) -> dict[str, float]:
            return {
                name: (after[name] + place * (kept[name] - after[name])) / len(scores)
                for name, scores in ordered.items()
            }

        return by_share(problem, shares)

    def _after(self, scores: Numbers, count: float) -> float:
        """How many of the best `count` units one round keeps; never none."""
        left = scores[: int(count)]
        large = float(left.max())
        if large <= 0:
            return count
        left = left / large
        p, q = self.p, self.q
        norms = (left**p).sum() ** (1 / p), (left**q).sum() ** (1 / q)
        index = 1 - len(left) ** (1 / q - 1 / p) * norms[0] / norms[1]
        share = (1 + self.eta) ** (-q / (q - p)) * (1 - index) ** (q * p / (q - p))
        return max(1.0, float(int(count) - np.floor(len(left) * min(self.gamma * (1 - share), self.beta))))
