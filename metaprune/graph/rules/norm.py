"""Normalisations. A norm whose statistics run over a dimension depends on how many positions it has."""

from torch import Tensor

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims
from metaprune.graph.rules._base import fixed, is_zero, rule, with_zero


def _scaled(call: Call, dim: Dim, *tensors: Tensor | None) -> Dim:
    """A dimension met by one-dimensional weights, biases and running statistics."""
    given = [call.dims(tensor)[0] for tensor in tensors if tensor is not None]
    return call.unify(dim, *given)


def _zeroed(call: Call) -> bool:
    """Weight and bias of a masked position are zero, whatever the norm gives for it."""
    weight, bias = call.get("weight"), call.get("bias")
    return weight is not None and all(is_zero(call.dims(tensor)[-1]) for tensor in (weight, bias) if tensor is not None)


def _shifts(call: Call) -> bool:
    """The norm adds something, so that zeros do not stay zero."""
    return call.get("bias") is not None or call.get("running_mean") is not None


def _others(dims: list[Dim], normed: set[int], keeps_zero: bool) -> list[Dim]:
    return [dim if k in normed else with_zero(dim, dim.zero and keeps_zero) for k, dim in enumerate(dims)]


@rule("batch_norm", "native_batch_norm", "cudnn_batch_norm")
@rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_native_batch_norm_legit_functional")
@rule("_native_batch_norm_legit", "_batch_norm_with_update")
def batch_norm(call: Call) -> Dims | list[Dims]:
    """x (N, C, ...). With stored statistics a channel knows nothing of the others; else they run over all but C."""
    x = list(call.dims(call["input"]))
    at = 1 if len(x) > 1 else 0
    zero = is_zero(x[at])
    parameters = [call.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    x[at] = _scaled(call, x[at], *parameters)
    stored = not call.get("training") and call.get("running_mean") is not None
    if not stored and "no_training" not in call.op.name:
        call.statistics_over(*(dim for k, dim in enumerate(x) if k != at))
    # Without weight and bias of zero it stays zero only if nothing is subtracted.
    x[at] = with_zero(x[at], _zeroed(call) or (zero and not _shifts(call)))
    call.module_attribute("num_features", x[at])
    return _with_statistics(call, _others(x, {at}, not _shifts(call)))


@rule("instance_norm")
def instance_norm(call: Call) -> Dims:
    """x (N, C, ...): statistics of each channel alone, over its positions."""
    x = list(call.dims(call["input"]))
    zero = is_zero(x[1])
    x[1] = _scaled(call, x[1], *(call[name] for name in ("weight", "bias", "running_mean", "running_var")))
    if call["use_input_stats"]:
        call.statistics_over(*x[2:])
    # The mean of a masked channel is zero, unless it was stored.
    x[1] = with_zero(x[1], _zeroed(call) or (zero and not _shifts(call)))
    call.module_attribute("num_features", x[1])
    return tuple(_others(x, {1}, not _shifts(call)))


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Dims | list[Dims]:
    """Statistics over the last dimensions, which `normalized_shape` names."""
    x = list(call.dims(call["input"]))
    rank = len(call["normalized_shape"])
    affine = [tensor for tensor in (call.get("weight"), call.get("bias")) if tensor is not None]
    normed, zeroed = set(range(len(x) - rank, len(x))), _zeroed(call)
    for k, at in enumerate(sorted(normed)):
        zero = is_zero(x[at]) and "rms" in call.op.name
        x[at] = call.unify(x[at], *(call.dims(tensor)[k] for tensor in affine))
        x[at] = with_zero(x[at], zeroed or zero)
        call.statistics_over(x[at])
        call.counts("normalized_shape", x[at], k)
    return _with_statistics(call, _others(x, normed, not _shifts(call)))


@rule("group_norm", "native_group_norm")
def group_norm(call: Call) -> Dims | list[Dims]:
    """x (N, C, ...): statistics over the channels and positions of each group.

    Groups leave exactly; channels inside them change the statistics.
    """
    x = list(call.dims(call["input"]))
    name = "num_groups" if "num_groups" in call.arguments else "group"
    x[1] = with_zero(_scaled(call, x[1], call["weight"], call["bias"]), _zeroed(call))
    call.statistics_over(*x[2:])
    if x[1].labels_NK is not None:
        group, inside = call.split(x[1], [call[name], x[1].size // call[name]])
        call.counts(name, group)
        call.statistics_over(inside)
        if group.size > 1 and inside.size > 1:
            call.units.hint(group, "group")
        call.module_attribute("num_channels", x[1])
    return _with_statistics(call, _others(x, {1}, not _shifts(call)))


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> Dims | list[Dims]:
    """v and g (1, ..., n, ..., 1): v scaled to the norm g along `dim`. Zeros add nothing to a norm."""
    v, g = list(call.dims(call["v"])), call.dims(call["g"])
    at = call["dim"]
    v[at] = with_zero(call.unify(v[at], g[at]), is_zero(v[at]))
    call.sum_over(*(dim for k, dim in enumerate(v) if k != at))
    return _with_statistics(call, v)


def _with_statistics(call: Call, dims: list[Dim]) -> Dims | list[Dims]:
    """The native forms also return the statistics, which nothing uses in evaluation mode."""
    if isinstance(call.out, Tensor):
        return tuple(dims)
    return [tuple(dims), *(fixed(tensor.shape) for tensor in call.out[1:])]
