"""What reads the units of an axis: the calls that multiply them by weights and add them up."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from metaprune.graph.layout import Layout
from metaprune.graph.record import Op


@dataclass(frozen=True, eq=False)
class Read:
    """One weight that reads the units of an axis, and the tensor in which it finds them.

    Attributes:
        binding: The weight and its dimension, one of :attr:`Axis.consumers`.
        op: The call that multiplies and adds up.
        value: Number of the tensor that holds the units: an operand of the call. A recurrent layer reads its own
            states, which are its first result (of its last layer only, where it has several).
        at: The dimension of that tensor along which they lie.
        rank_N: The unit that each position along it belongs to; -1 for those of other axes.
    """

    binding: tuple[str, int]
    op: Op
    value: int
    at: int
    rank_N: npt.NDArray[np.int64]


def find_reads(layout: Layout) -> dict[str, tuple[Read, ...]]:
    """For every axis, one entry for each of its consumers whose operand the trace knows."""
    trace = layout.trace
    numbers = {name: value.index for name, value in trace.parameters.items()}
    calls: dict[tuple[int, int], list[Op]] = {}
    for op in trace.ops:
        for entry in dict.fromkeys(op.consumed):
            calls.setdefault(entry, []).append(op)
    reads: dict[str, tuple[Read, ...]] = {}
    for index, axis in enumerate(layout.axes):
        found = (
            _read(layout, index, (name, dim), op)
            for name, dim in axis.consumers
            for op in calls.get((numbers[name], dim), [])
        )
        reads[axis.name] = tuple(read for read in found if read is not None)
    return reads


def _read(layout: Layout, axis: int, binding: tuple[str, int], op: Op) -> Read | None:
    parameters = {value.index for value in layout.trace.parameters.values()}
    recurrent = "hx" in op.arguments and len(op.outputs) > 1
    # The states that a recurrent layer starts from are an operand too, but not what it reads at its steps.
    operands = [op.inputs[0], op.outputs[0]] if recurrent else op.inputs
    for number in operands:
        dims = layout.trace.values[number].dims
        for at in reversed(range(len(dims))):
            rank_N = layout.units_along(dims[at], axis)
            if number not in parameters and rank_N is not None:
                return Read(binding, op, number, at, rank_N)
    return None
