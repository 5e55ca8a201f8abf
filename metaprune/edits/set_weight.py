"""Give a parameter or buffer new values, in the shape of the dense network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from metaprune.plans import EDITS, Draft, Edit

if TYPE_CHECKING:
    from metaprune.graph import Network


@EDITS.register("set_weight")
@dataclass(frozen=True, eq=False)
class SetWeight(Edit):
    """Give a parameter or buffer new values, in the shape of the dense network.

    Args:
        name: Its name in the state dict.
        value: The new values; shape and type of the old ones.
    """

    kind: ClassVar[str] = "set_weight"
    name: str
    value: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SetWeight) and self.name == other.name and torch.equal(self.value, other.value)

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.value.shape)))

    def check(self, network: "Network") -> str | None:
        """The tensor exists, with that shape, and every new value is finite."""
        shape = network.shapes.get(self.name)
        if shape is None:
            return f"the network has no parameter or buffer {self.name!r}."
        if shape != tuple(self.value.shape):
            return f"{self.name!r} has shape {shape}, but the plan gives it {tuple(self.value.shape)}."
        if self.value.is_floating_point() and not bool(self.value.isfinite().all()):
            return f"new values of {self.name!r} must be finite, but some are not."
        return None

    def apply(self, draft: Draft) -> None:
        """The last value given to a tensor counts."""
        draft.tensors[self.name] = self.value

    def to_json(self) -> dict[str, Any]:
        """The name; the value travels as a tensor."""
        return {"name": self.name}

    def tensors(self) -> dict[str, Tensor]:
        """The value."""
        return {self.name: self.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Read back."""
        return cls(str(data["name"]), tensors[data["name"]])
