"""Calls that act on the last dimensions and leave the leading ones alone: pooling, resizing, sampling."""

from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.rules._base import fixed, rule, with_zero

_POOLS = [
    f"{kind}_pool{rank}d{suffix}"
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp", "fractional_max")
    for rank in (1, 2, 3)
    for suffix in ("", "_with_indices")
]
_RESIZES = [
    f"{prefix}upsample_{mode}"
    for prefix in ("", "_")
    for mode in (
        "nearest1d",
        "nearest2d",
        "nearest3d",
        "nearest_exact1d",
        "nearest_exact2d",
        "nearest_exact3d",
        "linear1d",
        "bilinear2d",
        "bicubic2d",
        "trilinear3d",
        "bilinear2d_aa",
        "bicubic2d_aa",
    )
]
_PADS = [f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)]


def _rank(name: str) -> int:
    return next(int(letter) for letter in name if letter in "123")


@rule(*_POOLS, *_PADS, *_RESIZES, "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mkldnn_max_pool2d")
def spatial(call: Call) -> Dims | list[Dims]:
    """x (..., spatial): channels pass, positions must stay."""
    x = call.dims(call["self"] if "self" in call.arguments else call["input"])
    rank = _rank(call.op.name)
    call.freeze(*x[-rank:], reason=f"spatial positions in {call.where}")
    outputs = tensors_in(call.out)
    out = [(*x[:-rank], *fixed(tensor.shape[-rank:])) for tensor in outputs]
    return out[0] if len(out) == 1 else out


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(call: Call) -> Dims:
    """x (..., spatial) put back at the places (..., spatial) that pooling took it from: channels pass."""
    x, places, rank = call.dims(call["self"]), call.dims(call["indices"]), _rank(call.op.name)
    call.freeze(*x[-rank:], *places[-rank:], reason=f"spatial positions in {call.where}")
    leading = [with_zero(call.unify(a, b), a.zero) for a, b in zip(x[:-rank], places[:-rank])]
    (out,) = tensors_in(call.out)
    return (*leading, *fixed(out.shape[-rank:]))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sampler(call: Call) -> Dims:
    """x (N, C, ...) sampled at grid (N, ..., 2): channels pass."""
    x, grid = call.dims(call["input"]), call.dims(call["grid"])
    call.freeze(*x[2:], *grid[1:])
    (out,) = tensors_in(call.out)
    return (call.unify(x[0], grid[0]), x[1], *fixed(out.shape[2:]))
