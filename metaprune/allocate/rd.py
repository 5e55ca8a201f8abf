"""Rate-distortion: the sizes of least predicted loss under the limits, by dynamic programming.

Array suffixes: A axes that may be cut, L levels (legal sizes) of an axis, M moves, Q limited quantities.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate.knapsack import BINS, Numbers, knapsack
from metaprune.errors import ConfigError

_STARTS = (0.3, 0.6, 1.0)  # shares of every axis around which the cost is made linear first
_WEIGHINGS = 12  # of several limits against each other
_STEPS = (1, 2)  # levels that an axis goes up or down in one move
_MOVES = 200
_CHUNK = 2048  # moves whose cost is computed at once


@ALLOCATORS.register("rd")
@dataclass(frozen=True, kw_only=True)
class RateDistortion(Allocator):
    """Sizes whose predicted losses add up to the least that the limits allow.

    The loss of an axis at each size is its curve (:meth:`Problem.curve`): measured, in closed form, or sums of scores.
    Where costs add up over axes too, this is a multiple-choice knapsack, solved exactly for costs in whole bins. The
    cost of a layer is a product of two sizes, so it is made linear around the present sizes, and solved and made linear
    again until nothing changes. What comes out is held against the exact polynomial; from the best that fits, steps of
    one axis and exchanges between two are taken while the loss falls. Several limits are weighed against each other,
    the exceeded ones more and more; with them, as with products, nothing is claimed to be exact.

    Source: Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks, ICCV 2023,
    arXiv:2308.10438, equation 8.
    Differs from it: units leave, not weights; costs are those of the network after the cut, and rounded up.

    Args:
        levels: At most so many sizes of an axis enter the program, evenly spread, at least 2.
        bins: Steps of cost, at least 1.
        rounds: How often the cost is made linear anew, at least 1.
    """

    adds: ClassVar[bool] = True
    levels: int = 65
    bins: int = BINS
    rounds: int = 12

    def __post_init__(self) -> None:
        for name, least in (("levels", 2), ("bins", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name} >= {least}` must hold, but {name}={getattr(self, name)}.")

    def _sizes(self, problem: Problem) -> Sizes:
        search = _Search(problem, self)
        found = [search.fitted(sizes) for start in _STARTS for sizes in search.settle(start)]
        return search.polished(min([problem.smallest, *found], key=search.loss))


class _Search:
    """Configurations of a problem, what they lose and what they cost."""

    def __init__(self, problem: Problem, options: RateDistortion) -> None:
        self.problem, self.options = problem, options
        self.places = np.array([problem.network.index(axis.name) for axis in problem.axes])
        self.curves = [problem.curve(axis) for axis in problem.axes]
        self.legal = [problem.levels(axis) for axis in problem.axes]
        self.levels = [_spread(levels_L, options.levels) for levels_L in self.legal]

    def loss(self, sizes: Sizes) -> float:
        """Sum of the curves."""
        return float(sum(curve[sizes[k]] for k, curve in zip(self.places, self.curves)))

    def settle(self, share: float) -> Iterator[Sizes]:
        """Solutions of the linear problem around one share of everything, then half way to each, until they repeat."""
        around = self._near(share * self.problem.full)
        seen: set[bytes] = set()
        for _ in range(self.options.rounds):
            solved = self._solved(around)
            if solved is None or solved.tobytes() in seen:
                return
            seen.add(solved.tobytes())
            yield solved
            around = self._near((around + solved) / 2)

    def fitted(self, sizes: Sizes) -> Sizes:
        """The same sizes, or if they exceed a limit, all shrunk alike until they do not."""
        low, high = 0.0, 1.0
        while not self.problem.fits(sizes) and high - low > 1e-4:
            share = (low + high) / 2
            low, high = (share, high) if self.problem.fits(self._near(share * sizes)) else (low, share)
        return sizes if self.problem.fits(sizes) else self._near(low * sizes)

    def _near(self, wanted: Any) -> Sizes:
        return self.problem.sizes({axis.name: wanted[k] for axis, k in zip(self.problem.axes, self.places)})

    def _solved(self, around: Sizes) -> Sizes | None:
        """The best sizes if every level cost what it costs while all other axes are as in `around`."""
        rows = [_with(around, k, levels_L) for k, levels_L in zip(self.places, self.levels)]
        many, base = self.problem.network.cost_many(np.concatenate(rows)), self.problem.network.cost(around)
        limits = self.problem.limits
        costs_QN = np.array([(many[q] - base[q]) / limit for q, limit in limits.items()])
        room_Q = np.array([1 - base[q] / limit for q, limit in limits.items()])
        chosen = self._under_all(costs_QN, room_Q)
        if chosen is None:
            return None
        sizes = self.problem.full.copy()
        sizes[self.places] = [levels_L[level] for levels_L, level in zip(self.levels, chosen)]
        return sizes

    def _under_all(self, costs_QN: Numbers, room_Q: Numbers) -> list[int] | None:
        """The best levels found that hold every limit; where none do, those found last."""
        ends = np.cumsum([len(levels_L) for levels_L in self.levels])
        values = [curve[levels_L] for curve, levels_L in zip(self.curves, self.levels)]
        weight_Q, best, least, chosen = np.ones(len(room_Q)), None, np.inf, None
        for turn in range(_WEIGHINGS if len(room_Q) > 1 else 1):
            costs = np.split(weight_Q @ costs_QN, ends[:-1])
            chosen = knapsack(values, costs, float(weight_Q @ room_Q), self.options.bins)
            if chosen is None:
                break
            excess_Q = costs_QN[:, np.array([0, *ends[:-1]]) + chosen].sum(1) - room_Q
            loss = sum(value_L[level] for value_L, level in zip(values, chosen))
            if (excess_Q <= 1e-12).all() and loss < least:
                best, least = chosen, loss
                if float(excess_Q.max()) > -1e-3:  # a limit is used up, and weights have found which
                    break
            weight_Q = weight_Q * np.exp(3 * excess_Q / max(float(np.abs(excess_Q).max()), 1e-12) / (1 + turn))
        return best or chosen

    def polished(self, sizes: Sizes) -> Sizes:
        """Move on while the loss falls and every limit holds."""
        for _ in range(_MOVES):
            moved = self._moved(sizes)
            if moved is None:
                break
            sizes = moved
        return sizes

    def _moved(self, sizes: Sizes) -> Sizes | None:
        """After the move that lowers the loss most, of those that hold the limits: an axis up, perhaps another down."""
        ups, downs = self._steps(sizes, 1), self._steps(sizes, -1)
        gain_UD = np.array([[-up[2] - down[2] for down in [(0, 0, 0.0), *downs]] for up in ups])
        order = np.argsort(-gain_UD, axis=None, kind="stable")
        order = order[gain_UD.ravel()[order] > 1e-12 * (1 + abs(self.loss(sizes)))]
        for start in range(0, len(order), _CHUNK):
            rows = np.repeat(sizes[None], len(order[start : start + _CHUNK]), axis=0)
            for row, move in zip(rows, order[start : start + _CHUNK].tolist()):
                up, down = divmod(move, len(downs) + 1)
                if down:
                    row[downs[down - 1][0]] = downs[down - 1][1]
                row[ups[up][0]] = ups[up][1]
            many = self.problem.network.cost_many(rows)
            fits = np.all([many[q] <= limit for q, limit in self.problem.limits.items()], axis=0)
            if fits.any():
                return np.asarray(rows[int(np.argmax(fits))])
        return None

    def _steps(self, sizes: Sizes, direction: int) -> list[tuple[int, int, float]]:
        """Every step of one axis: its place, its new size, and what the loss changes."""
        steps = []
        for k, curve, levels_L in zip(self.places.tolist(), self.curves, self.legal):
            level = int(np.searchsorted(levels_L, sizes[k]))
            for target in (level + direction * count for count in _STEPS):
                if 0 <= target < len(levels_L):
                    steps.append((k, int(levels_L[target]), float(curve[levels_L[target]] - curve[sizes[k]])))
        return steps


def _with(sizes: Sizes, place: int, levels_L: Sizes) -> Sizes:
    """The same sizes with every level of one axis, shape (L, axes)."""
    rows = np.repeat(sizes[None], len(levels_L), axis=0)
    rows[:, place] = levels_L
    return rows


def _spread(levels_L: Sizes, count: int) -> Sizes:
    """At most so many of the levels, evenly spread, the first and the last among them."""
    if len(levels_L) <= count:
        return levels_L
    return levels_L[np.unique(np.rint(np.linspace(0, len(levels_L) - 1, count)).astype(np.int64))]
