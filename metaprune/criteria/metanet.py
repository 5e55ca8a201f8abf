"""What a metanetwork says of a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.errors import ConfigError
from metaprune.graph import Network
from metaprune.metanet import Blocks, Metanet, PaperMetanet, load_checkpoint, read_blocks, with_less_memory

ROUNDS = 4  # of looking at what leaves, and at what that makes units worth


@CRITERIA.register("metanet")
@dataclass(frozen=True, kw_only=True)
class MetanetScore(Criterion):
    """What a metanetwork predicts that a unit adds to the distortion of the output, from one pass over the network.

    The metanetwork reads the weights and, where there are data, what cheaper criteria say. Its scores hold for the
    budget at hand. They are those of the best of these criteria, corrected by as much as its shape trusts it.
    Source: own, see :mod:`metaprune.metanet.model`.

    Args:
        checkpoint: The metanetwork: ``default``, or a file that ``metaprune metatrain`` wrote.
    """

    additive: ClassVar[bool] = True
    together: ClassVar[bool] = True
    checkpoint: str = "default"

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        metanet = load_checkpoint(self.checkpoint).metanet
        reads = unit_scores(network, calibration, metanet.shape.reads)
        return metanet_scores(metanet, network, read_blocks(network.to_graph()), reads, calibration.share)


def unit_scores(network: Network, calibration: Calibration, names: Sequence[str]) -> dict[str, Tensor]:
    """Scores of all units, axis by axis, by every criterion that can judge with what is given.

    Returns:
        By name of the criterion, float64 of shape (units,); NaN where it is silent.
    """
    out = {}
    for name in names:
        criterion = CRITERIA[name]()
        if "gradients" in criterion.needs and calibration.task is None:
            continue
        if criterion.needs and calibration.batches is None:
            continue
        try:
            scores = criterion.score(network, calibration)
        except ConfigError:  # it reads something that this network lacks
            continue
        silent = {axis.name: torch.full((axis.size,), torch.nan) for axis in network.axes}
        out[name] = torch.cat([scores.get(axis.name, silent[axis.name]).double().cpu() for axis in network.axes])
    return out


@torch.no_grad()
def metanet_scores(
    metanet: Metanet | PaperMetanet, network: Network, blocks: Blocks, reads: Mapping[str, Tensor], share: float
) -> Scores:
    """What a metanetwork says that the units of prunable axes are worth, relative to the best; float64.

    Of one that only edits, like the published one, the norms of what it has edited.

    Args:
        metanet: The metanetwork.
        network: The network.
        blocks: Its graph.
        reads: From :func:`unit_scores`.
        share: Part of the multiply-accumulates that is to be left.
    """
    if isinstance(metanet, PaperMetanet):
        edited = network.with_tensors(metanet_edit(metanet, network, blocks, reads, share))
        return CRITERIA["l2"]().score(edited, Calibration())
    trust = metanet.shape.trust if any(name in reads for name in metanet.shape.reads[:1]) else 1.0

    def judged() -> Tensor:
        state_NH = metanet(blocks, reads, share)
        score_U = metanet.scores(blocks, state_NH, reads, share, trust)
        if metanet.pairs is not None:
            rho_AA = metanet.pairs(blocks, state_NH)
            score_U = score_U + _beside_others(network, blocks, score_U, rho_AA, share)[blocks.axis_U]
        return score_U.double().cpu()

    score_U = with_less_memory(metanet, judged)
    parts = (score_U - score_U.max()).exp().split([axis.size for axis in network.axes])
    return {axis.name: part for axis, part in zip(network.axes, parts, strict=True) if axis.prunable}


def _beside_others(network: Network, blocks: Blocks, score_U: Tensor, rho_AA: Tensor, share: float) -> Tensor:
    """Logarithm of what one more unit of an axis adds beside what leaves with it, over what it adds alone, (axes,).

    The slope of sum_a D_a + sum_{a != b} rho_ab sqrt(D_a D_b) in D_a, where what leaves is what one threshold takes; of
    axes that lose nothing as if half of them left.
    """
    free_U, saved_U = blocks.prunable_A[blocks.axis_U], savings(network).to(score_U)[blocks.axis_U].log()
    log_A = score_U.new_zeros(len(blocks.size_A))
    for _ in range(ROUNDS):
        rate_U = score_U + log_A[blocks.axis_U] - saved_U
        gone_U = free_U & (rate_U < threshold(network, blocks, rate_U, share))
        worth_A, half_A = log_A.new_zeros(len(log_A)), log_A.new_zeros(len(log_A))
        worth_A = worth_A.index_add(0, blocks.axis_U, torch.where(gone_U, score_U.exp(), 0))
        half_A = half_A.index_add(0, blocks.axis_U, torch.where(free_U, score_U.exp(), 0)) / 2
        root_A = torch.where(worth_A > 0, worth_A, half_A).clamp_min(1e-12).sqrt()
        slope_A = 1 + (rho_AA @ worth_A.sqrt()) / root_A
        log_A = (log_A + slope_A.clamp(0.25, 4).log()) / 2
    return log_A


@torch.no_grad()
def metanet_edit(
    metanet: Metanet | PaperMetanet, network: Network, blocks: Blocks, reads: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """What a metanetwork makes of the parameters, in their own shape and type; only those that it changes.

    Args:
        metanet: The metanetwork.
        network: The network.
        blocks: Its graph.
        reads: From :func:`unit_scores`.
        share: Part of the multiply-accumulates that is to be left.
    """
    if not metanet.edits:
        return {}
    own = network.weights
    changed = {}
    edited = with_less_memory(metanet, lambda: metanet.edit(blocks, metanet(blocks, reads, share)))
    for name, tensor in edited.items():
        value = network.places.places[name].write(tensor).to(own[name].dtype).cpu().contiguous()
        if not torch.equal(value, own[name].detach().cpu()):
            changed[name] = value
    return changed


def savings(network: Network) -> Tensor:
    """Multiply-accumulates that one unit of each axis costs in the dense network, over all; (axes,)."""
    full = np.array([axis.size for axis in network.axes], np.int64)
    free = [k for k, axis in enumerate(network.axes) if axis.prunable]
    rows = np.repeat(full[None], len(free), axis=0)
    rows[np.arange(len(free)), free] -= 1
    total = network.cost().macs
    saving = torch.ones(len(full))
    saving[free] = torch.from_numpy((total - network.cost_many(rows).macs) / max(total, 1)).float().clamp_min(1e-9)
    return saving


def threshold(network: Network, blocks: Blocks, rate_U: Tensor, budget: float) -> float:
    """Where to cut, so that the units above cost the budget: by bisection over the units' own rates."""
    full = np.array([axis.size for axis in network.axes], np.int64)
    axis_U, rates = blocks.axis_U.cpu().numpy(), rate_U.double().cpu().numpy()
    free = blocks.prunable_A[blocks.axis_U].cpu().numpy()
    ordered = np.sort(rates[free])
    limit, low, high = budget * network.cost().macs, 0, len(ordered) - 1

    def macs(count: int) -> float:
        gone = np.bincount(axis_U[free & (rates < ordered[count])], minlength=len(full))
        return float(network.cost(np.maximum(full - gone, 1)).macs)

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if macs(middle) <= limit else (middle + 1, high)
    return float(ordered[low])
