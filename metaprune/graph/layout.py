"""From units to axes: units that occur in the same places, equally often, are one axis.

Two units are of one axis if every label array of the network mentions them equally often in the same column, so that
removing either costs the same everywhere and the size of every dimension is a polynomial in the sizes of the axes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from metaprune.graph.axes import Alive, Axis, Dim, Labels
from metaprune.graph.record import Trace, Value
from metaprune.graph.rules.convolution import KERNEL

Monomial = tuple[int, ...]  # sorted variables, repeated for powers: (0, 3) is n0 * n3
Polynomial = dict[Monomial, float]


@dataclass(frozen=True)
class Layout:
    """Axes of a trace, and the way between them and label arrays.

    Attributes:
        trace: What was read off the run.
        axes: In the order in which parameters mention them.
        axis_of: Index of each unit's axis, -1 for none; shape (units,).
        rank_of: Place of each unit inside its axis; shape (units,).
    """

    trace: Trace
    axes: tuple[Axis, ...]
    axis_of: npt.NDArray[np.int64]
    rank_of: npt.NDArray[np.int64]
    _resolved: dict[int, Labels]
    _sizes: dict[int, Polynomial]

    def resolve(self, dim: Dim) -> Labels | None:
        """Labels of a dimension in basic units, shape (N, K)."""
        if dim.labels_NK is None:
            return None
        return self.rows(dim.labels_NK)

    def rows(self, labels_NK: Labels) -> Labels:
        """A label array in basic units; remembered, because many dimensions share one array."""
        key = id(labels_NK)  # the trace keeps the array, so its address is its own
        if key not in self._resolved:
            self._resolved[key] = self.trace.units.resolve(labels_NK)
        return self._resolved[key]

    def units_along(self, dim: Dim, axis: int) -> npt.NDArray[np.int64] | None:
        """Rank of the unit of an axis (by index) that each position needs, -1 where none; None where none at all."""
        rows = self.resolve(dim)
        if rows is None:
            return None
        rank_N = np.where(self.axis_of[rows] == axis, self.rank_of[rows], -1).max(axis=1)
        return rank_N if (rank_N >= 0).any() else None

    def alive(self, keep: Mapping[int, npt.NDArray[np.int64]]) -> Alive:
        """Which units stay when each axis (by index) keeps the given ranks; other axes keep all."""
        alive = np.ones(len(self.axis_of), bool)
        for axis, ranks in keep.items():
            stays = np.zeros(self.axes[axis].size, bool)
            stays[ranks] = True
            members = self.axis_of == axis
            alive[members] = stays[self.rank_of[members]]
        return alive

    def kept(self, dim: Dim, alive: Alive) -> Alive | None:
        """Which positions of a dimension stay, shape (N,); None for all."""
        if dim.labels_NK is None:
            return None
        return np.asarray(alive[self.rows(dim.labels_NK)].all(axis=1))

    def count(self, labels_NK: Labels, alive: Alive) -> int:
        """How many positions of a label array stay."""
        return int(alive[self.rows(labels_NK)].all(axis=1).sum())

    def ranks(self, labels_NK: Labels, alive: Alive, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What positions of a label array become among those that stay; negative ones still count from the end."""
        stays = alive[self.rows(labels_NK)].all(axis=1)
        return np.asarray((np.cumsum(stays) - 1)[positions] - np.where(positions < 0, stays.sum(), 0))

    def size(self, dim: Dim) -> Polynomial:
        """The size of a dimension as a polynomial in the axis sizes."""
        if dim.labels_NK is None:
            return {(): float(dim.size)}
        key = id(dim.labels_NK)
        if key not in self._sizes:
            self._sizes[key] = self._polynomial(self.rows(dim.labels_NK))
        return self._sizes[key]

    def _polynomial(self, labels_NK: Labels) -> Polynomial:
        axes_NK = np.sort(self.axis_of[labels_NK], axis=1)
        combinations, counts = _distinct_rows(axes_NK)
        out: Polynomial = {}
        for row, count in zip(combinations.tolist(), counts.tolist()):
            variables = tuple(axis for axis in row if axis >= 0)
            full = np.prod([self.axes[axis].size for axis in variables], dtype=float)
            out[variables] = out.get(variables, 0.0) + count / full
        return out


def build_layout(trace: Trace) -> Layout:
    """Group the units of a trace into axes."""
    while True:
        layout = _group(trace)
        irregular = _irregular(layout)
        if not irregular:
            return layout
        for labels_NK in irregular:
            trace.units.freeze(labels_NK, "its units are combined in an irregular pattern")


