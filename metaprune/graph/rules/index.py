"""Look-ups and writes by index."""

import numpy as np
import torch
from torch import Tensor

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.rules._base import fixed, freeze_all, is_zero, not_zero, output, positive, rule, with_zero


@rule("embedding")
def embedding(call: Call) -> Dims:
    """weight (V, D) looked up by integers: rows are named by value, so they stay."""
    rows, features = call.dims(call["weight"])
    call.freeze(rows, reason=f"rows are looked up by value in {call.where}")
    return (*not_zero(call.dims(call["indices"])), features)


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[Dims]:
    """Rows (V, D) looked up and pooled: (bags, D)."""
    rows, features = call.dims(call["weight"])
    call.freeze(rows, reason=f"rows are looked up by value in {call.where}")
    first, *rest = tensors_in(call.out)
    return [(Dim(first.shape[0]), features), *(fixed(tensor.shape) for tensor in rest)]


@rule("index")
def index(call: Call) -> Dims:
    """Advanced indexing. Dimensions that are not indexed pass; a constant vector alone picks positions of its own."""
    dims, indices = call.dims(call["self"]), list(call["indices"])
    indices += [None] * (len(dims) - len(indices))
    used = [k for k, item in enumerate(indices) if item is not None]
    if len(used) == 1 and indices[used[0]].dtype != torch.bool:
        at, item = used[0], indices[used[0]]
        made = _picked(call, dims[at], item)
        return (*dims[:at], *made, *dims[at + 1 :])
    for k in used:
        call.freeze(dims[k], reason=f"positions are looked up by value in {call.where}")
        call.freeze(*call.dims(indices[k]))
    out = output(call)
    passed = [dim for k, dim in enumerate(dims) if k not in used]
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    shape = fixed(out.shape[at : at + out.ndim - len(passed)])
    return (*passed[:at], *shape, *passed[at:])


@rule("index_select")
def index_select(call: Call) -> Dims:
    dims = list(call.dims(call["self"]))
    at = positive(call["dim"], len(dims))
    return (*dims[:at], *_picked(call, dims[at], call["index"]), *dims[at + 1 :])


def _picked(call: Call, dim: Dim, index: Tensor) -> Dims:
    """Positions of a dimension picked by a tensor of numbers: carried where the numbers are constants."""
    known = call.known(index)
    if known is None or dim.labels_NK is None or index.ndim != 1:
        call.freeze(dim, reason=f"positions are looked up by value in {call.where}")
        return not_zero(call.dims(index))
    own = call.dims(index)[0]
    if own.labels_NK is None and own.size != 1:
        call.freeze(dim, reason=f"positions are picked by a constant of the code in {call.where}")
        return (Dim(own.size),)
    made = call.units.take(dim, known.numpy().astype(np.int64), call.where)
    made = with_zero(call.unify(made, own), made.zero)  # a buffer shrinks with what it picks
    call.looks_up(index, dim)
    return (made,)


@rule("gather", "take_along_dim")
def gather(call: Call) -> Dims:
    """Out has the shape of `index`; where that is the shape of `self` too, other dimensions pass."""
    dims, index = call.dims(call["self"]), call["index" if "index" in call.arguments else "indices"]
    picked = call.get("dim")
    if picked is None or index.ndim != len(dims):
        freeze_all(call)
        return fixed(output(call).shape)
    out = []
    for k, (dim, other) in enumerate(zip(dims, call.dims(index), strict=True)):
        if k == positive(picked, len(dims)) or dim.size != other.size:
            call.freeze(dim, other, reason=f"positions are looked up by value in {call.where}")
            out.append(Dim(other.size))
        else:
            out.append(with_zero(call.unify(dim, other), dim.zero))
    return tuple(out)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> Dims:
    """Writes at looked-up positions: indexed dimensions stay, those behind them meet the values."""
    dims, values = list(call.dims(call["self"])), call.dims(call["values"])
    indices = [*call["indices"], *[None] * (len(dims) - len(call["indices"]))]
    used = [k for k, item in enumerate(indices) if item is not None]
    first = indices[0]
    if used == [0] and first.dtype == torch.bool and call["values"].numel() == 1:  # one number, wherever a mask says
        met = [call.unify(dim, other) for dim, other in zip(dims, call.dims(first))]
        return not_zero([*met, *dims[first.ndim :]])
    for k in used:
        call.freeze(dims[k], reason=f"positions are looked up by value in {call.where}")
        call.freeze(*call.dims(indices[k]))
    behind = range(max(used, default=-1) + 1, len(dims))
    for k in range(len(dims)):
        if k not in used and k not in behind:  # before an indexed one: its place among the values is not followed
            call.freeze(dims[k])
    for back, k in enumerate(reversed(behind), start=1):
        value = values[-back] if back <= len(values) else Dim(1)
        dims[k] = with_zero(call.unify(dims[k], value), is_zero(dims[k]) and is_zero(value))
    return tuple(dims)


@rule("index_add", "index_copy", "index_fill", "index_reduce")
def index_add(call: Call) -> Dims:
    """Writes along one dimension, which stays; the others meet those of the source."""
    dims = list(call.dims(call["self"]))
    at = positive(call["dim"], len(dims))
    call.freeze(dims[at], reason=f"positions are looked up by value in {call.where}")
    source = call.get("source")
    if source is None:
        return not_zero(dims)
    others = call.dims(source)
    call.freeze(others[at])
    for k, other in enumerate(others):
        if k != at:
            dims[k] = with_zero(call.unify(dims[k], other), is_zero(dims[k]) and is_zero(other))
    return tuple(dims)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> Dims:
    """Writes along one dimension, which stays, at places that `index` has for every position of the others."""
    dims, at = list(call.dims(call["self"])), call["dim"]
    others = [call.dims(tensor) for tensor in tensors_in([call["index"], call.get("src")])]
    if not dims or any(len(other) != len(dims) for other in others):
        freeze_all(call)
        return fixed(output(call).shape)
    at, written = positive(at, len(dims)), len(others) == 2 or call.get("value") == 0
    for k, here in enumerate(zip(dims, *others)):
        if k == at or len({dim.size for dim in here}) > 1:
            call.freeze(*here, reason=f"positions are looked up by value in {call.where}")
            dims[k] = Dim(dims[k].size)
        else:
            zero = written and is_zero(here[0]) and (len(here) < 3 or is_zero(here[2]))
            dims[k] = with_zero(call.unify(*here), zero)
    return tuple(dims)


@rule("one_hot")
def one_hot(call: Call) -> Dims:
    dims = not_zero(call.dims(call["self"]))
    return (*dims, Dim(output(call).shape[-1]))


@rule("fill", "zero", "masked_fill_scalar")
def fill(call: Call) -> Dims:
    zero = call.op.name.startswith("zero") or call.get("value") == 0
    return tuple(with_zero(dim, dim.zero and zero) for dim in call.dims(call["self"]))
