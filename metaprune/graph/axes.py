"""The axis algebra: which positions of which dimensions live or die together.

A **unit** is the smallest thing that leaves a network as a whole: a channel, a head, a head dimension, a hidden unit.
Every position of every dimension of every tensor carries a **label**, the set of units it needs: a conv output has one
unit per position, a flatten gives each position its channel, attention gives it a head and a head dimension. A position
is alive while all its units are. Three moves build everything (:class:`Units`):

* *unify*: two dimensions meet in one operation, so their labels must say the same position by position;
* *split*: a dimension becomes a grid, so its labels must factor into rows and columns; a unit that does not is
  *defined* as the conjunction of a new row unit and a new column unit;
* *freeze*: positions that can never leave, with the reason.

Concatenation, slicing, flipping, shuffling and padding need no move at all: they run on the label array as they run on
the data, so an index map is never computed, only carried. Every move merges or defines units and none is ever undone,
so tracing always ends (a union-find, almost linear).

After the trace, units that occur in the same places form an **axis** (:class:`Axis`).

Array suffixes: N positions, K labels a position, U units.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]  # (N, K): the units each position needs; 0 pads shorter sets
Alive = npt.NDArray[np.bool_]  # a yes or no for every unit, or every position


@dataclass(frozen=True, eq=False, slots=True)
class Dim:
    """One dimension of one tensor.

    Args:
        size: Number of positions.
        labels_NK: Units each position needs; None when every position is there for good.
        zero: In the masked network, entries at removed positions are zero. It decides whether a sum over this
            dimension is the same with the positions gone.
        note: Why the positions are there for good, for messages; only without labels.
        grid: The undecided grid that this is direction `place` of.
    """

    size: int
    labels_NK: Labels | None = None
    zero: bool = True
    note: str = ""
    grid: "Grid | None" = None
    place: int = 0


class Grid:
    """A dimension read as a grid, with the decision put off how its labels factor.

    If the parts along one direction are only ever picked one by one (the queries, keys and values of a fused
    projection), each may shrink in its own way, and nothing needs to factor: see :meth:`pick`. As soon as anything else
    touches the grid it is factored as usual: :meth:`settle`.

    Args:
        dim: The dimension.
        sizes: The grid, outer to inner; at least two entries, none of them 1.
        reason: The operation that reads it so.
    """

    def __init__(self, dim: Dim, sizes: Sequence[int], reason: str) -> None:
        self.dim, self.sizes, self.reason = dim, tuple(sizes), reason
        self.parts: list[Dim] | None = None
        self.direction: int | None = None
        self.picked: dict[int, tuple[Dim, ...]] = {}

    def dims(self) -> list[Dim]:
        """One undecided dimension a direction of the grid."""
        return [replace(self.dim, size=size, labels_NK=None, grid=self, place=k) for k, size in enumerate(self.sizes)]

    def settle(self, units: "Units") -> list[Dim]:
        """Factor the labels, and give the dimensions."""
        if self.parts is None:
            self.parts = units.split(self.dim, self.sizes, self.reason)
        return self.parts

    def pick(self, direction: int, index: int) -> tuple[Dim, ...] | None:
        """The other dimensions of one part along a direction; None where another direction was picked before."""
        if self.parts is not None or self.direction not in (None, direction) or self.dim.labels_NK is None:
            return None
        self.direction = direction
        if index not in self.picked:
            labels = self.dim.labels_NK.reshape(*self.sizes, -1).take(index, axis=direction)
            rest = self.sizes[:direction] + self.sizes[direction + 1 :]
            part = replace(self.dim, size=prod(rest), labels_NK=labels.reshape(prod(rest), -1))
            self.picked[index] = (part,) if len(rest) == 1 else tuple(Grid(part, rest, self.reason).dims())
        return self.picked[index]

    @property
    def ragged(self) -> bool:
        """Its parts were only ever picked."""
        return self.parts is None and self.direction is not None


KINDS = ("channel", "group", "head", "head_dim", "hidden")  # of axes, as far as our own rules tell them apart


@dataclass(frozen=True)
class Axis:
    """An ordered set of interchangeable units, and where they live.

    Attributes:
        name: Path of the module that makes the units, e.g. ``layer1.0.conv1``; unique in the network.
        size: Number of units.
        prunable: Units may be removed.
        reason: Why not, if not.
        bindings: The parameter and buffer dimensions that shrink with the axis, as (name, dimension).
        consumers: Those of them that read the units: the columns of the weights that multiply and add them up.
        kind: One of :data:`KINDS`, or what a rule of yours calls it.
        droppable: The axis lies inside a residual branch that may leave whole; its size may be 0 in a cost.
        changes: Operations whose result depends on the removed units beyond their being zero (the statistics of a norm,
            a softmax); empty where removing equals zeroing exactly.
    """

    name: str
    size: int
    prunable: bool
    reason: str
    bindings: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...] = ()
    kind: str = "channel"
    droppable: bool = False
    changes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Removing units equals zeroing them; no statistics change."""
        return not self.changes


