"""Why dimensions share units, and why some must stay: the moves of the trace, read back as sentences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from metaprune.errors import ConfigError, did_you_mean
from metaprune.graph.axes import Axis
from metaprune.graph.layout import Layout, parameter_dims

Binding = tuple[str, int]
_VERBS = {
    "add": "adds them",
    "sub": "subtracts them",
    "mul": "multiplies them",
    "div": "divides one by the other",
    "batch_norm": "scales one by the other",
    "layer_norm": "scales one by the other",
    "group_norm": "scales one by the other",
    "rms_norm": "scales one by the other",
    "conv": "applies one to the other",
    "linear": "applies one to the other",
    "addmm": "applies one to the other",
    "mm": "multiplies them as matrices",
    "matmul": "multiplies them as matrices",
    "bmm": "multiplies them as matrices",
    "einsum": "multiplies them",
    "attention": "scores one by the other",
    "where": "picks from them",
    "cat": "lays them side by side",
}


@dataclass(frozen=True)
class Link:
    """One step: what shares units with what, and by which operations.

    Attributes:
        known: A parameter dimension that was reached before (``conv1.weight:0``), or the axis.
        new: Those that it leads to.
        ops: The operations that make them one, each with its module.
        grid: An operation reads the new ones as a grid, of which these units are one direction.
    """

    known: str
    new: tuple[str, ...]
    ops: tuple[str, ...]
    grid: bool = False

    def __str__(self) -> str:
        new, ops = ", ".join(_short(self.new)), " and ".join(self.ops)
        if self.grid:
            return f"{new} is a grid that holds units of {self.known}, because of {ops}"
        both = f"{self.known} and {new}" if len(self.new) == 1 else f"{self.known}, {new}"
        does = _verb(self.ops[0]) if len(self.ops) == 1 else "join them"
        return f"{both} share units because {ops} {does}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the sentence as ``words``."""
        return {"from": self.known, "to": list(self.new), "ops": list(self.ops), "words": str(self)}


@dataclass(frozen=True)
class Why:
    """What is known of one axis.

    Attributes:
        axis: The axis.
        start: Where the links start: the parameter dimension that was asked for, or the one that makes the units.
        links: How everything that leaves with the units hangs together; each starts at something known before.
        chain: For an axis that must stay, the links from `start` to where it was frozen.
        end: Where that was.
        tied: Further names of the parameters among them.
    """

    axis: Axis
    start: str
    links: tuple[Link, ...]
    chain: tuple[Link, ...] = ()
    end: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """The same in words."""
        axis = self.axis
        if axis.prunable:
            said = [f"Axis {axis.name} may be cut; each of its {axis.size} units leaves everywhere at once."]
        else:
            said = [f"Axis {axis.name} must stay: {axis.reason}."]
            steps = "; ".join(map(str, self.chain))
            said += [f"From {self.start} to the reason: {steps}; there: {axis.reason}."] if steps else []
        said += [f"{link}." for link in self.links]
        said += [f"{other} and {first} are one tensor." for other, first in self.tied.items()]
        return said

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "axis": self.axis.name,
            "size": self.axis.size,
            "prunable": self.axis.prunable,
            "reason": self.axis.reason,
            "start": self.start,
            "links": [link.to_json() for link in self.links],
            "chain": [link.to_json() for link in self.chain],
            "end": self.end,
            "tied": dict(self.tied),
            "words": self.sentences(),
        }


def explain(layout: Layout, name: str) -> tuple[Why, ...]:
    """Why an axis, or every axis of a parameter or module, is as it is.

    Args:
        layout: The axes.
        name: An axis, a parameter dimension (``conv1.weight:0``), a parameter, or a module with all inside of it.

    Raises:
        ConfigError: There is no such name (the nearest one is given), or no axis runs along it.
    """
    moves = _Moves(layout)
    return tuple(moves.explain(index, binding) for index, binding in _asked(layout, name))


