"""What reads the units of an axis: the calls that multiply them by weights and add them up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metaprune.graph.layout import Layout
from metaprune.graph.record import Op


@dataclass(frozen=True, eq=False)
class Read:
    """One weight that reads the units of an axis, and the tensor in which it finds them.

    Attributes:
        axis: Name of the axis.
        binding: The weight and its dimension, one of :attr:`Axis.consumers`.
        op: The call that multiplies and adds up.
        value: Number of the tensor that holds the units: an operand of the call. A recurrent layer reads its own
            states, which are its first result (of its last layer only, where it has several).
        at: The dimension of that tensor along which they lie.
        rank_N: The unit that each position along it belongs to; -1 for those of other axes.
    """

    axis: str
    binding: tuple[str, int]
    op: Op
    value: int
    at: int
    rank_N: npt.NDArray[np.int64]

    def along(self, value_N: Tensor, shape: Sequence[int]) -> Tensor:
        """What belongs to each position, in a shape that multiplies the weight.

        Args:
            value_N: One number for each position along the dimension that is read.
            shape: Of the weight.
        """
        dim = self.binding[1]
        rest = [1] * (len(shape) - dim - 1)
        if len(value_N) == shape[dim]:
            return value_N.view(*[1] * dim, -1, *rest)
        groups = self.op.constants.get(("groups", None), 1)
        if groups == 1:  # both directions of a recurrent layer
            return value_N.view(-1, shape[dim]).mean(0).view(*[1] * dim, -1, *rest)
        return value_N.view(groups, -1).repeat_interleave(shape[0] // groups, dim=0).view(shape[0], -1, *rest)

    def units(self, value_N: Tensor, size: int) -> Tensor:
        """The mean over the positions of each of `size` units, shape (U,), float64."""
        rank_N = torch.from_numpy(self.rank_N)
        here = rank_N >= 0
        total_U = torch.zeros(size, dtype=torch.float64).index_add_(0, rank_N[here], value_N.double()[here])
        return total_U / torch.bincount(rank_N[here], minlength=size).clamp_min(1)


def find_reads(layout: Layout) -> dict[str, tuple[Read, ...]]:
    """For every axis, one entry for each of its consumers whose operand the trace knows."""
    trace = layout.trace
    numbers = {name: value.index for name, value in trace.parameters.items()}
    parameters = set(numbers.values())
    calls: dict[tuple[int, int], list[Op]] = {}
    for op in trace.ops:
        for entry in dict.fromkeys(op.consumed):
            calls.setdefault(entry, []).append(op)
    reads: dict[str, tuple[Read, ...]] = {}
    for index, axis in enumerate(layout.axes):
        found = (
            _read(layout, index, (name, dim), op, parameters)
            for name, dim in axis.consumers
            for op in calls.get((numbers[name], dim), [])
        )
        reads[axis.name] = tuple(read for read in found if read is not None)
    return reads


def _read(layout: Layout, axis: int, binding: tuple[str, int], op: Op, parameters: set[int]) -> Read | None:
    recurrent = "hx" in op.arguments and len(op.outputs) > 1
    # The states that a recurrent layer starts from are an operand too, but not what it reads at its steps.
    operands = [op.inputs[0], op.outputs[0]] if recurrent else op.inputs
    for number in operands:
        dims = layout.trace.values[number].dims
        for at in reversed(range(len(dims))):
            rank_N = layout.units_along(dims[at], axis)
            if number not in parameters and rank_N is not None:
                return Read(layout.axes[axis].name, binding, op, number, at, rank_N)
    return None
