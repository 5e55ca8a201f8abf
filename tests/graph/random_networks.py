"""Random networks: a small program as data, the module that it stands for, and a Hypothesis strategy that draws it.

A program prints as Python that builds it again, so that a failing one can be pasted into a test. Values have no batch
in their shapes here; every tensor has a batch of two in front.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.graph.random_blocks import BLOCKS
from tests.graph.random_blocks.base import BATCH, Choose, Shape, width

LARGEST = 700  # entries of a value, without the batch


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