def _asked(layout: Layout, name: str) -> list[tuple[int, Binding]]:
    """Axes that a name means, each with the binding to start from."""
    for index, axis in enumerate(layout.axes):
        if axis.name == name:
            return [(index, _maker(axis))]
    trace = layout.trace
    parameter, _, place = name.rpartition(":")
    own = {**trace.aliases, **{known: known for known in trace.parameters}}
    if parameter in own and place.isdigit():
        wanted = [(own[parameter], int(place))]
    else:
        inside = {first for known, first in own.items() if known == name or (name and known.startswith(f"{name}."))}
        wanted = [binding for axis in layout.axes for binding in axis.bindings if binding[0] in inside]
    found = {index: binding for binding in reversed(wanted) for index in _running_along(layout, binding)}
    if found:
        return sorted(found.items())
    if name in own or parameter in own:
        legal = [
            _named(binding) for axis in layout.axes for binding in axis.bindings if binding[0] == own.get(parameter)
        ]
        hint = f" Those of {parameter} are {', '.join(dict.fromkeys(legal))}." if legal else ""
        raise ConfigError(f"no axis runs along {name!r}: it has no dimension of units.{hint}")
    known = [axis.name for axis in layout.axes] + list(own)
    raise ConfigError(
        f"no axis, parameter or module is named {name!r}.{did_you_mean(name, known)} `metaprune inspect` lists the "
        "axes; a dimension of a parameter reads conv1.weight:0."
    )


def _running_along(layout: Layout, binding: Binding) -> list[int]:
    return [index for index, axis in enumerate(layout.axes) if binding in axis.bindings]


def _maker(axis: Axis) -> Binding:
    """The binding that an axis is named after."""
    made = [binding for binding in axis.bindings if binding not in axis.consumers]
    path = axis.name.partition("#")[0].partition(":")[0]
    own = [binding for binding in made if binding[0] == path or binding[0].rpartition(".")[0] == path]
    return (own or made or list(axis.bindings))[0]


def _short(names: Sequence[str]) -> list[str]:
    """Names with those of one module and dimension put together.

    >>> _short(["bn1.weight:0", "bn1.bias:0", "linear.weight:1"])
    ['bn1.{weight,bias}:0', 'linear.weight:1']
    """
    leaves: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parameter, _, place = name.rpartition(":")
        module, dot, leaf = parameter.rpartition(".")
        leaves.setdefault((module + dot, place), []).append(leaf)
    joined = [
        (module, leaf[0] if len(leaf) == 1 else f"{{{','.join(leaf)}}}", k) for (module, k), leaf in leaves.items()
    ]
    return [f"{module}{leaf}:{place}" for module, leaf, place in joined]


def _named(binding: Binding) -> str:
    return f"{binding[0]}:{binding[1]}"


def _verb(op: str) -> str:
    name = op.partition(" at ")[0].strip("_")
    return next((verb for known, verb in _VERBS.items() if name == known), None) or next(
        (verb for known, verb in _VERBS.items() if known in name), "joins them"
    )


@dataclass(frozen=True)
class _Step:
    """How a unit was reached: from the last parameter dimension before it, by these operations."""

    known: str
    ops: tuple[str, ...] = ()
    grid: bool = False


