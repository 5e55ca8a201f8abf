"""TAS: widths and depths that are learnt by gradients, as distributions over candidates.

Array suffixes: W candidate widths of an axis, U units.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, log, pi
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaprune.allocate import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate._branches import Branch, find_branches
from metaprune.allocate.fedtiny import normalising_by_batch
from metaprune.errors import ConfigError, InputError
from metaprune.gates import GatedNetwork, gated_axes
from metaprune.graph.record import tensors_in
from metaprune.measure.distortion import centred
from metaprune.search.supernet import parts_of
from metaprune.task import on_calibration_data

_WIDE = 2.0  # what the whole width is ahead of none, in the beginning


@ALLOCATORS.register("tas")
@dataclass(frozen=True, kw_only=True)
class Tas(Allocator):
    """Widths that are learnt by gradients: every axis has a distribution over candidate widths.

    A step draws `sampled` widths of every axis by Gumbel-softmax and mixes the masks that keep the best units by score,
    by their probabilities among each other. In turns, on two halves of the data, a copy's weights are trained towards
    the outputs of the dense network (distillation), by their relative squared error, and the distributions by its
    logarithm, plus `cost` times that of the expected cost while the most likely configuration exceeds a limit, minus
    it while that stays more than `tolerance` below. In the end the most likely width of every axis is taken, all shrunk
    alike as far as limits ask for it. With `depth`, residual branches have a distribution over staying and leaving.

    The network is changed nowhere: the copy is thrown away, and only sizes are given.

    Source: Dong and Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019, arXiv:1905.09717.
    Differs from it: the network is trained already, so that widths are masks of the best units instead of
    channel-wise interpolations of the first ones, each with BatchNorms of its own, and search takes some hundred steps
    instead of hundreds of epochs; a block of any network may leave by itself, not the last ones of a stage; all of the
    loss is distance from the dense network, so that no labels are read; any costs, several at once. As in the published
    code, a cost between limit and tolerance is not pushed at all.

    Args:
        widths: Candidates, as shares of an axis, in (0, 1].
        sampled: Widths of an axis that are mixed in a step, at least 1.
        steps: Of weights and distributions each, at least 1.
        samples: Calibration samples, at least 2.
        batch: Samples of a step, at least 1.
        rate: Step of the distributions (Adam), above 0.
        weight_rate: Step of the weights (SGD with momentum), at least 0.
        cost: Weight of the cost, at least 0.
        tolerance: Share of a limit that the cost may stay below it, in [0, 1].
        hot: Temperature of the first step, above 0; it falls along a cosine.
        cold: Of the last one.
        depth: Residual branches may leave whole.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "network"})
    widths: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    sampled: int = 2
    steps: int = 100
    samples: int = 1024
    batch: int = 64
    rate: float = 0.05
    weight_rate: float = 1e-4
    cost: float = 2.0
    tolerance: float = 0.05
    hot: float = 5.0
    cold: float = 0.1
    depth: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("sampled", 1),
            ("steps", 1),
            ("samples", 2),
            ("batch", 1),
            ("weight_rate", 0),
            ("cost", 0),
        ):
            if not getattr(self, name) >= least:
                raise ConfigError(f"`{name} >= {least}` must hold, but {name}={getattr(self, name)}.")
        for name in ("rate", "hot", "cold"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"`0 < {name} < inf` must hold, but {name}={getattr(self, name)}.")
        if not self.widths or not all(0 < width <= 1 for width in self.widths) or not 0 <= self.tolerance <= 1:
            raise ConfigError(
                "`0 < width <= 1` must hold for every candidate and `0 <= tolerance <= 1`, but they are "
                f"{self.widths} and {self.tolerance}."
            )

    def _sizes(self, problem: Problem) -> Sizes:
        return self.learn(problem).derived()

    def learn(self, problem: Problem) -> "Distributions":
        """Distributions over widths, and branches, as they are after the last step.

        Raises:
            InputError: The data cannot be used, or outputs or gradients are not finite.
        """
        halves = self._halves(problem)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(problem.seed)
            learning = _Learning(self, problem)
            for step in range(self.steps):
                heat = self.cold + (self.hot - self.cold) * (1 + cos(pi * step / self.steps)) / 2
                learning.weights_follow(halves[0][step % len(halves[0])], heat)
                learning.widths_follow(halves[1][step % len(halves[1])], heat)
        return learning.chosen

    def _halves(self, problem: Problem) -> tuple[list[Any], list[Any]]:
        """Batches for the weights, and others for the distributions; small remainders are left out."""
        parts = parts_of(problem, self.batch, self.samples)
        if len(parts) == 1:
            parts = parts_of(problem, max(len(tensors_in(parts)[0]) // 2, 1), self.samples)
        lengths = [len(tensors_in(part)[0]) for part in parts]
        parts = [part for part, length in zip(parts, lengths) if 2 * length >= max(lengths)]
        return parts[::2], parts[1::2] or parts


class Distributions(nn.Module):
    """Of every axis over its widths, and of every branch over staying and leaving.

    Args:
        problem: Gives axes, scores and legal sizes.
        widths: Candidates, as shares of an axis.
        sampled: How many of them are mixed.
        branches: That may leave.
    """

    def __init__(self, problem: Problem, widths: Sequence[float], sampled: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.problem, self.sampled, self.branches = problem, sampled, branches
        self.places = [problem.traced.index(axis.name) for axis in problem.axes]
        self.sizes = [
            np.unique([problem.aligned(axis, axis.size * width) for width in widths]) for axis in problem.axes
        ]
        self.masks = [
            torch.stack([_mask(problem, axis.name, int(size)) for size in sizes_W])
            for axis, sizes_W in zip(problem.axes, self.sizes)
        ]
        self.logits = nn.ParameterList(
            nn.Parameter(_WIDE * torch.from_numpy(sizes_W / axis.size))
            for axis, sizes_W in zip(problem.axes, self.sizes)
        )
        self.stays = nn.Parameter(torch.zeros(len(branches), 2).double())  # leaving, staying
        every = problem.traced.axes
        self.gates = {name: torch.ones(every[problem.traced.index(name)].size) for name in gated_axes(problem.traced)}
        self.open = [torch.ones(()) for _ in branches]

    def forward(self) -> dict[str, Tensor]:
        """The gates that were drawn last."""
        return self.gates

    def draw(self, heat: float) -> None:
        """Draw gates: of every axis a mixture of a few masks, of every branch how far it is open."""
        gates = dict(self.gates)
        for axis, masks_WU, logit_W in zip(self.problem.axes, self.masks, self.logits):
            if axis.name in gates:
                noisy_W = (logit_W.log_softmax(0) + _gumbel(logit_W)) / heat
                chosen = (noisy_W.detach().softmax(0) + 1e-7).multinomial(min(self.sampled, len(noisy_W)))
                gates[axis.name] = noisy_W[chosen].softmax(0).to(masks_WU) @ masks_WU[chosen]
        self.gates = gates
        self.open = [
            ((logit_2.log_softmax(0) + _gumbel(logit_2)) / heat).softmax(0)[1].float() for logit_2 in self.stays
        ]

    def expected(self) -> Tensor:
        """Sizes of all axes of the network in the mean; a branch counts as far as it is likely to stay."""
        sizes = torch.from_numpy(self.problem.full).double()
        means = [
            logit_W.softmax(0) @ torch.from_numpy(sizes_W).double() for logit_W, sizes_W in zip(self.logits, self.sizes)
        ]
        sizes = sizes.index_put((torch.tensor(self.places),), torch.stack(means))
        for branch, logit_2 in zip(self.branches, self.stays):
            scale = torch.ones_like(sizes).index_fill(0, torch.tensor(branch.places[:1]), 0.0)
            sizes = sizes * (scale + (1 - scale) * logit_2.softmax(0)[1])
        return sizes

    def likely(self, share: float = 1.0) -> Sizes:
        """The most likely sizes, all times a share; 0 for branches that are likelier to leave."""
        wanted = {
            axis.name: share * float(sizes_W[int(logit_W.argmax())])
            for axis, sizes_W, logit_W in zip(self.problem.axes, self.sizes, self.logits)
        }
        sizes = self.problem.sizes(wanted)
        for branch, logit_2 in zip(self.branches, self.stays):
            if int(logit_2.argmax()) == 0:
                sizes[list(branch.places)] = 0
        return sizes

    def derived(self) -> Sizes:
        """The most likely sizes, shrunk alike as far as the limits ask for it."""
        low, high = 0.0, 1.0
        while not self.problem.fits(self.likely(high)) and high - low > 1e-6:
            share = (low + high) / 2
            low, high = (share, high) if self.problem.fits(self.likely(share)) else (low, share)
        return self.likely(high) if self.problem.fits(self.likely(high)) else self.likely(low)


class _Learning:
    """A copy of the network under gates, and the steps of its weights and of the distributions."""

    def __init__(self, options: Tas, problem: Problem) -> None:
        assert problem.task is not None
        network, self.options, self.problem, self.task = problem.traced, options, problem, problem.task
        known = (
            [branch for branch in find_branches(problem) if network.module_of(branch.block)] if options.depth else []
        )
        self.chosen = Distributions(problem, options.widths, options.sampled, known)
        self.dense = copy.deepcopy(network.model).eval().requires_grad_(False)
        model = normalising_by_batch(copy.deepcopy(network.model))
        self.gated = GatedNetwork(network, model, self.chosen)
        self.ends = [_end_of(problem, branch) for branch in known]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.weights = torch.optim.SGD(self.parameters, lr=options.weight_rate, momentum=0.9)
        self.widths = torch.optim.Adam(self.chosen.parameters(), lr=options.rate, betas=(0.5, 0.999))

    def weights_follow(self, batch: Any, heat: float) -> None:
        """One step of the weights, for widths that are drawn."""
        if self.options.weight_rate and self.parameters:
            with torch.no_grad():
                self.chosen.draw(heat)
            self._step(self.weights, self._distance(batch), self.parameters)

    def widths_follow(self, batch: Any, heat: float) -> None:
        """One step of the distributions."""
        self.chosen.draw(heat)
        loss = self._distance(batch).clamp_min(1e-12).log() + self.options.cost * self._push()
        self._step(self.widths, loss, list(self.chosen.parameters()))

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(parameters, 10.0)
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(norm)):
            raise InputError(
                "losses and gradients must be finite, but are not while widths are learnt. Lower `weight_rate`, and "
                "look for infinities in the weights and the data."
            )
        optimizer.step()

    def _distance(self, batch: Any) -> Tensor:
        """From the dense network: squared error of the outputs over their square."""
        with on_calibration_data(), self._branches():
            with torch.no_grad():
                wanted = tensors_in(self.task.outputs(self.dense, batch))[0]
            given = tensors_in(self.task.outputs(self.gated, batch))[0]
        wanted, given = centred(wanted), centred(given)
        return F.mse_loss(given, wanted) / wanted.square().mean().clamp_min(1e-12)

    def _push(self) -> Tensor:
        """Down where the most likely configuration exceeds a limit, up where it stays far below all of them."""
        cost, sizes = self.problem.traced.cost(self.chosen.likely()), self.chosen.expected()
        shares = {quantity: cost[quantity] / limit for quantity, limit in self.problem.limits.items()}
        tight = max(shares, key=lambda quantity: shares[quantity])
        expected = self.problem.traced.soft_cost(sizes, tight).clamp_min(1.0).log() - log(self.problem.limits[tight])
        if shares[tight] > 1:
            return expected
        return -expected if shares[tight] < 1 - self.options.tolerance else 0 * expected

    @contextmanager
    def _branches(self) -> Iterator[None]:
        """The copy with its branches open as far as was drawn."""
        hooks = [
            self.gated.model.get_submodule(end).register_forward_hook(partial(_scaled, gate))
            for end, gate in zip(self.ends, self.chosen.open)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _scaled(gate: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * gate


def _end_of(problem: Problem, branch: Branch) -> str:
    """The module that gives what a branch adds."""
    where = problem.traced.module_of(branch.block)
    assert where is not None
    return where[1]


def _mask(problem: Problem, name: str, size: int) -> Tensor:
    """One for the best units, zero for the others, shape (U,)."""
    mask_U = torch.zeros(problem.traced.axis(name).size)
    mask_U[list(problem.best(problem.traced.axis(name), size))] = 1
    return mask_U


def _gumbel(like: Tensor) -> Tensor:
    """Noise of the standard Gumbel distribution."""
    return -torch.empty_like(like).exponential_().log()
