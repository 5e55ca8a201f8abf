"""How a weight reads units: along which dimension it adds up, and where a constant can be added to what it gives."""

from collections.abc import Mapping
from dataclasses import dataclass

from metaprune.graph.record import Op, Ref, Trace

_WITH_BIAS = {"linear": "bias", "addmm": "self"}  # the argument that is added to the product


@dataclass(frozen=True)
class Reader:
    """A weight that is multiplied with activations and added up.

    Attributes:
        into: Dimension along which it is added up.
        groups: Groups of a convolution, 1 elsewhere.
        bias: Parameter that is added to the result, or empty.
        mean: Running mean of a BatchNorm that alone reads the result, or empty.
    """

    into: int
    groups: int = 1
    bias: str = ""
    mean: str = ""


def find_reader(trace: Trace, name: str) -> Reader | None:
    """How the weight of that name reads; None if it does not, or in several ways.

    Args:
        trace: What was read off the run.
        name: First name of a parameter.
    """
    number = trace.parameters[name].index
    readers = [op for op in trace.ops if any(value == number for value, _ in op.consumed)]
    into = {dim for op in readers for value, dim in op.consumed if value == number}
    if len(into) != 1 or not readers:
        return None
    names = {value.index: name for name, value in trace.parameters.items()}
    op, groups = readers[0], readers[0].constants.get(("groups", None), 1)
    if len(readers) > 1 or sum(number in other.inputs for other in trace.ops) > 1:
        return Reader(into.pop(), groups)
    return Reader(into.pop(), groups, _bias(op, names), _mean(trace, op, names))


def _bias(op: Op, names: Mapping[int, str]) -> str:
    given = op.arguments.get(
        _WITH_BIAS.get(op.name, "bias" if "conv" in op.name and "transpose" not in op.name else "")
    )
    return names.get(given.number, "") if isinstance(given, Ref) else ""


def _mean(trace: Trace, op: Op, names: Mapping[int, str]) -> str:
    after = [other for other in trace.ops if set(op.outputs) & set(other.inputs)]
    if len(after) != 1 or "batch_norm" not in after[0].name or set(op.outputs) & set(trace.outputs):
        return ""
    given = after[0].arguments.get("running_mean")
    return names.get(given.number, "") if isinstance(given, Ref) else ""
