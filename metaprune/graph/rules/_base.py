"""Where rules are kept: one function per family of ATen calls.

A rule gets a :class:`~metaprune.graph.trace.Call`, moves its labels, and returns the dimensions of the output: a tuple
of :class:`~metaprune.graph.axes.Dim` for one tensor, a list of such tuples for several. It may also record

* ``call.counts(argument, dim)``: this integer argument is the size of that dimension;
* ``call.macs(*dims)``: the call's multiply-accumulates;
* ``call.statistics_over(dim)``: the result depends on the removed positions beyond their being zero;
* ``call.sum_over(dim)``: the positions are added up.

In-place variants (``add_``) share the rule of the plain name.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from metaprune.graph.axes import Dim
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.trace import Call, Rule

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for calls by name, without namespace and overload for ATen, ``namespace::name`` for others."""

    def add(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return add


def find_rule(func: torch._ops.OpOverload) -> Rule | None:
    """The rule of a call, or None."""
    name = func._schema.name.removeprefix("aten::")
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in func.tags:
        found = RULES["pointwise"]
    return found


def output(call: Call) -> Tensor:
    """The only output tensor."""
    (tensor,) = tensors_in(call.out)
    return tensor


def positive(dim: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return dim + ndim if dim < 0 else dim


def dims_list(dim: int | Iterable[int] | None, ndim: int) -> list[int]:
    """A `dim` argument as a list counted from the front; None or empty means all."""
    if dim is None:
        return list(range(ndim))
    if isinstance(dim, int):
        return [positive(dim, ndim)]
    return [positive(entry, ndim) for entry in dim] or list(range(ndim))


def fixed(sizes: Iterable[int], note: str = "") -> Dims:
    """Dimensions without labels."""
    return tuple(Dim(size, note=note) for size in sizes)


def with_zero(dim: Dim, zero: bool) -> Dim:
    """The same positions with another answer to "are masked entries zero?"."""
    return dim if dim.zero == zero or dim.labels_NK is None else Dim(dim.size, dim.labels_NK, zero)


def is_zero(dim: Dim) -> bool:
    """Masked entries along this dimension are zero, and there are some."""
    return dim.zero and dim.labels_NK is not None


def freeze_all(call: Call) -> None:
    """Whatever the call touches must stay."""
    for tensor in tensors_in(list(call.arguments.values())):
        call.freeze(*call.dims(tensor))


def not_zero(dims: Iterable[Dim]) -> Dims:
    """The same positions, whose masked entries need not be zero."""
    return tuple(with_zero(dim, False) for dim in dims)
