"""Tiny hard networks: one trap each.

A case says which parameter dimensions must be free, which must stay, and how to build the cut network by hand where
the statistics of a norm or a softmax change with the cut. Names of dimensions are ``parameter:dimension``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One network and what must be found in it.

    Attributes:
        name: Unique.
        make: Builds the module.
        inputs: Builds example inputs: a tensor, a tuple or a dictionary.
        free: Dimensions that must lie on a prunable axis.
        stuck: Dimensions that must not.
        changes: Dimensions whose axis must say that statistics change.
        by_hand: The module itself runs with narrower parameters put in, which gives the cut network made by hand.
        never_zero: Parameters (or one dimension of them, ``name:0``) by which, or by whose norm, the network divides,
            so that a masked entry is 1 rather than 0.
        keep: Buffers whose values mean something and must not be made random.
        counted: The flop counter of torch sees every product of the network.
        may_refuse: Some cuts cannot be done with this code, and the refusal must name call, place and reason.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    free: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    by_hand: bool = False
    never_zero: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    counted: bool = True
    may_refuse: bool = False


CASES: dict[str, Case] = {}


def image(channels: int = 3, size: int = 6, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, channels, size, size)


def sequence(length: int = 5, width: int = 8, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, length, width)


def words(length: int = 5, vocabulary: int = 11, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, vocabulary, (batch, length))


def flat(width: int = 8, batch: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, width)


def case(
    inputs: Callable[[], Any],
    *,
    free: str = "",
    stuck: str = "",
    changes: str = "",
    never_zero: str = "",
    keep: str = "",
    name: str = "",
    **options: Any,
) -> Callable[[Any], Any]:
    def add(make: Any) -> Any:
        key = name or make.__name__
        assert key not in CASES, key
        lists = {"free": free, "stuck": stuck, "changes": changes, "never_zero": never_zero, "keep": keep}
        CASES[key] = Case(key, make, inputs, **{k: tuple(text.split()) for k, text in lists.items()}, **options)
        return make

    return add


def conv(inside: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, out, kernel, padding=kernel // 2, **options)


class Head(nn.Module):
    """Pooled features to three numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mean((2, 3)))
