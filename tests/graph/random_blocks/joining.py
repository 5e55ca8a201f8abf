"""Joining values and taking them apart."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.graph.random_blocks.base import Apply, Choose, Shape, block, some_dim


def concat_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    differ = [k + 1 for k, (a, b) in enumerate(zip(*shapes)) if a != b]
    return {
        "dim": differ[0] if differ else choose.integer(1, len(shapes[0])),
        "twice": choose.one((False, False, True)),
    }


@block(
    "concat",
    (1, 2, 3, 4),
    concat_options,
    lambda a, b: len(a) == len(b) and sum(x != y for x, y in zip(a, b)) <= 1,
    weight=8,
)
def concat(shapes: list[Shape], dim: int, twice: bool) -> nn.Module:
    return Apply(lambda self, a, b: torch.cat([a, b, a] if twice else [a, b], dim))


def cut_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any] | None:
    dim = some_dim(choose, shapes)
    size = shapes[0][dim - 1]
    if size < 2:
        return None
    return {
        "dim": dim,
        "way": choose.one(_CUTS),
        "at": choose.integer(1, size - 1),
        "held": choose.one(("attribute", "baked")),
    }


def _cut_half(self: Any, x: Tensor, dim: int, at: int) -> tuple[Tensor, ...]:
    half = x.shape[dim] // 2
    return x.narrow(dim, 0, half), x.narrow(dim, x.shape[dim] - half, half)


_CUTS: dict[str, Callable[..., Any]] = {
    "chunk": lambda self, x, dim, at: x.chunk(2, dim),
    "split": lambda self, x, dim, at: x.split([at, x.shape[dim] - at], dim),
    "split_equal": lambda self, x, dim, at: x.split(at, dim)[:2],
    "narrow": lambda self, x, dim, at: x.narrow(dim, 0, at),
    "slice": lambda self, x, dim, at: x.transpose(0, dim)[at:].transpose(0, dim),
    "last": lambda self, x, dim, at: x.transpose(0, dim)[-at:].transpose(0, dim),
    "tensor_split": lambda self, x, dim, at: torch.tensor_split(x, 2, dim),
    "half": _cut_half,
    "strided": lambda self, x, dim, at: (
        x.transpose(0, dim)[::2].transpose(0, dim),
        x.transpose(0, dim)[1::2].transpose(0, dim),
    ),
    "halves_added": lambda self, x, dim, at: sum(_cut_half(self, x, dim, at)),
    "swap": lambda self, x, dim, at: torch.cat(list(x.split([at, x.shape[dim] - at], dim))[::-1], dim),
    "rotate": lambda self, x, dim, at: torch.cat(
        [-_cut_half(self, x, dim, at)[1], _cut_half(self, x, dim, at)[0]], dim
    ),
    "select": lambda self, x, dim, at: x.select(dim, at),
    "unbind": lambda self, x, dim, at: x.unbind(dim)[:2],
    "index": lambda self, x, dim, at: x.transpose(0, dim)[at].clone(),
}
_CUTS_BY_NAME = tuple(_CUTS)


@block("cut", (1, 2, 3, 4), cut_options, weight=9)
def cut(shapes: list[Shape], dim: int, way: str, at: int, held: str) -> nn.Module:
    if held == "attribute":
        return Apply(lambda self, x: _CUTS[way](self, x, dim, self.at), at=at)
    return Apply(lambda self, x: _CUTS[way](self, x, dim, at))


def partial_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any] | None:
    dim = some_dim(choose, shapes)
    if shapes[0][dim - 1] < 2:
        return None
    return {
        "dim": dim,
        "at": choose.integer(1, shapes[0][dim - 1] - 1),
        "way": choose.one(("zero", "scale", "linear", "assign", "index", "flip")),
        "clone": choose.one((True, True, False)),
    }


@block("partial", (1, 2, 3), partial_options, weight=3)
class Partial(nn.Module):
    """Something done in place to the first positions along a dimension."""

    def __init__(self, shapes: list[Shape], dim: int, at: int, way: str, clone: bool) -> None:
        super().__init__()
        self.dim, self.at, self.way, self.clone = dim, at, way, clone
        self.scale = nn.Parameter(torch.ones(at)) if way in ("scale", "linear", "assign") else None
        self.register_buffer("index", torch.arange(at).flip(0) if way == "index" else None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self.clone else x
        first = x.narrow(self.dim, 0, self.at)
        scale = None if self.scale is None else self.scale.view(-1, *[1] * (x.ndim - 1 - self.dim))
        if self.way == "zero":
            first.zero_()
        elif self.way == "scale":
            first.mul_(scale)
        elif self.way == "linear":
            first.add_(scale)
        elif self.way == "assign":
            x.transpose(0, self.dim)[: self.at] = (first * scale).transpose(0, self.dim)
        elif self.way == "index":
            x.transpose(0, self.dim)[self.index] = 0.5
        else:
            first.copy_(first.flip(1))
        return x
