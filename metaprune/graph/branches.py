"""Residual branches: what leaves with an axis when none of its units is left.

When an axis is empty, every tensor that has it as a dimension is empty, and whatever is computed from empty tensors
alone is a constant. The branch can leave whole if all of that ends where it is added to something that lives.
"""

import heapq
from collections.abc import Sequence

from metaprune.graph.layout import Layout
from metaprune.graph.record import Op, Trace

_JOINS = {"add", "add_", "sub", "sub_"}


class Branches:
    """For every axis, the calls and parameters that are of no use once it is empty."""

    def __init__(self, layout: Layout) -> None:
        trace = layout.trace
        self._axes = len(layout.axes)
        self._consumers: dict[int, list[int]] = {}
        self._producer: dict[int, Op] = {}
        for op in trace.ops:
            for number in op.inputs:
                self._consumers.setdefault(number, []).append(op.index)
            for number in op.outputs:
                self._producer.setdefault(number, op)
        self._parameters = {value.index for value in trace.parameters.values()}
        self._depends = self._on_input(trace)
        self._gates_of_op: dict[int, list[int]] = {}
        self._gates_of_parameter: dict[int, list[int]] = {}
        self.droppable: set[int] = set()
        self.joins: dict[int, set[int]] = {}
        empty = self._empty_values(layout)
        for axis, values in empty.items():
            found = self._useless(trace, values) if layout.axes[axis].prunable else None
            if found is None:
                continue
            self.droppable.add(axis)
            useless, joins = found
            self.joins[axis] = joins
            for index in useless | joins:
                self._gates_of_op.setdefault(index, []).append(self._axes + axis)
            self._gate_parameters(trace, useless, self._axes + axis)

    def gates_of_op(self, index: int) -> Sequence[int]:
        """Indicator variables that switch a call off."""
        return self._gates_of_op.get(index, ())

    def gates_of_parameter(self, number: int) -> Sequence[int]:
        """Indicator variables that switch a parameter off."""
        return self._gates_of_parameter.get(number, ())

    def _gate_parameters(self, trace: Trace, useless: set[int], gate: int) -> None:
        """Parameters that only these calls read; and buffers that nothing reads, beside them in their module."""
        gone: set[str] = set()
        for name, value in trace.parameters.items():
            users = self._consumers.get(value.index, [])
            if users and useless.issuperset(users):
                self._gates_of_parameter.setdefault(value.index, []).append(gate)
                gone.add(name.rpartition(".")[0])
        for name, value in trace.parameters.items():
            if name.rpartition(".")[0] in gone and value.index not in self._consumers:
                self._gates_of_parameter.setdefault(value.index, []).append(gate)

    def _on_input(self, trace: Trace) -> set[int]:
        """Values that are computed from the network's input, rather than from parameters and constants alone."""
        made = set(self._producer) | self._parameters
        depends = {value.index for value in trace.values if value.index not in made}
        for op in trace.ops:
            if depends.intersection(op.inputs):
                depends.update(op.outputs)
        return depends

    def _empty_values(self, layout: Layout) -> dict[int, list[int]]:
        """For every axis, the activations that have a dimension of nothing else."""
        empty: dict[int, list[int]] = {}
        for value in layout.trace.values:
            if value.index not in self._depends:
                continue
            for dim in value.dims:
                monomials = layout.size(dim)
                for axis in set.intersection(*(set(monomial) for monomial in monomials)):
                    empty.setdefault(axis, []).append(value.index)
        return empty

    def _useless(self, trace: Trace, empty: list[int]) -> tuple[set[int], set[int]] | None:
        """Calls that need not run once these values are empty, and the additions at which the branch ends.

        None if that reaches what must live.
        """
        dead, outputs = set(empty), set(trace.outputs)
        if dead & outputs:
            return None
        queue = sorted({index for number in dead for index in self._consumers.get(number, [])})
        useless: set[int] = set()
        joins: set[int] = set()
        seen, empties = set(queue), set(empty)
        while queue:
            op = trace.ops[heapq.heappop(queue)]
            alive = [number for number in op.inputs if number in self._depends and number not in dead]
            gone = [number for number in op.inputs if number in dead]
            if op.name in _JOINS and alive and not empties.intersection(gone):
                joins.add(op.index)
                continue  # the branch ends here: what lives goes on alone
            if alive and (not empties.intersection(gone) or ("attention" in op.name and op.inputs[2] in alive)):
                return None  # a constant steers what lives: a gate, or scores that weigh values
            useless.add(op.index)
            dead.update(op.outputs)
            if outputs.intersection(op.outputs):
                return None
            for index in (index for number in op.outputs for index in self._consumers.get(number, [])):
                if index not in seen:
                    seen.add(index)
                    heapq.heappush(queue, index)
        return useless | self._only_for(trace, useless, outputs), joins

    def _only_for(self, trace: Trace, useless: set[int], outputs: set[int]) -> set[int]:
        """Calls before these whose results nothing else uses."""
        more: set[int] = set()
        queue = [-index for index in useless]
        heapq.heapify(queue)
        while queue:
            for number in trace.ops[-heapq.heappop(queue)].inputs:
                op = self._producer.get(number)
                if op is None or op.index in useless or op.index in more or outputs.intersection(op.outputs):
                    continue
                users = {index for out in op.outputs for index in self._consumers.get(out, [])}
                if users and users <= useless | more:
                    more.add(op.index)
                    heapq.heappush(queue, -op.index)
        return more