class Proof:
    """Every move that was made, for explanations; arrays that exist anyway, kept.

    Attributes:
        merged: Representatives that became one, pair by pair, and the operation: a forest over the units of a class.
        defined: Units, the others that each was defined by (0 pads), and the operation.
        frozen: Labels that were frozen, and the number of the reason.
    """

    def __init__(self) -> None:
        self.merged: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], str]] = []
        self.defined: list[tuple[npt.NDArray[np.int64], Labels, str]] = []
        self.frozen: list[tuple[Labels, int]] = []


class Units:
    """All units of a network under construction, and what is known of them."""

    def __init__(self) -> None:
        # Unit 0 stands for "no unit". `left` and `right` define a unit as alive iff both are; 0 where it is basic.
        self._parent, self._left, self._right, self._reason = (np.zeros(1024, np.int64) for _ in range(4))
        self._count = 1
        self._reasons = [""]
        self._kinds: dict[int, str] = {}
        self._any_defined = False
        self.proof = Proof()

    def __len__(self) -> int:
        return self._count

    # ---- making units ------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> Labels:
        """New units, one a position, shape (size, 1)."""
        start, self._count = self._count, self._count + size
        while self._count > len(self._parent):
            for name in ("_parent", "_left", "_right", "_reason"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self._parent[start : self._count] = np.arange(start, self._count)
        return np.arange(start, self._count)[:, None]

    def dim(self, size: int, *, zero: bool = True) -> Dim:
        """A dimension of new units. A dimension of size 1 has none: it broadcasts, and is no axis."""
        return Dim(size, self.fresh(size) if size > 1 else None, zero)

    # ---- reading labels ----------------------------------------------------------------------------------------

    def resolve(self, labels_NK: Labels) -> Labels:
        """The same labels in basic units, merged units replaced by one representative; each row a set."""
        out = self._find(labels_NK)
        if not self._any_defined:
            return _as_sets(out) if out.shape[1] > 1 else out
        while (defined := self._left[out] != 0).any():
            columns = []
            for column_N, mask_N in zip(out.T, defined.T):
                if mask_N.any():
                    columns.append(self._find(np.where(mask_N, self._left[column_N], column_N)))
                    columns.append(self._find(np.where(mask_N, self._right[column_N], 0)))
                else:
                    columns.append(column_N)
            out = np.stack(columns, axis=1)
        return _as_sets(out) if out.shape[1] > 1 else out

    def reason(self, unit: int) -> str:
        """Why a unit is frozen; empty where it is free. `unit` must be a representative."""
        return self._reasons[self._reason[unit]]

    def reason_numbers(self, units: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """A number for each of those reasons; 0 where the unit is free."""
        return self._reason[units].astype(np.uint64)

    def kind(self, unit: int) -> str:
        """The hint that a rule gave for a unit, or ``channel``."""
        return self._kinds.get(unit, "channel")

    # ---- the three moves ---------------------------------------------------------------------------------------

    def freeze(self, what: Dim | Labels | None, reason: str) -> None:
        """Positions that can never leave. The first reason given for a unit stays."""
        labels_NK = what.labels_NK if isinstance(what, Dim) else what
        if labels_NK is None:
            return
        units = self.resolve(labels_NK).ravel()
        units = units[self._is_free(units)]
        if len(units):
            self._reasons.append(reason)
            self._reason[units] = len(self._reasons) - 1
            self.proof.frozen.append((labels_NK, len(self._reasons) - 1))

    def unify(self, dims: Iterable[Dim], reason: str) -> Dim:
        """Dimensions that meet in one operation; a dimension of size 1 broadcasts. `reason` names the operation.

        Returns:
            The dimension they have become. Its `zero` is that of the first; the caller knows the operation.
        """
        wide = [dim for dim in dims if dim.size != 1]
        if not wide:
            return Dim(1)
        first = next((dim for dim in wide if dim.labels_NK is not None), None)
        if first is None or first.labels_NK is None:
            return wide[0]
        for other in wide:
            if other.labels_NK is None:
                self.freeze(first, other.note or f"meets a dimension of fixed size in {reason}")
            elif other.labels_NK is not first.labels_NK:
                self._unify_labels(first.labels_NK, other.labels_NK, reason)
        return first

    def split(self, dim: Dim, sizes: Sequence[int], reason: str) -> list[Dim]:
        """A dimension as a grid of `sizes`, outer to inner. `reason` names the operation."""
        assert prod(sizes) == dim.size, (sizes, dim.size)
        if dim.labels_NK is None:
            return [Dim(size, note=dim.note) for size in sizes]
        if len(sizes) == 1:
            return [dim]
        outer, rest = self._split_once(dim, sizes[0], prod(sizes[1:]), reason)
        return [outer, *self.split(rest, sizes[1:], reason)]

    # ---- rearranging, without a move -----------------------------------------------------------------------------

    def settle(self, dim: Dim) -> Dim:
        """The dimension itself, or what its grid factors into."""
        return dim if dim.grid is None else self.settle(dim.grid.settle(self)[dim.place])

    def merge(self, dims: Sequence[Dim]) -> Dim:
        """Dimensions, outer to inner, flattened into one."""
        wide = [dim for dim in dims if dim.size != 1]
        if len(wide) == 1:
            return wide[0]
        size = prod(dim.size for dim in dims)
        if all(dim.labels_NK is None for dim in wide):
            return Dim(size, note=next((dim.note for dim in wide if dim.note), ""))
        columns, inner = [], size
        for dim in wide:
            inner //= dim.size
            if dim.labels_NK is not None:
                columns.append(np.tile(np.repeat(dim.labels_NK, inner, axis=0), (size // (dim.size * inner), 1)))
        return Dim(size, np.concatenate(columns, axis=1), all(dim.zero for dim in wide if dim.labels_NK is not None))

    def concat(self, dims: Sequence[Dim]) -> Dim:
        """Dimensions laid end to end."""
        size = sum(dim.size for dim in dims)
        if all(dim.labels_NK is None for dim in dims):
            return Dim(size, note=next((dim.note for dim in dims if dim.note), ""))
        depth = max(dim.labels_NK.shape[1] for dim in dims if dim.labels_NK is not None)
        out = np.zeros((size, depth), np.int64)
        start = 0
        for dim in dims:
            if dim.labels_NK is not None:
                out[start : start + dim.size, : dim.labels_NK.shape[1]] = dim.labels_NK
            start += dim.size
        return Dim(size, out, all(dim.zero for dim in dims if dim.labels_NK is not None))

    def take(self, dim: Dim, index_N: npt.NDArray[np.int64], reason: str) -> Dim:
        """Positions picked by index: slice, flip, roll, shuffle, repeat. One alone is no dimension, so it must stay."""
        if dim.labels_NK is None:
            return Dim(len(index_N), note=dim.note)
        labels_NK = dim.labels_NK[index_N]
        if len(index_N) == 1:
            self.freeze(labels_NK, f"a single position is picked in {reason}")
            return Dim(1)
        return replace(dim, size=len(index_N), labels_NK=labels_NK)

    def hint(self, dim: Dim, kind: str) -> None:
        """Remember what the units of a dimension are, for the name and kind of their axis."""
        if dim.labels_NK is not None:
            for unit in np.unique(self.resolve(dim.labels_NK)):
                self._kinds.setdefault(int(unit), kind)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _is_free(self, units: Labels) -> Alive:
        return (units != 0) & (self._reason[units] == 0)

    def _find(self, units: Labels) -> Labels:
        root = self._parent[units]
        if not ((up := self._parent[root]) != root).any():
            return root
        while (up != root).any():
            root, up = up, self._parent[up]
        self._parent[units] = root
        return root

    def _unify_labels(self, a_NK: Labels, b_NK: Labels, reason: str) -> None:
        """Make two label arrays say the same, position by position; each pass merges, defines or freezes units."""
        while True:
            a, b = self.resolve(a_NK), self.resolve(b_NK)
            if a.shape == b.shape and (a == b).all():
                return
            if a.shape[1] == b.shape[1] == 1 and a.all() and b.all():  # by far the most frequent case
                open_N = ((a != b) & (self._is_free(a) | self._is_free(b)))[:, 0]
                if open_N.any():
                    self._union(a[open_N, 0], b[open_N, 0], reason)
                return
            only_a, only_b = _difference(a, b), _difference(b, a)
            open_N = self._is_free(only_a).any(1) | self._is_free(only_b).any(1)  # frozen units alone need nothing
            if not open_N.any():
                return
            only_a, only_b = only_a[open_N], only_b[open_N]
            if (single := ((only_a != 0).sum(1) == 1) & ((only_b != 0).sum(1) == 1)).any():
                self._union(only_a[single].max(1), only_b[single].max(1), reason)
                continue
            # What never leaves says nothing beside others.
            only_a, only_b = np.where(self._is_free(only_a), only_a, 0), np.where(self._is_free(only_b), only_b, 0)
            count_a, count_b = (only_a != 0).sum(1), (only_b != 0).sum(1)
            if (single := (count_a == 1) & (count_b == 1)).any():
                self._union(only_a[single].max(1), only_b[single].max(1), reason)
            elif (one := (count_a == 1) & (count_b > 1)).any():
                self._define(only_a[one].max(1), only_b[one], reason)
            elif (one := (count_b == 1) & (count_a > 1)).any():
                self._define(only_b[one].max(1), only_a[one], reason)
            elif (gone := (count_a == 0) | (count_b == 0)).any():
                # The position is required here without that unit, so the unit may never be what removes it.
                fixed = f"meets a dimension without it in {reason}"
                self.freeze(np.concatenate([only_a[gone].ravel(), only_b[gone].ravel()])[:, None], fixed)
            else:
                self._reconcile(a_NK, b_NK, np.asarray(open_N), only_a, only_b, reason)

    def _union(self, a_N: npt.NDArray[np.int64], b_N: npt.NDArray[np.int64], why: str) -> None:
        units = np.concatenate([a_N, b_N])
        reasons = self._reason[units]
        while (differ := (a_N := self._find(a_N)) != (b_N := self._find(b_N))).any():
            a_N, b_N = a_N[differ], b_N[differ]
            # One parent per root and pass: a root that must join two others meets the second in the next pass.
            high, first = np.unique(np.maximum(a_N, b_N), return_index=True)
            low = np.minimum(a_N, b_N)[first]
            self._parent[high] = low
            self.proof.merged.append((high, low, why))
        roots = self._find(units)
        np.maximum.at(self._reason, roots, reasons)
        if self._kinds:
            for unit, root in zip(units.tolist(), roots.tolist()):
                if unit in self._kinds:
                    self._kinds.setdefault(root, self._kinds[unit])

    def _define(self, unit_N: npt.NDArray[np.int64], by_NK: Labels, why: str) -> None:
        """Define each unit as the conjunction of the others in its row (at least two), in their order."""
        self._any_defined = True
        unit_N, first = np.unique(unit_N, return_index=True)
        by_NK = by_NK[first]
        ready = ~np.isin(unit_N, by_NK)  # a unit that helps to define another waits, or a circle could close
        if not ready.any():
            ready[0] = True
        unit_N, by_NK = unit_N[ready], by_NK[ready]
        for row in np.flatnonzero(self._reason[unit_N]):
            self.freeze(by_NK[row][:, None], self.reason(unit_N[row]))
        by_NK = np.take_along_axis(by_NK, np.argsort(by_NK == 0, axis=1, kind="stable"), axis=1)  # gaps to the end
        self.proof.defined.append((unit_N, by_NK, why))
        rest = by_NK[:, -1]
        for column_N in by_NK[:, -2:0:-1].T:
            joint = self.fresh(len(unit_N))[:, 0]
            nested = rest != 0
            self._left[joint[nested]], self._right[joint[nested]] = column_N[nested], rest[nested]
            rest = np.where(nested, joint, column_N)
        self._left[unit_N], self._right[unit_N] = by_NK[:, 0], rest

    def _reconcile(
        self, a_NK: Labels, b_NK: Labels, open_N: Alive, only_a: Labels, only_b: Labels, reason: str
    ) -> None:
        """Rows that need several units on both sides: two ways of factoring the same positions."""
        columns_a, columns_b = _used_columns(only_a), _used_columns(only_b)
        if len(columns_a) == len(columns_b):
            patterns_b = [_pattern(column) for column in columns_b]
            matches = [
                next((k for k, other in enumerate(patterns_b) if np.array_equal(_pattern(column), other)), -1)
                for column in columns_a
            ]
            full = all(column.all() for column in (*columns_a, *columns_b))
            if full and sorted(matches) == list(range(len(columns_b))):
                for column, match in zip(columns_a, matches):
                    self._union(column, columns_b[match], reason)
                return
        # Factored at different places, as 12 = 3*4 and 12 = 6*2: refine both to 3*2*2.
        if self._refined(a_NK, b_NK, reason):
            return
        # One side has a unit of its own for every position: let it stand for the other side's, alone.
        for columns in (columns_a, columns_b):
            own = [k for k, column in enumerate(columns) if len(np.unique(column)) == len(column)]
            if own and len(columns) > 1:
                others = np.concatenate([column for k, column in enumerate(columns) if k != own[0]])
                self.freeze(others[:, None], f"meets a dimension without it in {reason}")
                return
        if self._refined(a_NK[open_N], b_NK[open_N], reason):
            return
        self.freeze(np.concatenate([only_a.ravel(), only_b.ravel()])[:, None], f"factored two ways in {reason}")

    def _refined(self, a_NK: Labels, b_NK: Labels, reason: str) -> bool:
        """Split both along the coarsest grid that both fit, if there is one and it is new."""
        sizes, before = _common_grid(self.resolve(a_NK), self.resolve(b_NK)), self._count
        for labels_NK in (a_NK, b_NK) if sizes else ():
            self.split(Dim(len(labels_NK), labels_NK), sizes or [], reason)
        return self._count > before

    def _split_once(self, dim: Dim, rows: int, columns: int, reason: str) -> tuple[Dim, Dim]:
        assert dim.labels_NK is not None
        if rows == 1:
            return Dim(1), dim
        if columns == 1:
            return dim, Dim(1)
        outer, inner, mixed = [], [], []
        for column_N in self.resolve(dim.labels_NK).T:
            grid = column_N.reshape(rows, columns)
            if (grid == grid[:, :1]).all():
                outer.append(grid[:, 0])
            elif (grid == grid[:1]).all():
                inner.append(grid[0])
            else:
                mixed.append(column_N)
        # Columns factor one by one, unless the sets differ in size and a column alone says nothing.
        together = [np.stack(mixed, axis=1)] if any((column == 0).any() for column in mixed) else []
        for labels_NK in together or [column_N[:, None] for column_N in mixed]:
            row, column = self.fresh(rows), self.fresh(columns)
            product = np.concatenate([np.repeat(row, columns, axis=0), np.tile(column, (rows, 1))], axis=1)
            self._unify_labels(labels_NK, product, reason)
            outer.append(row[:, 0])
            inner.append(column[:, 0])

        def part(size: int, labels: list[npt.NDArray[np.int64]]) -> Dim:
            return Dim(size, np.stack(labels, axis=1) if labels else None, dim.zero)

        return part(rows, outer), part(columns, inner)


def _as_sets(labels_NK: Labels) -> Labels:
    """Drop repeated units within a row and columns that are empty throughout."""
    for column in range(1, labels_NK.shape[1]):
        repeated = (labels_NK[:, :column] == labels_NK[:, column : column + 1]).any(axis=1)
        labels_NK[:, column] = np.where(repeated, 0, labels_NK[:, column])
    used = np.array([column.any() for column in labels_NK.T])
    used[0] = True
    return labels_NK[:, used]


def _difference(a_NK: Labels, b_NK: Labels) -> Labels:
    """Units of each row of `a_NK` that its row of `b_NK` lacks; 0 elsewhere."""
    shared = np.zeros(a_NK.shape, bool)
    for column in b_NK.T:
        shared |= a_NK == column[:, None]
    return np.where(shared, 0, a_NK)


def _used_columns(labels_NK: Labels) -> list[npt.NDArray[np.int64]]:
    return [column for column in labels_NK.T if column.any()]


def _pattern(column_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which positions share a unit, whatever its number: [7, 7, 3] and [2, 2, 9] both give [0, 0, 2]."""
    _, first, inverse = np.unique(column_N, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], np.int64)


def _common_grid(a_NK: Labels, b_NK: Labels) -> list[int] | None:
    """Sizes of the coarsest grid in which every column of both arrays runs along whole dimensions, or None."""
    size, strides = len(a_NK), {1, len(a_NK)}
    for column in (*_used_columns(a_NK), *_used_columns(b_NK)):
        pattern = _pattern(column)
        changes = np.flatnonzero(pattern != pattern[0])
        inner = int(changes[0]) if len(changes) else size
        count = len(np.unique(column))
        if inner * count > size or size % (inner * count):
            return None
        block = np.repeat(np.arange(count) * inner, inner)
        if not np.array_equal(pattern, np.tile(block, size // len(block))):
            return None
        strides |= {inner, inner * count}
    chain = sorted(strides)
    if any(large % small for small, large in pairwise(chain)):
        return None
    return [large // small for small, large in pairwise(chain)][::-1]
