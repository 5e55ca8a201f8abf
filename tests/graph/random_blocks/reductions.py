"""Sums, means and the like over a dimension."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_blocks.base import Apply, Shape, block, some_dim


def _normalised(x: Tensor, dim: int) -> Tensor:
    return F.normalize(x, dim=dim)


REDUCE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda x, dim: x.mean(dim),
    "sum": lambda x, dim: x.sum(dim),
    "sum_keep": lambda x, dim: x - x.sum(dim, keepdim=True),
    "mean_keep": lambda x, dim: x - x.mean(dim, keepdim=True),
    "amax": lambda x, dim: x.amax(dim),
    "max_keep": lambda x, dim: x * x.max(dim, keepdim=True)[0],
    "softmax": lambda x, dim: x.softmax(dim),
    "log_softmax": lambda x, dim: x.log_softmax(dim),
    "cumsum": lambda x, dim: x.cumsum(dim),
    "norm": lambda x, dim: x.norm(dim=dim),
    "normalize": _normalised,
    "var": lambda x, dim: x.var(dim, correction=0),
    "logsumexp": lambda x, dim: x.logsumexp(dim),
    "sort": lambda x, dim: x.sort(dim)[0],
    "topk": lambda x, dim: x.topk(1, dim)[0],
    "prod": lambda x, dim: x.prod(dim),
    "rms": lambda x, dim: x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-5),
    "standard": lambda x, dim: (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True, correction=0) + 1e-3),
    "mean_by_count": lambda x, dim: x.sum(dim) / x.shape[dim],
    "argmax": lambda x, dim: x * x.argmax(dim, keepdim=True),
    "median": lambda x, dim: x.median(dim)[0],
    "squeeze": lambda x, dim: x.sum(dim, keepdim=True).squeeze(dim),
}


@block("reduce", (2, 3, 4), lambda c, s: {"name": c.one(list(REDUCE)), "dim": some_dim(c, s)}, weight=5)
def reduce(shapes: list[Shape], name: str, dim: int) -> nn.Module:
    return Apply(lambda self, x: REDUCE[name](x, dim))


SPATIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, 1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(4, 5), mode="bilinear"),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "circular": lambda x: F.pad(x, (1, 0, 0, 1), mode="circular"),
    "unfold": lambda x: F.unfold(x, 2),
    "lrn": lambda x: F.local_response_norm(x, 3),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "lp": lambda x: F.lp_pool2d(x.abs() + 0.1, 2.0, 2),
    "shift": lambda x: torch.roll(x, (1, 1), (2, 3)),
    "windows": lambda x: x.unfold(2, 2, 1).mean(-1),
}
LINE: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
    "adaptive": lambda x: F.adaptive_avg_pool1d(x, 3),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "linear": lambda x: F.interpolate(x, size=4, mode="linear"),
    "reflect": lambda x: F.pad(x, (1, 1), mode="replicate"),
}


@block("spatial", (3,), lambda c, s: {"name": c.one(list(SPATIAL))}, weight=4)
def spatial(shapes: list[Shape], name: str) -> nn.Module:
    return Apply(lambda self, x: SPATIAL[name](x))


@block("line", (2,), lambda c, s: {"name": c.one(list(LINE))}, weight=2)
def line(shapes: list[Shape], name: str) -> nn.Module:
    return Apply(lambda self, x: LINE[name](x))
