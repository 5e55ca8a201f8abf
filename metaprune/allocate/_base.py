"""What every allocator promises: it decides how many units each axis keeps, and meets every limit from below."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from metaprune.errors import BudgetError, ConfigError, InputError, did_you_mean
from metaprune.graph import Axis, Entries, Network
from metaprune.graph.axes import KINDS
from metaprune.registry import Registry
from metaprune.task import Task, require_classes, require_finite

Sizes = npt.NDArray[np.int64]  # one entry an axis of the network, in their order
Shares = float | Mapping[str, float]  # of every axis, or by patterns of their names; the last that fits counts
FLOOR = 0.1
_PERCENT = " A budget up to 1 is a fraction, above 1 an absolute number."
ALIGNED = ("channel", "hidden")  # kinds of axes whose sizes matter to vector units


class Quantities(Protocol):
    """A cost: a number, or an array of them, by quantity."""

    def __getitem__(self, quantity: str, /) -> Any: ...


class Units(Protocol):
    """What has units, as allocators see it: a network with its axes, the entries of its weights, ranks of matrices."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Sets of units; a unit is worth what the problem says, whatever it is."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor that the axes are bound to."""
        ...

    def index(self, name: str) -> int:
        """The place of an axis, by name."""
        ...

    def cost(self, sizes: npt.ArrayLike | None = None) -> Quantities:
        """Cost of one configuration (one size an axis, in their order), or of all units. Never falls with a size."""
        ...

    def cost_many(self, sizes: npt.ArrayLike) -> Quantities:
        """Cost of many configurations, integers (n, axes): arrays of shape (n,)."""
        ...


@dataclass(frozen=True, eq=False)
class Problem:
    """Units with a value and a cost, and limits on the cost.

    Args:
        network: Whose units they are; gives the cost of any configuration. Allocators that only weigh values against
            costs take anything that is :class:`Units`; those that run a network need a traced one.
        scores: Axis name -> value of each unit, larger means keep; an axis without scores keeps all its units.
        limits: Quantity of cost -> what it may be at most.
        additive: Scores are comparable and addable over axes, so that they can be held against cost.
        curves: Axis name -> predicted loss with k units kept, shape (size + 1,); see :meth:`curve`.
        floor: Smallest share of an axis that must stay, in [0, 1]; at least one unit always stays. By patterns of names
            (``{"layer1.*": 0.5}``), axes that fit none have 0.1.
        round_to: Sizes of channel and hidden axes are multiples of this, or the whole axis; or by kind of axis.
        batches: Gives a fresh pass over the calibration batches, for allocators that run the network.
        task: How it runs on them, and its loss.
        seed: For allocators that draw random numbers.
        grid: Sizes are multiples of this share of their axis, rounded up; None allows every size.
        ceiling: Largest share of an axis that may stay, in (0, 1]; as `floor`, axes that fit no pattern have 1.

    Raises:
        ConfigError: A number is out of range, a pattern fits no axis, a kind is none, or a floor exceeds its ceiling.
        BudgetError: Even the floors cost more than a limit; the smallest reachable cost is named.
    """

    network: Units
    scores: Mapping[str, Tensor]
    limits: Mapping[str, float]
    additive: bool = False
    floor: Shares = FLOOR
    round_to: int | Mapping[str, int] = 1
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    batches: Callable[[], Iterator[Any]] | None = None
    task: Task | None = None
    seed: int = 0
    grid: float | None = None
    ceiling: Shares = 1.0

    def __post_init__(self) -> None:
        self._check_shares("floor", self.floor, lambda share: 0 <= share <= 1, "0 <= floor <= 1")
        self._check_shares("ceiling", self.ceiling, lambda share: 0 < share <= 1, "0 < ceiling <= 1")
        if min(self.round_to.values() if isinstance(self.round_to, Mapping) else [self.round_to], default=1) < 1:
            raise ConfigError(f"`round_to >= 1` must hold, but round_to={self.round_to}.")
        kinds = {*KINDS, *(axis.kind for axis in self.network.axes)}
        for kind in self.round_to if isinstance(self.round_to, Mapping) else ():
            if kind not in kinds:
                raise ConfigError(
                    f"`round_to` must be by kind of axis, but none is called {kind!r}.{did_you_mean(kind, kinds)} "
                    f"Known: {', '.join(sorted(kinds))}."
                )
        if self.grid is not None and not 0 < self.grid <= 1:
            raise ConfigError(f"`0 < grid <= 1` must hold, but grid={self.grid}.")
        for axis in self.axes:
            curve = self.curves.get(axis.name)
            if curve is not None and (curve.shape != (axis.size + 1,) or not bool(curve.isfinite().all())):
                raise ConfigError(
                    f"the curve of axis {axis.name!r} must be {axis.size + 1} finite numbers, one for each number of "
                    f"units kept, but has shape {tuple(curve.shape)} or is not finite."
                )
            if self.lowest(axis) > self.highest(axis):
                raise ConfigError(
                    f"the floor of an axis must not exceed its ceiling, but of axis {axis.name!r} at least "
                    f"{self.lowest(axis)} and at most {self.highest(axis)} of {axis.size} units are to stay."
                )
        smallest = self.network.cost(self.smallest)
        for quantity, limit in self.limits.items():
            if smallest[quantity] > limit:
                full = self.network.cost()[quantity]
                floor = "the floors given" if isinstance(self.floor, Mapping) else f"at least {self.floor:.0%}"
                raise BudgetError(
                    f"{quantity} must reach {limit:.12g}, but with {floor} of every axis"
                    f"{f' in multiples of {self.round_to}' if self.round_to != 1 else ''} they cannot go below "
                    f"{smallest[quantity]:.12g} ({smallest[quantity] / full:.3f} of the dense network). Raise the "
                    f"budget, or lower --floor or --round-to.{_PERCENT if 1 < limit <= 100 else ''}"
                )

    @property
    def traced(self) -> Network:
        """The traced network, for allocators that need one."""
        assert isinstance(self.network, Network)
        return self.network

    @property
    def model(self) -> nn.Module:
        """The network that the units are of, for allocators that run it.

        Raises:
            ConfigError: They are of none.
        """
        if not isinstance(self.network, Network | Entries):
            raise ConfigError(
                f"this allocator runs a network, but the units are those of {type(self.network).__name__}. Take one "
                "that needs no data."
            )
        return self.network.model

    def _check_shares(self, name: str, given: Shares, holds: Callable[[float], bool], rule: str) -> None:
        for pattern, share in given.items() if isinstance(given, Mapping) else [("*", given)]:
            if not holds(share):
                raise ConfigError(f"`{rule}` must hold, but {name}={given}.")
            names = [axis.name for axis in self.network.axes]
            if not any(fnmatchcase(axis, pattern) for axis in names):
                raise ConfigError(
                    f"every pattern of `{name}` must fit an axis, but {pattern!r} fits none."
                    f"{did_you_mean(pattern, names)} `metaprune inspect` names them."
                )

    def first(self, count: int) -> list[Any]:
        """The first so many calibration batches; fewer where there are not so many.

        Raises:
            InputError: There is none, one holds NaN, or all samples are of one class.
        """
        assert self.batches is not None
        return self.checked(list(itertools.islice(self.batches(), count)))

    def checked(self, batches: list[Any]) -> list[Any]:
        """The same batches, or parts of them, if they can be judged by.

        Raises:
            InputError: As for :meth:`first`.
        """
        if not batches:
            raise InputError("calibration needs at least one batch, but the data are empty. Give more.")
        require_finite(tensor for batch in batches for tensor in batch if isinstance(tensor, Tensor))
        require_classes(self.task, (batch[1] for batch in batches if len(batch) > 1))
        return batches

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that may be cut."""
        return tuple(axis for axis in self.network.axes if axis.prunable and axis.name in self.scores)

    @cached_property
    def full(self) -> Sizes:
        """Sizes with every axis at its ceiling: without any, those of the dense network."""
        free = {axis.name for axis in self.axes}
        return np.array(
            [self.highest(axis) if axis.name in free else axis.size for axis in self.network.axes], np.int64
        )

    @cached_property
    def smallest(self) -> Sizes:
        """Sizes with every axis at its floor."""
        return self.sizes({axis.name: 0 for axis in self.axes})

    def lowest(self, axis: Axis) -> int:
        """Fewest units that must stay of an axis."""
        return max(1, math.ceil(_share(self.floor, axis, FLOOR) * axis.size - 1e-9))

    def highest(self, axis: Axis) -> int:
        """Most units that may stay of an axis: all of it, or a multiple of `round_to` below its ceiling."""
        size = max(1, math.floor(_share(self.ceiling, axis, 1.0) * axis.size + 1e-9))
        step = self._multiple(axis)
        return size if size == axis.size or size < step else size // step * step

    def _multiple(self, axis: Axis) -> int:
        if isinstance(self.round_to, Mapping):
            return self.round_to.get(axis.kind, 1)
        return self.round_to if axis.kind in ALIGNED else 1

    def aligned(self, axis: Axis, wanted: float) -> int:
        """The nearest legal size at or above `wanted`; the largest one where that is more."""
        levels = self.levels(axis)
        return int(levels[min(int(np.searchsorted(levels, wanted)), len(levels) - 1)])

    def levels(self, axis: Axis) -> Sizes:
        """All legal sizes of an axis, ascending: on the grid, multiples of `round_to`, from floor to ceiling."""
        return self._levels[axis.name]

    @cached_property
    def _levels(self) -> dict[str, Sizes]:
        return {axis.name: self._levels_of(axis) for axis in self.network.axes if axis.prunable}

    def _levels_of(self, axis: Axis) -> Sizes:
        step = 1.0 if self.grid is None else max(1.0, self.grid * axis.size)
        sizes = np.ceil(np.append(np.arange(step, axis.size, step), axis.size) - 1e-9).astype(np.int64)
        step = self._multiple(axis)
        sizes = -(-np.maximum(sizes, self.lowest(axis)) // step) * step
        return np.unique(np.minimum(sizes, self.highest(axis)))

    def curve(self, axis: Axis) -> npt.NDArray[np.float64]:
        """Predicted loss with k units kept, shape (size + 1,): the one given, else the sum of the lowest scores.

        It never grows with k: what a larger axis can do, it can do without using all of its units.
        """
        if axis.name in self.curves:
            loss_K = self.curves[axis.name].double().numpy()
        else:
            loss_K = np.append(np.cumsum(np.sort(self.scores[axis.name].double().numpy()))[::-1], 0.0)
        return np.minimum.accumulate(loss_K)

    def sizes(self, wanted: Mapping[str, float]) -> Sizes:
        """Legal sizes at or above the wanted ones; axes not named keep all units."""
        sizes = self.full.copy()
        for axis in self.axes:
            if axis.name in wanted:
                sizes[self.network.index(axis.name)] = self.aligned(axis, wanted[axis.name])
        return sizes

    def fits(self, sizes: Sizes) -> bool:
        """Every limit holds."""
        return self.within(self.network.cost(sizes))

    def within(self, cost: Quantities) -> bool:
        """Every limit holds for this cost."""
        return all(cost[quantity] <= limit for quantity, limit in self.limits.items())

    def best(self, axis: Axis, count: int) -> tuple[int, ...]:
        """Ranks of the `count` units of highest score, ascending; ties go to the lower rank."""
        order = np.argsort(-self.scores[axis.name].numpy(), kind="stable")
        return tuple(sorted(int(rank) for rank in order[:count]))

    def filled(self, sizes: Sizes) -> Sizes:
        """Use up what the limits leave: give back units, the most valuable first, while they fit.

        Units are weighed by what they lower the loss, against their cost where scores are additive. One step gives an
        axis its next legal size; an axis that does not fit once does not fit later, because costs only grow. What has
        left whole stays away.
        """
        sizes = sizes.copy()
        growing = {
            axis.name: axis for axis in self.axes if sizes[self.network.index(axis.name)]
        }  # what is gone is gone
        curves = {name: self.curve(axis) for name, axis in growing.items()}
        while growing:
            offers = []
            for name, axis in growing.items():
                k = self.network.index(name)
                if sizes[k] < self.full[k]:
                    grown = sizes.copy()
                    grown[k] = self.aligned(axis, sizes[k] + 1)
                    offers.append((name, k, grown))
            if not offers:
                break
            costs = self.network.cost_many(np.stack([grown for _, _, grown in offers]))
            base = self.network.cost(sizes)
            worth: dict[str, float] = {}
            for row, (name, k, grown) in enumerate(offers):
                if any(costs[quantity][row] > limit for quantity, limit in self.limits.items()):
                    del growing[name]
                    continue
                gain = float(curves[name][sizes[k]] - curves[name][grown[k]])
                share = max((costs[q][row] - base[q]) / limit for q, limit in self.limits.items())
                worth[name] = gain / max(share, 1e-12) if self.additive else gain / (grown[k] - sizes[k])
            if worth:
                chosen = max(worth, key=lambda name: worth[name])
                sizes = next(grown for name, _, grown in offers if name == chosen)
        return sizes


def _share(given: Shares, axis: Axis, otherwise: float) -> float:
    if not isinstance(given, Mapping):
        return given
    fitting = [share for pattern, share in given.items() if fnmatchcase(axis.name, pattern)]
    return fitting[-1] if fitting else otherwise


class Allocator(ABC):
    """Decides what stays. Concrete allocators are frozen dataclasses in :data:`ALLOCATORS`.

    Attributes:
        needs: What it reads besides scores: ``data`` (and with it the task), a traced ``network`` with axes.
        whole: Residual branches leave whole, and nothing else does.
        adds: It adds up what axes lose, which asks for scores that are losses, or for curves.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    whole: ClassVar[bool] = False
    adds: ClassVar[bool] = False

    def allocate(self, problem: Problem) -> dict[str, tuple[int, ...]]:
        """Axis name -> ranks of the units that stay, ascending, for every axis that may be cut.

        None stay of the axes of a residual branch that leaves whole, which allocators with `whole` decide.

        The cost of the result meets every limit from below; limits that the dense network meets change nothing.

        Raises:
            ConfigError: The allocator needs data that were not given.
        """
        sizes = self.sizes(problem)
        return {axis.name: problem.best(axis, sizes[problem.network.index(axis.name)]) for axis in problem.axes}

    def sizes(self, problem: Problem) -> Sizes:
        """How many units stay of every axis; as :meth:`allocate`, where it does not matter which.

        Raises:
            ConfigError: The allocator needs data that were not given, or axes of a network.
        """
        self.check_units(problem.network)
        if self.needs and (problem.batches is None or problem.task is None):
            name = ALLOCATORS.name_of(type(self)) or type(self).__name__
            ready = ", ".join(name for name in ALLOCATORS if not ALLOCATORS[name].needs)
            raise ConfigError(
                f"allocator {name!r} needs data. Give `data=` (--data), or take one that needs none: {ready}."
            )
        sizes = problem.full if problem.fits(problem.full) else problem.filled(self._sizes(problem))
        assert problem.fits(sizes)
        return sizes

    def check_units(self, units: Units) -> None:
        """The allocator can decide about these units.

        Raises:
            ConfigError: It looks at a network that loses whole units or branches, and they are of no such one.
        """
        if _cuts_axes(self) and not isinstance(units, Network):
            name = ALLOCATORS.name_of(type(self)) or type(self).__name__
            ready = ", ".join(name for name in ALLOCATORS if not _cuts_axes(ALLOCATORS[name]))
            raise ConfigError(
                f"allocator {name!r} needs a network that loses whole units, but what leaves here are units of "
                f"{type(units).__name__}. Take one that weighs values against costs: {ready}."
            )

    @abstractmethod
    def _sizes(self, problem: Problem) -> Sizes:
        """Sizes that meet the limits, when the dense network does not."""


def _cuts_axes(allocator: Allocator | type[Allocator]) -> bool:
    """It looks at a network that loses whole units or branches."""
    return allocator.whole or "network" in allocator.needs


ALLOCATORS: Registry[type[Allocator]] = Registry(
    "allocator", "metaprune.allocators", home=("metaprune.allocate", "metaprune.search.allocators")
)  # those that search stand behind this room, which does not know them
