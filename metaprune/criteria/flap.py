"""How much what a unit feeds to its consumers fluctuates around its mean."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaprune.criteria._activations import judged_reads, over_units, read_moments
from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.graph import Network


@CRITERIA.register("flap")
@dataclass(frozen=True, kw_only=True)
class Flap(Criterion):
    """Variance of a unit times the squared norm of the weights that read it, added over the layers that do.

    This is what its removal costs a layer in mean squared output, apart from covariances, once its mean has gone into
    a bias or a BatchNorm. A unit that never changes is worth nothing. Layers differ in scale: allocator ``flap``
    standardises the scores of each axis, as the paper does. Axes that no weight reads (the dimensions of query and
    key) are left out, and kept.

    Source: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024,
    arXiv:2312.11983, equation 5 (WIFV).
    Differs from it: the variance is pooled exactly over batches; heads add what their dimensions have.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        reads = judged_reads(network)
        moments, _ = read_moments(network, calibration, [read for group in reads.values() for read in group])
        scores = {}
        for axis, group in reads.items():
            parts = []
            for read in group:
                energy = network.weights[read.binding[0]].detach().double().cpu().square()
                parts.append(over_units(network, read, energy * read.along(moments[read].variance_N, energy.shape)))
            scores[axis] = torch.stack(parts).sum(0)
        return scores
