"""A plan: what to do to a network, as data.

A plan is a frozen list of edits. It can be printed, compared, saved as JSON (with safetensors beside it when edits
carry tensors), loaded, and applied to a fresh instance of the same network. The edits themselves live in
:mod:`metaprune.edits`, one file each. (The module is not called ``plan``, because ``metaprune.plan`` is a function.)
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from metaprune.errors import ConfigError, InputError
from metaprune.files import make_folder, read_json, write_atomically
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
        drop: Residual branches that leave whole, by name.
        masks: Weight -> which of its entries stay; the others become zero, whatever values it is given.
        means: Weight -> means of its inputs; what leaves among these is absorbed into the bias of its layer.
    """

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)


class Edit(ABC):
    """One change to a network. Concrete edits are frozen dataclasses registered in :data:`EDITS` under their `kind`."""

    kind: ClassVar[str]

    @abstractmethod
    def check(self, network: "Network") -> str | None:
        """Why this edit cannot be done to this network, with the name and the property that fails; None if it can."""

    def check_left(self, network: "Network", draft: Draft) -> str | None:
        """Why this edit does not go together with the others of its plan, as `draft` has them; None if it does."""
        return None

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

    def __post_init__(self) -> None:
        """What is saved is what is compared: lists and plain dicts.

        Raises:
            ConfigError: `made_by` holds something that is no JSON value.
        """
        try:
            plain = json.loads(json.dumps(dict(self.made_by)))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"made_by must hold plain JSON values, but {error}.") from error
        object.__setattr__(self, "edits", tuple(self.edits))
        object.__setattr__(self, "made_by", plain)

    def draft(self) -> Draft:
        """What the edits ask for, together."""
        draft = Draft()
        for edit in self.edits:
            edit.apply(draft)
        return draft

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON. Tensors that edits carry go beside it, into a file named after their content.

        The JSON names that file and its hash and is written last, so a kill leaves the old plan or the new one.

        Args:
            path: ``plan.json``, or any name; its folder is made.

        Returns:
            The path written.

        Raises:
            InputError: The folder cannot be written.
        """
        from safetensors.torch import save

        path = Path(path)
        content: dict[str, Any] = {"schema": SCHEMA, "network": self.network, "made_by": self.made_by}
        content["edits"] = [{"edit": edit.kind, **edit.to_json()} for edit in self.edits]
        tensors = {
            f"{k}/{name}": tensor.detach().cpu().contiguous().clone()  # of its own memory, as safetensors wants it
            for k, edit in enumerate(self.edits)
            for name, tensor in edit.tensors().items()
        }
        data = save(tensors) if tensors else b""
        if tensors:
            digest = hashlib.sha256(data).hexdigest()
            content["tensors"] = {"file": f"{path.stem}-{digest[:12]}.safetensors", "sha256": digest}
        text = json.dumps(content, indent=1)
        make_folder(path.parent)
        before = _named_tensors(path)
        if tensors:
            write_atomically(path.parent / content["tensors"]["file"], data)
        write_atomically(path, text.encode())
        if before and before != content.get("tensors", {}).get("file"):
            (path.parent / before).unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote.

        Raises:
            InputError: No such file, no plan, a damaged one, or one of another schema version.
        """
        path = Path(path)
        content = read_json(path, "a plan")
        if not isinstance(content, dict) or not isinstance(content.get("edits"), list):
            raise InputError(f"{path} must be a plan (an object with a list `edits`), but is not.")
        if content.get("schema") != SCHEMA:
            raise InputError(
                f"{path} has schema {content.get('schema')!r}, but this version reads {SCHEMA}. Make the plan again."
            )
        unknown = set(content) - {"schema", "network", "made_by", "edits", "tensors"}
        network, made_by = content.get("network"), content.get("made_by")
        if unknown or not isinstance(network, str) or not isinstance(made_by, dict):
            raise InputError(f"{path} is damaged: {sorted(unknown) or 'network or made_by'} cannot be read.")
        stored = _read_tensors(path, content.get("tensors"))
        edits = []
        for k, data in enumerate(content["edits"]):
            own = {name.partition("/")[2]: stored.pop(name) for name in list(stored) if name.startswith(f"{k}/")}
            try:
                data = dict(data)
                edits.append(EDITS[data.pop("edit")].from_json(data, own))
            except (KeyError, TypeError, ValueError, ConfigError) as error:
                raise InputError(f"edit {k} of {path} is damaged ({type(error).__name__}: {error}).") from error
        if stored:
            raise InputError(f"{path} is damaged: tensor {next(iter(stored))!r} belongs to no edit.")
        return cls(tuple(edits), network, made_by)


def _named_tensors(path: Path) -> str | None:
    """The file that the plan now at `path`, if there is one, keeps its tensors in."""
    try:
        name = json.loads(path.read_text())["tensors"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and Path(name).name == name else None


def _read_tensors(path: Path, named: Any) -> dict[str, Tensor]:
    from safetensors.torch import load

    if named is None:
        return {}
    try:
        name, digest = str(named["file"]), named["sha256"]
        beside = path.parent / name
        if Path(name).name != name:
            raise InputError(f"{path} must name a file beside it for its tensors, but names {name!r}.")
        data = beside.read_bytes()
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"the tensors of {path} cannot be read ({type(error).__name__}: {error}).") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise InputError(f"{beside} is damaged: its content is not the one that {path.name} was written with.")
    return load(data)
