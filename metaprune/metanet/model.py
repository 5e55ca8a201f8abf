"""The default metanetwork: reads a network as a graph, writes an easier one, and says what each unit is worth.

Messages are products of the weights with node states, so no tensor has an entry an edge and a channel. With psi_m(w) in
{w, |w|, w^2} and the kernel in frequencies phi(p), head r of a layer sees the network through one matrix a block,

    M_r = sum_m sum_p (phi(p) C_m)_r psi_m(w_p),      node i receives M_r[i, :] @ x_r (against the weights: M_r^T),

where x_r is the r-th part of the states. Each psi is divided by its scale over the fan-in, so that width plays no part.
Nodes that share an axis, joint nodes and their units, and the network as a whole exchange means.

Everything that is written is equivariant to permutations of the units of an axis by construction: changes of weights
have low rank in the states of both ends, scores are a function of one state.

Source: own, after Lim et al., Graph Metanetworks, arXiv:2312.04501 (equivariant message passing on parameter graphs),
and Liu et al., arXiv:2506.12041 (pruning by an edited network).

Suffixes: S stacked groups, O units made, I units read, K kernel positions, Q frequencies, N nodes, U units, A axes, H
hidden, R heads or rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metaprune.errors import ConfigError, ResourceError
from metaprune.graph.convert import KINDS, TYPES
from metaprune.metanet.blocks import FREQUENCIES, Blocks, EdgeBlock, FeatureBlock

if TYPE_CHECKING:
    from metaprune.metanet.paper import PaperMetanet

TILE_BYTES = 64 << 20
LEAST_TILE_BYTES = 1 << 20
RECOMPUTE_FROM = 1 << 20  # entries of all weights together
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
_SHARES = 4  # parts of the quantities of cost that an axis enters


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a metanetwork is built from; it is saved with the weights.

    Args:
        mode: Always ``default``.
        hidden: Size of the states, a multiple of `heads`.
        layers: Rounds of messages.
        heads: Views of the weights in each of them.
        rank: Of the changes of weights.
        reads: Criteria whose scores of units are features, the most telling first; the first that is given is the
            base that scores start from.
        edit: How far a weight may be scaled, in (0, 1].
        trust: How much of the correction the criterion ``metanet`` takes where the first of `reads` is the base, in
            [0, 1]; training, and a weaker base, take all of it.
        pairs: Rank of the interactions of axes in predicted distortions; 0 for none.

    Raises:
        ConfigError: A number does not fit.
    """

    mode: Literal["default"] = "default"
    hidden: int = 64
    layers: int = 4
    heads: int = 8
    rank: int = 8
    reads: tuple[str, ...] = ("taylor", "l2")
    edit: float = 0.5
    trust: float = 0.5
    pairs: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", tuple(self.reads))
        if min(self.hidden, self.layers, self.heads, self.rank) < 1 or self.hidden % self.heads:
            raise ConfigError(
                f"`hidden`, `layers`, `heads` and `rank` must be positive and `hidden` a multiple of `heads`, but they "
                f"are {self.hidden}, {self.layers}, {self.heads} and {self.rank}."
            )
        if not 0 < self.edit <= 1:
            raise ConfigError(f"`0 < edit <= 1` must hold, but edit={self.edit}.")
        if not 0 <= self.trust <= 1:
            raise ConfigError(f"`0 <= trust <= 1` must hold, but trust={self.trust}.")
        if self.pairs < 0:
            raise ConfigError(f"`pairs >= 0` must hold, but pairs={self.pairs}.")

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "reads": list(self.reads)}


