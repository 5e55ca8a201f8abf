"""How good a metanetwork is: the area under accuracy over speed-up of networks that it did not learn from."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from metaprune.allocate import Problem
from metaprune.allocate.global_ import Global
from metaprune.criteria import Scores
from metaprune.data import Split
from metaprune.edits import Keep, SetWeight
from metaprune.errors import BudgetError
from metaprune.graph import Network
from metaprune.measure.accuracy import accuracy
from metaprune.plans import Plan
from metaprune.recovery import RECOVERIES, Context

RATIOS = (1.5, 2.0, 2.5, 3.0, 4.0)


@dataclass(frozen=True)
class Curve:
    """Accuracy at several speed-ups, without any training.

    Attributes:
        ratios: Dense over left multiply-accumulates, ascending.
        accuracies: In percent, one a ratio.
    """

    ratios: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def area(self) -> float:
        """Mean accuracy over the logarithm of the ratio, in percent.

        >>> Curve((1.5, 4.0), (90.0, 70.0)).area
        80.0
        """
        if len(self.ratios) == 1:
            return self.accuracies[0]
        places = np.log(self.ratios)
        return float(np.trapezoid(self.accuracies, places) / (places[-1] - places[0]))


def curve_of(
    network: Network,
    scores_at: Callable[[float], Scores],
    split: Split,
    calibration: Callable[[], Iterator[Any]],
    *,
    ratios: Sequence[float] = RATIOS,
    tensors: Mapping[str, Tensor] | None = None,
    floor: float = 0.05,
) -> Curve:
    """Prune at several speed-ups, re-estimate BatchNorm, and measure.

    Args:
        network: The dense network.
        scores_at: Additive scores of units for the share of multiply-accumulates that is to be left.
        split: Images to measure on; they must not be test images where something is chosen.
        calibration: Batches for the re-estimation of BatchNorm.
        ratios: Speed-ups, ascending; those that cannot be reached count as chance.
        tensors: Edited parameters, in their own shape.
        floor: Smallest share of an axis that stays.
    """
    classes = int(split.labels_all.max()) + 1
    found = []
    for ratio in ratios:
        try:
            plan = plan_at(network, scores_at(1 / ratio), 1 / ratio, tensors=tensors, floor=floor)
        except BudgetError:
            found.append(100 / classes)
            continue
        slim = RECOVERIES["recalibrate_norm"]().recover(network.apply(plan), Context(calibration=calibration)).model
        found.append(accuracy(slim.eval(), split).top1)
    return Curve(tuple(ratios), tuple(found))


def plan_at(
    network: Network,
    scores: Scores,
    share: float,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    floor: float = 0.05,
) -> Plan:
    """The plan that global ranking by score per cost makes for a share of the multiply-accumulates."""
    problem = Problem(network, scores, {"macs": share * network.cost().macs}, additive=True, floor=floor)
    kept = Global().allocate(problem)
    edits = [SetWeight(name, tensor) for name, tensor in (tensors or {}).items()]
    return Plan(
        (*edits, *(Keep(name, network.axis(name).size, ranks) for name, ranks in kept.items())), network.fingerprint
    )


def log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    """A number whose logarithm is uniform."""
    return math.exp(random.uniform(math.log(low), math.log(high)))
