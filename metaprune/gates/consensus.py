"""Consensus: every sample opens or closes each residual branch for itself, until all samples agree."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaprune.budget import QUANTITIES, Budget, parse_budget
from metaprune.edits import DropBlock
from metaprune.errors import BudgetError, ConfigError
from metaprune.gates._base import GATES, Gated, Gating, learnt, open_through, shrunk
from metaprune.graph import Network
from metaprune.plans import Plan
from metaprune.recovery import Context
from metaprune.recovery._training import Lesson
from metaprune.task import Batch

LATE = 0.1  # what a new batch counts against all before it


@GATES.register("consensus")
@dataclass(frozen=True, kw_only=True)
class Consensus(Gating):
    """Every sample opens or closes each residual branch, until all agree; closed ones leave.

    Branch k runs for a sample where ``g_k(x) = [sigmoid(fc2(relu(fc1(mean of x)))) > 0.5]``, x its input.

    With ``b_k`` the mean of g_k over a batch, the loss is that of the task plus ``polarise * mean_k b_k (1 - b_k)`` and
    ``activate * (sum_k b_k F_k / sum_k F_k - R)^2``, F_k the cost of a branch and R what the budget leaves for them.
    Polarised gates agree on all samples. After `until` of the training each branch is open for all or closed for all:
    open if it was for more than half of the late samples, fewer (of the lowest mean probability first) if the budget
    asks for it; floors bound widths, and play no part. Training goes on with that, and in the end closed branches
    leave. One pass, no fine-tuning.

    Source: Zhi et al., Learning a Consensus Sub-Network, arXiv:2302.10798, layer variant. The heads and weights
    of the terms are a reconstruction; the cost is squared against a target instead of minimised.

    Args:
        polarise: Weight of the polarisation, at least 0.
        activate: Weight of the cost, at least 0.
        hidden: Width of each gate's hidden layer, at least 1.
        sharpness: Of the straight-through gradient, above 0.
        until: Share of the training after which gates are fixed, in (0, 1].
    """

    name: ClassVar[str] = "consensus"
    polarise: float = 3.0
    activate: float = 3.0
    hidden: int = 8
    sharpness: float = 1.0
    until: float = 0.5

    def __post_init__(self) -> None:
        for option in ("polarise", "activate"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ConfigError(f"`0 <= {option} < inf` must hold, but {option}={getattr(self, option)!r}.")
        if self.hidden < 1 or not 0 < self.sharpness < math.inf:
            raise ConfigError(f"`hidden >= 1` and `sharpness > 0` must hold, but {self.hidden=}, {self.sharpness=}.")
        if not 0 < self.until <= 1:
            raise ConfigError(f"`0 < until <= 1` must hold, but until={self.until!r}.")

    def prune(self, network: Network, budget: str | Budget, context: Context) -> Gated:
        """As :class:`~metaprune.gates.Gating` says; residual branches leave, not units."""
        sites = _sites(network)
        costs = _Costs(network, [name for name, *_ in sites], budget)
        told = {name: getattr(self, name) for name in ("polarise", "activate", "hidden", "sharpness", "until")}
        told["budget"] = str(parse_budget(budget))
        lesson, done = learnt(
            self, network, context, lambda model, context: _Agreeing(self, sites, costs, model, context), told
        )
        gates = lesson.gates
        agreed = float(torch.maximum(gates.mean_K, 1 - gates.mean_K).mean())
        notes = (*done.notes, f"{agreed:.1%} consensus on {len(sites)} branches when they were fixed")
        cuts = tuple(DropBlock(name) for (name, *_), stays in zip(sites, gates.open_K.tolist()) if not stays)
        made_by = {"gates": self.name, "budget": str(parse_budget(budget)), "seed": context.seed}
        return shrunk(network, done.model, cuts, made_by, history=done.history, notes=notes)


def _sites(network: Network) -> list[tuple[str, str, str]]:
    """Branches that can have a gate: name, the module that gets their input, the one that gives their output.

    Raises:
        ConfigError: There is none.
    """
    sites = [(block.name, *where) for block in network.blocks if (where := network.module_of(block)) is not None]
    ends = [end for *_, end in sites]
    sites = [site for site in sites if ends.count(site[2]) == 1]
    if not sites:
        raise ConfigError("the network must have a residual branch whose output a module gives, but it has none.")
    return sites


class _Costs:
    """What branches cost, and which must leave.

    Args:
        network: The traced network.
        names: Its branches.
        budget: Of the whole network.

    Raises:
        BudgetError: Without all of them the network still costs more.
    """

    def __init__(self, network: Network, names: list[str], budget: str | Budget) -> None:
        self.network, self.names = network, names
        dense = network.cost()
        self.limits = parse_budget(budget).absolute({quantity: dense[quantity] for quantity in QUANTITIES})
        least = self._without(names)
        for quantity, limit in self.limits.items():
            if least[quantity] > limit:
                raise BudgetError(
                    f"{quantity} must reach {limit:.12g}, but without all of its {len(names)} residual branches the "
                    f"network still needs {least[quantity]}. Raise the budget, or gate units (`lapp`)."
                )
        quantity = min(self.limits, key=lambda name: self.limits[name] / dense[name])
        saved = [dense[quantity] - self._without([name])[quantity] for name in names]
        self.share_K = torch.tensor(saved, dtype=torch.float64) / max(sum(saved), 1)
        over = dense[quantity] - self.limits[quantity]
        self.target = min(max(1 - over / max(sum(saved), 1), 0.0), 1.0)

    def _without(self, names: list[str]) -> Any:
        return self.network.cost_of(Plan(tuple(map(DropBlock, names))))

    def staying(self, mean_K: Tensor, likely_K: Tensor) -> Tensor:
        """Branches that are open for more than half of the samples; fewer as far as the budget asks for it.

        Args:
            mean_K: Share of the samples that each is open for.
            likely_K: Mean probability of it; the lowest leave first.
        """
        open_K = mean_K > 0.5
        for k in torch.argsort(likely_K, stable=True).tolist():
            cost = self._without([name for name, stays in zip(self.names, open_K.tolist()) if not stays])
            if all(cost[quantity] <= limit for quantity, limit in self.limits.items()):
                break
            open_K[k] = False
        return open_K


class SampleGate(nn.Module):
    """A gate of each sample, from the mean of the input over all positions.

    Args:
        width: Channels of the input.
        hidden: Width of its hidden layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        nn.init.constant_(self.fc2.bias, 1.0)  # open to begin with

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w), (n, t, channels) or (n, channels) to logits (n,); open where positive."""
        pooled = x.flatten(2).mean(2) if x.ndim > 3 else x.flatten(1, -2).mean(1) if x.ndim > 2 else x
        logits: Tensor = self.fc2(torch.relu(self.fc1(pooled))).squeeze(-1)
        return logits


class SampleGates(nn.Module):
    """The gates of all branches, and what they have said lately.

    Args:
        widths: Channels that each reads.
        law: Width of hidden layers and sharpness.

    Attributes:
        mean_K: Share of late samples that each branch was open for; of all, as long as they are few.
        likely_K: Mean probability of it.
        seen_K: Batches that were looked at.
        fixed: Whether `open_K` decides, instead of the samples.
        open_K: Which branches are open then.
    """

    mean_K: Tensor
    likely_K: Tensor
    seen_K: Tensor
    fixed: Tensor
    open_K: Tensor

    def __init__(self, widths: list[int], law: Consensus) -> None:
        super().__init__()
        self.sharpness = law.sharpness
        self.each = nn.ModuleList([SampleGate(width, law.hidden) for width in widths])
        self.register_buffer("mean_K", torch.ones(len(widths)))
        self.register_buffer("likely_K", torch.ones(len(widths)))
        self.register_buffer("seen_K", torch.zeros(len(widths)))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        self.register_buffer("open_K", torch.ones(len(widths), dtype=torch.bool))

    def gate(self, k: int, x: Tensor) -> Tensor:
        """The gate of branch k for each sample, shape (n,), 0 or 1."""
        if bool(self.fixed):
            return self.open_K[k].to(x.dtype).expand(len(x))
        logits = self.each[k](x)
        if self.training:
            with torch.no_grad():
                self.seen_K[k] += 1
                rate = (1 / self.seen_K[k]).clamp_min(LATE)
                self.mean_K[k].lerp_((logits > 0).float().mean(), rate)
                self.likely_K[k].lerp_(logits.float().sigmoid().mean(), rate)
        return open_through(logits, self.sharpness)


def polarisation(mean_K: Tensor) -> Tensor:
    """``mean_k b_k (1 - b_k)``: 0 where all samples agree on every branch, 1/4 where half of them differ on each."""
    return (mean_K * (1 - mean_K)).mean()


class _Agreeing(Lesson):
    """The network with hooks that gate its branches, and the gates."""

    def __init__(
        self, law: Consensus, sites: list[tuple[str, str, str]], costs: _Costs, model: nn.Module, context: Context
    ) -> None:
        super().__init__(model, context)
        self.law, self.costs, self.plain = law, costs, model
        self.inputs: dict[str, Tensor] = {}
        self.gates_now: dict[str, Tensor] = {}
        self._sites = sites
        widths = self._widths()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.gates = SampleGates([widths[name] for name, *_ in sites], law)
        self.gates.to(context.device)
        self.hooks = [hook for k in range(len(sites)) for hook in self._gated(k)]
        self.model = nn.ModuleDict({"model": model, "gates": self.gates})

    def _widths(self) -> dict[str, int]:
        """Channels of what each branch reads."""
        widths: dict[str, int] = {}
        hooks = []
        for name, start, _ in self._sites:

            def look(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                x = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
                widths[name] = x.shape[1] if x.ndim > 3 else x.shape[-1]

            hooks.append(self.plain.get_submodule(start).register_forward_pre_hook(look, with_kwargs=True))
        assert self.context.train is not None
        batch = next(iter(self.context.train.batches(2, device=self.context.device)))
        training = self.plain.training
        with torch.no_grad():
            self.context.task.outputs(self.plain.eval(), batch)
        self.plain.train(training)
        for hook in hooks:
            hook.remove()
        return widths

    def _gated(self, k: int) -> list[Any]:
        name, start, end = self._sites[k]

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inputs[name] = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))

        def gate(module: nn.Module, args: Any, out: Any) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            open_N = self.gates_now[name] = self.gates.gate(k, self.inputs.pop(name))
            first = first * open_N.view(-1, *[1] * (first.ndim - 1)).to(first)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        return [
            self.plain.get_submodule(start).register_forward_pre_hook(note, with_kwargs=True),
            self.plain.get_submodule(end).register_forward_hook(gate),
        ]

    def loss(self, batch: Batch) -> Tensor:
        """That of the task, of disagreement, and of cost."""
        loss = self.context.task.step(self.plain, batch)
        if bool(self.gates.fixed):
            return loss
        mean_K = torch.stack([self.gates_now[name].float().mean() for name, *_ in self._sites])
        active = (mean_K * self.costs.share_K.to(mean_K)).sum()
        return (
            loss + self.law.polarise * polarisation(mean_K) + self.law.activate * (active - self.costs.target).square()
        )

    def settle(self, step: int, steps: int) -> None:
        """Fix the gates when their time is over."""
        if not bool(self.gates.fixed) and step >= self.law.until * steps:
            self.gates.open_K.copy_(self.costs.staying(self.gates.mean_K.cpu(), self.gates.likely_K.cpu()))
            self.gates.fixed.fill_(True)

    def finished(self) -> nn.Module:
        """The network without its gates."""
        for hook in self.hooks:
            hook.remove()
        return self.plain
