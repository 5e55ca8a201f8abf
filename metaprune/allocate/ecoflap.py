"""Shares in proportion to how steep the loss is, found without gradients."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._paths import by_share
from metaprune.errors import ConfigError
from metaprune.graph import Axis
from metaprune.modes import evaluating
from metaprune.task import on_calibration_data

_FLAT = 1e-3  # least slope that is told from none, relative to the steepest


@ALLOCATORS.register("ecoflap")
@dataclass(frozen=True, kw_only=True)
class Ecoflap(Allocator):
    """Coarse to fine: shares of axes from the slope of the loss, units of an axis from their scores::

        s = mean_batches |L(w + eps z) - L(w - eps z)| / (2 eps),   z ~ N(0, 1), for the weights w of one axis alone

    Every axis keeps `spread` less than its even share, and what that leaves is given out in proportion to the slopes;
    an axis that is whole gets no more. Equal slopes give equal shares. The network is never changed, and nothing but
    its loss is computed.

    Source: Sung et al., ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models, ICLR 2024,
    arXiv:2310.02998, section 3 (zeroth order; p_max is the even share and `spread`).

    Args:
        spread: How much more than evenly an axis may lose, as a share of its units, in (0, 1].
        epsilon: Step in the weights, above 0.
        batches: At most so many are looked at, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    spread: float = 0.2
    epsilon: float = 1e-3
    batches: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.spread <= 1 or self.epsilon <= 0 or self.batches < 1:
            raise ConfigError(
                "`0 < spread <= 1`, `epsilon > 0` and `batches >= 1` must hold, but they are "
                f"{self.spread}, {self.epsilon} and {self.batches}."
            )

    def _sizes(self, problem: Problem) -> Sizes:
        slopes = {axis.name: self.slope(problem, axis) for axis in problem.axes}
        steepest = max(slopes.values()) or 1.0
        slopes = {name: max(slope / steepest, _FLAT) for name, slope in slopes.items()}
        even = by_share(problem, lambda place: dict.fromkeys(slopes, place))
        share = float(sum(even[problem.network.index(axis.name)] / axis.size for axis in problem.axes))
        base = max(0.0, share / len(slopes) - self.spread)
        whole = 1 / min(slopes.values())

        def shares(place: float) -> dict[str, float]:
            return {name: min(1.0, base + place * whole * slope) for name, slope in slopes.items()}

        return by_share(problem, shares)

    def slope(self, problem: Problem, axis: Axis) -> float:
        """Mean slope of the loss along a random direction in the weights of one axis."""
        assert problem.task is not None
        weights = dict(problem.model.named_parameters())
        names = sorted({name for name, _ in axis.bindings if name in weights and weights[name].is_floating_point()})
        generator = torch.Generator().manual_seed(problem.seed)
        total, count = 0.0, 0
        with evaluating(problem.model), torch.no_grad(), on_calibration_data():
            for batch in problem.first(self.batches):
                step = {
                    name: self.epsilon * torch.randn(weights[name].shape, generator=generator).to(weights[name])
                    for name in names
                }
                ends = [self._loss(problem, batch, {n: weights[n] + sign * step[n] for n in names}) for sign in (1, -1)]
                total += abs(ends[0] - ends[1]) / (2 * self.epsilon)
                count += 1
        return total / max(count, 1)

    def _loss(self, problem: Problem, batch: Any, weights: dict[str, Tensor]) -> float:
        assert problem.task is not None

        def model(*args: Any, **kwargs: Any) -> Any:
            return functional_call(problem.model, weights, args, kwargs)

        return float(problem.task.slope(model, batch, torch.Generator().manual_seed(problem.seed)))
