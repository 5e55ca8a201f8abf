"""Random networks: a small program as data, the module that it stands for, and a Hypothesis strategy that draws it.

A program prints as Python that builds it again, so that a failing one can be pasted into a test. Values have no batch
in their shapes here; every tensor has a batch of two in front.

Letters: c channels, t tokens, d head dimension, n batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

BATCH = 2
LARGEST = 700  # entries of a value, without the batch
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One block applied to earlier values; its results become the next values."""

    block: str
    inputs: tuple[int, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A network as data.

    Attributes:
        inputs: Shapes of the inputs; an empty one stands for five integers below 7.
        steps: In the order in which they run; values are numbered inputs first.
        outputs: Values that are returned, each through a head.
        form: ``tuple``, ``dict`` or ``list``, in which they are returned.
        head: ``linear`` or ``pooled`` (made into three numbers), ``summed`` (over channels), or ``raw``.
        ties: Pairs of steps; the second gets the first one's weight where the shapes agree.
    """

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    form: str = "tuple"
    head: str = "pooled"
    ties: tuple[tuple[int, int], ...] = ()

    def build(self) -> nn.Module:
        """The module, with weights yet to be made unique."""
        torch.manual_seed(0)
        return RandomNetwork(self).double().eval()

    def example(self) -> tuple[Tensor, ...]:
        """Inputs for it."""
        generator = torch.Generator().manual_seed(1)
        return tuple(_example(shape, generator) for shape in self.inputs)


def _example(shape: Shape, generator: torch.Generator) -> Tensor:
    if not shape:
        return torch.randint(0, 7, (BATCH, 5), generator=generator)
    return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)


class RandomNetwork(nn.Module):
    """A program as a module."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.blocks = nn.ModuleList()
        values = list(program.example())
        with torch.no_grad():
            for step in program.steps:
                given = [values[k] for k in step.inputs]
                self.blocks.append(make_block(step, given, self.blocks))
                values.extend(_results(self.blocks[-1].double().eval()(*given)))
        for first, second in program.ties:
            one, other = self.blocks[first], self.blocks[second]
            if getattr(one, "weight", None) is not None and one.weight.shape == other.weight.shape:
                other.weight = one.weight
        self.heads = nn.ModuleList(Head(values[k].shape, program.head) for k in program.outputs)

    def forward(self, *given: Tensor) -> Any:
        values = list(given)
        for step, block in zip(self.program.steps, self.blocks):
            values.extend(_results(block(*(values[k] for k in step.inputs))))
        out = [head(values[k]) for k, head in zip(self.program.outputs, self.heads)]
        if self.program.form == "dict":
            return {f"out{k}": item for k, item in enumerate(out)}
        return tuple(out) if self.program.form == "tuple" else out


def make_block(step: Step, given: Sequence[Tensor], before: Sequence[nn.Module]) -> nn.Module:
    """The module of one step; `again` is an earlier one a second time."""
    if step.block == "again":
        return before[step.options["step"]]
    return BLOCKS[step.block].make([tuple(tensor.shape[1:]) for tensor in given], **step.options)


def _results(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


class Head(nn.Module):
    def __init__(self, shape: torch.Size, kind: str) -> None:
        super().__init__()
        self.kind, self.rank = kind, len(shape)
        if kind == "linear":
            self.out = nn.Linear(prod(shape[1:]), 3)
        elif kind == "pooled":
            self.out = nn.Linear(shape[1] if self.rank != 3 else shape[2], 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "raw":
            return x
        if self.kind == "summed":
            return x.sum(2 if self.rank == 3 else 1)
        if self.kind == "linear":
            return self.out(x.flatten(1))
        if self.rank == 3:  # tokens
            x = x.mean(1)
        elif self.rank > 3:
            x = x.flatten(2).mean(2)
        return self.out(x)


# ---- blocks ----------------------------------------------------------------------------------------------------------


class Choose(Protocol):
    """Where the choices of a program come from: Hypothesis, or a random generator."""

    def integer(self, low: int, high: int) -> int: ...

    def one(self, items: Sequence[Any]) -> Any: ...


Options = Callable[[Choose, list[Shape]], "dict[str, Any] | None"]
Match = Callable[[Shape, Shape], bool]


@dataclass(frozen=True)
class Block:
    """A kind of block.

    Attributes:
        make: Builds the module from the shapes it gets, and its options.
        options: Draws options for shapes; None where none fit.
        ranks: Ranks of the first value.
        matches: For each further value, whether it fits to the first.
        weight: How often it is drawn.
    """

    make: Callable[..., nn.Module]
    options: Options
    ranks: tuple[int, ...]
    matches: tuple[Match, ...]
    weight: int


BLOCKS: dict[str, Block] = {}


def block(
    name: str, ranks: Iterable[int], options: Options, *matches: Match, weight: int = 2
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    def add(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        BLOCKS[name] = Block(make, options, tuple(ranks), matches, weight)
        return make

    return add


class Apply(nn.Module):
    """A function of tensors, with plain integer attributes and integers that no attribute holds."""

    def __init__(self, function: Callable[..., Any], **held: int) -> None:
        super().__init__()
        self.function = function
        for name, number in held.items():
            setattr(self, name, number)

    def forward(self, *given: Tensor) -> Any:
        return self.function(self, *given)


def nothing(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    return {}


def same(a: Shape, b: Shape) -> bool:
    return a == b


def divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def some_dim(choose: Choose, shapes: list[Shape]) -> int:
    """A dimension behind the batch: most often the one where channels are."""
    channels = len(shapes[0]) if len(shapes[0]) == 2 else 1
    return choose.one((channels, channels, choose.integer(1, len(shapes[0]))))


def width(choose: Choose) -> int:
    return choose.one((4, 6, 8, 12, 2, 3, 5))


# ---- convolutions


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


# ---- linear maps


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


# ---- norms and pointwise


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


# ---- joining and taking apart


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


# ---- shapes


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


# ---- reductions


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


# ---- attention and recurrence


def attention_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any]:
    heads = choose.one((2, 4, 3, 1))
    return {
        "heads": heads,
        "kv_heads": choose.one([heads, *divisors(heads)]),
        "d": choose.one((2, 3, 4)),
        "value_d": choose.one((0, 0, 2, 3)),
        "style": choose.one(("separate", "unbind", "chunk", "heads_first", "kv")),
        "fused": choose.one((True, False)),
        "repeat": choose.one(("interleave", "expand", "gqa")),
        "scale": choose.one(("attribute", "computed")),
        "residual": choose.one((True, True, False)),
        "norm": choose.one((False, False, True)),
    }


@block("attention", (2,), attention_options, weight=12)
class Attention(nn.Module):
    def __init__(
        self,
        shapes: list[Shape],
        heads: int,
        kv_heads: int,
        d: int,
        value_d: int,
        style: str,
        fused: bool,
        repeat: str,
        scale: str,
        residual: bool,
        norm: bool,
    ) -> None:
        super().__init__()
        width = shapes[0][-1]
        if style != "separate":
            kv_heads, value_d = heads, 0
        value_d = value_d or d
        self.heads, self.kv_heads, self.d, self.value_d, self.repeats = heads, kv_heads, d, value_d, heads // kv_heads
        self.style, self.fused, self.repeat, self.residual = style, fused, repeat, residual
        self.scale = None if scale == "computed" else d**-0.5
        if style == "separate":
            self.q, self.k, self.v = (nn.Linear(width, size) for size in (heads * d, kv_heads * d, kv_heads * value_d))
        elif style == "kv":
            self.q, self.kv = nn.Linear(width, heads * d), nn.Linear(width, 2 * heads * d, bias=False)
        else:
            self.qkv = nn.Linear(width, 3 * heads * d)
        self.proj = nn.Linear(heads * value_d, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=1e-5) if norm else nn.Identity() for _ in range(2))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        if self.style == "unbind":
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, self.d).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.style == "heads_first":
            q, k, v = self.qkv(x).view(b, t, self.heads, 3, self.d).transpose(1, 2).unbind(3)
            return q, k, v
        if self.style == "chunk":
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        elif self.style == "kv":
            kv = self.kv(x).reshape(b, t, 2, self.heads, self.d).permute(2, 0, 3, 1, 4)
            return self.q(x).view(b, t, self.heads, self.d).transpose(1, 2), kv[0], kv[1]
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        return (
            q.view(b, t, self.heads, -1).transpose(1, 2),
            k.view(b, t, self.kv_heads, self.d).transpose(1, 2),
            v.view(b, t, self.kv_heads, self.value_d).transpose(1, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.parts(x)
        q, k = self.q_norm(q), self.k_norm(k)
        gqa = self.repeats > 1 and self.repeat == "gqa" and self.fused
        if self.repeats > 1 and not gqa:
            if self.repeat == "interleave":
                k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
            else:
                k, v = (
                    y[:, :, None].expand(b, y.shape[1], self.repeats, t, y.shape[-1]).reshape(b, -1, t, y.shape[-1])
                    for y in (k, v)
                )
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=gqa)
        else:
            out = (q @ k.transpose(-2, -1) * (self.scale or q.shape[-1] ** -0.5)).softmax(-1) @ v
        out = self.proj(out.transpose(1, 2).reshape(b, t, -1))
        return x + out if self.residual else out


def multihead_options(choose: Choose, shapes: list[Shape]) -> dict[str, Any] | None:
    heads = [k for k in divisors(shapes[0][-1]) if k < 5]
    return {
        "heads": choose.one(heads),
        "weights": choose.one((True, False)),
        "bias": choose.one((True, False)),
        "residual": choose.one((True, False)),
    }


@block("multihead", (2,), multihead_options, lambda a, b: len(b) == 2, weight=5)
class Multihead(nn.Module):
    def __init__(self, shapes: list[Shape], heads: int, weights: bool, bias: bool, residual: bool) -> None:
        super().__init__()
        other = shapes[1][-1]
        self.attention = nn.MultiheadAttention(
            shapes[0][-1], heads, kdim=other, vdim=other, bias=bias, batch_first=True
        )
        self.weights, self.residual = weights, residual

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out, _ = self.attention(x, y, y, need_weights=self.weights)
        return x + out if self.residual else out


@block(
    "recurrent",
    (2,),
    lambda c, s: {
        "kind": c.one(("LSTM", "GRU", "RNN")),
        "hidden": c.one((3, 4, 5)),
        "layers": c.one((1, 1, 2)),
        "both": c.one((False, True)),
        "last": c.one((False, True)),
    },
    weight=3,
)
class Recurrent(nn.Module):
    def __init__(self, shapes: list[Shape], kind: str, hidden: int, layers: int, both: bool, last: bool) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(shapes[0][-1], hidden, layers, batch_first=True, bidirectional=both)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(x)
        if self.last:
            return (state[0] if isinstance(state, tuple) else state).transpose(0, 1).flatten(1)
        return out


@block("embedding", (0,), lambda c, s: {"width": width(c)})
def embedding(shapes: list[Shape], width: int) -> nn.Module:
    return nn.Embedding(7, width)


# ---- calls without a rule, and calls that are rare


@torch.library.custom_op("metaprune_tests::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    """Mixes every entry with its place, so that no unit may leave."""
    places = torch.arange(x[0].numel(), dtype=x.dtype).view_as(x[0])
    return x * torch.cos(places) + x.roll(1, -1)


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _plus_one(x: Tensor) -> Tensor:
    return 1 + x.mean(tuple(k for k in range(x.ndim) if k != 1))


def _as_map(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 1, -1)


RARE: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm_computed": lambda x: (
        F.layer_norm(x, (x.shape[-1],), 1 + x[0].flatten(0, -2).mean(0), x[0].flatten(0, -2).sum(0))
        if x.ndim > 2
        else x
    ),
    "rms_norm_computed": lambda x: F.rms_norm(x, (x.shape[-1],), 1 + x.flatten(0, -2).mean(0), 1e-5),
    "group_norm_computed": lambda x: F.group_norm(x, 1, _plus_one(x)),
    "group_norm_shifted": lambda x: F.group_norm(x, x.shape[1], None, _plus_one(x)) if x.ndim > 2 else x,
    "batch_norm_computed": lambda x: F.batch_norm(
        x, _plus_one(x) * 0.1, _plus_one(x) ** 2, _plus_one(x), _plus_one(x) - 1
    ),
    "batch_norm_weight": lambda x: F.batch_norm(x.sigmoid(), _plus_one(x) * 0, _plus_one(x) ** 2, _plus_one(x) - 1),
    "batch_norm_of_batch": lambda x: F.batch_norm(x, None, None, training=True, eps=0.1),
    "instance_norm_shifted": lambda x: F.instance_norm(x, bias=_plus_one(x)),
    "conv_of_itself": lambda x: F.conv1d(x, x.mean(0)[None, :, :1].expand(2, -1, -1)),
    "conv_grouped_by_itself": lambda x: F.conv1d(x, x.mean(0)[:, None, :1], groups=x.shape[1]),
    "embedding_bag": lambda x: F.embedding_bag(
        torch.zeros(len(x), 2, dtype=torch.long, device=x.device), x[0].flatten(1)
    ),
    "one_hot": lambda x: F.one_hot((x > 0).long().sum(-1).clamp(max=3), 4).double(),
    "amin": lambda x: x - x.amin(1, keepdim=True),
    "aminmax": lambda x: torch.aminmax(x, dim=1)[0],
    "nansum": lambda x: x.nansum(1),
    "nanmean": lambda x: x.nanmean(-1),
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "msort": lambda x: torch.msort(x.transpose(0, 1)).transpose(0, 1),
    "mode": lambda x: x.round().mode(1)[0],
    "count_nonzero": lambda x: x * x.count_nonzero(dim=1).view(-1, *[1] * (x.ndim - 1)),
    "any": lambda x: x * (x > 0).any(1, keepdim=True),
    "full_like": lambda x: x + torch.full_like(x, 0.25),
    "full": lambda x: x * torch.full((x.shape[1],), 0.3, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2)),
    "ones_summed": lambda x: torch.ones_like(x).cumsum(1) + x,
    "zeros_filled": lambda x: torch.zeros_like(x).fill_(0.5) * x.sigmoid(),
    "empty_filled": lambda x: torch.empty_like(x).copy_(x.sigmoid()),
    "zero_then_set": lambda x: torch.zeros_like(x).masked_fill(x > 0, 2.0),
    "index_fill": lambda x: x.index_fill(1, torch.zeros(1, dtype=torch.long, device=x.device), 0.5),
    "index_copy": lambda x: x.index_copy(0, torch.arange(len(x), device=x.device), x.cos()),
    "index_reduce": lambda x: x.index_reduce(0, torch.arange(len(x), device=x.device), x.cos(), "amax"),
    "masked_select_mean": lambda x: x * torch.masked_select(x, x > 0).mean(),
    "var_mean": lambda x: torch.var_mean(x, -1, correction=0)[0],
    "norm_one": lambda x: x / (1 + x.norm(p=1, dim=1, keepdim=True)),
    "norm_zero": lambda x: x / (1 + torch.linalg.vector_norm(x, 0, dim=1, keepdim=True)),
    "norm_negative": lambda x: x.abs().add(0.1).norm(p=-1, dim=1),
    "grid_sample": lambda x: F.grid_sample(
        x,
        torch.linspace(-1, 1, 2 * 4, dtype=x.dtype, device=x.device).view(1, 2, 2, 2).expand(len(x), -1, -1, -1),
        align_corners=False,
    ),
    "affine_grid": lambda x: F.grid_sample(
        x,
        F.affine_grid(
            x.mean((1, 2, 3)).view(-1, 1, 1) + torch.eye(2, 3, dtype=x.dtype, device=x.device),
            list(x.shape),
            align_corners=False,
        ),
        align_corners=False,
    ),
    "outer_of_first": lambda x: torch.outer(x[0], x[1]).unsqueeze(0).expand(len(x), -1, -1),
    "dot": lambda x: x * torch.dot(x[0], x[1]),
    "softmin": lambda x: F.softmin(x, dim=1),
    "softmax_both": lambda x: x.flatten(1).softmax(1).view_as(x),
    "softmax_of_pairs": lambda x: x.view(len(x), -1, 2, *x.shape[2:]).softmax(2).view_as(x),
    "swapaxes": lambda x: x.swapaxes(1, -1).swapdims(0, 0),
    "numpy_t": lambda x: x.permute(*range(x.ndim - 1, -1, -1)).T if x.ndim == 2 else x.transpose(1, -1),
    "triu": lambda x: torch.triu(x, 1),
    "complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * 1j
    ).flatten(-2),
    "complex_halves": lambda x: torch.complex(*x.chunk(2, -1)).abs(),
    "polar": lambda x: torch.polar(x.abs(), x).real,
    "hardswish": F.hardswish,
    "feature_dropout": lambda x: F.dropout1d(x, 0.5, training=False),
    "rand_like": lambda x: x + 0 * torch.rand_like(x),
    "scale_by_size": lambda x: x * (x.shape[-1] / x.shape[1]),
    "mean_of_halves": lambda x: torch.cat([half - half.mean(1, keepdim=True) for half in x.chunk(2, 1)], 1),
    "unflatten_named": lambda x: x.unflatten(-1, (2, -1)).sum(-2),
    "unflatten_inner": lambda x: x.unflatten(1, (-1, 2)).amax(2),
    "expand_then_sum": lambda x: x.unsqueeze(1).expand(-1, 3, *[-1] * (x.ndim - 1)).sum(1),
    "expand_and_join": lambda x: (
        (x.unsqueeze(2).expand(-1, -1, 2, *[-1] * (x.ndim - 2)).flatten(1, 2)).view(len(x), 2, -1, *x.shape[2:]).sum(1)
    ),
    "repeat_as_batch": lambda x: x.repeat(2, *[1] * (x.ndim - 1)).view(2, *x.shape).mean(0),
    "cumsum_batch": lambda x: x.cumsum(0),
    "cat_batch": lambda x: torch.cat([x, x.flip(1)], 0).chunk(2, 0)[1],
    "stack_and_select": lambda x: torch.stack([x, x.tanh(), x * 2], 1)[:, 1],
    "write_into_zeros": lambda x: (lambda out: (out[:, 1:].add_(x[:, :-1]), out)[1])(torch.zeros_like(x)),
    "write_half": lambda x: (
        lambda out: (out[..., : x.shape[-1] // 2].copy_(x[..., x.shape[-1] // 2 :][..., : x.shape[-1] // 2]), out)[1]
    )(x.clone()),
    "write_through_view": lambda x: (lambda out: (out.view(len(x), -1).mul_(0.5).sigmoid_(), out)[1])(
        x.clone(memory_format=torch.contiguous_format)
    ),
    "write_through_transpose": lambda x: (lambda out: (out.transpose(1, -1).add_(0.5), out)[1])(x.clone()),
    "write_out": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "write_scalar": lambda x: (lambda out: (out.__setitem__((slice(None), 0), 0.5), out)[1])(x.clone()),
    "write_mask": lambda x: (lambda out: (out.__setitem__(x > 0.2, 0.7), out)[1])(x.clone()),
    "foreach": lambda x: torch._foreach_add([x, x * 2], 1.0)[1],
    "foreach_": lambda x: (lambda out: (torch._foreach_add_([out], 0.5), out)[1])(x.clone()),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x[:, :1], x)[0] * x,
    "einsum_outer": lambda x: (
        torch.einsum("ni,nj->nij", x, x.cos()) if x.ndim == 2 else torch.einsum("ni...,nj...->nij...", x, x.cos())
    ),
    "einsum_sum": lambda x: torch.einsum("n...->n", x).view(-1, *[1] * (x.ndim - 1)) * x,
    "einsum_diagonal": lambda x: torch.einsum("nii->ni", x),
    "einsum_three": lambda x: torch.einsum("nti,nsi,nsj->ntj", x, x.cos(), x.sigmoid()),
    "mask_of_own": lambda x: (
        x * (x.mean(tuple(range(2, x.ndim))) > 0).view(*x.shape[:2], *[1] * (x.ndim - 2)) if x.ndim > 2 else x
    ),
    "not_mask": lambda x: (~(x > 0)).double(),
    "int_and_back": lambda x: (x * 4).long().remainder(3).double(),
    "int_shifted": lambda x: ((x * 4).long() + 1).double(),
    "float_and_back": lambda x: x.float().double().half().double(),
    "fold_channels": lambda x: F.fold(x, (3, 3), 2) if x.shape[-1] == 4 else x,
    "max_unpool": lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2),
    "fractional": lambda x: F.adaptive_max_pool1d(x, 2),
    "sdpa_self": lambda x: F.scaled_dot_product_attention(x, x, x.cos()),
    "sdpa_causal": lambda x: F.scaled_dot_product_attention(x, x.tanh(), x, is_causal=True),
    "sdpa_masked": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.mT),
    "sdpa_heads_of_channels": lambda x: (
        F.scaled_dot_product_attention(*(x.unflatten(-1, (2, -1)).transpose(1, 2),) * 3).transpose(1, 2).flatten(2)
    ),
    "channel_attention": lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT).mT,
    "bmm": lambda x: torch.bmm(x, x.mT.softmax(-1)),
    "pad_negative": lambda x: F.pad(x, (-1, 1)),
    "pad_channels_one": lambda x: F.pad(x, (*[0, 0] * (x.ndim - 2), 1, 1), value=1.0),
    "pad_circular": lambda x: F.pad(x, (1, 1), mode="circular") if x.ndim == 3 else x,
    "logsumexp_pairs": lambda x: x.unflatten(1, (-1, 2)).logsumexp(2),
    "prod_pairs": lambda x: x.unflatten(1, (2, -1)).prod(1),
    "where_scalar": lambda x: torch.where(x > 0, x, 0.3),
    "where_scalar_zero": lambda x: torch.where(x > 0, x, 0.0),
    "where_inverse": lambda x: torch.where(x > 0, 0.3, x),
    "xlogy": lambda x: torch.xlogy(x, 2 + x * x),
    "ldexp": lambda x: torch.ldexp(x, torch.ones_like(x)),
    "copysign": lambda x: torch.copysign(torch.ones_like(x), x),
    "heaviside": lambda x: torch.heaviside(x, torch.full_like(x, 0.5)),
    "nextafter": lambda x: torch.exp2(x) - 1,
    "sinc": torch.sinc,
    "erfc": torch.erfc,
    "logaddexp": lambda x: torch.logaddexp(x, x * 0.5),
    "floor_divide": lambda x: torch.floor_divide(x, 0.3),
    "float_power": lambda x: x.float_power(0),
    "pow_zero": lambda x: x**0,
    "pow_of_number": lambda x: 2.0**x,
    "clamp_tensor": lambda x: torch.clamp(x, min=torch.full((), 0.1, dtype=x.dtype, device=x.device)),
    "threshold_": lambda x: F.threshold(x, 0.1, 20.0),
    "threshold_low": lambda x: F.threshold(x, -1.0, 20.0),
    "hardshrink": lambda x: F.hardshrink(x, 0.2),
    "relu6_shifted": lambda x: F.relu6(x + 3) / 6,
    "celu": F.celu,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "rrelu": lambda x: F.rrelu(x),
    "digamma": lambda x: torch.lgamma(x.abs() + 1.5),
    "addcdiv": lambda x: torch.addcdiv(x, torch.ones_like(x), 1 + x * x),
    "sub_number": lambda x: torch.sub(x, 0.5, alpha=2),
    "alias_add": lambda x: x.add(x, alpha=-0.5),
    "logical_not": lambda x: torch.logical_not(x > 0).to(x.dtype),
    "isclose": lambda x: x + torch.isclose(x, x * 1.0).double(),
    "odd": odd,
    "diff": lambda x: torch.diff(x, dim=-1),
    "diff_first": lambda x: torch.diff(x, dim=1),
    "cdist": lambda x: torch.cdist(x, x + 1),
    "trapezoid": lambda x: torch.trapezoid(x, dim=1),
    "kron": lambda x: torch.kron(x, torch.ones(1, 2, dtype=x.dtype, device=x.device)) if x.ndim == 2 else x,
    "rot90": lambda x: torch.rot90(x, 1, (1, x.ndim - 1)),
    "tril": lambda x: torch.tril(x),
    "cummax": lambda x: torch.cummax(x, 1)[0],
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
    "renorm": lambda x: torch.renorm(x, 2, 1, 0.5),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "diagonal": lambda x: torch.diagonal(x, 0, 1, 2),
    "as_strided": lambda x: x.contiguous().as_strided(x.shape, x.contiguous().stride()),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, torch.zeros_like(x, dtype=torch.long), x),
    "scatter_add": lambda x: torch.ones_like(x).scatter_add(1, torch.zeros_like(x, dtype=torch.long), x),
    "index_add": lambda x: x.index_add(1, torch.zeros(1, dtype=torch.long, device=x.device), x[:, :1]),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, 0),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, 1:] * 2, 1, 1),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (4, 4), 2, stride=2),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(1), dim=1),
    "pairwise": lambda x: F.pairwise_distance(x, x * 0.5),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([-1], [-1])).sum(x.ndim - 1),
    "take_along": lambda x: torch.take_along_dim(x, x.argsort(1), 1),
    "quantile": lambda x: torch.quantile(x, 0.5, dim=1),
    "bucketize": lambda x: (
        x * torch.bucketize(x.contiguous(), torch.tensor([0.0, 0.3], dtype=x.dtype, device=x.device))
    ),
    "stack_unbind": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "hstack": lambda x: torch.hstack([x, x * 2]),
    "dstack": lambda x: torch.dstack([x, x.tanh()]),
    "vander": lambda x: torch.linalg.vander(x, N=3),
    "cov": lambda x: torch.stack([torch.cov(part.flatten(1)) for part in x]) if x.ndim > 2 else x,
    "fft": lambda x: torch.fft.rfft(x, dim=-1).abs(),
    "fft_first": lambda x: torch.fft.fft(x, dim=1).real,
    "meshgrid": lambda x: (
        x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))
    ),
    "arange": lambda x: x * torch.arange(x.shape[-1], dtype=x.dtype, device=x.device),
    "constant": lambda x: x + torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).to(x.device),
    "eye": lambda x: x + torch.eye(x.shape[-2], x.shape[-1], dtype=x.dtype, device=x.device),
    "tile": lambda x: torch.tile(x, (1, 2, *[1] * (x.ndim - 2))),
    "roll_all": lambda x: torch.roll(x, 1),
    "unfold_dim": lambda x: x.unfold(1, 2, 1).flatten(1, 2),
    "count": lambda x: x * x.shape[1] ** -0.5,
    "sum_all": lambda x: x / (1 + x.pow(2).sum(dim=tuple(range(1, x.ndim)), keepdim=True)),
    "max_other": lambda x: x - x.amax(tuple(range(1, x.ndim)), keepdim=True),
    "std_mean": lambda x: torch.std_mean(x, 1)[1],
    "weighted": lambda x: torch.einsum("n...,n...->n...", x, x),
    "diag_embed": lambda x: torch.diag_embed(x),
    "outer": lambda x: x.unsqueeze(-1) * x.unsqueeze(1) if x.ndim == 2 else x,
    "gram": lambda x: x @ x.mT,
    "cross_gram": lambda x: x.flatten(2).mT @ x.flatten(2),
    "channel_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) * 2,
    "two_halves": lambda x: x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:]).sum(1),
    "two_halves_picked": lambda x: (lambda y: y[:, 0] * y[:, 1].sigmoid())(
        x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:])
    ),
    "radix": lambda x: (lambda y: (y * y.softmax(1)).sum(1))(x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:])),
    "index_put": lambda x: x.index_put((torch.arange(len(x), device=x.device),), x * 2),
    "new_zeros": lambda x: torch.cat([x, x.new_zeros(x.shape)], 1),
    "new_full": lambda x: x + x.new_full((x.shape[-1],), 0.5),
    "ones_cat": lambda x: torch.cat([torch.ones_like(x[:, :1]), x], 1),
    "where_index": lambda x: x * (torch.arange(x.shape[1], device=x.device) > 1).view(-1, *[1] * (x.ndim - 2)),
    "even_odd": lambda x: torch.stack([x[..., ::2], x[..., 1::2]], -1).flatten(-2),
    "rotary": lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) + x,
    "lift": lambda x: (
        x[:, None] * x[:, :, None] if x.ndim == 2 else x[:, None].expand(-1, 2, *[-1] * (x.ndim - 1)).flatten(1, 2)
    ),
    "baddbmm": lambda x: torch.baddbmm(x, x @ x.mT, x),
    "addmm": lambda x: torch.addmm(x, x @ x.mT, x),
    "addbmm": lambda x: torch.addbmm(x[0], x, x.mT @ x).expand_as(x),
    "mv": lambda x: torch.mv(x, x[0]).unsqueeze(1) * x,
    "norm_first": lambda x: x / (1e-2 + x.norm(dim=1, keepdim=True)),
    "norm_inf": lambda x: x / (1 + x.abs().amax(-1, keepdim=True)),
    "view_as": lambda x: (x.reshape(-1).view_as(x) * 2).reshape_as(x),
    "t": lambda x: x.mT.contiguous().mT,
    "chain": lambda x: x.unflatten(1, (2, -1)).flatten(0, 1).unflatten(0, (-1, 2)).flatten(1, 2),
    "chain2": lambda x: (
        x.transpose(0, 1).reshape(x.shape[1], -1).reshape(x.transpose(0, 1).shape).transpose(0, 1).tanh()
    ),
    "swap": lambda x: x.view(len(x), -1, 2, *x.shape[2:]).flip(2).reshape(x.shape),
    "batch_mean": lambda x: x - x.mean(0),
    "batch_roll": lambda x: x + x.roll(1, 0),
    "batch_gram": lambda x: torch.einsum("n...,m...->nm", x, x) @ x.flatten(1),
}


@block("rare", (1, 2, 3), lambda c, s: {"name": c.one(list(RARE))}, weight=14)
def rare(shapes: list[Shape], name: str) -> nn.Module:
    return Apply(lambda self, x: RARE[name](x))


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw_program(choose: Choose, longest: int = 10) -> Program:
    """A program that runs, of up to `longest` steps."""
    inputs = tuple(_draw_input(choose) for _ in range(choose.one((1, 1, 1, 2))))
    values = list(Program(inputs, (), ()).example())
    steps: list[Step] = []
    modules: list[nn.Module] = []
    count = choose.integer(len(inputs) + 1, longest)
    for _ in range(3 * count):  # some do not fit
        if len(steps) == count:
            break
        number = len(steps)
        step = _draw_layer(choose, number, values) if number < len(inputs) else _draw_step(choose, values, steps)
        made = None if step is None else _run(step, [values[k].clone() for k in step.inputs], modules)
        if step is not None and made is not None:
            steps.append(step)
            modules.append(made[0])
            values.extend(made[1])
    used = {k for step in steps for k in step.inputs}
    outputs = [k for k in range(len(inputs), len(values)) if k not in used][-3:] or [len(values) - 1]
    weighted = [k for k, step in enumerate(steps) if step.block in ("linear", "conv", "einsum", "embedding")]
    ties = ()
    if len(weighted) > 1 and choose.one((False, True)):
        ties = ((weighted[0], choose.one(weighted[1:])),)
    form, head = (
        choose.one(("tuple", "dict", "list")),
        choose.one((*["pooled"] * 4, "linear", "linear", "summed", "raw")),
    )
    return Program(inputs, tuple(steps), tuple(outputs), form, head, ties)


def _run(step: Step, given: list[Tensor], before: list[nn.Module]) -> tuple[nn.Module, list[Tensor]] | None:
    """The module of a step and its results; None where it does not run, or its results are no good."""
    try:
        with torch.no_grad():
            module = make_block(step, given, before).double().eval()
            results = _results(module(*given))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, NotImplementedError, ZeroDivisionError):
        return None
    return (module, results) if all(map(_fits, results)) else None


def _draw_input(choose: Choose) -> Shape:
    rank = choose.one((3, 2, 3, 2, 1, 4, 0, 2))
    return {0: (), 1: (6,), 2: (5, 8), 3: (3, 4, 4), 4: (3, 2, 3, 3)}[rank]


def _fits(out: Tensor) -> bool:
    sizes = out.shape[1:]
    return (
        out.dtype == torch.float64
        and out.shape[:1] == (BATCH,)
        and 1 <= len(sizes) <= 4
        and 0 < prod(sizes) <= LARGEST
        and bool(out.isfinite().all())
        and float(out.abs().max()) < 1e6
    )


def _draw_step(choose: Choose, values: list[Tensor], steps: list[Step]) -> Step | None:
    recent = list(range(len(values)))[::-1][:5]
    first = choose.one((recent[0], recent[0], recent[0], *recent))
    shapes = [_shape(value) for value in values]
    if not shapes[first]:
        return Step("embedding", (first,), {"width": width(choose)})
    weighted = [k for k, step in enumerate(steps) if step.block in _AGAIN]
    if weighted and choose.integer(0, 19) == 0:
        earlier = choose.one(weighted)
        return Step("again", (first, *steps[earlier].inputs[1:]), {"step": earlier})
    names = [name for name, item in BLOCKS.items() if len(shapes[first]) in item.ranks for _ in range(item.weight)]
    kind = choose.one(names)
    chosen = [first]
    for matches in BLOCKS[kind].matches:
        fitting = [k for k in range(len(values)) if shapes[k] and matches(shapes[first], shapes[k])]
        fitting = [k for k in fitting if k != first] or fitting
        if not fitting:
            return None
        chosen.append(choose.one(fitting[::-1]))
    options = BLOCKS[kind].options(choose, [shapes[k] for k in chosen])
    return None if options is None else Step(kind, tuple(chosen), options)


def _draw_layer(choose: Choose, number: int, values: list[Tensor]) -> Step:
    """A layer first for each input, because the dimensions of an input cannot be pruned."""
    shape = _shape(values[number])
    if not shape:
        return Step("embedding", (number,), {"width": width(choose)})
    kind = "linear" if len(shape) == 1 else choose.one(("conv", "linear")) if len(shape) == 2 else "conv"
    return Step(kind, (number,), BLOCKS[kind].options(choose, [shape]) or {})


_AGAIN = {"linear", "conv", "residual", "mlp", "attention", "norm", "squeeze_excite", "einsum"}


def _shape(value: Tensor) -> Shape:
    return tuple(value.shape[1:]) if value.is_floating_point() else ()


@dataclass
class _Drawn:
    """Choices made by Hypothesis."""

    draw: Any

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def one(self, items: Sequence[Any]) -> Any:
        items = list(items)
        return items[self.draw(st.integers(0, len(items) - 1))]


@st.composite
def programs(draw: Any, longest: int = 10) -> Program:
    """Random networks."""
    return draw_program(_Drawn(draw), longest)
