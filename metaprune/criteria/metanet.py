"""What a metanetwork says of a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.errors import ConfigError
from metaprune.graph import Network
from metaprune.metanet import Blocks, Metanet, PaperMetanet, load_checkpoint, read_blocks, with_less_memory


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
    score_U = with_less_memory(
        metanet, lambda: metanet.scores(blocks, metanet(blocks, reads, share), reads, share, trust).double().cpu()
    )
    parts = (score_U - score_U.max()).exp().split([axis.size for axis in network.axes])
    return {axis.name: part for axis, part in zip(network.axes, parts, strict=True) if axis.prunable}


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
