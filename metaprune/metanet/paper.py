"""The published metanetwork, on dense blocks instead of lists of edges.

Legend: x states of nodes, e states of edges, i the node that a message goes to, j the one that it comes from. With xn =
LayerNorm(x) and phi_n = SiLU(Linear), one layer is, in each direction,

    m_ij = phi2(xn_i) * phi1(xn_j) * e_ij,      x_i += Linear([mean, std, max, min]_j m_ij)
    r_ij = phi3(xn_j) * phi4(xn_i) * e_ij,      e_ij += r_ij

with one set of weights, and e * inv in the direction against the weights, inv = (1, .., 1, -1, .., -1). It follows:

* e_{l+1} = e_l * (1 + A_i B_j + B_i A_j) with A = phi3(xn), B = phi4(xn), because inv^2 = 1: edge states are never
  mixed over channels, and those of any layer are e_0 times a product that only node states enter;
* the aggregations factor over a block: z_i = phi2(xn_i) leaves the sums, and a maximum of z_i t_ij over j is z_i times
  the maximum of t_ij, or their minimum where z_i is negative.

So no message is stored, nothing is gathered edge by edge, and where memory is short the states of edges are computed
anew, tile by tile (``recompute``).

Source: Liu et al., Meta Pruning via Graph Metanetworks, arXiv:2506.12041.
Differs from it: typed features and kernel frequencies instead of columns per architecture, so that one network reads
all; nodes that a residual stream shares are one node, not several with identity edges between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metaprune.errors import ConfigError
from metaprune.graph.convert import TYPES
from metaprune.metanet.blocks import FREQUENCIES, Blocks, EdgeBlock

TILE_BYTES = 64 << 20
_LEAST_VARIANCE = 1e-5  # as torch_geometric's StdAggregation


class FeatureEncoder(nn.Module):
    """The mean over a node's typed features of a linear map of their kernel frequencies, one map a type."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight_TQH = nn.Parameter(torch.randn(len(TYPES), FREQUENCIES, hidden) / math.sqrt(FREQUENCIES))
        self.bias_TH = nn.Parameter(0.1 * torch.randn(len(TYPES), hidden))

    def forward(self, blocks: Blocks) -> Tensor:
        """States of the nodes, (nodes, hidden)."""
        state_NH = self.bias_TH.new_zeros(blocks.nodes, self.bias_TH.shape[1])
        count_N1 = self.bias_TH.new_zeros(blocks.nodes, 1)
        for block in blocks.features:
            coded_NQ = block.value_NK @ block.code_KQ
            state_NH = state_NH.index_add(
                0, block.node_N, coded_NQ @ self.weight_TQH[block.type] + self.bias_TH[block.type]
            )
            count_N1 = count_N1.index_add(0, block.node_N, count_N1.new_ones(len(block.node_N), 1))
        return state_NH / count_N1.clamp_min(1)


