"""Norms of a unit's weights."""

from dataclasses import dataclass
from typing import ClassVar

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._norms import relative_norm
from metaprune.graph import Entries, Network


@CRITERIA.register("l1")
@dataclass(frozen=True, kw_only=True)
class L1(Criterion):
    """Sum of absolute weights of a unit.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710.
    Differs from it: every parameter slice of the unit counts, not the filter alone; each is taken relative to the mean
    of its axis, and the slices are averaged. An entry of a weight is worth its absolute value.
    """

    entrywise: ClassVar[bool] = True

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return relative_norm(network, 1)

    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        return _magnitudes(entries)


@CRITERIA.register("l2")
@dataclass(frozen=True, kw_only=True)
class L2(Criterion):
    """Euclidean norm of the weights of a unit.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710, with the 2-norm; groups as
    in Fang et al., DepGraph, CVPR 2023, arXiv:2301.12900.
    Differs from them: each slice is taken relative to the mean of its axis, and the slices are averaged. An entry of a
    weight is worth its absolute value.
    """

    entrywise: ClassVar[bool] = True

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return relative_norm(network, 2)

    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        return _magnitudes(entries)


def _magnitudes(entries: Entries) -> Scores:
    return {name: weight.double().cpu().abs() for name, weight in entries.weights.items()}
