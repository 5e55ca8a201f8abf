"""Reductions, softmax, sorting and scans."""

import torch

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.rules._base import dims_list, not_zero, rule, with_zero
from metaprune.graph.rules.pointwise import pointwise


def _reduced(call: Call, dims: Dims, chosen: list[int]) -> Dims | list[Dims]:
    keep = bool(call.get("keepdim", False))
    out = tuple(Dim(1) if k in chosen else dim for k, dim in enumerate(dims) if keep or k not in chosen)
    count = len(tensors_in(call.out))
    return out if count == 1 else [out] * count


@rule("sum", "nansum")
def sum_(call: Call) -> Dims | list[Dims]:
    dims = call.dims(call["self"])
    chosen = dims_list(call.get("dim"), len(dims))
    call.sum_over(*(dims[k] for k in chosen))
    return _reduced(call, dims, chosen)


@rule(
    "mean",
    "nanmean",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "amax",
    "amin",
    "max",
    "min",
    "logsumexp",
    "prod",
    "aminmax",
)
def statistic(call: Call) -> Dims | list[Dims]:
    if isinstance(call.get("other"), torch.Tensor):  # max(a, b)
        return pointwise(call)
    dims = call.dims(call["self"])
    chosen = dims_list(call.get("dim"), len(dims))
    call.statistics_over(*(dims[k] for k in chosen))
    reduced = _reduced(call, dims, chosen)
    if call.op.name in ("mean", "nanmean", "amax", "amin", "max", "min", "var", "std"):
        return reduced
    return [not_zero(dims) for dims in reduced] if isinstance(reduced, list) else not_zero(reduced)


@rule("linalg_vector_norm", "norm", "frobenius_norm")
def norm(call: Call) -> Dims | list[Dims]:
    """Zeros add nothing to a norm of positive order."""
    dims = call.dims(call["self"])
    chosen = dims_list(call.get("dim"), len(dims))
    order = call.get("ord", call.get("p", 2))
    for dim in (dims[k] for k in chosen):
        if order is None or (isinstance(order, (int, float)) and order > 0):
            call.sum_over(dim)
        else:
            call.statistics_over(dim)
    return _reduced(call, dims, chosen)


@rule("argmax", "argmin", "any", "all", "count_nonzero", "median", "mode", "kthvalue")
def positions(call: Call) -> Dims | list[Dims]:
    """What comes out names or counts positions: they must stay."""
    dims = call.dims(call["self"])
    chosen = dims_list(call.get("dim"), len(dims))
    call.freeze(*(dims[k] for k in chosen))
    reduced = _reduced(call, dims, chosen)
    return [not_zero(dims) for dims in reduced] if isinstance(reduced, list) else not_zero(reduced)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "softmin")
def softmax(call: Call) -> Dims:
    """Positions share a sum of 1, so each depends on which others there are."""
    dims = list(not_zero(call.dims(call["self"] if "self" in call.arguments else call["input"])))
    at = call["dim"] % max(len(dims), 1)
    if dims:
        dims[at] = with_zero(dims[at], "log" not in call.op.name)
        call.statistics_over(dims[at])
    return tuple(dims)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def scan(call: Call) -> Dims | list[Dims]:
    dims = call.dims(call["self"])
    call.freeze(dims[call["dim"] % len(dims)])
    out = dims if call.op.name == "cumsum" else not_zero(dims)
    count = len(tensors_in(call.out))
    return out if count == 1 else [out] * count


@rule("topk", "sort", "argsort", "msort")
def sort(call: Call) -> Dims | list[Dims]:
    dims = list(call.dims(call["self"]))
    at = (call.get("dim", 0) or 0) % len(dims)
    call.freeze(dims[at], reason=f"sorted by value in {call.where}")
    outputs = tensors_in(call.out)
    dims[at] = Dim(outputs[0].shape[at])
    out = not_zero(dims)
    return out if len(outputs) == 1 else [out] * len(outputs)
