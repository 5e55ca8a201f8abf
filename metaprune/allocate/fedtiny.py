"""Candidates drawn at random, and the one of the lowest loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import by_share
from metaprune.edits import Keep
from metaprune.errors import ConfigError
from metaprune.plans import Plan
from metaprune.task import on_calibration_data


@ALLOCATORS.register("fedtiny")
@dataclass(frozen=True, kw_only=True)
class Fedtiny(Allocator):
    """Draw allocations around the even one, cut each, let BatchNorm find its statistics, and keep the lowest loss.

    The share of an axis in a candidate is in proportion to `1 + noise`, noise uniform in [-spread, spread], scaled
    until the limits hold; the even allocation is a candidate too. Every candidate normalises with the statistics of the
    batch at hand, as after re-estimation.

    Source: Huang et al., Distributed Pruning Towards Tiny Neural Networks in Federated Learning, ICDCS 2023,
    arXiv:2212.01977, section 3 (adaptive BatchNorm selection), on one device.
    The spread of the noise and the number of candidates are ours: the paper's are not known to us.

    Args:
        candidates: How many, at least 1.
        spread: Of the noise, in [0, 1).
        batches: At most so many are looked at, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "network"})
    candidates: int = 10
    spread: float = 0.5
    batches: int = 4

    def __post_init__(self) -> None:
        if self.candidates < 1 or not 0 <= self.spread < 1 or self.batches < 1:
            raise ConfigError(
                "`candidates >= 1`, `0 <= spread < 1` and `batches >= 1` must hold, but they are "
                f"{self.candidates}, {self.spread} and {self.batches}."
            )

    def _sizes(self, problem: Problem) -> Sizes:
        candidates = list(self._drawn(problem))
        losses = [loss_of(problem, sizes, self.batches) for sizes in candidates]
        return candidates[int(np.argmin(losses))]

    def _drawn(self, problem: Problem) -> Iterator[Sizes]:
        random = np.random.default_rng(problem.seed)
        for candidate in range(self.candidates):
            noise = random.uniform(-self.spread, self.spread, len(problem.axes)) * (candidate > 0)
            weights = {axis.name: 1 + step for axis, step in zip(problem.axes, noise, strict=True)}
            yield problem.filled(by_share(problem, partial(_scaled, weights)))


def _scaled(weights: dict[str, float], place: float) -> dict[str, float]:
    """Shares in proportion to weights: nothing at 0, everything at 1."""
    return {name: min(1.0, place * weight / min(weights.values())) for name, weight in weights.items()}


def loss_of(problem: Problem, sizes: Sizes, batches: int) -> float:
    """Mean loss of the network cut to these sizes, over the first calibration batches."""
    assert problem.task is not None
    keeps = [
        Keep(axis.name, axis.size, problem.best(axis, sizes[problem.network.index(axis.name)]))
        for axis in problem.axes
        if sizes[problem.network.index(axis.name)] < axis.size
    ]
    slim = normalising_by_batch(problem.traced.apply(Plan(tuple(keeps))))
    with torch.no_grad(), on_calibration_data():
        losses = [float(problem.task.step(slim, batch)) for batch in problem.first(batches)]
    return float(np.mean(losses))


def normalising_by_batch(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, but for its BatchNorms, which take the statistics of each batch."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    return model
