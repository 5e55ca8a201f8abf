"""What gates promise: a network is trained with gates on its units, and the closed ones leave physically.

A gate on a unit multiplies what reads it: its slices of every weight that multiplies units and adds them up. Where that
is zero the unit plays no part, so that the gated network with hard gates is the masked one, which surgery makes small.
Nothing is inserted into the network, whatever its class.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaprune.allocate import Problem
from metaprune.budget import QUANTITIES, Budget, parse_budget
from metaprune.edits import Keep, SetWeight
from metaprune.errors import ConfigError, VerificationError
from metaprune.graph import Network, Verification
from metaprune.graph.record import tensors_in
from metaprune.graph.trace import call_arguments
from metaprune.modes import evaluating
from metaprune.plans import Edit, Plan
from metaprune.recovery import Context, Finetune, Recovered
from metaprune.recovery._training import Lesson, Trained, Training
from metaprune.registry import Registry

L = TypeVar("L", bound=Lesson)

TOLERANCE = 1e-5  # largest error at which the shrunk network counts as the gated one


@dataclass(frozen=True, eq=False)
class Gated:
    """What training with gates gives.

    Attributes:
        model: The smaller network.
        plan: What was cut from the given network, and the weights that were learnt: it can be saved and replayed.
        verification: The smaller network against the masked one.
        history: One entry an epoch.
        notes: What a reader of the report should know.
    """

    model: nn.Module
    plan: Plan
    verification: Verification
    history: tuple[Mapping[str, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gating(ABC):
    """Training-time pruning. Concrete ones are frozen dataclasses in :data:`GATES`.

    Args:
        training: The course: epochs, learning rate, batch size and so on.
        floor: Smallest share of every axis that must stay; at least one unit always stays.
    """

    name: ClassVar[str]
    training: Trained = field(default_factory=Finetune)
    floor: float = 0.1

    @abstractmethod
    def prune(self, network: Network, budget: str | Budget, context: Context) -> Gated:
        """Train the network with gates, and let what is closed leave. The given network stays as it is.

        Args:
            network: The traced network, trained or not.
            budget: What the result may cost, e.g. ``"macs=0.5"``; it is met.
            context: Training data, task, device, seed, folder of checkpoints.

        Raises:
            BudgetError: The budget cannot be reached; the smallest cost that can is named.
            ConfigError: An option is out of range, or nothing in the network can have a gate.
            InputError: Data or weights are unusable, or training diverged.
        """


GATES: Registry[type[Gating]] = Registry("gating", "metaprune.gates", home="metaprune.gates")


def gated_axes(network: Network) -> list[str]:
    """Axes whose units can have a gate: what reads them multiplies them by weights, and no statistics run over them.

    Raises:
        ConfigError: There is none.
    """
    names = [axis.name for axis in network.axes if axis.prunable and axis.consumers and not axis.changes]
    if not names:
        raise ConfigError("the network must have a prunable axis whose units only weights read, but it has none.")
    return names


class GatedNetwork(nn.Module):
    """A network whose units are multiplied by gates where they are read.

    Args:
        network: Its axes.
        model: A copy of its model; it is trained in place, or frozen.
        gates: A module that gives, from no input, axis name -> the gate of each unit, shape (units,).
        frozen: The weights of the model stay, and it is evaluated (no dropout, stored statistics).
    """

    def __init__(self, network: Network, model: nn.Module, gates: nn.Module, *, frozen: bool = False) -> None:
        super().__init__()
        self.model, self.gates, self.frozen = model, gates, frozen
        if frozen:
            model.requires_grad_(False)
        self._reads = [
            (name, dim, axis, rank_N)
            for axis in gated_axes(network)
            for name, dim in network.axis(axis).consumers
            if (rank_N := network.ranks_along(name, dim, axis)) is not None
        ]

    def train(self, mode: bool = True) -> "GatedNetwork":
        """The model itself stays in evaluation mode where it is frozen."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives with its gates as they are."""
        return functional_call(self.model, self.tensors(self.gates()), args, kwargs)

    def tensors(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that read gated units, each of their slices multiplied by its gate."""
        tensors: dict[str, Tensor] = {}
        for name, dim, axis, rank_N in self._reads:
            weight = tensors.get(name, self.model.get_parameter(name))
            gate_N = torch.where(rank_N >= 0, gates[axis].cpu()[rank_N.clamp_min(0)], 1.0).to(weight)
            shape = [1] * weight.ndim
            shape[dim] = -1
            tensors[name] = weight * gate_N.view(shape)
        return tensors


class Fixed(nn.Module):
    """Gates that stay as they are.

    Args:
        gates: Axis name -> the gate of each unit.
    """

    def __init__(self, gates: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.given = dict(gates)

    def forward(self) -> dict[str, Tensor]:
        """The gates."""
        return self.given


def gateable(network: Network) -> list[str]:
    """Axes whose units can have a gate, once it is seen that closed gates are the same as surgery.

    Raises:
        ConfigError: There is no such axis; or something reads units without a weight, past every gate.
    """
    names = gated_axes(network)
    kept = {name: tuple(range(0, network.axis(name).size, 2)) for name in names}
    gates = {name: torch.zeros(network.axis(name).size) for name in names}
    for name, ranks in kept.items():
        gates[name][list(ranks)] = 1
    slim = network.apply(Plan(keeps(network, kept)))
    gated = GatedNetwork(network, copy.deepcopy(network.model), Fixed(gates))
    error = _difference(gated, slim, network)
    if not error <= 10 * TOLERANCE:
        raise ConfigError(
            f"closed gates must be the same as surgery, but with half of the units they differ by {error:.3g} of the "
            "largest output: something reads units without a weight. Freeze what makes them (`freeze=` of `trace`)."
        )
    return names


def _difference(one: nn.Module, other: nn.Module, network: Network) -> float:
    """Largest absolute difference of two networks over the largest absolute output, on the example inputs."""
    args, kwargs = call_arguments(network.example_inputs)
    with torch.no_grad(), evaluating(one), evaluating(other):
        pairs = list(zip(tensors_in(one(*args, **kwargs)), tensors_in(other(*args, **kwargs)), strict=True))
    scale = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(scale, 1e-30)


def open_through(margins: Tensor, sharpness: float) -> Tensor:
    """``1`` where a margin is positive, else ``0``; the gradient is that of ``sigmoid(sharpness * margin)``."""
    soft = torch.sigmoid(sharpness * margins)
    return (margins > 0).to(margins) + (soft - soft.detach())


def kept_within(
    network: Network, scores: Mapping[str, Tensor], budget: str | Budget, floor: float
) -> dict[str, tuple[int, ...]]:
    """Units with a positive score; fewer, lowest scores first over all axes, as far as the budget asks for it.

    Args:
        network: The traced network.
        scores: Axis name -> score of each unit.
        budget: Met from below.
        floor: Share of every axis that stays in any case, at least one unit.

    Raises:
        BudgetError: The budget cannot be reached; the smallest cost that can is named.
    """
    dense = network.cost()
    limits = parse_budget(budget).absolute({quantity: dense[quantity] for quantity in QUANTITIES})
    problem = Problem(network, {name: score.detach().cpu() for name, score in scores.items()}, limits, floor=floor)
    least = dict(zip((axis.name for axis in network.axes), problem.smallest.tolist(), strict=True))
    order: list[tuple[float, str, int]] = []  # what may leave, lowest score first
    for name, score in problem.scores.items():
        ranked = torch.argsort(score, stable=True).tolist()
        order += [(float(score[rank]), name, rank) for rank in ranked[: len(ranked) - least[name]]]
    order.sort(key=lambda entry: entry[0])
    closed = sum(score <= 0 for score, _, _ in order)
    gone = np.zeros((len(order) + 1, len(network.axes)), np.int64)
    for k, (_, name, _) in enumerate(order):
        gone[k + 1] = gone[k]
        gone[k + 1, network.index(name)] += 1
    costs = network.cost_many(np.array([axis.size for axis in network.axes]) - gone)
    fits = np.all([costs[quantity] <= limit for quantity, limit in limits.items()], axis=0)
    fits[:closed] = False
    leaving = {(name, rank) for _, name, rank in order[: int(np.argmax(fits))]}
    return {
        name: tuple(rank for rank in range(len(score)) if (name, rank) not in leaving) for name, score in scores.items()
    }


def keeps(network: Network, kept: Mapping[str, tuple[int, ...]]) -> tuple[Keep, ...]:
    """The edits that keep these units."""
    return tuple(
        Keep(name, network.axis(name).size, ranks)
        for name, ranks in kept.items()
        if len(ranks) < network.axis(name).size
    )


def shrunk(
    network: Network, trained: nn.Module, cuts: tuple[Edit, ...], made_by: Mapping[str, Any], **more: Any
) -> Gated:
    """The trained network without what is closed, checked against the masked one.

    Raises:
        VerificationError: They differ; nothing is handed out.
    """
    before, after = network.model.state_dict(), trained.state_dict()
    learnt = (
        SetWeight(name, tensor.detach().cpu().clone())
        for name, tensor in after.items()
        if name in network.shapes and not torch.equal(tensor, before[name].to(tensor.device))
    )
    plan = Plan((*learnt, *cuts), network.fingerprint, made_by)
    slim = network.apply(plan)
    verification = network.verify(plan, slim=slim)
    if not verification.passed(TOLERANCE):
        raise VerificationError(
            f"the shrunk network must equal the masked one to {TOLERANCE:g} of the largest output, but differs by "
            f"{verification.max_error:.3g}. Nothing is handed out; please report the model."
        )
    return Gated(slim.eval(), plan, verification, **more)


def learnt(
    gating: Gating,
    network: Network,
    context: Context,
    teach: Callable[[nn.Module, Context], L],
    told: Mapping[str, Any],
) -> tuple[L, Recovered]:
    """Train a copy of the network under gates.

    Args:
        gating: Its course is followed.
        network: The traced network; not changed.
        context: As for the gating.
        teach: Makes the lesson of a copy of the model.
        told: Options beside the course that decide what is learnt, as plain JSON.

    Returns:
        The lesson, with its gates as they are in the end, and the trained network without them.

    Raises:
        ConfigError: The context lacks what training needs; nothing was done.
    """
    gating.training.check(network.model, context)
    lessons: list[L] = []

    def remembered(model: nn.Module, context: Context) -> L:
        lessons.append(teach(model, context))
        return lessons[-1]

    model = copy.deepcopy(network.model).to(context.device)
    course = {"gates": gating.name, "floor": gating.floor, **told}
    with torch.random.fork_rng():
        done = Training(gating.training, model, context, teach=remembered, course=course, name=gating.name).run()
    return lessons[-1], done
