"""Norms, functions of each entry, and functions of two values of one shape."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_blocks.base import Apply, Choose, Shape, block, divisors, same, some_dim


def norm_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    kinds = ["batch", "layer", "group", "rms", "functional", *(["instance", "layer2"] if len(shapes[0]) > 1 else [])]
    kind = choose.one(kinds)
    groups = choose.one(divisors(shapes[0][0])) if kind == "group" else 1
    return {"kind": kind, "affine": choose.one((True, True, False)), "groups": groups}


@block("norm", (1, 2, 3, 4), norm_options, weight=6)
def norm(shapes: list[Shape], kind: str, affine: bool, groups: int) -> nn.Module:
    shape = shapes[0]
    rank = max(len(shape) - 2, 0)
    if kind == "batch":
        return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank](shape[0], affine=affine)
    if kind == "instance":
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank](
            shape[0], affine=affine, track_running_stats=groups % 2 == 0
        )
    if kind == "group":
        return nn.GroupNorm(groups, shape[0], affine=affine)
    if kind == "rms":
        return nn.RMSNorm(shape[-1], eps=1e-5, elementwise_affine=affine)
    if kind == "functional":
        return Apply(lambda self, x: F.layer_norm(x, (x.shape[-1],)))
    return nn.LayerNorm(shape[-1:] if kind == "layer" else shape[-2:], elementwise_affine=affine)


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "hardtanh": lambda x: F.hardtanh(x, 0.1, 1.0),
    "clamp": lambda x: x.clamp(min=-0.5),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "gaussian": lambda x: (-x * x).exp(),
    "one_minus": lambda x: 1 - x,
    "shifted": lambda x: x + 0.5,
    "halved": lambda x: x / 2,
    "inverse": lambda x: 1 / (1 + x * x),
    "power": lambda x: x**2,
    "masked": lambda x: x.masked_fill(x > 0.3, 0.7),
    "threshold": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "relu_": lambda x: x.relu_(),
    "add_": lambda x: x.add_(0.25),
    "mul_": lambda x: x.mul_(0.5),
    "sigmoid_": lambda x: x.sigmoid_(),
    "abs": torch.abs,
    "sign": torch.sign,
    "detach": lambda x: x.detach() * 2,
    "cos": torch.cos,
    "lerp": lambda x: torch.lerp(x, x.tanh(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.1),
    "nan_to_num": torch.nan_to_num,
    "logit": lambda x: torch.logit(x.sigmoid(), eps=1e-3),
    "round": lambda x: x + (x.round() - x).detach(),
    "clone": lambda x: x.clone().contiguous(),
    "log1p": lambda x: x.abs().log1p(),
    "hypot": lambda x: torch.hypot(x, torch.ones_like(x)),
    "fmod": lambda x: torch.fmod(x, 0.75),
    "remainder": lambda x: torch.remainder(x, 0.75),
    "max_const": lambda x: torch.maximum(x, torch.full((), 0.2, dtype=x.dtype, device=x.device)),
    "rsub": lambda x: torch.rsub(x, 0.5),
    "double": lambda x: x.to(torch.float64).type_as(x),
}


@block("pointwise", (1, 2, 3, 4), lambda c, s: {"name": c.one(list(POINTWISE))}, weight=8)
def pointwise(shapes: list[Shape], name: str) -> nn.Module:
    return Apply(lambda self, x: POINTWISE[name](x))


@block("prelu", (1, 2, 3), lambda c, s: {"own": c.one((True, False))}, weight=1)
def prelu(shapes: list[Shape], own: bool) -> nn.Module:
    return nn.PReLU(shapes[0][0] if own else 1)


@block("glu", (1, 2, 3), lambda c, s: {"dim": some_dim(c, s)})
def glu(shapes: list[Shape], dim: int) -> nn.Module:
    return nn.GLU(dim)


def _overwrite(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a.copy_(b)
    return a


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "add2": lambda a, b: torch.add(a, b, alpha=2),
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "max": torch.maximum,
    "add_": lambda a, b: a.clone().add_(b),
    "iadd": lambda a, b: a.add_(b),
    "imul": lambda a, b: a.mul_(b),
    "gate": lambda a, b: a * b.sigmoid(),
    "where": lambda a, b: torch.where(a > b, a, b * 0.5),
    "div": lambda a, b: a / (1 + b.abs()),
    "copy": _overwrite,
    "stack_sum": lambda a, b: torch.stack([a, b], 1).sum(1),
    "stack_max": lambda a, b: torch.stack([a, b]).amax(0),
    "addcmul": lambda a, b: torch.addcmul(a, b, b),
    "lerp": lambda a, b: a.lerp(b, 0.3),
    "hypot": torch.hypot,
    "atan2": torch.atan2,
    "min": torch.minimum,
    "logical": lambda a, b: a * (a > b),
}


@block("binary", (1, 2, 3, 4), lambda c, s: {"name": c.one(list(BINARY))}, same, weight=10)
def binary(shapes: list[Shape], name: str) -> nn.Module:
    return Apply(lambda self, a, b: BINARY[name](a, b))


@block(
    "broadcast",
    (1,),
    lambda c, s: {"name": c.one(("add", "mul", "gate", "film"))},
    lambda a, b: len(b) > 1 and a[0] in (b[0], b[-1]),
    weight=3,
)
def broadcast(shapes: list[Shape], name: str) -> nn.Module:
    small, large = shapes
    first = small[0] == large[0]

    def forward(self: Any, a: Tensor, b: Tensor) -> Tensor:
        a = a.view(*a.shape, *[1] * (b.ndim - 2)) if first else a.view(a.shape[0], *[1] * (b.ndim - 2), -1)
        return b * (1 + a) + a if name == "film" else BINARY[name](a, b)

    return Apply(forward)