class Metanet(nn.Module):
    """The default metanetwork.

    Args:
        shape: What it is built from.
        tile_bytes: Memory for what has an entry an edge, at once; products of larger blocks are made anew in the
            backward pass.
    """

    def __init__(self, shape: Shape | None = None, tile_bytes: int = TILE_BYTES) -> None:
        super().__init__()
        shape = shape or Shape()
        self.shape, self.tile_bytes = shape, tile_bytes
        hidden = shape.hidden
        self.encode = _Encoder(hidden, len(shape.reads))
        self.layers = nn.ModuleList(_Layer(hidden, shape.heads) for _ in range(shape.layers))
        self.worth = _mlp(hidden + 1, hidden, 1)
        self.scale, self.shift = _LowRank(hidden, shape.rank), _LowRank(hidden, shape.rank)
        self.features = nn.Linear(hidden, 2 * len(TYPES) * FREQUENCIES)
        self.pairs = _Pairs(hidden, shape.pairs) if shape.pairs else None
        self.curve = nn.Parameter(torch.tensor([0.0, 1.0]))
        for last in (self.worth[-1], self.features):
            nn.init.zeros_(last.get_parameter("weight"))
            nn.init.zeros_(last.get_parameter("bias"))

    def forward(self, blocks: Blocks, reads: Mapping[str, Tensor] | None = None, budget: float = 0.5) -> Tensor:
        """States of the nodes, (nodes, hidden); :meth:`scores` and :meth:`edit` read them.

        Args:
            blocks: The network.
            reads: Scores of every unit by some of the criteria of the shape, (units,); NaN where a criterion is silent.
            budget: Share of the multiply-accumulates that is to be left, in (0, 1].
        """
        state_NH = self.encode(blocks, _standard(blocks, self.shape.reads, reads or {}), budget)
        for layer in self.layers:
            state_NH = self._through(blocks, layer, blocks, state_NH, partial(self._through, blocks), self._tiles)
        return F.layer_norm(state_NH, state_NH.shape[1:])

    def scores(
        self,
        blocks: Blocks,
        state_NH: Tensor,
        reads: Mapping[str, Tensor] | None = None,
        budget: float = 0.5,
        trust: float = 1.0,
    ) -> Tensor:
        """Logarithm of what each unit is worth, (units,): that of the base criterion, corrected.

        Args:
            blocks: The network.
            state_NH: What :meth:`forward` gave for it.
            reads: As there.
            budget: As there.
            trust: Part of the correction that counts.
        """
        units = len(blocks.axis_U)
        budgets = state_NH.new_full((units, 1), math.log(budget))
        correction_U = self.worth(torch.cat([state_NH[:units], budgets], dim=1)).squeeze(1)
        return _base(blocks, self.shape.reads, reads or {}).to(correction_U) + trust * correction_U

    def distortion(self, blocks: Blocks, state_NH: Tensor, score_U: Tensor, removed_CU: Tensor) -> Tensor:
        """Logarithm of the predicted distortion of configurations, (C,), to a learnt power.

        It is the sum of what the removed units are worth, D_a on axis a, and with `pairs` also of what axes are worth
        together, sum_{a != b} rho_ab sqrt(D_a D_b).

        Args:
            blocks: The network.
            state_NH: What :meth:`forward` gave for it.
            score_U: Logarithms from :meth:`scores`.
            removed_CU: Which units leave; at least one a row.
        """
        gone_CU = torch.where(removed_CU, score_U, -torch.inf)
        total_C = gone_CU.logsumexp(dim=1)
        if self.pairs is not None:
            part_CU = (gone_CU - total_C.unsqueeze(1)).exp()  # of the sum
            part_CA = part_CU.new_zeros(len(part_CU), len(blocks.size_A)).index_add(1, blocks.axis_U, part_CU)
            root_CA = part_CA.clamp_min(1e-12).sqrt()
            both_C = ((root_CA @ self.pairs(blocks, state_NH)) * root_CA).sum(1)
            total_C = total_C + both_C.log1p()
        return self.curve[0] + self.curve[1] * total_C

    @property
    def edits(self) -> bool:
        """It changes parameters; one that never learnt to does not."""
        heads = (self.scale.out, self.shift.out, self.features)
        return any(bool(tensor.any()) for head in heads for tensor in (head.weight, head.bias))

    def edit(self, blocks: Blocks, state_NH: Tensor) -> dict[str, Tensor]:
        """Changed parameters by name, in their form, float32. A fresh metanetwork changes nothing."""
        tensors: dict[str, Tensor] = {}
        for block in blocks.edges:
            if block.learnt:
                parts = [self._through(blocks, self._edited, tile, state_NH) for tile in self._tiles(block)]
                tensors |= block.unstack(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        change_NTQ = self.features(state_NH).view(-1, 2, len(TYPES), FREQUENCIES)
        for features in blocks.features:
            if features.learnt:
                tensors |= features.unstack(self._edited_features(features, change_NTQ))
        return tensors

    def _edited(self, tile: EdgeBlock, state_NH: Tensor) -> Tensor:
        scale, shift = self.scale(tile, state_NH), self.shift(tile, state_NH)
        return tile.value_SOIK * (1 + self.shape.edit * scale.tanh()) + shift * tile.rms_S[:, None, None, None]

    def _edited_features(self, block: FeatureBlock, change_NTQ: Tensor) -> Tensor:
        scale_NK, shift_NK = (change_NTQ[block.node_N, k, block.type] @ block.code_KQ.T for k in range(2))
        return block.value_NK * (1 + self.shape.edit * scale_NK.tanh()) + shift_NK * block.rms_N.unsqueeze(1)

    def _tiles(self, block: EdgeBlock) -> list[EdgeBlock]:
        return block.tiles(4 * (block.value_SOIK.shape[3] * 4 + self.shape.heads), self.tile_bytes)

    def _through(self, blocks: Blocks, function: Callable[..., Any], *inputs: Any) -> Any:
        """Run; with a large network, what has an entry an edge is made anew in the backward pass."""
        if torch.is_grad_enabled() and blocks.entries > RECOMPUTE_FROM:
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


T = TypeVar("T")


def with_less_memory(metanet: "Metanet | PaperMetanet", work: Callable[[], T]) -> T:
    """Do some work with a metanetwork; where memory does not suffice, again with smaller tiles.

    Raises:
        ResourceError: It does not suffice for the smallest ones either.
    """
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:  # torch's own error on GPUs is a RuntimeError too
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
                raise
            if metanet.tile_bytes <= LEAST_TILE_BYTES:
                raise ResourceError(
                    f"a metanetwork needs more memory than there is, even with tiles of {metanet.tile_bytes >> 10} "
                    "KiB. Close what else runs, or use a smaller metanetwork (`shape` in the recipe)."
                ) from error
        metanet.tile_bytes //= 4


class _Encoder(nn.Module):
    """First states of nodes: their typed features, the norms of their weights, their axis, and what criteria say."""

    def __init__(self, hidden: int, reads: int) -> None:
        super().__init__()
        features, norms = 2 * FREQUENCIES + 2, 3
        self.features_TFH = nn.Parameter(torch.randn(len(TYPES), features + 1, hidden) / math.sqrt(features + 1))
        self.norms_TDFH = nn.Parameter(torch.randn(len(TYPES), 2, norms + 1, hidden) / math.sqrt(norms + 1))
        self.axes = _mlp(1 + len(KINDS) + 1 + _SHARES + 1, hidden, hidden)
        self.reads = nn.Linear(3 * reads, hidden)
        self.mix = _mlp(hidden, 2 * hidden, hidden)

    def forward(self, blocks: Blocks, reads_UF: Tensor, budget: float) -> Tensor:
        weight = self.features_TFH
        state_NH = weight.new_zeros(blocks.nodes, weight.shape[2])
        count_N1 = weight.new_zeros(blocks.nodes, 1)
        for block in blocks.features:
            relative_NK = block.value_NK / block.rms_N.unsqueeze(1)
            raw_NK = block.value_NK.sign() * block.value_NK.abs().log1p()
            columns = [raw_NK @ block.code_KQ, relative_NK @ block.code_KQ]
            columns += [block.rms_N.log().unsqueeze(1), block.depth_N.unsqueeze(1)]
            state_NH, count_N1 = self._add(state_NH, count_N1, block.node_N, torch.cat(columns, 1), weight[block.type])
        for edges in blocks.edges:
            squares_SOI = edges.value_SOIK.square().mean(3)
            for direction, (nodes, dim) in enumerate([(edges.out_SO, 2), (edges.into_SI, 1)]):
                norm = (squares_SOI.mean(dim).sqrt() / edges.rms_S[:, None]).reshape(-1, 1)
                scale = edges.rms_S[:, None].log().expand(nodes.shape).reshape(-1, 1)
                depth = edges.depth_S[:, None].expand(nodes.shape).reshape(-1, 1)
                columns = [norm.clamp_min(1e-6).log(), scale, depth]
                weights = self.norms_TDFH[edges.type, direction]
                state_NH, count_N1 = self._add(state_NH, count_N1, nodes.reshape(-1), torch.cat(columns, 1), weights)
        state_NH = state_NH / count_N1.clamp_min(1)
        axis_AH = self.axes(_axis_features(blocks, budget))
        units = len(blocks.axis_U)
        added_UH = axis_AH[blocks.axis_U] + self.reads(reads_UF)
        state_NH = state_NH + F.pad(added_UH, (0, 0, 0, blocks.nodes - units))
        return state_NH + self.mix(F.layer_norm(state_NH, state_NH.shape[1:]))

    @staticmethod
    def _add(
        state_NH: Tensor, count_N1: Tensor, node_N: Tensor, columns_NF: Tensor, weight_FH: Tensor
    ) -> tuple[Tensor, Tensor]:
        ones_N1 = columns_NF.new_ones(len(node_N), 1)
        added_NH = torch.cat([columns_NF, ones_N1], 1) @ weight_FH
        return state_NH.index_add(0, node_N, added_NH), count_N1.index_add(0, node_N, ones_N1)


class _Layer(nn.Module):
    """Messages along and against the weights, and means over joint nodes, axes and the network."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.views_DMQR = nn.Parameter(torch.randn(2, 3, FREQUENCIES, heads) / math.sqrt(3))
        self.gains_TDH = nn.Parameter(torch.ones(len(TYPES), 2, hidden))
        self.mix = _mlp(6 * hidden, 2 * hidden, hidden)

    def forward(
        self,
        blocks: Blocks,
        state_NH: Tensor,
        through: Callable[..., Any],
        tiles: Callable[[EdgeBlock], list[EdgeBlock]],
    ) -> Tensor:
        normed_NH = F.layer_norm(state_NH, state_NH.shape[1:])
        received = [normed_NH]
        sums = [torch.zeros_like(normed_NH), torch.zeros_like(normed_NH)]
        counts = [normed_NH.new_zeros(blocks.nodes, 1) for _ in range(2)]
        for block in blocks.edges:
            parts = tiles(block)
            read_SIH = normed_NH[block.into_SI]
            along = torch.cat([through(self._along, tile, read_SIH) for tile in parts], dim=1)
            against = sum(through(self._against, tile, normed_NH[tile.out_SO]) for tile in parts)
            for direction, (to, message) in enumerate([(block.out_SO, along), (block.into_SI, against)]):
                message = (message * self.gains_TDH[block.type, direction]).flatten(0, 1)
                sums[direction] = sums[direction].index_add(0, to.reshape(-1), message)
                counts[direction] = counts[direction].index_add(0, to.reshape(-1), message.new_ones(to.numel(), 1))
        received += [total / count.clamp_min(1) for total, count in zip(sums, counts, strict=True)]
        received.append(_coupled(blocks, normed_NH))
        axis_AH = _mean(normed_NH[: len(blocks.axis_U)], blocks.axis_U, len(blocks.size_A))
        received.append(F.pad(axis_AH[blocks.axis_U], (0, 0, 0, blocks.nodes - len(blocks.axis_U))))
        received.append(axis_AH.mean(0, keepdim=True).expand_as(normed_NH))
        return state_NH + self.mix(torch.cat(received, dim=1))

    def _along(self, block: EdgeBlock, read_SIH: Tensor) -> Tensor:
        return self._product(block, read_SIH, 0)

    def _against(self, block: EdgeBlock, read_SOH: Tensor) -> Tensor:
        return self._product(block, read_SOH, 1)

    def _product(self, block: EdgeBlock, read: Tensor, direction: int) -> Tensor:
        """What the nodes at one end receive from the states at the other, (S, nodes, H)."""
        matrix_SROI = self._views(block, direction)
        if direction == 1:
            matrix_SROI = matrix_SROI.mT
        stack, nodes, hidden = read.shape
        parts = read.view(stack, nodes, self.heads, -1).transpose(1, 2)
        return (matrix_SROI @ parts).transpose(1, 2).reshape(stack, -1, hidden)

    def _views(self, block: EdgeBlock, direction: int) -> Tensor:
        """The matrices M of all heads, (S, R, O, I)."""
        fan = block.fans[direction]
        relative = block.value_SOIK / block.rms_S[:, None, None, None]
        signed_RK, absolute_RK, square_RK = ((block.code_KQ @ view).T for view in self.views_DMQR[direction])
        stack, out, into, kernel = relative.shape
        flat_SKE = relative.reshape(stack, out * into, kernel).transpose(1, 2)
        matrix = (signed_RK / math.sqrt(fan)) @ flat_SKE
        matrix = matrix + (absolute_RK / fan) @ flat_SKE.abs() + (square_RK / fan) @ flat_SKE.square()
        return matrix.view(stack, self.heads, out, into)


class _Pairs(nn.Module):
    """Interactions rho of axes, (axes, axes): products of vectors shorter than 1, so that no sum becomes negative."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.vector = nn.Linear(hidden, rank)
        nn.init.normal_(self.vector.weight, std=0.1 / math.sqrt(hidden))
        nn.init.zeros_(self.vector.bias)

    def forward(self, blocks: Blocks, state_NH: Tensor) -> Tensor:
        axis_AH = _mean(state_NH[: len(blocks.axis_U)], blocks.axis_U, len(blocks.size_A))
        vector_AR = self.vector(axis_AH)
        vector_AR = vector_AR / (1 + vector_AR.square().sum(1, keepdim=True)).sqrt()
        return (vector_AR @ vector_AR.T).fill_diagonal_(0)


class _LowRank(nn.Module):
    """A change of every weight that has low rank in the states of its ends; zero at first."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.out, self.into = nn.Linear(hidden, rank), nn.Linear(hidden, rank)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.kernel_QR = nn.Parameter(torch.randn(FREQUENCIES, rank))

    def forward(self, tile: EdgeBlock, state_NH: Tensor) -> Tensor:
        out_SOR, into_SIR = self.out(state_NH[tile.out_SO]), self.into(state_NH[tile.into_SI])
        kernel_KR = tile.code_KQ @ self.kernel_QR
        left_SOKR = out_SOR.unsqueeze(2) * kernel_KR
        stack, out, kernel, rank = left_SOKR.shape
        change = left_SOKR.reshape(stack, out * kernel, rank) @ into_SIR.mT
        return change.view(stack, out, kernel, -1).transpose(2, 3) / math.sqrt(rank)


def _mlp(inside: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, hidden), nn.SiLU(), nn.Linear(hidden, out))


def _mean(value_NH: Tensor, group_N: Tensor, groups: int) -> Tensor:
    total = value_NH.new_zeros(groups, value_NH.shape[1]).index_add(0, group_N, value_NH)
    count = value_NH.new_zeros(groups, 1).index_add(0, group_N, value_NH.new_ones(len(group_N), 1))
    return total / count.clamp_min(1)


def _coupled(blocks: Blocks, state_NH: Tensor) -> Tensor:
    """At joint nodes the mean of the units they need, at units the mean of the joint nodes that need them."""
    joint, unit = blocks.needs
    both = torch.cat([joint, unit])
    return _mean(torch.cat([state_NH[unit], state_NH[joint]]), both, blocks.nodes)


def _axis_features(blocks: Blocks, budget: float) -> Tensor:
    kinds = F.one_hot(blocks.kind_A, len(KINDS)).float()
    columns = [blocks.size_A.float().log().unsqueeze(1), kinds, blocks.prunable_A.float().unsqueeze(1), blocks.share_AC]
    columns.append(torch.full_like(columns[0], math.log(budget)))
    return torch.cat(columns, dim=1)


def _standard(blocks: Blocks, names: tuple[str, ...], reads: Mapping[str, Tensor]) -> Tensor:
    """Per criterion: the logarithm of the score over the network's mean, over its axis's mean, and whether it is there.

    Returns:
        (units, 3 criteria), float32; zero where a criterion is silent.
    """
    columns = []
    for name in names:
        score_U = reads.get(name)
        if score_U is None:
            columns.append(blocks.share_AC.new_zeros(len(blocks.axis_U), 3))
            continue
        there_U = score_U.isfinite()
        score_U = _positive(score_U.to(blocks.share_AC.device))
        axis_A1 = _mean(score_U[there_U].unsqueeze(1), blocks.axis_U[there_U], len(blocks.size_A))
        whole = score_U[there_U].mean().log()
        near = axis_A1[blocks.axis_U, 0].clamp_min(1e-300).log()
        column = torch.stack([score_U.log() - whole, score_U.log() - near, torch.ones_like(score_U)], dim=1)
        columns.append(torch.where(there_U.unsqueeze(1), column, 0).clamp(-20, 20).float())
    return torch.cat(columns, dim=1)


def _base(blocks: Blocks, names: tuple[str, ...], reads: Mapping[str, Tensor]) -> Tensor:
    """Logarithm of the first criterion that is given, over its mean over the network; zero where there is none."""
    first = next((name for name in names if name in reads), None)
    if first is None:
        return torch.zeros(len(blocks.axis_U), device=blocks.axis_U.device)
    there_U = reads[first].isfinite()
    score_U = _positive(reads[first])
    return torch.where(there_U, score_U.log() - score_U[there_U].mean().log(), 0).float()


def _positive(score_U: Tensor) -> Tensor:
    """Scores with those that are zero or missing lifted to a thousandth of the smallest that is not."""
    there = score_U[score_U.isfinite() & (score_U > 0)]
    least = float(there.min()) * 1e-3 if len(there) else 1.0
    return torch.where(score_U.isfinite(), score_U.double(), least).clamp_min(least)
