"""Several criteria in one."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.errors import ConfigError
from metaprune.graph import Network


@dataclass(frozen=True, kw_only=True)
class _Combined(Criterion):
    of: tuple[str, ...] = ("l2", "fpgm")

    def __post_init__(self) -> None:
        own = CRITERIA.name_of(type(self))
        if isinstance(self.of, str) or not self.of or own in self.of:
            raise ConfigError(f"`of` must name criteria other than {own!r}, but is {self.of!r}. Give e.g. (l2, fpgm).")
        object.__setattr__(self, "of", tuple(self.of))
        object.__setattr__(self, "needs", frozenset().union(*(CRITERIA[name].needs for name in self.of)))

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        parts = [CRITERIA[name]().score(network, calibration) for name in self.of]
        axes = [axis.name for axis in network.axes if all(axis.name in scores for scores in parts)]
        if not axes:
            raise ConfigError(f"some axis must be judged by all of {', '.join(self.of)}, but none is. Leave one out.")
        sizes = [network.axis(name).size for name in axes]
        combined_U = self._combine([torch.cat([scores[name] for name in axes]) for scores in parts])
        return dict(zip(axes, combined_U.split(sizes), strict=True))

    @abstractmethod
    def _combine(self, parts: list[Tensor]) -> Tensor:
        """One score a unit from those of all parts."""


@CRITERIA.register("rank_average")
@dataclass(frozen=True, kw_only=True)
class RankAverage(_Combined):
    """Mean of the ranks that a unit has by several criteria, among all units that all of them judge, in (0, 1].

    Equal scores share the mean of their ranks. The scale of a criterion plays no part, nor anything else but its order.

    Source: Borda's count, 1781.

    Args:
        of: Registered names.
    """

    def _combine(self, parts: list[Tensor]) -> Tensor:
        return torch.stack([_ranks(score_U) for score_U in parts]).mean(0)


@CRITERIA.register("product")
@dataclass(frozen=True, kw_only=True)
class Product(_Combined):
    """Product of the scores of several criteria, each relative to the mean of all units that all of them judge.

    A unit that one of them finds worthless is worthless. Source: the weighted product model, Bridgman, 1922.

    Args:
        of: Registered names.
    """

    def _combine(self, parts: list[Tensor]) -> Tensor:
        return torch.stack([score_U / score_U.mean().clamp_min(1e-300) for score_U in parts]).prod(0)


def _ranks(score_U: Tensor) -> Tensor:
    """Places in ascending order over their number, ties sharing their mean, in (0, 1].

    >>> import torch
    >>> _ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist()
    [0.875, 0.25, 0.875, 0.5]
    """
    _, place_U, count_D = score_U.unique(return_inverse=True, return_counts=True)
    last_D = count_D.cumsum(0)
    return ((last_D + last_D - count_D + 1).double() / 2)[place_U] / len(score_U)
