"""Set single weights to zero: any of them, or N of every M that are added up side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from metaprune.errors import ConfigError
from metaprune.plans import EDITS, Draft, Edit

if TYPE_CHECKING:
    from metaprune.graph import Network


@EDITS.register("mask")
@dataclass(frozen=True, eq=False)
class Mask(Edit):
    """Set single entries of a weight to zero: any of them, or N of every M.

    The mask is part of the plan, so a zero that was learnt is none of its.

    A pattern ``"2:4"`` promises that of every 4 entries side by side along the dimension that is added up (the input of
    a layer, wherever that lies in its weight), 2 stay. :func:`unstructured` and :func:`n_of_m` make masks.

    Source: Han et al., Learning both Weights and Connections, arXiv:1506.02626; for N:M, Mishra et al., Accelerating
    Sparse Deep Neural Networks, arXiv:2104.08378.

    Args:
        name: The weight, by its name in the state dict.
        kept: True where an entry stays; shape of the weight, bool.
        pattern: ``"N:M"``, or empty for none.
    """

    kind: ClassVar[str] = "mask"
    name: str
    kept: Tensor
    pattern: str = ""

    def __post_init__(self) -> None:
        if self.kept.dtype != torch.bool:
            raise ConfigError(
                f"a mask says of every entry whether it stays, but that of {self.name!r} is {self.kept.dtype}."
            )
        if self.pattern:
            parse_pattern(self.pattern)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Mask) and (self.name, self.pattern) == (other.name, other.pattern)
        return same and isinstance(other, Mask) and torch.equal(self.kept, other.kept)

    def __hash__(self) -> int:
        return hash((self.name, self.pattern, tuple(self.kept.shape)))

    def check(self, network: "Network") -> str | None:
        """The weight exists, with that shape; a pattern holds along the dimension that it adds up."""
        shape = network.shapes.get(network.aliases.get(self.name, self.name))
        if shape is None:
            return f"the network has no parameter or buffer {self.name!r}."
        if shape != tuple(self.kept.shape):
            return f"{self.name!r} has shape {shape}, but its mask has {tuple(self.kept.shape)}."
        return self._refusal(network, self.kept) if self.pattern else None

    def check_left(self, network: "Network", draft: Draft) -> str | None:
        """The pattern also holds in what the other edits leave."""
        left = network.left(draft, self.name, self.kept)
        if not self.pattern or left is None or left.shape == self.kept.shape:
            return None
        wrong = self._refusal(network, left)
        return wrong and f"{wrong[:-1]}, once other edits have cut it. Cut first, then mask what is left."

    def _refusal(self, network: "Network", kept: Tensor) -> str | None:
        n, m = parse_pattern(self.pattern)
        dim = network.input_dim(self.name)
        if dim is None:
            return f"{self.pattern} needs one dimension along which {self.name!r} is added up, but none is known."
        size = kept.shape[dim]
        if size % m:
            return (
                f"{self.pattern} needs an input of {self.name!r} (dimension {dim}) that {m} divides, but it is "
                f"{size}. Leave this weight out, or choose a pattern whose M divides {size}."
            )
        counts = kept.movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1)
        wrong = int((counts != n).sum())
        if wrong:
            return (
                f"{self.pattern} must hold along the input of {self.name!r} (dimension {dim}), but {wrong} of "
                f"{counts.numel()} groups of {m} keep another number than {n}."
            )
        return None

    def apply(self, draft: Draft) -> None:
        """A second mask of a weight narrows the first."""
        draft.masks[self.name] = draft.masks.get(self.name, self.kept) & self.kept

    def to_json(self) -> dict[str, Any]:
        """Name and pattern; the mask travels as a tensor."""
        return {"name": self.name, "pattern": self.pattern}

    def tensors(self) -> dict[str, Tensor]:
        """The mask."""
        return {self.name: self.kept}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Read back."""
        if set(tensors) != {data["name"]}:
            raise KeyError(f"{data.get('name')!r} among the tensors {sorted(tensors)}")
        return cls(data["name"], tensors[data["name"]], data["pattern"])


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``"2:4"`` as (2, 4): how many of how many stay.

    Raises:
        ConfigError: It is none.

    >>> parse_pattern("2:4")
    (2, 4)
    """
    parts = pattern.split(":") if isinstance(pattern, str) else []
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and 0 < int(parts[0]) <= int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise ConfigError(f"a pattern must be N:M with 1 <= N <= M, e.g. 2:4, but is {pattern!r}.")


def unstructured(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which entries stay when the lowest `share` of all of them leave together, whatever tensors they lie in.

    Exactly ``floor(share * entries)`` leave. Of equal ones the first leave first, in the order of the tensors.

    Args:
        scores: What each entry is worth, by name, in any shapes.
        share: In [0, 1].

    Raises:
        ConfigError: `share` is out of range, or a score is not finite.

    >>> unstructured({"w": torch.tensor([3.0, 1.0, 1.0, 2.0])}, 0.25)["w"].tolist()
    [True, False, True, True]
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"`0 <= share <= 1` must hold, but share={share}.")
    _require_finite(scores)
    flat = torch.cat([score.detach().double().flatten() for score in scores.values()] or [torch.zeros(0)])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[torch.argsort(flat, stable=True)[: int(share * len(flat))]] = False
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def n_of_m(score: Tensor, pattern: str, into: int) -> Tensor:
    """Which entries stay when of every M side by side along a dimension the N best do.

    Exactly N stay in each group; of equal ones the first leave first.

    Args:
        score: What each entry is worth.
        pattern: ``"N:M"``.
        into: The dimension that is added up; ``network.input_dim(name)`` tells it.

    Returns:
        Bool, in the shape of `score`.

    Raises:
        ConfigError: M does not divide the dimension, or a score is not finite.

    >>> n_of_m(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), "2:4", 1).tolist()
    [[False, True, True, False]]
    """
    n, m = parse_pattern(pattern)
    if score.shape[into] % m:
        raise ConfigError(f"{pattern} needs a dimension that {m} divides, but it is {score.shape[into]}.")
    _require_finite({"score": score})
    groups = score.detach().double().movedim(into, -1).unflatten(-1, (-1, m))
    return best_of(groups, n).flatten(-2).movedim(-1, into).contiguous()


def best_of(score: Tensor, count: int) -> Tensor:
    """Which entries are the `count` best along the last dimension; of equal ones the first leave first.

    >>> best_of(torch.tensor([[1.0, 2.0, 1.0]]), 2).tolist()
    [[False, True, True]]
    """
    leaving = score.argsort(dim=-1, stable=True)[..., : score.shape[-1] - count]
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, leaving, False)


def _require_finite(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise ConfigError(f"scores must be finite, but {int((~score.isfinite()).sum())} of {name!r} are not.")
