"""Scores drawn at random: the control that every other criterion must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.graph import Entries, Network


@CRITERIA.register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Score every unit, or every entry, uniformly at random in (0, 1), from the seed of the calibration."""

    entrywise: ClassVar[bool] = True

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        generator = calibration.generator()
        return {
            axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64)
            for axis in network.axes
            if axis.prunable
        }

    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        generator = calibration.generator()
        return {
            name: torch.rand(entries.shapes[name], generator=generator, dtype=torch.float64) for name in entries.names
        }
