"""The same entries in another shape or order."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_blocks.base import BATCH, Apply, Choose, Shape, block, divisors, some_dim, width


def unflatten_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any] | None:
    dim = some_dim(choose, shapes)
    factors = [k for k in divisors(shapes[0][dim - 1]) if 1 < k < shapes[0][dim - 1]]
    if not factors or len(shapes[0]) > 3:
        return None
    return {
        "dim": dim,
        "factor": choose.one(factors),
        "held": choose.one(("attribute", "baked", "computed", "computed_inner")),
        "inner": choose.one((True, False)),
    }


@block("unflatten", (1, 2, 3), unflatten_options, weight=7)
def unflatten(shapes: list[Shape], dim: int, factor: int, held: str, inner: bool) -> nn.Module:
    """One dimension as two, with the factor in an attribute or in the code, outside or inside."""

    def sizes(x: Tensor, factor: int) -> list[int]:
        rest = {"attribute": -1, "baked": -1}.get(held, x.shape[dim] // factor)
        pair = [rest, factor] if inner else [factor, rest]
        return [*x.shape[:dim], *pair, *x.shape[dim + 1 :]]

    if held == "baked":
        return Apply(lambda self, x: x.reshape(sizes(x, factor)))
    return Apply(lambda self, x: x.reshape(sizes(x, self.factor)), factor=factor)


@block(
    "flatten",
    (2, 3, 4),
    lambda c, s: {"start": c.integer(1, len(s[0]) - 1), "way": c.one(("flatten", "reshape", "literal"))},
    weight=7,
)
def flatten(shapes: list[Shape], start: int, way: str) -> nn.Module:
    size = prod(shapes[0][start - 1 : start + 1])
    if way == "flatten":
        return Apply(lambda self, x: x.flatten(start, start + 1))
    number = size if way == "literal" else -1
    return Apply(lambda self, x: x.reshape(*x.shape[:start], number, *x.shape[start + 2 :]))


def reshape_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    total, shape = prod(shapes[0]), []
    for _ in range(choose.integer(1, 2)):
        shape.append(choose.one(divisors(total)))
        total //= shape[-1]
    return {"shape": (*shape, total)}


@block("reshape", (1, 2, 3, 4), reshape_options, weight=2)
def reshape(shapes: list[Shape], shape: Shape) -> nn.Module:
    return Apply(lambda self, x: x.reshape(x.shape[0], *shape))


def permute_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    left, order = list(range(1, len(shapes[0]) + 1)), []
    while left:
        order.append(left.pop(choose.integer(0, len(left) - 1)))
    return {"order": tuple(order)}


@block("permute", (2, 3, 4), permute_options, weight=7)
def permute(shapes: list[Shape], order: Shape) -> nn.Module:
    return Apply(lambda self, x: x.permute(0, *order))


def shuffle_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    return {"groups": choose.one(divisors(shapes[0][0])), "way": choose.one(("module", "view", "attribute"))}


@block("shuffle", (2, 3), shuffle_options, weight=4)
def shuffle(shapes: list[Shape], groups: int, way: str) -> nn.Module:
    if way == "module":
        return nn.ChannelShuffle(groups)
    if way == "view":
        return Apply(lambda self, x: x.view(len(x), groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2))

    def forward(self: Any, x: Tensor) -> Tensor:
        grid = x.reshape(x.shape[0], self.groups, x.shape[1] // self.groups, *x.shape[2:])
        return grid.transpose(1, 2).reshape(x.shape)

    return Apply(forward, groups=groups)


@block("pixel_shuffle", (3,), lambda c, s: {"up": s[0][0] % 4 == 0, "way": c.one(("module", "view"))})
def pixel_shuffle(shapes: list[Shape], up: bool, way: str) -> nn.Module:
    if way == "module":
        return nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2)
    if up:
        return Apply(
            lambda self, x: (
                x.view(len(x), 2, 2, -1, *x.shape[2:])
                .permute(0, 3, 4, 1, 5, 2)
                .reshape(len(x), -1, 2 * x.shape[2], 2 * x.shape[3])
            )
        )
    return Apply(
        lambda self, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
    )


def move_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    dim = some_dim(choose, shapes)
    return {"dim": dim, "way": choose.one(_MOVES), "count": choose.integer(1, 3), "seed": choose.integer(0, 9)}


_MOVES = (
    "flip",
    "roll",
    "index",
    "buffer",
    "interleave",
    "repeat",
    "pad",
    "pad_back",
    "pad_ones",
    "gather",
    "new_dim",
    "expand",
    "fancy",
)


@block("move", (1, 2, 3), move_options, weight=8)
class Move(nn.Module):
    """Positions along a dimension put elsewhere, copied, or joined by constants."""

    def __init__(self, shapes: list[Shape], dim: int, way: str, count: int, seed: int) -> None:
        super().__init__()
        self.dim, self.way, self.count = dim, way, count
        size = shapes[0][dim - 1]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        if way == "gather":
            order = order.view(-1, *[1] * (len(shapes[0]) - dim)).expand(BATCH, *shapes[0]).contiguous()
        if way == "fancy":
            order = torch.cat([order, order[:count]])
        self.register_buffer("order", order if way in ("buffer", "gather", "fancy") else None)
        self.order_list = {"order": order.tolist()} if way == "index" else None

    def forward(self, x: Tensor) -> Tensor:
        dim, count = self.dim, self.count
        before = (slice(None),) * dim
        if self.way == "flip":
            return x.flip(dim)
        if self.way == "roll":
            return x.roll(count, dim)
        if self.way == "index":
            return x[(*before, self.order_list["order"])]
        if self.way == "buffer":
            return x.index_select(dim, self.order)
        if self.way == "fancy":
            return x[(*before, self.order)]
        if self.way == "interleave":
            return x.repeat_interleave(count, dim)
        if self.way == "repeat":
            return x.repeat([count if k == dim else 1 for k in range(x.ndim)])
        if self.way.startswith("pad"):
            pads = [0, 0] * (x.ndim - 1 - dim) + ([0, count] if self.way == "pad_back" else [count, 1])
            return F.pad(x, pads, value=0.5 if self.way == "pad_ones" else 0.0)
        if self.way == "gather":
            return x.gather(dim, self.order)
        if self.way == "new_dim":
            return x.unsqueeze(dim)
        shape = [*x.shape[:dim], count, *x.shape[dim:]]
        return x.unsqueeze(dim).expand(shape).flatten(dim, dim + 1)


@block(
    "own",
    (1, 2, 3),
    lambda c, s: {"way": c.one(("token", "position", "scale", "bias", "position_slice")), "dim": some_dim(c, s)},
    weight=5,
)
class Own(nn.Module):
    """A raw parameter: a class token, a position embedding, a scale or a bias along a dimension."""

    def __init__(self, shapes: list[Shape], way: str, dim: int) -> None:
        super().__init__()
        self.dim, self.way, shape = dim, way, list(shapes[0])
        if way == "token":
            shape[dim - 1] = 1
        elif way in ("scale", "bias"):
            shape = [size if k == dim - 1 else 1 for k, size in enumerate(shape)]
        elif way == "position_slice":
            shape[dim - 1] += 2
        self.extra = nn.Parameter(torch.randn(1, *shape) if way != "bias" else torch.randn(shape[dim - 1]))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "token":
            return torch.cat([self.extra.expand(x.shape[0], *[-1] * (x.ndim - 1)), x], self.dim)
        if self.way == "position_slice":
            return x + self.extra.narrow(self.dim, 0, x.shape[self.dim])
        if self.way == "bias":
            return x + self.extra.view(-1, *[1] * (x.ndim - 1 - self.dim))
        return x * self.extra if self.way == "scale" else x + self.extra


@block("as_batch", (2, 3), lambda c, s: {"out": width(c), "conv": c.one((True, False))})
class AsBatch(nn.Module):
    """Every channel for itself: channels join the batch."""

    def __init__(self, shapes: list[Shape], out: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1) if conv else None
        self.layer = nn.Linear(shapes[0][-1], out)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 1, x.shape[-1])
        rows = self.layer(rows if self.conv is None else self.conv(rows))
        return rows.reshape(*x.shape[:-1], -1)
