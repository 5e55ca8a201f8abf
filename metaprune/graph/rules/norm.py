"""Normalisations. A norm whose statistics run over a dimension depends on how many positions it has."""

from metaprune.graph.axes import Dim
from metaprune.graph.rules._base import output, rule, with_zero
from metaprune.graph.trace import Call, Dims


def _affine(call: Call, dim: Dim, *tensors: object) -> Dim:
    """A dimension met by one-dimensional weights, biases and running statistics."""
    for tensor in tensors:
        if tensor is not None:
            (other,) = call.dims(tensor)  # type: ignore[arg-type]
            dim = call.unify(dim, other)
    return dim


@rule(
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
)
def batch_norm(call: Call) -> Dims | list[Dims]:
    """x (N, C, ...); statistics are stored, so a channel knows nothing of the others."""
    x = list(call.dims(call["input"]))
    at = 1 if len(x) > 1 else 0
    x[at] = with_zero(
        _affine(call, x[at], call["weight"], call["bias"], call["running_mean"], call["running_var"]), True
    )
    return _with_statistics(call, tuple(x))


@rule("instance_norm")
def instance_norm(call: Call) -> Dims:
    """x (N, C, ...); statistics of each channel alone."""
    x = list(call.dims(call["input"]))
    x[1] = with_zero(_affine(call, x[1], call["weight"], call["bias"], call["running_mean"], call["running_var"]), True)
    return tuple(x)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Dims | list[Dims]:
    """Statistics over the last dimensions, which `normalized_shape` names."""
    x = list(call.dims(call["input"]))
    rank = len(call["normalized_shape"])
    for k in range(rank):
        at = len(x) - rank + k
        affine = [tensor for tensor in (call.get("weight"), call.get("bias")) if tensor is not None]
        for tensor in affine:
            x[at] = call.unify(x[at], call.dims(tensor)[k])
        rms = "rms" in call.op.name
        x[at] = with_zero(x[at], bool(affine) or rms)
        call.statistics_over(x[at])
        call.counts("normalized_shape", x[at], k)
    return _with_statistics(call, tuple(x))


@rule("group_norm", "native_group_norm")
def group_norm(call: Call) -> Dims | list[Dims]:
    """x (N, C, ...); statistics over the channels of each group: groups leave exactly, channels in them do not."""
    x = list(call.dims(call["input"]))
    groups = call["num_groups"] if "num_groups" in call.arguments else call["group"]
    x[1] = with_zero(_affine(call, x[1], call["weight"], call["bias"]), call["weight"] is not None)
    if x[1].labels_NK is not None:
        group, inside = call.split(x[1], [groups, x[1].size // groups])
        call.counts("num_groups" if "num_groups" in call.arguments else "group", group)
        call.statistics_over(inside)
        if group.size > 1 and inside.size > 1:
            call.units.hint(group, "group")
    return _with_statistics(call, tuple(x))


def _with_statistics(call: Call, dims: Dims) -> Dims | list[Dims]:
    """The native forms also return the statistics, which nothing uses in evaluation mode."""
    if isinstance(call.out, (list, tuple)):
        return [dims, *(tuple(Dim(size) for size in tensor.shape) for tensor in call.out[1:])]
    output(call)
    return dims
