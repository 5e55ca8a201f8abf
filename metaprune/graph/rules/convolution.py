"""Convolutions of any rank: plain, grouped, depthwise, transposed."""

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims
from metaprune.graph.rules._base import is_zero, not_zero, output, rule, with_zero

KERNEL = "kernel positions"
_SLIDING = ("stride", "padding")


@rule(
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "_convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
def convolution(call: Call) -> Dims:
    """x (N, I, ...), weight (O, I/g, k...) or, transposed, (I, O/g, k...) -> (N, O, ...)."""
    tensor = call["input"] if "input" in call.arguments else call["self"]
    x = call.dims(tensor)
    weight = call.dims(call["weight"])
    out = output(call)
    groups = call["groups"]
    transposed = "transpose" in call.op.name or bool(call.get("transposed"))
    spatial = len(weight) - 2
    batch, channels, positions = x[: -spatial - 1], x[-spatial - 1], x[-spatial:]
    call.freeze(*weight[2:], reason=KERNEL)
    places = [_places(call, k, dim, size) for k, (dim, size) in enumerate(zip(positions, out.shape[-spatial:]))]

    first, second = weight[0], weight[1]
    if transposed:
        channels = call.unify(channels, first)
        group, inside = _grid(call, channels, groups)
        made = call.units.merge([group, second])
    else:
        group, inside = _grid(call, channels, groups)
        group_out, _ = _grid(call, first, groups)
        call.unify(inside, second)
        call.unify(group, group_out)
        made = first
    call.consumes(call["weight"], 0 if transposed else 1)
    call.sum_over(with_zero(inside, (first if transposed else second).zero or inside.zero))
    if groups > 1:
        call.counts("groups", group)
        if inside.size > 1 or made.size > groups:
            call.units.hint(group, "group")
    zero = first.zero and (second.zero or not transposed)
    if call["bias"] is not None:
        (bias,) = call.dims(call["bias"])
        made = call.unify(made, bias)
        zero = zero and is_zero(bias)
        batch, places = not_zero(batch), list(not_zero(places))
    # The kernel slides over the output, or over the input where it is transposed.
    if transposed:
        call.macs(*batch, channels, *weight[1:], *positions)
    else:
        call.macs(*batch, *weight, *places)
    return (*batch, with_zero(made, zero), *places)


def _places(call: Call, k: int, dim: Dim, size: int) -> Dim:
    """Positions of the output along spatial dimension `k`: those of the input, if the kernel joins none of them."""
    step, padding = (
        entry if isinstance(entry, (int, str)) else entry[k % len(entry)] for entry in map(call.get, _SLIDING)
    )
    if call["weight"].shape[2 + k] == step == 1 and padding in (0, "valid", "same") and size == dim.size:
        return dim
    call.freeze(dim, reason=f"spatial positions in {call.where}")
    return Dim(size)


def _grid(call: Call, channels: Dim, groups: int) -> tuple[Dim, Dim]:
    """Channels as (groups, channels in a group)."""
    if groups == 1:
        return Dim(1), channels
    group, inside = call.split(channels, [groups, channels.size // groups])
    return group, inside