class PaperLayer(nn.Module):
    """The weights of one layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.phi = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(4))
        self.mix = nn.Linear(4 * hidden, hidden)

    def factors(self, state_NH: Tensor) -> list[Tensor]:
        """phi1 to phi4 of the normed states."""
        normed_NH = F.layer_norm(state_NH, state_NH.shape[1:])
        return [F.silu(phi(normed_NH)) for phi in self.phi]


@dataclass(frozen=True, kw_only=True)
class PaperShape:
    """What the published metanetwork is built from; it is saved with the weights.

    Args:
        mode: Always ``paper``.
        hidden: Size of the states, even.
        layers: Rounds of messages.
        node_ratio: Factor of what is added to features.
        edge_ratio: Factor of what is added to weights.

    Raises:
        ConfigError: A number does not fit.
    """

    mode: Literal["paper"] = "paper"
    hidden: int = 64
    layers: int = 8
    node_ratio: float = 0.01
    edge_ratio: float = 0.01

    reads: ClassVar[tuple[str, ...]] = ("l2",)  # it reads no scores; these judge what it has edited

    def __post_init__(self) -> None:
        if self.hidden < 2 or self.hidden % 2 or self.layers < 1:
            raise ConfigError(
                f"`hidden` must be even and `layers` at least 1, but they are {self.hidden} and {self.layers}."
            )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class PaperMetanet(nn.Module):
    """The published metanetwork. It edits a network; what units are worth, a criterion says of the edited one.

    Args:
        shape: What it is built from.
        tile_bytes: Memory for the states of edges at once.
        recompute: Compute states of edges anew in the backward pass; None decides by their size.
    """

    edits: ClassVar[bool] = True

    def __init__(
        self, shape: PaperShape | None = None, tile_bytes: int = TILE_BYTES, recompute: bool | None = None
    ) -> None:
        super().__init__()
        shape = shape or PaperShape()
        self.shape, self.tile_bytes, self.recompute = shape, tile_bytes, recompute
        hidden = self.hidden = shape.hidden
        self.encode_nodes = FeatureEncoder(hidden)
        self.encode_edges = nn.Linear(FREQUENCIES, hidden)
        self.layers = nn.ModuleList(PaperLayer(hidden) for _ in range(shape.layers))
        self.decode_nodes = _mlp(hidden, len(TYPES) * FREQUENCIES)
        self.decode_edges = _mlp(hidden, FREQUENCIES)

    def edit(self, blocks: Blocks, edited: dict[str, Tensor]) -> dict[str, Tensor]:
        """What :meth:`forward` gave, as :meth:`Metanet.edit <metaprune.metanet.Metanet.edit>` of the default mode."""
        return edited

    def forward(
        self, blocks: Blocks, reads: Mapping[str, Tensor] | None = None, budget: float = 0.5
    ) -> dict[str, Tensor]:
        """The edited parameters by name, in their form; float32. Scores and budget play no part in this mode."""
        state_NH = self.encode_nodes(blocks)
        size = 4 * self.hidden
        recompute = self.recompute
        if recompute is None:
            recompute = blocks.count * size * (len(self.layers) + 1) > 16 * self.tile_bytes
        tiles = [tile for block in blocks.edges for tile in block.tiles(size, self.tile_bytes)]
        history: list[Tensor] = []
        states: list[Tensor | None] = [None if recompute else self.first(tile) for tile in tiles]
        for layer in self.layers:
            assert isinstance(layer, PaperLayer)
            p1_NH, p2_NH, a_NH, b_NH = layer.factors(state_NH)
            moments = [
                checkpoint(self._later_moments, tile, p1_NH, *history, use_reentrant=False)
                if edge is None
                else _moments(edge, p1_NH, tile)
                for tile, edge in zip(tiles, states, strict=True)
            ]
            state_NH = state_NH + self._received(layer, p2_NH, tiles, moments)
            states = [None if edge is None else _step(edge, a_NH, b_NH, tile) for tile, edge in zip(tiles, states)]
            history += [a_NH, b_NH]
        return self._decode(blocks, state_NH, tiles, states, history)

    def first(self, tile: EdgeBlock) -> Tensor:
        """States of edges before the first layer, (S, H, O, I)."""
        stack, out, into, kernel = tile.value_SOIK.shape
        to_hidden_HK = self.encode_edges.weight @ tile.code_KQ.T
        value_SKE = tile.value_SOIK.reshape(stack, out * into, kernel).transpose(1, 2)
        edge = torch.matmul(to_hidden_HK, value_SKE) + self.encode_edges.bias[:, None]
        return edge.view(stack, self.hidden, out, into)

    def later(self, tile: EdgeBlock, *history: Tensor) -> Tensor:
        """States of edges after the layers whose A and B are given in turn."""
        edge = self.first(tile)
        for a_NH, b_NH in zip(history[::2], history[1::2], strict=True):
            edge = _step(edge, a_NH, b_NH, tile)
        return edge

    def _later_moments(self, tile: EdgeBlock, p1_NH: Tensor, *history: Tensor) -> "_Moments":
        return _moments(self.later(tile, *history), p1_NH, tile)

    def _received(
        self, layer: PaperLayer, z_NH: Tensor, tiles: Sequence[EdgeBlock], moments: Sequence["_Moments"]
    ) -> Tensor:
        """What both directions add to the nodes."""
        inv_H = torch.ones_like(z_NH[0])
        inv_H[self.hidden // 2 :] = -1
        along = _aggregated(
            z_NH, [(tile.out_SO, tile.into_SI.shape[1], parts[:4]) for tile, parts in zip(tiles, moments)]
        )
        against = _aggregated(
            z_NH * inv_H, [(tile.into_SI, tile.out_SO.shape[1], parts[4:]) for tile, parts in zip(tiles, moments)]
        )
        return layer.mix(along) + layer.mix(against)

    def _decode(
        self,
        blocks: Blocks,
        state_NH: Tensor,
        tiles: Sequence[EdgeBlock],
        states: Sequence[Tensor | None],
        history: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        node_NTQ = self.decode_nodes(F.layer_norm(state_NH, state_NH.shape[1:])).view(-1, len(TYPES), FREQUENCIES)
        for features in blocks.features:
            if features.learnt:
                change_NK = node_NTQ[features.node_N, features.type] @ features.code_KQ.T
                tensors |= features.unstack(features.value_NK + self.shape.node_ratio * change_NK)
        waiting = iter(zip(tiles, states, strict=True))
        for block in blocks.edges:
            parts = [
                checkpoint(self._decoded, tile, edge, *history, use_reentrant=False)
                for tile, edge in (next(waiting) for _ in block.tiles(4 * self.hidden, self.tile_bytes))
            ]
            if block.learnt:
                tensors |= block.unstack(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        return tensors

    def _decoded(self, tile: EdgeBlock, edge: Tensor | None, *history: Tensor) -> Tensor:
        edge = self.later(tile, *history) if edge is None else edge
        edge = edge.permute(0, 2, 3, 1)
        change = self.decode_edges(F.layer_norm(edge, edge.shape[3:])) @ tile.code_KQ.T
        return tile.value_SOIK + self.shape.edge_ratio * change


def _mlp(hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))


_Moments = tuple[Tensor, ...]  # sum, sum of squares, maximum and minimum: at the nodes made, then at those read


def _moments(edge: Tensor, p1_NH: Tensor, tile: EdgeBlock) -> _Moments:
    return _Reached.apply(  # type: ignore[no-untyped-call]
        edge, _at(p1_NH, tile.out_SO), _at(p1_NH, tile.into_SI)
    )


def _step(edge: Tensor, a_NH: Tensor, b_NH: Tensor, tile: EdgeBlock) -> Tensor:
    out = torch.stack([_at(a_NH, tile.out_SO), _at(b_NH, tile.out_SO)], dim=-1)
    into = torch.stack([_at(b_NH, tile.into_SI), _at(a_NH, tile.into_SI)], dim=-1)
    return _Grown.apply(edge, out, into)  # type: ignore[no-untyped-call]


def _at(state_NH: Tensor, node_SM: Tensor) -> Tensor:
    """States of some nodes, (S, H, M)."""
    return state_NH[node_SM].transpose(1, 2).contiguous()


def _aggregated(z_NH: Tensor, ends: Sequence[tuple[Tensor, int, _Moments]]) -> Tensor:
    """[mean, std, max, min] of z_i * t_ij at every node, (nodes, 4 hidden); zero where no edge ends.

    Args:
        z_NH: Factor at the node that receives.
        ends: Nodes (S, M), messages that each gets, and moments (S, H, M) of what they get.
    """
    hidden = z_NH.shape[1]
    index = torch.cat([node_SM.reshape(-1) for node_SM, _, _ in ends])
    counts = torch.cat([torch.full((node_SM.numel(), 1), float(count)) for node_SM, count, _ in ends]).to(z_NH)
    total, square, high, low = (
        torch.cat([parts[k].transpose(1, 2).reshape(-1, hidden) for _, _, parts in ends]) for k in range(4)
    )
    some_N1 = z_NH.new_zeros(len(z_NH), 1).index_add(0, index, counts).clamp_min(1)
    mean = z_NH * torch.zeros_like(z_NH).index_add(0, index, total) / some_N1
    spread = z_NH.square() * torch.zeros_like(z_NH).index_add(0, index, square) / some_N1 - mean.square()
    std = spread.clamp_min(_LEAST_VARIANCE).sqrt()
    std = std.masked_fill(std <= math.sqrt(_LEAST_VARIANCE), 0.0)
    wide = index.unsqueeze(1).expand(-1, hidden)
    high = torch.zeros_like(z_NH).scatter_reduce(0, wide, high, "amax", include_self=False)
    low = torch.zeros_like(z_NH).scatter_reduce(0, wide, low, "amin", include_self=False)
    up = z_NH >= 0
    return torch.cat([mean, std, z_NH * torch.where(up, high, low), z_NH * torch.where(up, low, high)], dim=1)


class _Reached(torch.autograd.Function):
    """Moments of e_oi * p_i over i, and of e_oi * p_o over o, from e (S, H, O, I), p_o (S, H, O) and p_i (S, H, I).

    Sums are products of matrices, and so are their gradients, of rank two in both directions together; only the
    extremes need the products themselves, and their gradients a few places of them.
    """

    @staticmethod
    def forward(ctx: Any, edge: Tensor, p_out: Tensor, p_in: Tensor) -> _Moments:
        squared = edge.square()
        sums = _times(edge, p_in), _times(squared, p_in.square())
        sums_ = _times(edge.mT, p_out), _times(squared.mT, p_out.square())
        product = torch.mul(edge, p_in.unsqueeze(2), out=squared)
        high, low = product.max(3), product.min(3)
        product = torch.mul(edge, p_out.unsqueeze(3), out=squared)
        high_, low_ = product.max(2), product.min(2)
        ctx.save_for_backward(edge, p_out, p_in, high.indices, low.indices, high_.indices, low_.indices)
        return *sums, high.values, low.values, *sums_, high_.values, low_.values

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total, square, high, low, total_, square_, high_, low_ = gradients
        edge, p_out, p_in, *places = ctx.saved_tensors
        squared = edge.square()
        by_in = _times(edge.mT, total) + 2 * p_in * _times(squared.mT, square)
        by_out = _times(edge, total_) + 2 * p_out * _times(squared, square_)
        by_edge = _rank_two(square, p_in.square(), p_out.square(), square_, out=squared).mul_(edge).mul_(2)
        left, right = torch.stack([total, p_out], -1), torch.stack([p_in, total_], -1)
        by_edge.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1).mT)
        for place, gradient in zip(places[:2], (high, low), strict=True):
            by_in.scatter_add_(2, place, gradient * edge.gather(3, place.unsqueeze(3)).squeeze(3))
            by_edge.scatter_add_(3, place.unsqueeze(3), (gradient * p_in.gather(2, place)).unsqueeze(3))
        for place, gradient in zip(places[2:], (high_, low_), strict=True):
            by_out.scatter_add_(2, place, gradient * edge.gather(2, place.unsqueeze(2)).squeeze(2))
            by_edge.scatter_add_(2, place.unsqueeze(2), (gradient * p_out.gather(2, place)).unsqueeze(2))
        return by_edge, by_out, by_in


class _Grown(torch.autograd.Function):
    """e * (1 + out @ in^T), from e (S, H, O, I), out (S, H, O, 2) and in (S, H, I, 2)."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, out: Tensor, into: Tensor) -> Tensor:
        ctx.save_for_backward(edge, out, into)
        return torch.matmul(out, into.mT).mul_(edge).add_(edge)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        edge, out, into = ctx.saved_tensors
        by_product = gradient * edge
        by_out, by_into = torch.matmul(by_product, into), torch.matmul(by_product.mT, out)
        return torch.matmul(out, into.mT, out=by_product).mul_(gradient).add_(gradient), by_out, by_into


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)


def _rank_two(a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, out: Tensor) -> Tensor:
    """a b^T + c d^T over the last dimensions."""
    return torch.matmul(torch.stack([a, c], -1), torch.stack([b, d], -1).mT, out=out)