class _Moves:
    """The moves of a trace as edges between units: both ways where units became one, and from the units that define
    another to that one, so that whatever is reached from a unit needs it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        proof = layout.trace.units.proof
        edges: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], str, bool]] = []
        for a, b, op in proof.merged:
            edges += [(a, b, op, False), (b, a, op, False)]
        for units, by_NK, op in proof.defined:
            edges += [(column[column != 0], units[column != 0], op, True) for column in by_NK.T]
        empty = np.zeros(0, np.int64)
        self._from = np.concatenate([empty, *(edge[0] for edge in edges)])
        self._to = np.concatenate([empty, *(edge[1] for edge in edges)])
        self._move = np.repeat(np.arange(len(edges)), [len(edge[0]) for edge in edges])
        self._moves = [(edge[2], edge[3]) for edge in edges]
        order = np.argsort(self._from, kind="stable")
        self._from, self._to, self._move = self._from[order], self._to[order], self._move[order]
        self._homes = np.full(len(layout.trace.units), -1)
        self._bindings: list[Binding] = []
        for name, _, k, dim in parameter_dims(layout.trace):
            assert dim.labels_NK is not None
            self._homes[dim.labels_NK[:, 0]] = len(self._bindings)
            self._bindings.append((name, k))

    def explain(self, index: int, binding: Binding) -> Why:
        """Everything about one axis, told from one of its bindings."""
        axis, units = self.layout.axes[index], self.layout.trace.units
        (sample,) = np.flatnonzero((self.layout.axis_of == index) & (self.layout.rank_of == 0))[:1]
        start, root = self._start(axis, int(sample), binding)
        frozen_at = self._frozen_at(int(units.reason_numbers(np.array([sample]))[0]))
        links: list[tuple[str, str, tuple[str, ...], bool]] = []
        came: dict[str, tuple[str, str, tuple[str, ...], bool]] = {}
        steps = {start: _Step(root)}
        end: _Step | None = None
        for unit, before, move in self._walk(start):
            step = self._step(steps[before], move) if before >= 0 else steps[unit]
            home = self._name(unit)
            if home is not None and home != step.known and home != root and home not in came:
                came[home] = (step.known, home, step.ops, step.grid)
                links.append(came[home])
            steps[unit] = _Step(home) if home is not None else step
            if end is None and unit in frozen_at:
                end = steps[unit]
        chain: list[Link] = []
        place = end.known if end is not None and not axis.prunable else ""
        while place in came:
            known, new, ops, grid = came[place]
            chain.insert(0, Link(known, (new,), ops, grid))
            place = known
        tied = {other: first for other, first in self.layout.trace.aliases.items() if first in dict(axis.bindings)}
        return Why(axis, root, _grouped(links), tuple(chain), "" if end is None else end.known, tied)

    def _start(self, axis: Axis, sample: int, binding: Binding) -> tuple[int, str]:
        """A unit to start from: one of the binding if its units are those of the axis, else the axis' own."""
        value = self.layout.trace.parameters[binding[0]]
        labels_NK = value.dims[binding[1]].labels_NK
        assert labels_NK is not None
        rows = self.layout.rows(labels_NK)
        if rows.shape[1] == 1:
            return int(labels_NK[np.flatnonzero(rows[:, 0] == sample)[0], 0]), _named(binding)
        return sample, self._name(sample) or f"axis {axis.name}"

    def _walk(self, start: int) -> Iterator[tuple[int, int, int]]:
        """Units in the order of their distance: each with the one before it and the move between, -1 for the start."""
        seen = {start}
        layer = [start]
        yield start, -1, -1
        while layer:
            ahead = []
            low, high = (np.searchsorted(self._from, layer, side) for side in ("left", "right"))
            for unit, first, last in zip(layer, low.tolist(), high.tolist()):
                for other, move in zip(self._to[first:last].tolist(), self._move[first:last].tolist()):
                    if other not in seen:
                        seen.add(other)
                        ahead.append(other)
                        yield other, unit, move
            layer = ahead

    def _step(self, before: _Step, move: int) -> _Step:
        op, grid = self._moves[move]
        ops = before.ops if op in before.ops else (*before.ops, op)
        return _Step(before.known, ops, before.grid or grid)

    def _name(self, unit: int) -> str | None:
        home = self._homes[unit]
        return None if home < 0 else _named(self._bindings[home])

    def _frozen_at(self, number: int) -> set[int]:
        found = [labels.ravel() for labels, reason in self.layout.trace.units.proof.frozen if reason == number]
        return set(np.concatenate(found).tolist()) if found and number else set()


def _grouped(links: list[tuple[str, str, tuple[str, ...], bool]]) -> tuple[Link, ...]:
    """Links of the same start and operations as one."""
    groups: dict[tuple[str, tuple[str, ...], bool], list[str]] = {}
    for known, new, ops, grid in links:
        groups.setdefault((known, ops, grid), []).append(new)
    return tuple(Link(known, tuple(new), ops, grid) for (known, ops, grid), new in groups.items())
