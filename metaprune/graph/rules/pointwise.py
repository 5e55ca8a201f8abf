"""Calls that act on each position alone: dimensions that broadcast together must agree."""

import numpy as np
from torch import Tensor

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.rules._base import fixed, freeze_all, is_zero, rule, with_zero

# f(0) = 0, so that a masked unit stays zero.
_KEEPS_ZERO = frozenset(
    """abs absolute alias asin asinh atan atanh ceil celu clone contiguous deg2rad detach dropout elu erf erfinv expm1
    feature_dropout fix floor frac gelu hardswish leaky_relu lift_fresh log1p mish nan_to_num neg negative
    positive rad2deg relu relu6 round rrelu selu sgn sign silu sin sinh softshrink softsign sqrt square tan tanh
    tanhshrink trunc _to_copy to type_as real imag conj resolve_conj resolve_neg _conj _neg_view copysign
    alpha_dropout""".split()
)
_ZERO_IF_ANY = {"mul", "multiply", "logical_and", "bitwise_and", "__and__"}
_DIVIDES = {"div", "divide", "true_divide", "floor_divide", "fmod", "remainder"}
_ZERO_IF_FIRST = _DIVIDES | {"prelu", "__lshift__", "ldexp", "polar"}
_ZERO_IF_ALL = frozenset(
    "add sub subtract rsub maximum minimum max min fmax fmin hypot logical_or where complex".split()
)
_INFINITE_AT_ZERO = {"reciprocal", "rsqrt", "log", "log2", "log10"}


@rule("pointwise", "clone", "contiguous", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh", "dropout")
@rule("feature_dropout", "alpha_dropout", "masked_fill", "where", "nan_to_num", "positive", "resolve_conj")
@rule("add", "sub", "mul", "div", "copy", "rsub", "maximum", "minimum", "broadcast_tensors", "hardswish")
@rule("complex", "polar", "_conj", "_neg_view")
def pointwise(call: Call) -> Dims | list[Dims]:
    """Broadcast and unify all tensor arguments."""
    tensors = tensors_in(list(call.arguments.values()))
    outputs = tensors_in(call.out)
    if call.op.name in ("clone", "contiguous", "detach", "alias"):
        return call.undecided_dims(tensors[0])
    if call.op.name == "where" and len(tensors) == 1:  # positions of what is not zero
        freeze_all(call)
        return [fixed(out.shape) for out in outputs]
    call.statistics_over(*(dim for tensor in _never_zero(call) for dim in call.dims(tensor) if is_zero(dim)))
    per_output = [_broadcast(call, tensors, out) for out in outputs]
    return per_output[0] if len(per_output) == 1 else per_output


def _never_zero(call: Call) -> list[Tensor]:
    """Operands that must not be zero. Where masked ones are, the call gives no number, and its masked result is taken
    over the others, as that of a norm. What is divided by a parameter itself is masked by ones there.
    """
    name = call.op.name.removesuffix("_")
    if name in _DIVIDES:
        return [item for item in tensors_in(call.get("other")) if not call.tracer.value(item).name]
    exponent = call.get("exponent")
    if name in _INFINITE_AT_ZERO or (name == "pow" and _is_number(exponent) and exponent < 0):
        return tensors_in(call["self"])
    return tensors_in(call["tensor2"]) if name == "addcdiv" else []


def _broadcast(call: Call, tensors: list[Tensor], out: Tensor) -> Dims:
    dims = []
    for back in range(out.ndim, 0, -1):
        here = [call.dims(tensor)[tensor.ndim - back] if tensor.ndim >= back else Dim(1) for tensor in tensors]
        joined = call.unify(*here)
        dims.append(with_zero(joined, _zero(call, here)))
    return tuple(dims)


def _zero(call: Call, dims: list[Dim]) -> bool:
    """Are masked entries of the result zero, given those of the tensor operands?"""
    name = call.op.name.removesuffix("_")
    zeros = [is_zero(dim) for dim in dims]
    if name in _KEEPS_ZERO or name == "copy":
        return zeros[-1 if name == "copy" else 0]
    if name in _ZERO_IF_ANY:
        return any(zeros)
    if name in _ZERO_IF_FIRST:
        return zeros[0] and isinstance(call.arguments[next(iter(call.arguments))], Tensor)
    if name in _ZERO_IF_ALL:
        operands = zeros[1:] if name == "where" else zeros
        numbers = [
            item for key, item in call.arguments.items() if key in ("other", "self", "input") and _is_number(item)
        ]
        return all(operands) and not any(numbers)
    if name == "pow":
        exponent = call.get("exponent")
        return zeros[0] and _is_number(exponent) and exponent > 0
    if name in ("clamp", "clip", "hardtanh"):
        low, high = call.get("min", call.get("min_val")), call.get("max", call.get("max_val"))
        bounds = (low is None or (_is_number(low) and low <= 0)) and (high is None or (_is_number(high) and high >= 0))
        return zeros[0] and bounds
    if name in ("masked_fill", "threshold"):
        return zeros[0] and call.get("value") == 0
    if name == "addcmul":
        return zeros[0] and (zeros[1] or zeros[2])
    if name == "addcdiv":
        return zeros[0] and zeros[1]
    if name == "lerp":
        return zeros[0] and zeros[1]
    return False


def _is_number(item: object) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Dims:
    """x (N, C, ...) with one slope a channel, or one for all."""
    dims, (weight,) = list(call.dims(call["self"])), call.dims(call["weight"])[:1]
    if weight.size > 1:
        dims[1] = with_zero(call.unify(dims[1], weight), dims[1].zero)
    return tuple(dims)


@rule("glu")
def glu(call: Call) -> Dims:
    """Halves a, b along `dim`: a * sigmoid(b)."""
    dims = list(call.dims(call["self"]))
    dim = call["dim"] % len(dims)
    half = dims[dim].size // 2
    first, second = (call.units.take(dims[dim], np.arange(half) + k * half, call.where) for k in range(2))
    dims[dim] = with_zero(call.unify(first, second), first.zero)
    return tuple(dims)
