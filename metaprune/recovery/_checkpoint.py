"""Checkpoints of work on a network: one safetensors file with JSON in its header, whole at any moment."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError, ResourceError
from metaprune.files import write_atomically

_HEADER = "checkpoint"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where some work stood.

    Args:
        config: All that decides the result, as plain JSON; work goes on only under an equal one.
        state: Counters and sums, as plain JSON.
        tensors: Weights, buffers and what the optimiser remembers, by name.
    """

    config: Mapping[str, Any]
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Replace the file at `path`.

        Raises:
            ResourceError: It cannot be written; the file is as it was.
        """
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors.items()}
        header = json.dumps({"config": dict(self.config), "state": dict(self.state)})
        try:
            for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed while it wrote
                leftover.unlink()
            write_atomically(path, save(copies, {_HEADER: header}))
        except (OSError, InputError) as error:
            raise ResourceError(
                f"a checkpoint must be written to {path}, but that failed ({error}). Free some space; the one before "
                "it is kept."
            ) from error

    @classmethod
    def load(cls, path: Path, config: Mapping[str, Any]) -> "Checkpoint":
        """Read what `save` wrote, for work under `config`.

        Raises:
            ConfigError: It was written under another config; what differs is named.
            InputError: It is damaged.
        """
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            before, state = header["config"], header["state"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} must be a checkpoint, but it cannot be read ({error}). Delete it to start from the beginning."
            ) from error
        differences = _differences(before, json.loads(json.dumps(dict(config))))
        if differences:
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise ConfigError(
                f"{path} is a checkpoint of other work: {'; '.join(differences[:3])}{more}. Give the old values, or "
                "leave out --resume to start from the beginning."
            )
        return cls(before, state, tensors)


def _differences(before: Any, after: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = list(dict.fromkeys([*after, *before]))
        return [
            line for name in names for line in _differences(before.get(name), after.get(name), f"{path} {name}".strip())
        ]
    return [] if before == after else [f"{path} was {json.dumps(before)} and is now {json.dumps(after)}"]


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter, by name."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of every parameter, in hexadecimal.

    Buffers play no part: BatchNorm statistics that a GPU sums in any order must not keep a run from going on.
    """
    return digest(dict(model.named_parameters()))


def digest(values: Any) -> str:
    """SHA-256 of the tensors in tuples, lists and dicts, in hexadecimal."""
    total = hashlib.sha256()
    for path, tensor in _tensors(values, ""):
        total.update(f"{path} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _tensors(values: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(values, Tensor):
        yield path, values
    elif isinstance(values, Mapping | tuple | list):
        for name, part in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _tensors(part, f"{path}/{name}")


def plain(value: Any) -> Any:
    """A setting as JSON that is equal in every process: dataclasses by their fields, anything else by its full name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    named = value if hasattr(value, "__qualname__") else type(value)
    full_name = f"{named.__module__}.{named.__qualname__}"
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": full_name} | {part.name: plain(getattr(value, part.name)) for part in fields(value)}
    return full_name
