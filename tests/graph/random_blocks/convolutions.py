"""Convolutions, and what is made of them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_blocks.base import Choose, Shape, block, divisors, width


def conv_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    inside = shapes[0][0]
    groups = choose.one((1, 1, *divisors(inside)))
    out = choose.one([inside, *(k for k in (4, 6, 8, 12, 3, 2, 5, 2 * inside) if k % groups == 0 and k <= 12)])
    return {
        "out": out,
        "groups": groups,
        "kernel": choose.one((1, 3, 2)),
        "stride": choose.one((1, 1, 2)),
        "dilation": choose.one((1, 1, 2)),
        "padding": choose.one((0, 1)),
        "bias": choose.one((True, False)),
        "transposed": choose.one((False, False, True)),
        "functional": choose.one((False, False, True)),
    }


@block("conv", (2, 3, 4), conv_options, weight=12)
def conv(shapes: list[Shape], *, transposed: bool, functional: bool, out: int, **options: Any) -> nn.Module:
    rank = len(shapes[0]) - 1
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    kernel = options.pop("kernel")
    layer = kinds[rank - 1](shapes[0][0], out, kernel, **options)
    return ByFunction(layer) if functional else layer


class ByFunction(nn.Module):
    """The parameters of a layer, and the function called with them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
        self.call = getattr(F, type(layer).__name__.lower().replace("transpose", "_transpose"))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            dilation=self.dilation,
        )


@block("residual", (2, 3), lambda c, s: {"kernel": c.one((1, 3)), "inner": width(c), "order": c.one((0, 1))}, weight=4)
class Residual(nn.Module):
    def __init__(self, shapes: list[Shape], kernel: int, inner: int, order: int) -> None:
        super().__init__()
        kind, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[len(shapes[0]) - 2]
        width = shapes[0][0]
        self.a, self.b = (
            kind(width, inner, kernel, padding=kernel // 2),
            kind(inner, width, kernel, padding=kernel // 2),
        )
        self.norm, self.order = norm(inner if order else width), bool(order)

    def forward(self, x: Tensor) -> Tensor:
        if self.order:
            return F.relu(x + self.b(F.relu(self.norm(self.a(x)))))
        return x + self.b(self.a(F.relu(self.norm(x))))


@block("squeeze_excite", (2, 3, 4), lambda c, s: {"inner": width(c), "gate": c.one(("sigmoid", "hardsigmoid", "tanh"))})
class SqueezeExcite(nn.Module):
    def __init__(self, shapes: list[Shape], inner: int, gate: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(shapes[0][0], inner), nn.Linear(inner, shapes[0][0])
        self.gate, self.rank = getattr(F, gate), len(shapes[0]) - 1

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(self.up(F.relu(self.down(x.flatten(2).mean(-1)))))
        return x * gate.view(*gate.shape, *[1] * self.rank)