def _group(trace: Trace) -> Layout:
    units = trace.units
    resolved: dict[int, Labels] = {}
    sites: dict[bytes, Labels] = {}
    for value in (*trace.parameters.values(), *trace.values):
        for dim in value.dims:
            if dim.labels_NK is not None and id(dim.labels_NK) not in resolved:
                rows = resolved[id(dim.labels_NK)] = units.resolve(dim.labels_NK)
                sites.setdefault(rows.tobytes() + bytes(str(rows.shape), "ascii"), rows)

    # A random linear hash of "how often in which column of which site", modulo 2^64.
    signature = np.zeros(len(units), np.uint64)
    random = np.random.default_rng(0)
    for rows in sites.values():
        for column in rows.T:
            np.add.at(signature, column, random.integers(1, 2**63, dtype=np.uint64))

    order, bindings = _bindings(trace, resolved, len(units))
    bound = np.flatnonzero(order >= 0)
    bound = bound[np.argsort(order[bound], kind="stable")]
    key = signature[bound] ^ (units.reason_numbers(bound) * np.uint64(0x9E3779B97F4A7C15))
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    by_appearance = np.argsort(np.argsort(first))
    axis_of, rank_of = np.full(len(units), -1), np.zeros(len(units), np.int64)
    axis_of[bound] = by_appearance[group]
    axes: list[Axis] = []
    for index, start in enumerate(np.sort(first)):
        members = bound[axis_of[bound] == index]
        rank_of[members] = np.arange(len(members))
        unit = int(bound[start])
        reason = units.reason(unit) or ("the only unit of its kind" if len(members) == 1 else "")
        axes.append(Axis("", len(members), not reason, reason, (), kind=units.kind(unit)))

    used: list[dict[tuple[str, int], None]] = [{} for _ in axes]
    for binding, rows in bindings:
        for axis in np.flatnonzero(np.bincount(axis_of[rows].ravel() + 1)[1:]).tolist():
            used[axis][binding] = None
    names = {value.index: name for name, value in trace.parameters.items()}
    read = {(names.get(number, ""), dim) for op in trace.ops for number, dim in op.consumed}
    axes = [
        replace(axis, bindings=tuple(used[k]), consumers=tuple(binding for binding in used[k] if binding in read))
        for k, axis in enumerate(axes)
    ]
    return _without_kernels(Layout(trace, tuple(_named(trace, axes)), axis_of, rank_of, resolved, {}))


def _bindings(
    trace: Trace, resolved: Mapping[int, Labels], count: int
) -> tuple[npt.NDArray[np.int64], list[tuple[tuple[str, int], Labels]]]:
    """When each unit is first mentioned by a parameter (-1 never), and all mentions."""
    order = np.full(count, -1)
    bindings, seen = [], 0
    for name, value in trace.parameters.items():
        for k, dim in enumerate(value.dims):
            if dim.labels_NK is None:
                continue
            rows = resolved[id(dim.labels_NK)]
            bindings.append(((name, k), rows))
            for column in rows.T:
                new = np.flatnonzero((order[column] < 0) & (column != 0))[::-1]  # of several, the last write stays
                order[column[new]] = seen + new
                seen += len(column)
    return order, bindings


def _named(trace: Trace, axes: Iterable[Axis]) -> list[Axis]:
    """Name each axis after the module that makes its units."""
    makes = _making(trace)
    taken: dict[str, int] = {}
    out = []
    for axis in axes:
        made_by = [name for name, dim in axis.bindings if (name, dim) in makes]
        name = (made_by or [axis.bindings[0][0]])[0]
        module, _, leaf = name.rpartition(".")
        name = module if module and (leaf == "bias" or leaf.startswith(("weight", "in_proj", "running"))) else name
        if axis.kind != "channel":
            name = f"{name}:{axis.kind}"
        taken[name] = taken.get(name, 0) + 1
        out.append(replace(axis, name=name if taken[name] == 1 else f"{name}#{taken[name]}"))
    return out


def _making(trace: Trace) -> set[tuple[str, int]]:
    """Parameter dimensions whose positions a layer puts out: rows of weights, columns of look-up tables."""
    columns = {
        number
        for op in trace.ops
        if op.name == "embedding" or "conv_transpose" in op.name or op.constants.get(("transposed", None))
        for number in op.inputs
    }
    weights = [(name, value) for name, value in trace.parameters.items() if len(value.dims) > 1]
    return {(name, int(value.index in columns)) for name, value in weights}


def _without_kernels(layout: Layout) -> Layout:
    """Kernel positions are features of an edge, not units: their axes go."""
    keep = [k for k, axis in enumerate(layout.axes) if axis.reason != KERNEL]
    number = np.full(len(layout.axes) + 1, -1)
    number[keep] = np.arange(len(keep))
    return replace(layout, axes=tuple(layout.axes[k] for k in keep), axis_of=number[layout.axis_of])


def _distinct_rows(rows_NK: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each row once, and how often it occurs; entries of at least -1."""
    places, depth = int(rows_NK.max(initial=0)) + 2, rows_NK.shape[1]
    if places**depth >= 2**63:
        return np.unique(rows_NK, axis=0, return_counts=True)
    numbers_N = (rows_NK + 1) @ places ** np.arange(depth)  # a row as one number, because rows are slow to sort
    _, first, counts = np.unique(numbers_N, return_index=True, return_counts=True)
    return rows_NK[first], counts


def _irregular(layout: Layout) -> list[Labels]:
    """Label arrays that do not pair every unit of each axis with every unit of the others, equally often.

    What is frozen stays in any case, so only prunable axes count.
    """
    bad, seen = [], set()
    free = np.array([axis.prunable for axis in layout.axes] + [False], bool)  # the last one stands for no axis
    for value in (*layout.trace.parameters.values(), *layout.trace.values):
        for dim in value.dims:
            rows = layout.resolve(dim)
            if rows is None or rows.shape[1] < 2 or id(rows) in seen:
                continue
            seen.add(id(rows))
            axes_NK = layout.axis_of[rows]
            for combination in _distinct_rows(axes_NK)[0]:
                columns = np.flatnonzero(free[combination])
                if not len(columns):
                    continue
                here = rows[(axes_NK == combination).all(1)][:, columns]
                distinct, counts = _distinct_rows(here)
                sizes = [layout.axes[axis].size for axis in combination[columns]]
                if len(distinct) != np.prod(sizes) or len(set(counts.tolist())) > 1:
                    bad.append(here)
    return bad


def parameter_dims(trace: Trace) -> Iterable[tuple[str, Value, int, Dim]]:
    """All labelled dimensions of parameters and buffers: name, value, dimension, labels."""
    for name, value in trace.parameters.items():
        for k, dim in enumerate(value.dims):
            if dim.labels_NK is not None:
                yield name, value, k, dim
