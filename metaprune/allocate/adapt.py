"""Small steps down, each larger where a block changes its input less."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import Shares, by_share
from metaprune.errors import ConfigError
from metaprune.graph.lockstep import watching
from metaprune.graph.record import Op
from metaprune.graph.verify import masked_copy
from metaprune.task import on_calibration_data


@ALLOCATORS.register("adapt")
@dataclass(frozen=True, kw_only=True)
class Adapt(Allocator):
    """Prune in small steps; in each, an axis loses less than the mean the more its block changes what passes it::

        I = -mean cos(stream before the block, stream after it),   I' = (I - mean I) / max |I - mean I|
        share lost += step - amplitude I'

    Importances are measured anew on the masked network after every `every` steps, so that what earlier steps did to a
    block counts. Axes that lie in no residual branch (streams, plain networks) lose the mean share, `I' = 0`. The last
    step is taken as far as the limits need.

    Source: Wang et al., Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training, 2025,
    arXiv:2502.03460, section 3.
    Differs from it: units are scored once; nothing is trained between the steps.

    Args:
        step: Share that all axes lose in the mean of a step, in (0, 1].
        amplitude: Largest difference from it, in [0, step].
        every: Steps between two measurements, at least 1.
        batches: At most so many are looked at, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "network"})
    step: float = 0.02
    amplitude: float = 0.02
    every: int = 5
    batches: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1 or not 0 <= self.amplitude <= self.step or self.every < 1 or self.batches < 1:
            raise ConfigError(
                "`0 < step <= 1`, `0 <= amplitude <= step`, `every >= 1` and `batches >= 1` must hold, but they are "
                f"{self.step}, {self.amplitude}, {self.every} and {self.batches}."
            )

    def _sizes(self, problem: Problem) -> Sizes:
        shares: Shares = {axis.name: 1.0 for axis in problem.axes}
        rates: Mapping[str, float] = {}
        for number in range(int(np.ceil(1 / self.step)) + 1):
            if number % self.every == 0:
                rates = self._rates(problem, shares)
            after = {name: max(0.0, share - rates[name]) for name, share in shares.items()}
            if problem.fits(problem.sizes({axis.name: after[axis.name] * axis.size for axis in problem.axes})):
                break
            shares = after
        return by_share(
            problem, lambda place: {name: after[name] + place * (share - after[name]) for name, share in shares.items()}
        )

    def _rates(self, problem: Problem, shares: Shares) -> dict[str, float]:
        """What each axis loses in a step from these shares."""
        importance = importances(problem, shares, self.batches)
        mean = float(np.mean(list(importance.values()))) if importance else 0.0
        most = max((abs(value - mean) for value in importance.values()), default=0.0)
        relative = {name: (value - mean) / max(most, 1e-12) for name, value in importance.items()}
        return {name: self.step - self.amplitude * relative.get(name, 0.0) for name in shares}


def importances(problem: Problem, shares: Shares, batches: int) -> dict[str, float]:
    """How much the branch of each droppable axis turns the stream, with these shares of every axis left: -cos."""
    network = problem.traced
    keep = {
        network.index(axis.name): np.array(problem.best(axis, problem.aligned(axis, shares[axis.name] * axis.size)))
        for axis in problem.axes
    }
    masked = masked_copy(network.model, network.layout, network.layout.alive(keep), {}).eval()
    joins = {axis.name: network.joins[axis.name] for axis in problem.axes if network.joins.get(axis.name)}
    seen: dict[int, list[float]] = {}

    def look(op: Op, tensors: Mapping[int, Tensor]) -> None:
        before, after = tensors[stream[op.index]], tensors[op.outputs[0]]
        along = 1 if before.ndim == 4 else -1
        cosine = F.cosine_similarity(before.expand_as(after).float(), after.float(), dim=along)
        seen.setdefault(op.index, []).append(float(cosine.mean()))

    stream = {op.index: _stream(network.layout.trace.ops, op) for ops in joins.values() for op in ops}
    assert problem.task is not None
    for batch in problem.first(batches):
        with on_calibration_data(), watching(network.layout.trace, set(stream), look):
            problem.task.outputs(masked, batch)
    return {name: -float(np.mean([np.mean(seen[op.index]) for op in ops])) for name, ops in joins.items()}


def _stream(ops: list[Op], join: Op) -> int:
    """The operand of an addition that was made first: what passes the branch."""
    made = {number: op.index for op in ops for number in op.outputs}
    return min(join.inputs[:2], key=lambda number: made.get(number, -1))
