"""Metanetworks as files: safetensors, whose header says what they are built from and how they came about."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from metaprune.errors import ConfigError, InputError
from metaprune.files import make_folder, write_atomically
from metaprune.metanet.model import Metanet, Shape
from metaprune.metanet.paper import PaperMetanet, PaperShape

SCHEMA = 1
SHAPES: dict[str, type[Shape] | type[PaperShape]] = {"default": Shape, "paper": PaperShape}  # by mode
SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A metanetwork and where it comes from.

    Attributes:
        metanet: In evaluation mode.
        card: How it was trained: population, data, seeds, numbers. Plain JSON values.
    """

    metanet: Metanet | PaperMetanet
    card: Mapping[str, Any]


def new_metanet(shape: Shape | PaperShape) -> Metanet | PaperMetanet:
    """A metanetwork of a shape, with first weights."""
    return PaperMetanet(shape) if isinstance(shape, PaperShape) else Metanet(shape)


def save_checkpoint(metanet: Metanet | PaperMetanet, path: str | Path, card: Mapping[str, Any] | None = None) -> Path:
    """Write a metanetwork.

    Raises:
        InputError: The folder cannot be written.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in metanet.state_dict().items()}
    content = {"schema": SCHEMA, "shape": metanet.shape.to_json(), "card": dict(card or {})}
    make_folder(path.parent)
    write_atomically(path, save(tensors, {"metanet": json.dumps(content)}))
    return path


def load_checkpoint(name: str | Path) -> Checkpoint:
    """Read a metanetwork.

    Args:
        name: ``default`` or another one that ships with the package, or a file.

    Raises:
        ConfigError: There is none of that name.
        InputError: The file is damaged, or of another schema version.
    """
    path = _find(name)
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})["metanet"])
            if content["schema"] != SCHEMA:
                raise InputError(
                    f"{path} has schema {content['schema']!r}, but this version reads {SCHEMA}. Train it again with "
                    "`metaprune metatrain`, or install the version that wrote it."
                )
            metanet = new_metanet(SHAPES[content["shape"].get("mode", "default")](**content["shape"]))
            metanet.load_state_dict({key: file.get_tensor(key) for key in list(file.keys())})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise InputError(
            f"{path} must be a metanetwork, but cannot be read ({type(error).__name__}: {error})."
        ) from error
    return Checkpoint(metanet.eval().requires_grad_(False), content["card"])


def shipped() -> list[str]:
    """Names of the metanetworks that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def _find(name: str | Path) -> Path:
    inside = SHIPPED / f"{name}.safetensors"
    if isinstance(name, str) and inside.parent == SHIPPED and inside.is_file():
        return inside
    if not Path(name).is_file():
        raise ConfigError(
            f"a metanetwork must be one that ships ({', '.join(shipped())}) or a .safetensors file, but {str(name)!r} "
            "is neither. `metaprune metatrain` makes one."
        )
    return Path(name)
