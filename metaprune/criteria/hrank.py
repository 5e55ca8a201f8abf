"""Rank of feature maps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaprune.criteria._activations import judged_reads, watch_reads
from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.errors import ConfigError
from metaprune.graph import Network
from metaprune.graph.reads import Read


@CRITERIA.register("hrank")
@dataclass(frozen=True, kw_only=True)
class HRank(Criterion):
    """Mean rank of the feature maps of a unit, as the layers that read it see them.

    Maps are matrices: axes whose units are not read as maps of at least 2 x 2 places in images are left out, and kept.

    Source: Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020, arXiv:2002.10179, equation 4.

    Args:
        samples: Images to look at, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    samples: int = 64

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"`samples >= 1` must hold, but samples={self.samples}. The paper takes 500.")

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        values = network.layout.trace.values
        reads = {
            axis: maps
            for axis, group in judged_reads(network).items()
            if (maps := [read for read in group if _is_map([dim.size for dim in values[read.value].dims], read)])
        }
        if not reads:
            raise ConfigError(
                "criterion 'hrank' needs feature maps (N, C, H, W) that layers read, but this network has none on an "
                "axis that may be cut. Take 'wanda', which reads vectors too."
            )
        ranks: dict[Read, list[Tensor]] = {}

        def look(read: Read, x_BHWN: Tensor) -> None:
            ranks.setdefault(read, []).append(torch.linalg.matrix_rank(x_BHWN.movedim(-1, 1)).double().cpu())

        watch_reads(network, calibration, [read for maps in reads.values() for read in maps], look, self.samples)
        return {
            axis: torch.stack(
                [read.units(torch.cat(ranks[read]).mean(0), network.axis(axis).size) for read in maps]
            ).mean(0)
            for axis, maps in reads.items()
        }


def _is_map(shape: list[int], read: Read) -> bool:
    return len(shape) == 4 and read.at == 1 and min(shape[2:]) > 1
