"""Let a residual branch leave whole: its calls, its parameters and its modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from metaprune.errors import ConfigError, did_you_mean
from metaprune.plans import EDITS, Draft, Edit

if TYPE_CHECKING:
    from metaprune.graph import Network


@EDITS.register("drop_block")
@dataclass(frozen=True)
class DropBlock(Edit):
    """Let a residual branch leave whole: what is left is the dense network with the output of that branch zeroed.

    The addition at which the branch ends goes too. In the instance of the model's own class the modules of the branch
    are gone, and what the code finds in their place makes no call; where it does not go along with that, the network
    becomes a graph of its other calls. `layer_idx`, the place of a layer in the cache of a decoder, is numbered anew
    over the layers that are left, because a cache asks its first layer how long it is.

    Source: depth pruning as in LAPTOP-Diff, arXiv:2404.11098, and FinerCut, arXiv:2405.18218, whose units
    are the attention and feed-forward sub-layers.

    Args:
        block: Name of a branch, or of a module all of whose branches leave; ``Network.blocks`` lists them.
    """

    kind: ClassVar[str] = "drop_block"
    block: str

    def __post_init__(self) -> None:
        if not isinstance(self.block, str):
            raise ConfigError(f"a block is named by text, but {self.block!r} is a {type(self.block).__name__}.")

    def check(self, network: "Network") -> str | None:
        """There is a residual branch of that name, or some inside of a module of that name."""
        if network.blocks_in(self.block):
            return None
        names = [block.name for block in network.blocks]
        if not names:
            return f"{self.block!r} cannot leave whole: the network has no residual branch. Cut axes with `keep`."
        if any(name == self.block for name, _ in network.model.named_modules()):
            inner = next((name for name in names if f"{self.block}.".startswith(f"{name}.")), None)
            within = f"is part of the branch {inner!r}; drop that" if inner else "runs beside no shortcut"
            return (
                f"without {self.block!r} the network would be disconnected: it {within}. Branches that may leave: "
                f"{_some(names)}."
            )
        return f"no block is named {self.block!r}.{did_you_mean(self.block, names)} Known: {_some(names)}."

    def apply(self, draft: Draft) -> None:
        """Dropping a branch twice drops it once."""
        draft.drop.append(self.block)

    def to_json(self) -> dict[str, Any]:
        """The name."""
        return {"block": self.block}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Read back."""
        if tensors:
            raise TypeError("a dropped block carries no tensors")
        return cls(**data)


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])}, … {names[-1]}"
