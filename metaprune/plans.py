"""A plan: what to do to a network, as data.

A plan is a frozen list of edits. It can be printed, compared, saved as JSON (with safetensors beside it when edits
carry tensors), loaded, and applied to a fresh instance of the same network. The edits themselves live in
:mod:`metaprune.edits`, one file each. (The module is not called ``plan``, because ``metaprune.plan`` is a function.)
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from metaprune.errors import InputError
from metaprune.files import read_json, write_atomically
from metaprune.registry import Registry

if TYPE_CHECKING:
    from metaprune.graph import Network

SCHEMA = 1


@dataclass
class Draft:
    """What the edits of a plan ask for, collected before anything is done.

    Attributes:
        keep: Axis name -> ranks of the units that stay, ascending.
        tensors: Parameter or buffer name -> its new value, in the shape of the dense network.
    """

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Edit(ABC):
    """One change to a network. Concrete edits are frozen dataclasses registered in :data:`EDITS` under their `kind`."""

    kind: ClassVar[str]

    @abstractmethod
    def check(self, network: "Network") -> str | None:
        """Why this edit cannot be done to this network, with the name and the property that fails; None if it can."""

    @abstractmethod
    def apply(self, draft: Draft) -> None:
        """Add to the draft what the edit asks for."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The edit without its tensors, as JSON values."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that the edit carries, by name."""
        return {}

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The edit that `to_json` and `tensors` describe."""


EDITS: Registry[type[Edit]] = Registry("edit", "metaprune.edits", home="metaprune.edits")


@dataclass(frozen=True)
class Plan:
    """A frozen list of edits.

    Args:
        edits: Applied together, in order.
        network: Fingerprint of the network that the plan was made for, see ``Network.fingerprint``.
        made_by: How it was made: budget, criterion, allocator, seed, versions. Plain JSON values.
    """

    edits: tuple[Edit, ...]
    network: str = ""
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def draft(self) -> Draft:
        """What the edits ask for, together."""
        draft = Draft()
        for edit in self.edits:
            edit.apply(draft)
        return draft

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, and its tensors, if any, to the same name with ``.safetensors``.

        Args:
            path: ``plan.json``, or any name; its folder is made.

        Returns:
            The path written.
        """
        from safetensors.torch import save

        path = Path(path)
        edits: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for k, edit in enumerate(self.edits):
            edits.append({"edit": edit.kind, **edit.to_json()})
            tensors |= {f"{k}/{name}": tensor.contiguous() for name, tensor in edit.tensors().items()}
        content = {"schema": SCHEMA, "network": self.network, "made_by": dict(self.made_by), "edits": edits}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".safetensors")
        if tensors:
            write_atomically(beside, save(tensors))
        else:
            beside.unlink(missing_ok=True)
        write_atomically(path, json.dumps(content, indent=1).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            InputError: No such file, no plan, a damaged one, or one of another schema version.
        """
        from safetensors.torch import load_file

        path = Path(path)
        content = read_json(path, "a plan")
        if not isinstance(content, dict) or "edits" not in content:
            raise InputError(
                f"{path} must be a plan (an object with `edits`), but it is not. Give a file that `save` wrote."
            )
        if content.get("schema") != SCHEMA:
            raise InputError(
                f"{path} has schema {content.get('schema')!r}, but this version reads {SCHEMA}. Make the plan again."
            )
        beside = path.with_suffix(".safetensors")
        stored: dict[str, Tensor] = load_file(beside) if beside.exists() else {}
        edits = []
        for k, data in enumerate(content["edits"]):
            own = {name.partition("/")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{k}/")}
            try:
                edits.append(EDITS[data["edit"]].from_json(data, own))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"edit {k} of {path} is damaged ({type(error).__name__}: {error}).") from error
        return cls(tuple(edits), content.get("network", ""), content.get("made_by", {}))
