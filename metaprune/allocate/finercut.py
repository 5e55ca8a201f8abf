"""Depth: one branch after another, each time the one that the output misses least."""

from dataclasses import dataclass
from typing import ClassVar

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._branches import Branch, Outputs, find_branches, require_depth, sizes_without
from metaprune.errors import ConfigError


@ALLOCATORS.register("finercut")
@dataclass(frozen=True, kw_only=True)
class Finercut(Allocator):
    """Drop whole residual branches, attention and feed-forward layers each for themselves, greedily.

    In every step the network is run without what has left and without each branch that is still there, and the one goes
    whose removal changes the output least; so what branches do to each other counts, which sums of losses leave out.
    Widths stay as they are, and scores play no part. Floors bound
    widths; a branch that must stay is one whose modules are frozen (``freeze=``).

    Source: Zhang et al., FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models, 2024,
    arXiv:2405.18218, algorithm 1.
    Differs from it: no first layers are spared, and the change of the output is that of measure.distortion.

    Args:
        batches: At most so many are looked at, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    whole: ClassVar[bool] = True
    batches: int = 4

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ConfigError(f"`batches >= 1` must hold, but batches={self.batches}. 4 is a good start.")

    def _sizes(self, problem: Problem) -> Sizes:
        branches = find_branches(problem)
        require_depth(problem, branches)
        outputs = Outputs(problem, self.batches)
        dropped: list[Branch] = []
        while not problem.fits(sizes_without(problem, dropped)):
            left = [branch for branch in branches if branch not in dropped]
            dropped.append(min(left, key=lambda branch: outputs.loss([*dropped, branch])))
        return sizes_without(problem, dropped)
