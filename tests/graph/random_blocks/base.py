"""What a block of a random network is, and what draws its options."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

BATCH = 2
Shape = tuple[int, ...]


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
