"""Linear maps, sums of products, and products of two values.

Letters: c channels, t tokens, d head dimension, n batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_blocks.base import BATCH, Apply, Choose, Shape, block, width


def linear_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    return {"out": choose.one((shapes[0][-1], width(choose))), "bias": choose.one((True, False))}


@block("linear", (1, 2, 3), linear_options, weight=8)
def linear(shapes: list[Shape], out: int, bias: bool) -> nn.Module:
    return nn.Linear(shapes[0][-1], out, bias=bias)


@block("mlp", (1, 2, 3), lambda c, s: {"inner": width(c), "gated": c.one((False, True))}, weight=3)
class Mlp(nn.Module):
    """A transformer's feed-forward part, with its residual."""

    def __init__(self, shapes: list[Shape], inner: int, gated: bool) -> None:
        super().__init__()
        width = shapes[0][-1]
        self.norm, self.gated = nn.LayerNorm(width), gated
        self.up, self.down = nn.Linear(width, 2 * inner if gated else inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.up(self.norm(x))
        if self.gated:
            value, gate = inside.chunk(2, -1)
            return x + self.down(value * F.silu(gate))
        return x + self.down(F.gelu(inside))


_EQUATIONS = {
    1: ("ni,io->no", "ni,oi->no", "ni,ij->ni"),
    2: (
        "nti,io->nto",
        "nti,io->not",
        "nti,ts->nsi",
        "nti,hid->nthd",
        "nti,hid->nhtd",
        "nti,ti->nt",
        "nti,ti->ni",
        "...i,oi->...o",
    ),
    3: ("nchw,cd->ndhw", "nchw,wo->ncho", "nchw,hwo->nco", "nchw,cwo->noh", "nhti,hio->nto"),
    4: (),
}


def einsum_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    return {"equation": choose.one(_EQUATIONS[len(shapes[0])]), "out": width(choose), "heads": choose.one((2, 3))}


@block("einsum", (1, 2, 3), einsum_options, weight=3)
class Einsum(nn.Module):
    def __init__(self, shapes: list[Shape], equation: str, out: int, heads: int) -> None:
        super().__init__()
        left, weight = equation.split("->")[0].split(",")
        if left == "...i":
            sizes = {"i": shapes[0][-1]}
        else:
            sizes = dict(zip(left, (BATCH, *shapes[0]), strict=True))
        new = {"h": heads, "d": heads + 1}
        self.equation = equation
        self.weight = nn.Parameter(torch.randn([sizes.get(letter) or new.get(letter, out) for letter in weight]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, self.weight)


@block("bilinear", (1, 2), lambda c, s: {"out": width(c)}, lambda a, b: a[:-1] == b[:-1], weight=1)
def bilinear(shapes: list[Shape], out: int) -> nn.Module:
    return nn.Bilinear(shapes[0][-1], shapes[1][-1], out)


@block(
    "product",
    (2, 3),
    lambda c, s: {"way": c.one(("plain", "turned"))},
    lambda a, b: len(a) == len(b) and a[:-2] == b[:-2] and a[-1] in b[-2:],
)
def product(shapes: list[Shape], way: str) -> nn.Module:
    if shapes[0][-1] == shapes[1][-1] and (way == "turned" or shapes[1][-2] != shapes[0][-1]):
        return Apply(lambda self, a, b: a @ b.mT)
    return Apply(lambda self, a, b: torch.matmul(a, b))
