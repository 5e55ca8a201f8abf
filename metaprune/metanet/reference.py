"""The published metanetwork as plain message passing over a list of edges: slow, obvious, and the truth for tests.

It shares the weights of :class:`~metaprune.metanet.paper.PaperMetanet`, and nothing of how they are used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from metaprune.graph.convert import TYPES
from metaprune.metanet.blocks import FREQUENCIES, Blocks
from metaprune.metanet.paper import PaperLayer, PaperMetanet


class _Messages(MessagePassing):  # type: ignore[misc]
    """One direction of one layer."""

    def __init__(self) -> None:
        super().__init__(aggr=["mean", "std", "max", "min"])

    def forward(self, p1: Tensor, p2: Tensor, edge: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, p1=p1, p2=p2, edge=edge)

    def message(self, p1_j: Tensor, p2_i: Tensor, edge: Tensor) -> Tensor:
        return p2_i * p1_j * edge


class ReferenceMetanet(nn.Module):
    """The same function as a :class:`PaperMetanet`, edge by edge.

    Args:
        paper: Whose weights to use.
    """

    def __init__(self, paper: PaperMetanet) -> None:
        super().__init__()
        self.paper = paper
        self.messages = _Messages()

    def forward(self, blocks: Blocks) -> dict[str, Tensor]:
        """The edited parameters by name, in their form."""
        paper = self.paper
        node = paper.encode_nodes(blocks)
        ends, values = [], []
        for block in blocks.edges:
            stack, out, into, _ = block.value_SOIK.shape
            read = block.into_SI.unsqueeze(1).expand(stack, out, into).reshape(-1)
            made = block.out_SO.unsqueeze(2).expand(stack, out, into).reshape(-1)
            ends.append(torch.stack([read, made]))
            values.append(paper.encode_edges((block.value_SOIK @ block.code_KQ).reshape(-1, FREQUENCIES)))
        edge_index, edge = torch.cat(ends, dim=1), torch.cat(values)
        inv = torch.ones(paper.hidden)
        inv[paper.hidden // 2 :] = -1
        for layer in paper.layers:
            assert isinstance(layer, PaperLayer)
            p1, p2, p3, p4 = layer.factors(node)
            against = edge_index.flip(0)
            node = node + layer.mix(self.messages(p1, p2, edge, edge_index))
            node = node + layer.mix(self.messages(p1, p2, edge * inv, against))
            (read, made), (made_, read_) = edge_index, against
            along = p3[read] * p4[made] * edge
            back = p3[made_] * p4[read_] * (edge * inv)
            edge = edge + along + inv * back
        return self._decode(blocks, node, edge)

    def _decode(self, blocks: Blocks, node: Tensor, edge: Tensor) -> dict[str, Tensor]:
        paper = self.paper
        tensors: dict[str, Tensor] = {}
        changes = paper.decode_nodes(F.layer_norm(node, node.shape[1:])).view(len(node), len(TYPES), FREQUENCIES)
        for features in blocks.features:
            if features.learnt:
                change = changes[features.node_N, features.type] @ features.code_KQ.T
                tensors |= dict(features.unstack(features.value_NK + paper.shape.node_ratio * change))
        by_frequency = paper.decode_edges(F.layer_norm(edge, edge.shape[1:]))
        sizes = [block.value_SOIK[..., 0].numel() for block in blocks.edges]
        for block, change in zip(blocks.edges, by_frequency.split(sizes), strict=True):
            if block.learnt:
                value = block.value_SOIK + paper.shape.edge_ratio * (change @ block.code_KQ.T).view_as(block.value_SOIK)
                tensors |= dict(block.unstack(value))
        return tensors
