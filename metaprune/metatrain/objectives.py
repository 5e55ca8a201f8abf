"""What a metanetwork is trained for. Objectives can be combined; each step takes one vector-Jacobian product.

An objective that needs the task's gradient detaches the edited tensors, adds up what any number of batches say of them,
and returns their inner product with that gradient: a surrogate whose gradient is the right one. All surrogates together
are differentiated once.

Suffixes: U units, C configurations, N nodes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from metaprune.criteria.metanet import savings, threshold
from metaprune.errors import ConfigError
from metaprune.graph import Network
from metaprune.metanet import Blocks, Metanet, PaperMetanet
from metaprune.metatrain.distortion import Distortions, batch_statistics
from metaprune.registry import Registry
from metaprune.task import Task

LEAST_DISTORTION = 1e-5  # nats; what is smaller is noise


@dataclass(frozen=True, eq=False)
class Subject:
    """A network of the population, as a metanetwork meets it.

    Attributes:
        name: Its name.
        network: Traced, with its weights.
        blocks: Its graph.
        distortions: What was measured of it.
    """

    name: str
    network: Network
    blocks: Blocks
    distortions: Distortions


class Pass:
    """One pass of the metanetwork over a network, shared by the objectives of a step.

    Args:
        metanet: The metanetwork.
        subject: The network.
        reads: Scores of criteria that it may read here.
        budget: Share of the multiply-accumulates that is to be left.
        batches: Gives batches of training data, without end.
        task: Their loss.
        random: Draws.
    """

    def __init__(
        self,
        metanet: Metanet | PaperMetanet,
        subject: Subject,
        reads: Mapping[str, Tensor],
        budget: float,
        batches: Iterator[Any],
        task: Task,
        random: np.random.Generator,
    ) -> None:
        self.metanet, self.subject, self.reads, self.budget = metanet, subject, reads, budget
        self.batches, self.task, self.random = batches, task, random

    @cached_property
    def state(self) -> Any:
        """What the metanetwork makes of the network: states of its nodes, or it edited."""
        return self.metanet(self.subject.blocks, self.reads, self.budget)

    @property
    def judge(self) -> Metanet:
        """The metanetwork as one that says what units are worth; objectives that ask for it have `scores`."""
        assert isinstance(self.metanet, Metanet)
        return self.metanet

    @cached_property
    def score_U(self) -> Tensor:
        """Logarithm of what each unit is worth."""
        return self.judge.scores(self.subject.blocks, self.state, self.reads, self.budget)

    @cached_property
    def edited(self) -> dict[str, Tensor]:
        """Changed parameters in their form."""
        return self.metanet.edit(self.subject.blocks, self.state)

    def surrogate(self, tensors: Mapping[str, Tensor], batches: int) -> tuple[Tensor, float]:
        """Inner product of parameters with the mean gradient of the task's loss at them, and that loss.

        Args:
            tensors: Parameters in their form, with a graph to the metanetwork.
            batches: How many.
        """
        places, model = self.subject.network.places.places, self.subject.network.model
        leaves = {name: places[name].write(tensor).detach().requires_grad_() for name, tensor in tensors.items()}
        total = 0.0
        with batch_statistics(model):
            for _ in range(batches):
                batch = next(self.batches)

                def run(*args: Any, **kwargs: Any) -> Any:
                    return functional_call(model, leaves, args, kwargs)

                loss = self.task.step(run, batch) / batches
                loss.backward()
                total += float(loss.detach())
        products = [
            (tensor * places[name].read(leaf.grad)).sum()
            for (name, tensor), leaf in zip(tensors.items(), leaves.values(), strict=True)
            if leaf.grad is not None
        ]
        return torch.stack(products).sum(), total


class Objective(ABC):
    """What is to be small. Concrete objectives are frozen dataclasses in :data:`OBJECTIVES`.

    Attributes:
        scores: It asks what units are worth, which the published metanetwork does not say.
    """

    scores: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, one: Pass) -> tuple[Tensor, dict[str, float]]:
        """A scalar to differentiate, and numbers to report by name."""


OBJECTIVES: Registry[type[Objective]] = Registry("objective", "metaprune.objectives", home="metaprune.metatrain")


@OBJECTIVES.register("amortised")
@dataclass(frozen=True, kw_only=True)
class Amortised(Objective):
    """Predict the measured distortion of configurations: the logarithm, and which of two at like cost is smaller.

    The distortion of a configuration is predicted from what its removed units are worth. Configurations of all axes
    count the more, the nearer what they leave is to the budget; those of one axis or two always count. Two random
    configurations near the budget are compared, and what each search tried near it with the best that it found.

    Args:
        ranking: Weight of the comparisons.
        width: Standard deviation, in the logarithm of the share that is left, of what counts as near.
    """

    ranking: float = 0.5
    width: float = 0.25

    def __call__(self, one: Pass) -> tuple[Tensor, dict[str, float]]:
        """See the class."""
        measured = one.subject.distortions
        wanted_C = measured.distortion_C.clamp_min(LEAST_DISTORTION).log()
        seen_C = one.judge.distortion(one.subject.blocks, one.state, one.score_U, measured.removed_CU)
        distance_C = (measured.share_C.log() - math.log(one.budget)) / self.width
        weight_C = torch.where(measured.few_C, 0.3, torch.exp(-0.5 * distance_C.square()))
        error_C = F.huber_loss(seen_C, wanted_C, reduction="none")
        fit = (weight_C * error_C).sum() / weight_C.sum()
        near_C = ~measured.few_C & (distance_C.abs() < 2)
        first, second = _comparisons(wanted_C, near_C, measured.search_C, one.random)
        ranked = fit.new_zeros(())
        if len(first):
            gap = wanted_C[first] - wanted_C[second]
            ranked = (F.softplus(-gap.sign() * (seen_C[first] - seen_C[second])) * gap.abs()).mean()
        return fit + self.ranking * ranked, {"fit": float(fit.detach()), "ranking": float(ranked.detach())}


def _comparisons(
    wanted_C: Tensor, near_C: Tensor, search_C: Tensor, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Pairs of configurations: drawn from the random ones, and of each search the best with every other."""
    drawn = torch.nonzero(near_C & (search_C < 0)).squeeze(1)
    drawn = drawn[torch.from_numpy(random.permutation(len(drawn)))]
    half = len(drawn) // 2
    first, second = [drawn[:half]], [drawn[half : 2 * half]]
    for number in range(int(search_C.max()) + 1):
        tried = torch.nonzero(near_C & (search_C == number)).squeeze(1)
        if len(tried) > 1:
            best = tried[wanted_C[tried].argmin()]
            others = tried[tried != best]
            first.append(best.expand(len(others)))
            second.append(others)
    return torch.cat(first), torch.cat(second)


