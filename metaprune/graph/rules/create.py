"""Tensors made inside the forward. Uniform ones shrink with whatever they meet; others have the size they have."""

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims
from metaprune.graph.rules._base import fixed, output, rule


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided")
def uniform(call: Call) -> Dims:
    """Every entry is the same, so positions are units of their own until they meet others."""
    name = call.op.name.removeprefix("new_")
    zero = name == "zeros" or (name == "full" and call.get("fill_value") == 0)
    dims: Dims = tuple(call.units.dim(size, zero=zero) for size in output(call).shape)
    for k, dim in enumerate(dims):
        call.counts("size", dim, k)
    return dims


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def like(call: Call) -> Dims:
    zero = call.op.name == "zeros_like" or (call.op.name == "full_like" and call.get("fill_value") == 0)
    return tuple(Dim(dim.size, dim.labels_NK, zero, dim.note) for dim in call.dims(call["self"]))


@rule(
    "arange",
    "linspace",
    "logspace",
    "eye",
    "scalar_tensor",
    "tril_indices",
    "triu_indices",
    "rand",
    "randn",
    "randint",
    "randperm",
)
def constant(call: Call) -> Dims:
    """Entries differ by position, so positions stay."""
    return fixed(output(call).shape, f"a constant made in {call.where}")
