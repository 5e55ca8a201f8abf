"""LAPP: thresholds on the norms of filters, learnt together with the weights under a budget, from scratch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metaprune.budget import QUANTITIES, Budget, parse_budget
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
    open_through,
    shrunk,
)
from metaprune.graph import Network
from metaprune.recovery import Context
from metaprune.recovery._training import Lesson, Trained, weight_decay_groups
from metaprune.task import Batch


@GATES.register("lapp")
@dataclass(frozen=True, kw_only=True)
class Lapp(Gating):
    """Every axis learns a threshold under a budget, together with the weights, from scratch.

    With t_a the threshold of axis a, unit j stays where ``s_aj = ||W_aj||_1 / mean_j ||W_aj||_1`` exceeds it.

    Forward the gate is ``[s > t]``, backward its derivative is that of ``sigmoid(sharpness (s - t))``. The loss is that
    of the task plus ``weight * sum_q relu(F_q / F_q0 - R_q)^2`` for the cost F of the units that are open and every
    limit R of the budget. Thresholds start at zero, where nothing is closed, and take steps of one size towards a lower
    loss. Once the budget is met, or after `until` of the training, gates are fixed: the units of the lowest margins
    ``s - t`` over all axes are closed as far as the budget asks for it. Training goes on with that; in the end what is
    closed leaves.

    Source: LAPP, arXiv:2309.14157. The score, the surrogate and the steps of the thresholds are a reconstruction; the
    bypass convolutions of the paper are left out, because they cost an operation and memory traffic in use.

    Args:
        weight: Of the cost in the loss, above 0.
        sharpness: Of the surrogate, above 0.
        rate: Step of the thresholds at the highest learning rate, above 0.
        until: Share of the training after which thresholds are not learnt, in (0, 1].
    """

    name: ClassVar[str] = "lapp"
    weight: float = 20.0
    sharpness: float = 10.0
    rate: float = 0.01
    until: float = 0.5

    def __post_init__(self) -> None:
        for option in ("weight", "sharpness", "rate"):
            if not 0 < getattr(self, option) < float("inf"):
                raise ConfigError(f"`0 < {option} < inf` must hold, but {option}={getattr(self, option)!r}.")
        if not 0 < self.until <= 1:
            raise ConfigError(f"`0 < until <= 1` must hold, but until={self.until!r}.")

    def prune(self, network: Network, budget: str | Budget, context: Context) -> Gated:
        """As :class:`~metaprune.gates.Gating` says."""
        every = {name: torch.ones(network.axis(name).size) for name in gateable(network)}
        kept_within(network, every, budget, self.floor)  # refuses what cannot be reached
        told = {"budget": str(parse_budget(budget))}
        told |= {name: getattr(self, name) for name in ("weight", "sharpness", "rate", "until")}
        lesson, done = learnt(
            self, network, context, lambda model, context: _Learning(self, network, budget, model, context), told
        )
        made_by = {"gates": self.name, "budget": str(parse_budget(budget)), "seed": context.seed}
        cuts = keeps(network, lesson.kept())
        return shrunk(network, done.model, cuts, made_by, history=done.history, notes=done.notes)


class Thresholds(nn.Module):
    """Gates by the norm of what makes each unit.

    Args:
        network: Its axes.
        model: The model whose weights are read.
        sharpness: Of the surrogate.
    """

    def __init__(self, network: Network, model: nn.Module, sharpness: float) -> None:
        super().__init__()
        self.axes, self.sharpness = gated_axes(network), sharpness
        self.thresholds = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in self.axes])
        self.fixed: Tensor
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        self.sizes = {name: network.axis(name).size for name in self.axes}
        for k, name in enumerate(self.axes):
            self.register_buffer(f"open_{k}", torch.ones(self.sizes[name]))
        self._made = {name: _maker(network, name) for name in self.axes}
        self._model = [model]  # not a part of this module

    def margins(self) -> dict[str, Tensor]:
        """``s - t`` of every unit."""
        out = {}
        for name, threshold in zip(self.axes, self.thresholds, strict=True):
            weight, dim, rank_N = self._made[name]
            tensor = self._model[0].get_parameter(weight)
            total_N = tensor.abs().movedim(dim, 0).reshape(tensor.shape[dim], -1).sum(1)
            here = (rank_N >= 0).to(total_N.device)
            ranks = rank_N.to(total_N.device)[here]
            norm_U = total_N.new_zeros(self.sizes[name]).index_add(0, ranks, total_N[here])
            out[name] = norm_U / norm_U.mean().clamp_min(1e-12) - threshold.to(norm_U)
        return out

    def forward(self) -> dict[str, Tensor]:
        """Axis -> gate of each unit, 0 or 1."""
        if bool(self.fixed):
            return {name: self.get_buffer(f"open_{k}") for k, name in enumerate(self.axes)}
        return {name: open_through(margin, self.sharpness) for name, margin in self.margins().items()}

    def fix(self, kept: Mapping[str, tuple[int, ...]]) -> None:
        """From now on exactly these units are open."""
        self.fixed.fill_(True)
        for k, name in enumerate(self.axes):
            gate = self.get_buffer(f"open_{k}").zero_()
            gate[list(kept[name])] = 1


def _maker(network: Network, name: str) -> tuple[str, int, Tensor]:
    """The largest weight that makes the units of an axis, the dimension they lie along, the unit of each position."""
    axis = network.axis(name)
    shapes = network.shapes
    made = [(weight, dim) for weight, dim in axis.bindings if (weight, dim) not in axis.consumers]
    made = sorted(made or axis.bindings, key=lambda binding: -len(shapes[binding[0]]))
    weight, dim = made[0]
    rank_N = network.ranks_along(weight, dim, name)
    assert rank_N is not None
    return weight, dim, rank_N


class _Learning(Lesson):
    """Weights and thresholds together; then the weights alone."""

    def __init__(self, law: Lapp, network: Network, budget: str | Budget, model: nn.Module, context: Context) -> None:
        super().__init__(model, context)
        self.law, self.network, self.budget = law, network, budget
        self.plain = model
        self.gates = Thresholds(network, model, law.sharpness).to(context.device)
        self.model = GatedNetwork(network, model, self.gates)
        dense = network.cost()
        self.dense = {quantity: float(dense[quantity]) for quantity in QUANTITIES}
        self.limits = parse_budget(budget).absolute({quantity: dense[quantity] for quantity in QUANTITIES})

    def optimizer(self, recipe: Trained) -> Optimizer:
        """As usual; thresholds by the sign of their gradient, without decay and momentum."""
        groups = weight_decay_groups(self.plain, recipe.weight_decay)
        for threshold in self.gates.thresholds:
            threshold.register_hook(torch.sign)
        steps = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "pace": self.law.rate / recipe.lr}
        groups.append({"params": list(self.gates.thresholds), **steps})
        return torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=True)

    def loss(self, batch: Batch) -> Tensor:
        """That of the task, and of the cost while thresholds are learnt."""
        loss = self.context.task.step(self.model, batch)
        if bool(self.gates.fixed):
            return loss
        for quantity, limit in self.limits.items():
            share = self.cost(quantity) / self.dense[quantity]
            loss = loss + self.law.weight * torch.relu(share - limit / self.dense[quantity]).square()
        return loss

    def cost(self, quantity: str) -> Tensor:
        """What the open units cost, differentiable."""
        gates = self.gates()
        sizes = [
            gates[axis.name].double().sum() if axis.name in gates else torch.tensor(float(axis.size)).double()
            for axis in self.network.axes
        ]
        return self.network.soft_cost(torch.stack([size.cpu() for size in sizes]), quantity)

    def settle(self, step: int, steps: int) -> None:
        """Fix the gates once the budget is met, or when their time is over."""
        if bool(self.gates.fixed):
            return
        with torch.no_grad():
            met = all(float(self.cost(quantity)) <= limit for quantity, limit in self.limits.items())
            if met or step >= self.law.until * steps:
                margins = self.gates.margins()
                low = min(float(margin.min()) for margin in margins.values())
                ranked = {name: margin - low + 1 for name, margin in margins.items()}  # the budget alone decides
                self.gates.fix(kept_within(self.network, ranked, self.budget, self.law.floor))

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Units that are open in the end."""
        return {name: tuple(gate.nonzero().flatten().tolist()) for name, gate in self.gates().items()}

    def finished(self) -> nn.Module:
        """The network without its gates."""
        return self.plain
