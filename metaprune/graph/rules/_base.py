"""Where rules are kept: one function per family of ATen calls.

A rule gets a :class:`~metaprune.graph.trace.Call`, moves its labels, and returns the dimensions of the output: a tuple
of :class:`~metaprune.graph.axes.Dim` for one tensor, a list of such tuples for several. It may also record

* ``call.counts(argument, dim)``: this integer argument is the size of that dimension;
* ``call.macs(*dims)``: the call's multiply-accumulates;
* ``call.statistics_over(dim)``: the result depends on the removed positions beyond their being zero;
* ``call.sum_over(dim)``: the positions are added up.

In-place variants (``add_``) share the rule of the plain name.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from metaprune.errors import ConfigError, MetapruneError, RuleError
from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call, Rule, fitting
from metaprune.graph.record import Dims, tensors_in

RULES: dict[str, Rule] = {}
OWN_RULES: dict[str, Rule] = {}  # those of users


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for calls by name, without namespace and overload for ATen, ``namespace::name`` for others."""

    def add(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return add


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Teach metaprune an op of your own: a decorator for the function that says what the op does to dimensions.

    Without a rule, the dimensions that an op touches must stay. With one they can be cut, as far as the rule says.

    A rule gets a :class:`~metaprune.graph.trace.Call` and returns the dimensions of the result: a tuple with one
    :class:`~metaprune.graph.axes.Dim` a dimension, or for several results a list of such tuples. To return a dimension
    of an operand means: the positions of the result are those of the operand, in the same order, and leave with them.

    ===========================================  =======================================================================
    ``call["x"]``, ``call.dims(call["x"])``      an argument by its name in the schema; the dimensions of a tensor
    ``call.unify(a, b)``                         position k of both stands for the same unit: they leave together
    ``call.freeze(dim)``                         these positions must stay
    ``call.sum_over(dim)``                       the op adds these positions up
    ``call.consumes(tensor, k)``                 ... after multiplying them: dimension k of a weight that reads units
    ``call.statistics_over(dim)``                the result depends on the positions beyond their sum (norm, softmax)
    ``call.not_zero(*dims)``                     the result is not zero where the operand is (``exp``, ``x + 1``)
    ``call.split(dim, sizes)``                   read a dimension as a grid, outer to inner: ``heads, head_dim``
    ``call.units.merge([a, b])``                 the reverse: flatten a grid into one dimension
    ``call.units.concat([a, b])``                dimensions laid end to end
    ``call.counts("groups", dim)``               the integer argument ``groups`` is the size of this dimension
    ``call.macs(a, b, c)``                       the op multiplies and adds a * b * c times
    ``Dim(size)``                                positions that are there for good
    ===========================================  =======================================================================

    A dimension that a rule neither returns nor mentions may be cut without a trace in the result: freeze what the op
    mixes in any other way. The op itself must take any size of the dimensions that its rule leaves free. A rule that
    raises, or whose dimensions do not have the sizes of the result, ends the trace with an error: what was meant to be
    followed should not be frozen unnoticed. A rule that fits but lies is found out when a network is cut: networks
    that were traced with rules of users are compared with their masked selves by numbers, each time.

    Args:
        *names: Ops, as ``namespace::name``, of any overload.

    Raises:
        ConfigError: A name does not read ``namespace::name``, or has a rule already.

    >>> import torch, metaprune as mp
    >>> from torch import nn
    >>> @torch.library.custom_op("doc::scaled_relu", mutates_args=())
    ... def scaled_relu(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    ...     return torch.relu(x) * scale[:, None, None]
    >>> @scaled_relu.register_fake
    ... def _(x, scale):
    ...     return torch.empty_like(x)
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv1, self.scale = nn.Conv2d(3, 8, 3), nn.Parameter(torch.ones(8))
    ...         self.conv2 = nn.Conv2d(8, 4, 3)
    ...     def forward(self, x):
    ...         return self.conv2(scaled_relu(self.conv1(x), self.scale))
    >>> net = mp.trace(Net(), torch.randn(2, 3, 8, 8))
    >>> net.axis("conv1").reason
    'op doc::scaled_relu at the top level has no rule'

    >>> @mp.register_rule("doc::scaled_relu")
    ... def scaled_relu_rule(call):
    ...     batch, channels, height, width = call.dims(call["x"])
    ...     (scaled,) = call.dims(call["scale"])
    ...     return batch, call.unify(channels, scaled), height, width
    >>> net = mp.trace(Net(), torch.randn(2, 3, 8, 8))
    >>> net.axis("conv1").bindings
    (('scale', 0), ('conv1.weight', 0), ('conv1.bias', 0), ('conv2.weight', 1))
    >>> plan = mp.plan(net, budget="macs=0.5")
    >>> net.verify(plan).max_error < 1e-5
    True
    """
    for name in names:
        if not all(part.isidentifier() for part in name.split("::")) or name.count("::") != 1:
            raise ConfigError(f"a rule must be for ops named namespace::name, e.g. mylib::myop, but got {name!r}.")

    def add(function: Rule) -> Rule:
        checked = _checked(function)
        for name in names:
            known = OWN_RULES.get(name) or RULES.get(name.removeprefix("aten::"))
            if known is not None and _home(known) != _home(function):
                raise ConfigError(f"op {name} has a rule already, {_home(known)}. One op has one rule.")
            OWN_RULES[name] = checked
        return function

    return add


def _checked(function: Rule) -> Rule:
    """The rule of a user, with an error that names it for whatever it does wrong."""

    @functools.wraps(function)
    def checked(call: Call) -> list[Dims]:
        call.tracer.own_rules[call.where] = None
        try:
            return fitting(function(call), tensors_in(call.out))
        except MetapruneError:
            raise
        except Exception as error:
            raise RuleError(
                f"rule {_home(function)} must follow op {call.where}, but {type(error).__name__}: {error}. "
                "Correct the rule, or leave it out: then what the op touches stays."
            ) from error

    return checked


def _home(function: Rule) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def find_rule(func: torch._ops.OpOverload) -> Rule | None:
    """The rule of a call, or None."""
    own = OWN_RULES.get(func._schema.name)
    if own is not None:
        return own
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
