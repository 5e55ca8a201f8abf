"""What stands where a residual branch has left: something to call whose result adds nothing."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.graph.record import Ref

_SUMS: set[Any] = {
    *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    *(torch.sub, torch.subtract, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__),
}


class Nothing:
    """What a branch that is not there computes: nothing comes of it, and a sum with it is its other operand.

    No tensor is made for it and no call. What code does to it on the way to the sum gives nothing again.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A sum is its other operand; everything else is nothing."""
        if func in _SUMS:
            first, second = args[0], args[1] if len(args) > 1 else (kwargs or {})["other"]
            return second if isinstance(first, cls) else first
        return cls()

    def __getattr__(self, name: str) -> Callable[..., "Nothing"]:
        if name.startswith("__") or not callable(getattr(Tensor, name, None)):
            raise AttributeError(f"what a dropped branch computes has no {name!r}")
        return lambda *args, **kwargs: Nothing()

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __iadd__ = __add__

    def __rsub__(self, other: Any) -> Any:
        return other

    def __mul__(self, other: Any) -> "Nothing":
        return self

    __rmul__ = __truediv__ = __mul__


class Absent:
    """Stands where a module was whose residual branch has left, as a plain attribute: there is no such module any more.

    Args:
        result: What the module returned, with :class:`Nothing` for its tensors.
    """

    __slots__ = ("result",)

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever it gets, nothing."""
        return self.result


class Dropped(nn.Module):
    """The same as an entry of a container, where a module must be.

    Args:
        result: What the module returned, with :class:`Nothing` for its tensors.
    """

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever it gets, nothing."""
        return self.result


def put_in_place(module: nn.Module, path: str, result: Any) -> None:
    """Take the module at `path` out; `result` is what it returned, tensors as ``Ref``."""
    way, _, name = path.rpartition(".")
    parent = module.get_submodule(way)
    if isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        parent._modules[name] = Dropped(_nothing_in(result)).train(parent.training)
        return
    del parent._modules[name]
    vars(parent)[name] = Absent(_nothing_in(result))


def _nothing_in(item: Any) -> Any:
    if isinstance(item, Ref):
        return Nothing()
    if type(item) in (list, tuple):
        return type(item)(map(_nothing_in, item))
    if isinstance(item, Mapping):
        return {key: _nothing_in(entry) for key, entry in item.items()}
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **{part.name: _nothing_in(getattr(item, part.name)) for part in fields(item) if part.init})
    return item if isinstance(item, (int, float, bool, str)) else None
