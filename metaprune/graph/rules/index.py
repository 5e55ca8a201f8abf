"""Look-ups and writes by index."""

from torch import Tensor

from metaprune.graph.axes import Dim
from metaprune.graph.rules._base import fixed, output, positive, rule, with_zero
from metaprune.graph.trace import Call, Dims


@rule("embedding")
def embedding(call: Call) -> Dims:
    """weight (V, D) looked up by integers: rows are named by value, so they stay."""
    rows, features = call.dims(call["weight"])
    call.freeze(rows, reason=f"rows are looked up by value in {call.where}")
    return (*call.dims(call["indices"]), features)


@rule("index")
def index(call: Call) -> Dims:
    """Advanced indexing: indexed dimensions stay, the others pass."""
    dims, indices = call.dims(call["self"]), list(call["indices"])
    indices += [None] * (len(dims) - len(indices))
    used = [k for k, item in enumerate(indices) if item is not None]
    for k in used:
        call.freeze(dims[k], reason=f"positions are looked up by value in {call.where}")
        call.freeze(*call.dims(indices[k]))
    out = output(call)
    passed = [dim for k, dim in enumerate(dims) if k not in used]
    made = fixed(out.shape[: out.ndim - len(passed)])
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    shape = fixed(out.shape[at : at + len(made)])
    return (*passed[:at], *shape, *passed[at:])


@rule("index_select")
def index_select(call: Call) -> Dims:
    dims = list(call.dims(call["self"]))
    at = positive(call["dim"], len(dims))
    call.freeze(dims[at], reason=f"positions are looked up by value in {call.where}")
    dims[at] = Dim(output(call).shape[at])
    return tuple(dims)


@rule("gather", "take_along_dim")
def gather(call: Call) -> Dims:
    """Out has the shape of `index`; other dimensions of `self` are read up to that size, so all stay."""
    call.freeze(*call.dims(call["self"]))
    tensors: list[Tensor] = [item for item in call.arguments.values() if isinstance(item, Tensor)]
    call.freeze(*call.dims(tensors[-1]))
    return fixed(output(call).shape)


@rule("one_hot")
def one_hot(call: Call) -> Dims:
    dims = call.dims(call["self"])
    return (*dims, Dim(output(call).shape[-1]))


@rule("fill", "zero", "masked_fill_scalar")
def fill(call: Call) -> Dims:
    zero = call.op.name.startswith("zero") or call.get("value") == 0
    return tuple(with_zero(dim, dim.zero and zero) for dim in call.dims(call["self"]))