@OBJECTIVES.register("direct")
@dataclass(frozen=True, kw_only=True)
class Direct(Objective):
    """Loss of the edited network with a soft mask over its units, at the budget.

    The mask of a unit is a sigmoid of its worth per cost over a threshold at which the *hard* mask meets the budget.
    BatchNorm normalises with the batch, as after its re-estimation.

    Args:
        temperature: Of the sigmoid, in units of the logarithm of worth.
        batches: Of training data a step.
    """

    temperature: float = 0.5
    batches: int = 1

    def __call__(self, one: Pass) -> tuple[Tensor, dict[str, float]]:
        """See the class."""
        mask_U = soft_mask(one.subject.network, one.subject.blocks, one.score_U, one.budget, self.temperature)
        surrogate, loss = one.surrogate(masked(one.subject.blocks, one.edited, mask_U), self.batches)
        return surrogate, {"task": loss}


@OBJECTIVES.register("paper")
@dataclass(frozen=True, kw_only=True)
class Paper(Objective):
    """Loss of the edited network, and sparsity of its groups of weights.

    The second is 1/2 sum_k gamma_k |W[k]|^2 over units k, per weight, with gamma = alpha^((Imax - I) / (Imax - Imin))
    and I the root of the mean square of the unit's weights, by axis; gamma is held fixed in the gradient, and 1 where
    all units of an axis are alike.

    Source: Liu et al., arXiv:2506.12041, with the group norm of Fang et al., DepGraph, arXiv:2301.12900.
    Differs from it: the loss is a mean over batches and the norm a mean over weights, so that their balance does not
    hang on the amount of data or the size of the network.

    Args:
        sparsity: Weight of the norm.
        alpha: Largest gamma, at least 1.
        batches: Of training data a step.
    """

    scores: ClassVar[bool] = False
    sparsity: float = 10.0
    alpha: float = 16.0
    batches: int = 1

    def __post_init__(self) -> None:
        if self.alpha < 1 or self.sparsity < 0:
            raise ConfigError(f"`alpha >= 1` and `sparsity >= 0` must hold, but are {self.alpha} and {self.sparsity}.")

    def __call__(self, one: Pass) -> tuple[Tensor, dict[str, float]]:
        """See the class."""
        surrogate, loss = one.surrogate(one.edited, self.batches)
        square_U, count_U = _squares(one.subject.blocks, one.edited)
        gamma_U = _gamma(one.subject.blocks, (square_U / count_U.clamp_min(1)).detach().sqrt(), self.alpha)
        norm = 0.5 * (gamma_U * square_U).sum() / count_U.sum().clamp_min(1)
        return surrogate + self.sparsity * norm, {"task": loss, "sparsity": float(norm.detach())}


