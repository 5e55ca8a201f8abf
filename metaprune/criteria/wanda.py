"""Weights times the norms of what they read."""

from dataclasses import dataclass
from typing import ClassVar

from metaprune.criteria._activations import entry_norms, judged_reads, read_moments, relative_mean, weighed_norm
from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.graph import Entries, Network


@CRITERIA.register("wanda")
@dataclass(frozen=True, kw_only=True)
class Wanda(Criterion):
    """Sum of `|w| * ||x||` over the weights that read a unit, where `||x||` is the norm of what they read of it.

    Relative to the mean of the axis, averaged over the layers that read it. Axes that no weight reads (the dimensions
    of query and key) are left out, and kept.

    An entry of a weight is worth `|w_ij| * ||x_j||`, as in the paper; a position of a kernel has the norm of what lies
    under it. Pattern ``row`` compares entries as the paper does, within each output.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, arXiv:2306.11695;
    over the units of an axis as Wanda-sp in An et al., FLAP, AAAI 2024, arXiv:2312.11983, section 4.
    Differs from them: all layers see the dense network; a kernel reads the norm of its whole input channel.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    entrywise: ClassVar[bool] = True

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        reads = judged_reads(network)
        moments, samples = read_moments(network, calibration, [read for group in reads.values() for read in group])
        scores = {}
        for axis, group in reads.items():
            norms = {read: (moments[read].energy_N / samples).sqrt() for read in group}
            scores[axis] = relative_mean([weighed_norm(network, read, norms[read]) for read in group])
        return scores

    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        norms, weights = entry_norms(entries, calibration), entries.weights
        return {name: weights[name].double().cpu().abs() * norm for name, norm in norms.items()}
