"""Where every tensor of a network sits in its graph.

A **node** is a distinct set of units that some position of a tensor needs. Most sets hold one unit, and the first nodes
are the units themselves, axis by axis; the others are joint nodes, as for an entry of ``heads x width``, or for
positions that need no unit. A tensor is then

* an edge block ``[groups, out, in, *kernel]`` if two of its dimensions run along nodes,
* a feature ``[nodes, *kernel]`` if one does,
* a rest ``[*kernel]`` if none does.

Kernel dimensions are all others, and the repetitions of a flattened map or of the gates of an LSTM. Every such form is
a view of the tensor, so that nothing is copied (except for four unit dimensions and more), and the way back is exact.

Array suffixes: N nodes, K units a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
from torch import Tensor

from metaprune.graph.axes import Dim, Labels
from metaprune.graph.layout import Layout
from metaprune.graph.record import Op, Value, refs_in

Nodes = npt.NDArray[np.int64]
_CONVOLUTION = "conv"


@dataclass(frozen=True, eq=False)
class Place:
    """Where one tensor sits.

    Attributes:
        name: Its first name in the network.
        type: The operation that reads it first and as what, e.g. ``conv2d.weight``; empty if none does.
        parameter: A parameter, rather than a buffer.
        depth: When it is read first, from 0 for the first operation of the network to 1 for the last.
        shape: Its own shape.
        split: The shape in which every dimension is a node dimension or a kernel dimension.
        order: The permutation of those that gives the form of the block, before `form` joins what was split.
        form: ``[groups, out, in, *kernel]``, ``[nodes, *kernel]`` or ``[*kernel]``.
        out: Nodes of the rows, (groups * out,); of a feature, its nodes; else empty.
        into: Nodes of the columns, (groups * in,); empty unless it is an edge block.
    """

    name: str
    type: str
    parameter: bool
    depth: float
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    form: tuple[int, ...]
    out: Nodes
    into: Nodes

    @property
    def kind(self) -> str:
        """``edge``, ``feature`` or ``rest``."""
        return "edge" if len(self.into) else "feature" if len(self.out) else "rest"

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor in its form: a view."""
        return tensor.view(self.split).permute(self.order).reshape(self.form)

    def write(self, block: Tensor) -> Tensor:
        """The tensor of which this is the form."""
        permuted = block.reshape([self.split[k] for k in self.order])
        return permuted.permute(tuple(np.argsort(self.order).tolist())).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Places:
    """All places, and what the nodes are.

    Attributes:
        places: By name of the parameter or buffer.
        count: Number of nodes.
        axis_of: Index of each node's axis, shape (units,); joint nodes come after these and have none.
        rank_of: Place of each of these inside its axis.
        needs: Pairs of a joint node and a unit that it needs, shape (2, pairs).
    """

    places: dict[str, Place]
    count: int
    axis_of: Nodes
    rank_of: Nodes
    needs: Nodes


def find_places(layout: Layout) -> Places:
    """Give every parameter and buffer of a network its place."""
    nodes = _NodeNumbers(layout)
    uses = _uses(layout)
    consumed = {entry for op in layout.trace.ops for entry in op.consumed}
    places = {}
    for name, value in layout.trace.parameters.items():
        use = uses.get(value.index)
        places[name] = _place(name, value, use, len(layout.trace.ops), consumed, nodes)
    axis_of = np.repeat(np.arange(len(layout.axes)), [axis.size for axis in layout.axes])
    rank_of = np.concatenate([np.arange(axis.size) for axis in layout.axes] or [np.zeros(0, np.int64)])
    return Places(places, nodes.count, axis_of.astype(np.int64), rank_of.astype(np.int64), nodes.needs)


