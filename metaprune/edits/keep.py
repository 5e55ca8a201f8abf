"""Keep some units of an axis; the others leave physically."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from metaprune.errors import ConfigError
from metaprune.plans import EDITS, Draft, Edit

if TYPE_CHECKING:
    from metaprune.graph import Network


@EDITS.register("keep")
@dataclass(frozen=True)
class Keep(Edit):
    """Keep some units of an axis; the others leave physically.

    Args:
        axis: Name of the axis.
        size: Number of its units before.
        kept: Ranks of the units that stay, strictly ascending.
    """

    kind: ClassVar[str] = "keep"
    axis: str
    size: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(self.kept))
        whole = all(type(number) is int for number in (self.size, *self.kept))
        if not isinstance(self.axis, str) or not whole:
            raise ConfigError(f"an axis is named by text and units by integers, but {self.axis!r} keeps {self.kept!r}.")

    def check(self, network: "Network") -> str | None:
        """The axis exists, is prunable and of that size, and some units stay."""
        axis = network.axis(self.axis)
        if axis.size != self.size:
            return f"axis {self.axis!r} has {axis.size} units, but the plan was made for {self.size}."
        if not self.kept:
            return f"`1 <= kept <= {axis.size}` must hold for axis {self.axis!r}, but nothing is kept."
        ascending = all(low < high for low, high in zip(self.kept, self.kept[1:], strict=False))
        if not ascending or self.kept[0] < 0 or self.kept[-1] >= axis.size:
            return (
                f"kept ranks of axis {self.axis!r} must ascend within 0..{axis.size - 1}, but are {_short(self.kept)}."
            )
        if not axis.prunable and len(self.kept) < axis.size:
            return f"axis {self.axis!r} cannot be cut: {axis.reason}."
        return None

    def apply(self, draft: Draft) -> None:
        """A second cut of an axis within one plan narrows the first; ranks are those of the dense network."""
        before = set(draft.keep.get(self.axis, range(self.size)))
        draft.keep[self.axis] = tuple(rank for rank in self.kept if rank in before)

    def to_json(self) -> dict[str, Any]:
        """Axis, size and kept ranks."""
        return {"axis": self.axis, "size": self.size, "kept": list(self.kept)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Read back."""
        if tensors or not isinstance(data["kept"], list):
            raise TypeError("kept ranks must be a list, without tensors")
        return cls(**data)


def _short(ranks: tuple[int, ...]) -> str:
    return str(list(ranks)) if len(ranks) <= 8 else f"[{', '.join(map(str, ranks[:6]))}, …, {ranks[-1]}]"
