"""Give a parameter or buffer new values, in the shape of the dense network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from metaprune.graph.twin import named_tensors
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
        tensor = named_tensors(network.model).get(self.name)
        if tensor is None:
            return f"the network has no parameter or buffer {self.name!r}."
        if tensor.shape != self.value.shape or tensor.dtype != self.value.dtype:
            return (
                f"{self.name!r} has shape {tuple(tensor.shape)} and type {tensor.dtype}, but the plan gives it "
                f"{tuple(self.value.shape)} of {self.value.dtype}."
            )
        if self.value.is_floating_point() and not bool(self.value.isfinite().all()):
            return f"new values of {self.name!r} must be finite, but some are not."
        return None

    def apply(self, draft: Draft) -> None:
        """The last value given to a tensor counts, under whichever of its names."""
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
        if set(data) != {"name"} or set(tensors) != {data["name"]}:
            raise KeyError(f"{data.get('name')!r} among the tensors {sorted(tensors)}")
        return cls(data["name"], tensors[data["name"]])
