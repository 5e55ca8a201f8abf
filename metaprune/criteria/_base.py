"""What every criterion promises: one score a unit, larger means keep."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaprune.errors import ConfigError, InputError
from metaprune.graph import Entries, Network
from metaprune.registry import Registry
from metaprune.task import Task, require_classes, require_finite

Scores = dict[str, Tensor]  # axis name -> (units,), or weight -> one an entry, in its shape; float64, not negative
Curves = dict[str, Tensor]  # axis name -> (units + 1,), float64: predicted loss with that many units kept


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a criterion says of a network.

    Args:
        scores: The worth of every unit.
        curves: Predicted loss of each axis with k units kept, the best by score, where the criterion knows it better
            than as a sum of scores; else empty.
        additivity: How far losses of axes add up when several are cut, where that was measured: the squared correlation
            of the loss of sets of axes with the sum over them. It says how much a knapsack over curves can be trusted.
    """

    scores: Scores
    curves: Curves = field(default_factory=dict)
    additivity: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What a criterion may look at.

    Args:
        batches: Gives a fresh pass over the calibration batches, always the same.
        task: The loss that is to stay small.
        seed: For criteria that draw random numbers.
        share: Part of the dense cost that the budget leaves, the smallest over its quantities.
    """

    batches: Callable[[], Iterator[Any]] | None = None
    task: Task | None = None
    seed: int = 0
    share: float = 0.5

    def generator(self) -> torch.Generator:
        """A generator of the seed, on the CPU."""
        return torch.Generator().manual_seed(self.seed)


class _Seen:
    """Looks at calibration batches as they pass, so that bad ones are refused without a pass of its own."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.samples, self.targets = 0, list[Tensor]()

    def batches(self) -> Iterator[Any]:
        """The same batches.

        Raises:
            InputError: Numbers in them are not finite, or there are none.
        """
        assert self.calibration.batches is not None
        for batch in self.calibration.batches():
            tensors = [item for item in batch if isinstance(item, Tensor)]
            require_finite(tensors)
            self.samples += len(tensors[0]) if tensors else 0
            if len(tensors) > 1:
                self.targets.append(tensors[1])
            yield batch
        if not self.samples:
            raise InputError("calibration needs at least one sample, but the data are empty. Give more.")

    def check(self) -> None:
        """What was seen is enough to judge by.

        Raises:
            InputError: All samples are of one class.
        """
        require_classes(self.calibration.task, self.targets)


class Criterion(ABC):
    """Scores the units of every prunable axis. Concrete criteria are frozen dataclasses in :data:`CRITERIA`.

    Attributes:
        needs: What it reads besides weights: ``data``, ``gradients`` (data and a task).
        additive: A score estimates how much the loss rises when the unit leaves, so that scores of different axes can
            be compared, added, and held against what the unit costs.
        together: It looks at all weights at once, so that the network must be in memory.
        entrywise: It also scores the single entries of weights.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    additive: ClassVar[bool] = False
    together: ClassVar[bool] = False
    entrywise: ClassVar[bool] = False

    def score(self, network: Network | Entries, calibration: Calibration) -> Scores:
        """The scores of :meth:`judge`."""
        return self.judge(network, calibration).scores

    def judge(self, network: Network | Entries, calibration: Calibration) -> Verdict:
        """Score every unit of every prunable axis that the criterion can judge; others are left out, and kept.

        Of entries, every one of every weight.

        Raises:
            ConfigError: The criterion needs data or a task that was not given, or scores no entries.
            InputError: A score is not finite, all are 0, or the data hold no samples, one class alone, or NaN.
        """
        name = CRITERIA.name_of(type(self)) or type(self).__name__
        if self.needs and calibration.batches is None:
            raise ConfigError(f"criterion {name!r} needs data. Give `data=` (--data), or one that reads weights alone.")
        if "gradients" in self.needs and calibration.task is None:
            raise ConfigError(f"criterion {name!r} needs a loss. Give `loss=` (--task).")
        seen = _Seen(calibration)
        verdict = self._verdict(network, replace(calibration, batches=seen.batches) if self.needs else calibration)
        if self.needs:
            seen.check()
        for axis, score_U in verdict.scores.items():
            if not bool(score_U.isfinite().all()):
                raise InputError(
                    f"scores must be finite, but {int((~score_U.isfinite()).sum())} units of axis {axis!r} are not. "
                    "Look for infinities in the weights, the data or the loss."
                )
        if verdict.scores and not any(bool(score_U.any()) for score_U in verdict.scores.values()):
            raise InputError(
                f"scores must tell units apart, but by {name!r} every unit of every axis is worth 0 here. Look for a "
                "loss that is least at the dense network, for a single sample, or for a layer that gives zeros alone; "
                "or take a criterion that reads weights, such as l2."
            )
        return verdict

    def _verdict(self, network: Network | Entries, calibration: Calibration) -> Verdict:
        if isinstance(network, Network):
            return self._judge(network, calibration)
        require_entrywise(self)
        return Verdict(self._score_entries(network, calibration))

    def _score_entries(self, entries: Entries, calibration: Calibration) -> Scores:
        """For criteria that are `entrywise`; by weight, in its shape."""
        raise NotImplementedError

    def _judge(self, network: Network, calibration: Calibration) -> Verdict:
        """For criteria that know more than scores."""
        return Verdict(self._score(network, calibration))

    @abstractmethod
    def _score(self, network: Network, calibration: Calibration) -> Scores: ...


CRITERIA: Registry[type[Criterion]] = Registry("criterion", "metaprune.criteria", home="metaprune.criteria")


def require_entrywise(criterion: Criterion | type[Criterion]) -> None:
    """The criterion scores single entries of weights.

    Raises:
        ConfigError: It scores whole units alone; those that score entries are named.
    """
    if not criterion.entrywise:
        kind = criterion if isinstance(criterion, type) else type(criterion)
        name = CRITERIA.name_of(kind) or kind.__name__
        able = ", ".join(name for name in CRITERIA if CRITERIA[name].entrywise)
        raise ConfigError(
            f"criterion {name!r} scores whole units, not the single entries of weights. Take one of {able}, or a "
            "budget that units are cut for, e.g. macs=0.5."
        )
