"""What a metanetwork reads off a graph, and how what it writes goes back.

Tensors of one type and form are stacked, because a network of sixty small layers would otherwise be sixty times as many
small products. Everything here is a gather, so that gradients pass.

Suffixes: S stacked groups, O units made, I units read, K kernel positions, Q kernel frequencies, N nodes, H hidden.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from metaprune.graph import GraphTensor, tensors_of

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData

FREQUENCIES = 9  # a 3 x 3 kernel is coded without loss
STACKED = 1 << 18  # entries; larger tensors stay alone, so that they stay views


@dataclass(frozen=True, eq=False)
class EdgeBlock:
    """Weights between units: tensors of one type and form, stacked.

    Attributes:
        names: The tensors, in the order of the stack.
        type: Their type, an index into :data:`metaprune.graph.convert.TYPES`.
        value_SOIK: Their entries.
        out_SO: Nodes made.
        into_SI: Nodes read.
        code_KQ: Kernel positions in frequencies.
        rms_S: Root mean square of the tensor that each group belongs to; 1 where it is 0.
        depth_S: When each is read, 0 to 1.
        learnt: Parameters, rather than buffers.
        form: Of one tensor, ``[groups, out, in, *kernel]``.
        fans: Units that one unit made reads, and units that one read helps to make; of tiles, those of the whole.
    """

    names: tuple[str, ...]
    type: int
    value_SOIK: Tensor
    out_SO: Tensor
    into_SI: Tensor
    code_KQ: Tensor
    rms_S: Tensor
    depth_S: Tensor
    learnt: bool
    form: tuple[int, ...]
    fans: tuple[int, int]

    def rows(self, start: int, stop: int) -> "EdgeBlock":
        """The same with some of the units made."""
        return replace(self, value_SOIK=self.value_SOIK[:, start:stop], out_SO=self.out_SO[:, start:stop])

    def tiles(self, bytes_per_edge: int, tile_bytes: int) -> list["EdgeBlock"]:
        """Parts of which no one has more edges than the tile holds, but one row at least."""
        stack, out, into, _ = self.value_SOIK.shape
        rows = max(1, tile_bytes // (bytes_per_edge * stack * into))
        return [self] if rows >= out else [self.rows(start, start + rows) for start in range(0, out, rows)]

    def unstack(self, value_SOIK: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, in its form."""
        groups = self.form[0]
        for k, name in enumerate(self.names):
            yield name, value_SOIK[k * groups : (k + 1) * groups].reshape(self.form)


@dataclass(frozen=True, eq=False)
class FeatureBlock:
    """Typed features of units: tensors of one type and kernel, laid end to end.

    Attributes:
        names: The tensors.
        counts: Nodes of each.
        type: Their type.
        value_NK: Their entries.
        node_N: Whose they are.
        code_KQ: Kernel positions in frequencies.
        rms_N: Root mean square of the tensor that each row belongs to; 1 where it is 0.
        depth_N: When that is read.
        learnt: Parameters, rather than buffers.
        kernel: Sizes of the kernel dimensions.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    type: int
    value_NK: Tensor
    node_N: Tensor
    code_KQ: Tensor
    rms_N: Tensor
    depth_N: Tensor
    learnt: bool
    kernel: tuple[int, ...]

    def unstack(self, value_NK: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, in its form."""
        for name, count, part in zip(self.names, self.counts, value_NK.split(list(self.counts)), strict=True):
            yield name, part.reshape(count, *self.kernel)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A graph as a metanetwork reads it.

    Attributes:
        nodes: Number of nodes; units come first.
        edges: All weights between units.
        features: All typed features.
        axis_U: Axis of each unit.
        needs: Pairs of a joint node and a unit, (2, pairs).
        size_A: Units of each axis.
        kind_A: Kind of each axis.
        prunable_A: Whether it may be cut.
        share_AC: Part of each quantity of cost that has the axis as a factor.
    """

    nodes: int
    edges: tuple[EdgeBlock, ...]
    features: tuple[FeatureBlock, ...]
    axis_U: Tensor
    needs: Tensor
    size_A: Tensor
    kind_A: Tensor
    prunable_A: Tensor
    share_AC: Tensor

    @property
    def count(self) -> int:
        """Number of edges, each with all its kernel positions."""
        return sum(block.value_SOIK[..., 0].numel() for block in self.edges)

    @property
    def entries(self) -> int:
        """Entries of all weights between units."""
        return sum(block.value_SOIK.numel() for block in self.edges)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Blocks":
        """On another device, or with its floating-point numbers in another type."""
        own = _moved(self, device, dtype)
        edges = tuple(_moved(block, device, dtype) for block in self.edges)
        return replace(own, edges=edges, features=tuple(_moved(block, device, dtype) for block in self.features))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that was read, in its form."""
        return {name: value for block in self.edges for name, value in block.unstack(block.value_SOIK)} | {
            name: value for block in self.features for name, value in block.unstack(block.value_NK)
        }


_Part = TypeVar("_Part", EdgeBlock, FeatureBlock, Blocks)


def _moved(part: _Part, device: str | torch.device | None, dtype: torch.dtype | None) -> _Part:
    moved: dict[str, Any] = {}
    for field in fields(part):
        item = getattr(part, field.name)
        if isinstance(item, Tensor):
            moved[field.name] = item.to(device=device, dtype=dtype if item.is_floating_point() else None)
    return replace(part, **moved)


