"""One threshold for scores in standard deviations of their axis."""

from dataclasses import dataclass

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import by_threshold


@ALLOCATORS.register("flap")
@dataclass(frozen=True, kw_only=True)
class FlapGlobal(Allocator):
    """Rank all units by how many standard deviations of their axis their score lies above its mean.

    Neither the scale nor the offset of an axis's scores plays a part. An axis whose scores are all equal lies at 0.

    Source: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024,
    arXiv:2312.11983, section 4.2 (adaptive structure search).
    Differs from it: units are counted by what they cost in fact, whatever their kind.
    """

    def _sizes(self, problem: Problem) -> Sizes:
        values = {}
        for axis in problem.axes:
            score_U = problem.scores[axis.name].numpy()
            values[axis.name] = (score_U - score_U.mean()) / max(
                float(score_U.std()), 1e-12 * abs(score_U).max(), 1e-300
            )
        return by_threshold(problem, values)