class _NodeNumbers:
    """Numbers of nodes: units first, then every other set of units that is asked for."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        starts = np.cumsum([0, *(axis.size for axis in layout.axes)])
        self._units = int(starts[-1])
        bound = layout.axis_of >= 0
        self._number = np.full(len(layout.axis_of), -1)
        self._number[bound] = starts[layout.axis_of[bound]] + layout.rank_of[bound]
        self._joint: dict[tuple[int, ...], int] = {}

    @property
    def count(self) -> int:
        return self._units + len(self._joint)

    @property
    def needs(self) -> Nodes:
        pairs = [(number, unit) for units, number in self._joint.items() for unit in units]
        return np.array(pairs, np.int64).reshape(-1, 2).T

    def sets(self, dim: Dim) -> Labels:
        """The set of unit nodes of each position, sorted, -1 first."""
        rows = self._layout.resolve(dim)
        return np.full((dim.size, 1), -1) if rows is None else np.sort(self._number[rows], axis=1)

    def of(self, sets_NK: Labels) -> Nodes:
        """The node of each set."""
        out = sets_NK[:, -1].copy()
        alone = (sets_NK[:, :-1] == -1).all(axis=1) & (out >= 0)
        if not alone.all():
            distinct, inverse = np.unique(sets_NK[~alone], axis=0, return_inverse=True)
            keys = [tuple(unit for unit in row if unit >= 0) for row in distinct.tolist()]
            numbers = np.array([self._joint.setdefault(key, self._units + len(self._joint)) for key in keys])
            out[~alone] = numbers[inverse.ravel()]
        return out


@dataclass(frozen=True)
class _Use:
    """The first operation that reads a tensor, and as which argument."""

    op: Op
    argument: str
    layout: Layout

    @property
    def groups(self) -> int:
        return int(self.op.constants.get(("groups", None), 1)) if _CONVOLUTION in self.op.name else 1

    def other_channels(self, spatial: int) -> Dim:
        """The channels that a grouped kernel meets along its dimension 1, all groups together."""
        number = self.op.outputs[0] if "transpose" in self.op.name else self.op.inputs[0]
        return self.layout.trace.values[number].dims[-(spatial + 1)]


def _uses(layout: Layout) -> dict[int, _Use]:
    uses: dict[int, _Use] = {}
    for op in (*layout.trace.ops, *layout.trace.further_ops):
        for argument, item in op.arguments.items():
            for number in refs_in(item):
                uses.setdefault(number, _Use(op, argument, layout))
    return uses


def _place(
    name: str, value: Value, use: _Use | None, ops: int, consumed: set[tuple[int, int]], nodes: _NodeNumbers
) -> Place:
    sets = [nodes.sets(dim) for dim in value.dims]
    along = [k for k, rows in enumerate(sets) if (rows >= 0).any()]
    into, out = _directions(value, along, consumed)
    shape = tuple(dim.size for dim in value.dims)
    groups = use.groups if use else 1
    if out is None or into is None:
        split, order, form, made, read = _feature(shape, out, sets, nodes)
    elif groups > 1 and use is not None:
        # Dimension 0 of a grouped kernel runs over all groups, its dimension 1 over what one group meets.
        met = nodes.of(nodes.sets(use.other_channels(len(shape) - 2)))
        own = nodes.of(sets[0])
        split = [groups, shape[0] // groups, *shape[1:]]
        order = [0, 1 + out, 1 + into, *range(3, len(split))]
        form = [split[k] for k in order]
        made, read = (own, met) if out == 0 else (met, own)
    else:
        more = [k for k in along if k not in (out, into)]
        split, order, form, made, read = _block(shape, out, into, more, sets, nodes)
    return Place(
        name=name,
        type=f"{use.op.name}.{use.argument}" if use else "",
        parameter=value.parameter,
        depth=min(use.op.index / max(ops - 1, 1), 1.0) if use else 1.0,
        shape=shape,
        split=tuple(split),
        order=tuple(order),
        form=tuple(form),
        out=made,
        into=read,
    )


_Form = tuple[list[int], list[int], list[int], Nodes, Nodes]  # split, order, form, nodes made, nodes read


def _feature(shape: Sequence[int], out: int | None, sets: Sequence[Labels], nodes: _NodeNumbers) -> _Form:
    empty = np.zeros(0, np.int64)
    if out is None:
        return list(shape), list(range(len(shape))), list(shape), empty, empty
    part = _Spread(nodes.of(sets[out]))
    split = [*shape[:out], *part.sizes, *shape[out + 1 :]]
    order = [out + part.place, *(k for k in range(len(split)) if k != out + part.place)]
    return split, order, [split[k] for k in order], part.nodes, empty


def _block(
    shape: Sequence[int], out: int, into: int, more: Sequence[int], sets: Sequence[Labels], nodes: _NodeNumbers
) -> _Form:
    """An edge block. Further dimensions along nodes (experts) are its groups, whose units the nodes made need too."""
    ends = {k: _Spread(nodes.of(sets[k]), factor=not more) for k in (out, into)}
    split: list[int] = []
    where: dict[int, int] = {}  # dimension -> its place in `split`
    for k, size in enumerate(shape):
        where[k] = len(split) + (ends[k].place if k in ends else 0)
        split += ends[k].sizes if k in ends else (size,)
    placed = [*(where[k] for k in more), where[out], where[into]]
    order = [*placed, *(k for k in range(len(split)) if k not in placed)]
    sizes = [split[k] for k in order]
    groups = prod(sizes[: len(more)])
    form = [groups, *sizes[len(more) :]]
    if not more:
        return split, order, form, ends[out].nodes, ends[into].nodes
    made = np.full((1, 1), -1)
    for k in (*more, out):
        made = _unions(made, sets[k])
    return split, order, form, nodes.of(made), np.tile(ends[into].nodes, groups)


def _unions(outer_NK: Labels, inner_NK: Labels) -> Labels:
    """The union of every set with every other, outer to inner, sorted, -1 first."""
    rows, columns = len(outer_NK), len(inner_NK)
    both = np.sort(np.concatenate([np.repeat(outer_NK, columns, axis=0), np.tile(inner_NK, (rows, 1))], axis=1), axis=1)
    both[:, 1:][both[:, 1:] == both[:, :-1]] = -1
    return np.sort(both, axis=1)


def _directions(value: Value, along: list[int], consumed: set[tuple[int, int]]) -> tuple[int | None, int | None]:
    """The dimension that is read and the one that is made, of those that run along nodes."""
    if len(along) < 2:
        return None, (along[0] if along else None)
    into = next((k for k in along if (value.index, k) in consumed), None)
    if into is None:  # a table: looked up by its rows
        return along[0], along[-1]
    return into, next(k for k in reversed(along) if k != into)


class _Spread:
    """A dimension as nodes times repetitions, where it is regular.

    >>> flat = _Spread(np.array([4, 4, 5, 5]))
    >>> flat.nodes.tolist(), flat.sizes, flat.place
    ([4, 5], (2, 2), 0)
    >>> gates = _Spread(np.array([4, 5, 6, 4, 5, 6]))
    >>> gates.nodes.tolist(), gates.sizes, gates.place
    ([4, 5, 6], (2, 3), 1)
    """

    def __init__(self, nodes_N: Nodes, factor: bool = True) -> None:
        self.nodes, self.place = nodes_N, 0
        self.sizes: tuple[int, ...] = (len(nodes_N),)
        count = len(np.unique(nodes_N))
        if not factor or count in (1, len(nodes_N)) or len(nodes_N) % count:
            return
        repeats = len(nodes_N) // count
        inner, outer = nodes_N.reshape(count, repeats), nodes_N.reshape(repeats, count)
        if (inner == inner[:, :1]).all():
            self.nodes, self.sizes = inner[:, 0], (count, repeats)
        elif (outer == outer[:1]).all():
            self.nodes, self.sizes, self.place = outer[0], (repeats, count), 1