def read_blocks(graph: "HeteroData") -> Blocks:
    """Stack the floating-point tensors of a graph."""
    types, depths = graph["parameter"].type.tolist(), graph["parameter"].depth
    learnt = graph["parameter"].learnt.tolist()
    stacks: dict[tuple[object, ...], list[GraphTensor]] = {}
    for tensor in tensors_of(graph):
        if tensor.kind == "rest" or not tensor.value.is_floating_point() or not tensor.value.numel():
            continue
        shape = tuple(tensor.value.shape)
        form = shape if tensor.kind == "edge" else shape[1:]
        alone = tensor.name if tensor.value.numel() > STACKED else ""
        key = (tensor.kind, types[tensor.node], learnt[tensor.node], form, alone)
        stacks.setdefault(key, []).append(tensor)
    edges, features = [], []
    for (kind, type_, is_learnt, *_), stack in stacks.items():
        depth = depths[[tensor.node for tensor in stack]]
        if kind == "edge":
            edges.append(_edges(stack, int(type_), bool(is_learnt), depth))  # type: ignore[call-overload]
        else:
            features.append(_features(stack, int(type_), bool(is_learnt), depth))  # type: ignore[call-overload]
    axis_N = graph["unit"].axis
    return Blocks(
        nodes=int(graph["unit"].num_nodes),
        edges=tuple(edges),
        features=tuple(features),
        axis_U=axis_N[axis_N >= 0],
        needs=graph["unit", "needs", "unit"].edge_index,
        size_A=graph["axis"].size,
        kind_A=graph["axis"].kind,
        prunable_A=graph["axis"].prunable,
        share_AC=graph["axis"].share,
    )


def written(graph: "HeteroData", tensors: Mapping[str, Tensor]) -> "HeteroData":
    """A graph with other values in some of its tensors; the given one stays.

    Args:
        graph: Gives everything else.
        tensors: By name, in their form.
    """
    out = graph.clone() if not graph.dense else graph.__copy__()
    for tensor in tensors_of(graph):
        if tensor.name in tensors:
            ends = {"edge": ("unit", "unit"), "feature": ("parameter", "unit")}[tensor.kind]
            store = out[ends[0], tensor.name, ends[1]]
            value = tensors[tensor.name].to(tensor.value.dtype)
            if "block" in store:
                store.block = value
            else:
                store.edge_attr = value.reshape(store.edge_attr.shape)
    return out


def kernel_code(sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Orthonormal cosine basis over kernel positions, (positions, :data:`FREQUENCIES`).

    Two dimensions get three frequencies each; one, or more than two (as one), get nine. Frequencies that a kernel is
    too small for are zero, so that a 1 x 1 kernel is the mean frequency of a larger one.

    >>> code_KQ = kernel_code((3, 3))
    >>> code_KQ.shape, torch.allclose(code_KQ @ code_KQ.T, torch.eye(9), atol=1e-6)
    (torch.Size([9, 9]), True)
    """
    sizes = [size for size in sizes if size > 1]
    if len(sizes) == 2:
        rows, columns = (_cosines(size, math.isqrt(FREQUENCIES)) for size in sizes)
        return torch.einsum("ia,jb->ijab", rows, columns).reshape(math.prod(sizes), FREQUENCIES).to(device)
    return _cosines(math.prod(sizes), FREQUENCIES).to(device)


def _cosines(size: int, count: int) -> Tensor:
    place, frequency = torch.arange(size).unsqueeze(1), torch.arange(count)
    basis = torch.cos(math.pi * (place + 0.5) / size * frequency) * (2 / size) ** 0.5
    basis[:, 0] = size**-0.5
    return torch.where(frequency < size, basis, 0.0)


def _edges(stack: list[GraphTensor], type_: int, learnt: bool, depth: Tensor) -> EdgeBlock:
    form = tuple(stack[0].value.shape)
    groups, out, into = form[:3]
    values = [tensor.value.detach().reshape(groups, out, into, -1) for tensor in stack]
    return EdgeBlock(
        names=tuple(tensor.name for tensor in stack),
        type=type_,
        value_SOIK=_joined(values).float(),
        out_SO=_joined([tensor.out.view(groups, out) for tensor in stack]),
        into_SI=_joined([tensor.into.view(groups, into) for tensor in stack]),
        code_KQ=kernel_code(form[3:], values[0].device),
        rms_S=_rms(values).repeat_interleave(groups),
        depth_S=depth.repeat_interleave(groups).to(values[0].device),
        learnt=learnt,
        form=form,
        fans=(into, out),
    )


def _features(stack: list[GraphTensor], type_: int, learnt: bool, depth: Tensor) -> FeatureBlock:
    kernel = tuple(stack[0].value.shape[1:])
    values = [tensor.value.detach().reshape(len(tensor.out), -1).float() for tensor in stack]
    counts = torch.tensor([len(value) for value in values])
    return FeatureBlock(
        names=tuple(tensor.name for tensor in stack),
        counts=tuple(counts.tolist()),
        type=type_,
        value_NK=torch.cat(values),
        node_N=torch.cat([tensor.out for tensor in stack]),
        code_KQ=kernel_code(kernel, values[0].device),
        rms_N=_rms(values).repeat_interleave(counts.to(values[0].device)),
        depth_N=depth.repeat_interleave(counts).to(values[0].device),
        learnt=learnt,
        kernel=kernel,
    )


def _rms(values: list[Tensor]) -> Tensor:
    """Root mean square of each tensor; 1 where it is 0."""
    rms = torch.stack([value.float().square().mean().sqrt() for value in values])
    return torch.where(rms > 0, rms, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