def soft_mask(network: Network, blocks: Blocks, score_U: Tensor, budget: float, temperature: float) -> Tensor:
    """A factor in (0, 1) for every unit, (units,): 1 for units of axes that must stay.

    Args:
        network: Gives costs.
        blocks: Its graph.
        score_U: Logarithm of what units are worth.
        budget: Share of the multiply-accumulates at which the hard mask, score above threshold, is to arrive.
        temperature: Of the sigmoid.
    """
    free_U = blocks.prunable_A[blocks.axis_U]
    rate_U = score_U - savings(network).to(score_U)[blocks.axis_U].log()
    limit = threshold(network, blocks, rate_U.detach(), budget)
    soft_U = torch.sigmoid((rate_U - limit) / temperature)
    return torch.where(free_U, soft_U, 1.0)


def masked(blocks: Blocks, tensors: Mapping[str, Tensor], mask_U: Tensor) -> dict[str, Tensor]:
    """Parameters with the columns that read a unit scaled by its mask; a joint node has the product of its units'."""
    mask_N = torch.cat([mask_U, mask_U.new_ones(blocks.nodes - len(mask_U))])
    if blocks.needs.shape[1]:
        joint, unit = blocks.needs
        mask_N = mask_N.scatter_reduce(0, joint, mask_U[unit], "prod", include_self=True)
    out = dict(tensors)
    for block in blocks.edges:
        for k, name in enumerate(block.names):
            if name in out:
                groups = block.form[0]
                into = mask_N[block.into_SI[k * groups : (k + 1) * groups]]
                shape = (groups, 1, block.form[2], *[1] * (len(block.form) - 3))
                out[name] = out[name] * into.view(shape)
    return out


def _squares(blocks: Blocks, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of squares of the weights at every unit, made or read, and their number; (units,) each."""
    units = len(blocks.axis_U)
    first = next(iter(tensors.values()))
    square_N, count_N = first.new_zeros(blocks.nodes), first.new_zeros(blocks.nodes)
    for block in blocks.edges:
        for k, name in enumerate(block.names):
            if name not in tensors:
                continue
            groups, out, into = block.form[:3]
            entries = tensors[name].reshape(groups, out, into, -1).square().sum(3)
            size = math.prod(block.form[3:])
            part = slice(k * groups, (k + 1) * groups)
            for nodes, total, count in (
                (block.out_SO[part], entries.sum(2), into * size),
                (block.into_SI[part], entries.sum(1), out * size),
            ):
                square_N = square_N.index_add(0, nodes.reshape(-1), total.reshape(-1))
                count_N = count_N.index_add(0, nodes.reshape(-1), torch.full_like(total.reshape(-1), count))
    return square_N[:units], count_N[:units]


def _gamma(blocks: Blocks, importance_U: Tensor, alpha: float) -> Tensor:
    axes = len(blocks.size_A)
    high = importance_U.new_zeros(axes).scatter_reduce(0, blocks.axis_U, importance_U, "amax", include_self=False)
    low = importance_U.new_zeros(axes).scatter_reduce(0, blocks.axis_U, importance_U, "amin", include_self=False)
    spread_U = (high - low)[blocks.axis_U]
    rank_U = (high[blocks.axis_U] - importance_U) / spread_U.clamp_min(1e-12)
    gamma_U = torch.where(spread_U > 0, alpha**rank_U, 1.0)
    return torch.where(blocks.prunable_A[blocks.axis_U], gamma_U, 0.0)
