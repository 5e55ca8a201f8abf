"""Trained networks on disk: one folder each, named after what decides the network.

A folder holds ``model.safetensors``, for a cut network ``plan.json``, and ``entry.json``, which names the hash of the
weights and is written last: without it there is no entry, and a kill at any moment leaves none that is half there.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from metaprune.errors import InputError, MetapruneError
from metaprune.files import make_folder, read_json, write_atomically
from metaprune.graph import Network, trace
from metaprune.plans import Plan
from metaprune.zoo import load_weights, resolve_model

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a dense network is built.

    Args:
        model: What :func:`metaprune.zoo.resolve_model` takes.
        options: Of its factory, all of them that matter.
        input_shape: (C, H, W) of one image.
    """

    model: str
    options: Mapping[str, Any]
    input_shape: tuple[int, int, int]

    def build(self, seed: int = 0) -> nn.Module:
        """The network with first weights drawn from `seed`, in evaluation mode; torch's generator is left as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return resolve_model(self.model, input_shape=(2, *self.input_shape), options=self.options).module.eval()

    def example_inputs(self) -> Tensor:
        """A batch of 2, shape (2, C, H, W), the same at every call."""
        return torch.randn(2, *self.input_shape, generator=torch.Generator().manual_seed(0))

    def trace(self, model: nn.Module) -> Network:
        """The axes of such a network."""
        return trace(model, self.example_inputs())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a stored network.

    Args:
        architecture: Of the dense network that it is, or was cut from.
        accuracy: On the validation images, in percent.
        images: How many those are.
        seconds: What it took to make.
        history: One entry for each epoch.
        plan: What was cut; None for a dense network.
    """

    architecture: Architecture
    accuracy: float
    images: int
    seconds: float = 0.0
    history: tuple[Mapping[str, float], ...] = ()
    plan: Plan | None = None


@dataclass(frozen=True)
class Store:
    """The folder of a population."""

    folder: Path

    def place(self, key: str) -> Path:
        """The folder of one network."""
        return self.folder / "networks" / key

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry, damaged or not."""
        return (self.place(key) / "entry.json").exists()

    def write(self, key: str, model: nn.Module, entry: Entry) -> None:
        """Keep a network.

        Raises:
            InputError: The folder cannot be written.
            ResourceError: The disk is full.
        """
        place = self.place(key)
        make_folder(place)
        for leftover in place.glob(".*"):  # of a process that was killed while it wrote
            leftover.unlink()
        data = save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in _tensors(model)})
        if entry.plan is not None:
            entry.plan.save(place / "plan.json")
        write_atomically(place / "model.safetensors", data)
        content = {
            "schema": SCHEMA,
            **asdict(replace(entry, plan=None)),
            "plan": None if entry.plan is None else "plan.json",
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomically(place / "entry.json", json.dumps(content, indent=1).encode())

    def read(self, key: str) -> Entry:
        """What is known of a network, once its files are found whole.

        Raises:
            InputError: There is no such entry, or it is damaged.
        """
        place = self.place(key)
        if key not in self:
            raise InputError(f"it is not in the store ({place}). Build the population again to train it.")
        with _damage(place):
            content = read_json(place / "entry.json", "an entry")
            if content.pop("schema") != SCHEMA:
                raise InputError(f"it must be of schema {SCHEMA}")
            if hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest() != content.pop("sha256"):
                raise InputError("its weights are not those that were written")
            built = content.pop("architecture")
            content["plan"] = Plan.load(place / content["plan"]) if content["plan"] else None
            return Entry(architecture=Architecture(**{**built, "input_shape": tuple(built["input_shape"])}), **content)

    def model(self, key: str, entry: Entry) -> nn.Module:
        """The network, in evaluation mode.

        Raises:
            InputError: It cannot be built as it was.
        """
        place = self.place(key)
        model = entry.architecture.build()
        with _damage(place):
            if entry.plan is not None:
                model = entry.architecture.trace(model).apply(entry.plan).eval()
            load_weights(model, place / "model.safetensors")
        return model


@contextmanager
def _damage(place: Path) -> Iterator[None]:
    try:
        yield
    except (MetapruneError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = str(error).rstrip(".") or type(error).__name__
        raise InputError(f"{place} is damaged: {said}. Delete it to train that network again.") from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that a state dict holds; tied weights once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
