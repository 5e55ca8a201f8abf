"""EcoDiff: hard-concrete gates against the output of the whole pipeline, weights frozen, no labels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from metaprune.budget import Budget, parse_budget
from metaprune.errors import ConfigError
from metaprune.gates._base import (
    GATES,
    Gated,
    GatedNetwork,
    Gating,
    gateable,
    gated_axes,
    keeps,
    kept_within,
    learnt,
    shrunk,
)
from metaprune.graph import Network
from metaprune.recovery import Context
from metaprune.recovery._training import Lesson, Trained
from metaprune.task import Batch, main_output

GAMMA, ZETA, TEMPERATURE = -0.1, 1.1, 0.83  # the interval that is stretched to [0, 1], and how sharp its middle is


@GATES.register("ecodiff")
@dataclass(frozen=True, kw_only=True)
class EcoDiff(Gating):
    """Random gates learn which units the output needs; weights stay, and labels are not read.

    Every unit j has a logit l_j and a random gate ``z = clamp(1.2 sigmoid((log u - log(1 - u) + l) / 0.83) - 0.1)``.

    The gates are drawn once a step. The loss is the mean squared difference of the gated output to the dense one, over
    the mean square of that, plus ``weight * mean |l|``; weights are frozen, and labels are not read. In the end the
    units of the lowest logits over all axes leave until the budget is met.

    A pipeline that calls the network many times is a :class:`~metaprune.task.Task` whose `outputs` does so; all calls
    of a step see the same gates. With `checkpointed` its gradient takes the memory of one call and of what is handed
    from call to call, for a second forward (Chen et al., Training Deep Nets with Sublinear Memory Cost,
    arXiv:1604.06174).

    Source: EcoDiff (Zhang et al., arXiv:2412.02852). Differs: gates are drawn once a trajectory, so that the
    checkpointed gradient is exact; the difference has no unit.

    Args:
        weight: Of the logits' size in the loss, at least 0.
        start: Every logit in the beginning.
        rate: Learning rate of the logits (AdamW), above 0.
        checkpointed: Compute each call of the network again for its gradient.
    """

    name: ClassVar[str] = "ecodiff"
    weight: float = 0.2
    start: float = 3.0
    rate: float = 0.1
    checkpointed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"`0 <= weight < inf` must hold, but weight={self.weight!r}.")
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"`0 < rate < inf` must hold, but rate={self.rate!r}.")

    def prune(self, network: Network, budget: str | Budget, context: Context) -> Gated:
        """As :class:`~metaprune.gates.Gating` says."""
        every = {name: torch.ones(network.axis(name).size) for name in gateable(network)}
        kept_within(network, every, budget, self.floor)  # refuses what cannot be reached
        frozen = replace(self, training=replace(self.training, recalibrate=False))  # the dense network as it is
        told = {name: getattr(self, name) for name in ("weight", "start", "rate", "checkpointed")}
        lesson, done = learnt(
            frozen, network, context, lambda model, context: _Matching(self, network, model, context), told
        )
        logits = lesson.gates.by_axis()
        low = min(float(logit.min()) for logit in logits.values())
        ranked = {name: logit - low + 1 for name, logit in logits.items()}  # all positive: the budget alone decides
        cuts = keeps(network, kept_within(network, ranked, budget, self.floor))
        made_by = {"gates": self.name, "budget": str(parse_budget(budget)), "seed": context.seed}
        return shrunk(network, network.model, cuts, made_by, history=done.history, notes=done.notes)


class HardConcrete(nn.Module):
    """Random gates in [0, 1] that are exactly 0 or 1 with positive probability.

    Args:
        sizes: Axis name -> number of units.
        start: Every logit in the beginning.
    """

    def __init__(self, sizes: Mapping[str, int], start: float) -> None:
        super().__init__()
        self.axes = list(sizes)
        self.logits = nn.ParameterList([nn.Parameter(torch.full((size,), start)) for size in sizes.values()])

    def by_axis(self) -> dict[str, Tensor]:
        """Axis -> logits."""
        return {name: logits.detach() for name, logits in zip(self.axes, self.logits, strict=True)}

    def forward(self) -> dict[str, Tensor]:
        """Axis -> gate of each unit: drawn in training mode, the most likely one in evaluation mode."""
        return {name: self._gate(logits) for name, logits in zip(self.axes, self.logits, strict=True)}

    def _gate(self, logits: Tensor) -> Tensor:
        if not self.training:
            return ((ZETA - GAMMA) * torch.sigmoid(logits / TEMPERATURE) + GAMMA).clamp(0, 1)
        u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        return hard_concrete(logits, u)


def hard_concrete(logits: Tensor, u: Tensor) -> Tensor:
    """The gate that a uniform number `u` in (0, 1) gives."""
    noisy = torch.sigmoid((u.log() - (1 - u).log() + logits) / TEMPERATURE)
    return ((ZETA - GAMMA) * noisy + GAMMA).clamp(0, 1)


def open_probability(logits: Tensor) -> Tensor:
    """Probability that a gate is not zero: ``sigmoid(l - 0.83 log(0.1 / 1.1))``.

    >>> round(float(open_probability(torch.tensor(0.0))), 3), round(float(open_probability(torch.tensor(-5.0))), 3)
    (0.88, 0.047)
    """
    return torch.sigmoid(logits - TEMPERATURE * math.log(-GAMMA / ZETA))


def _called(model: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(model, dict(tensors), args, kwargs)


class _Matching(Lesson):
    """The dense output is to be matched by few open gates."""

    def __init__(self, law: EcoDiff, network: Network, model: nn.Module, context: Context) -> None:
        super().__init__(model, context)
        self.law, self.plain = law, model
        sizes = {name: network.axis(name).size for name in gated_axes(network)}
        self.gates = HardConcrete(sizes, law.start).to(context.device)
        self.model = self.gated = GatedNetwork(network, model, self.gates, frozen=True)

    def optimizer(self, recipe: Trained) -> Optimizer:
        """AdamW over the logits alone."""
        group = {"params": list(self.gates.parameters()), "pace": self.law.rate / recipe.lr}
        return torch.optim.AdamW([group], self.law.rate, weight_decay=0.0)

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch, a scalar."""
        given = main_output(self.context.task.outputs(self._drawn(), batch))
        with torch.no_grad():
            wanted = main_output(self.context.task.outputs(self.plain, batch))
        distance = (given - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
        sizes = torch.cat([logits.abs() for logits in self.gates.logits])
        return distance + self.law.weight * sizes.mean()

    def _drawn(self) -> Callable[..., Any]:
        """The network with gates that are drawn now, for all calls."""
        call = partial(_called, self.plain, self.gated.tensors(self.gates()))
        return partial(checkpoint, call, use_reentrant=False) if self.law.checkpointed else call

    def finished(self) -> nn.Module:
        """The network as it was."""
        return self.plain
