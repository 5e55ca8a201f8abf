"""Trained networks that a metanetwork is fitted to and chosen on.

A population is a folder: ``population.json`` says which networks belong to it, and the store beside it holds each under
a hash of all that decides it (architecture, seed, training, data). What is there is never made again, by whatever
recipe it is asked for; a network in training goes on from its checkpoint after a kill.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaprune.data import Dataset, load
from metaprune.errors import ConfigError, InputError, UnsupportedModelError
from metaprune.files import make_folder, read_json, write_atomically
from metaprune.metatrain._processes import number_of_workers, run_jobs
from metaprune.metatrain._training import Job, seed_of
from metaprune.metatrain.recipe import MemberSpec, Recipe
from metaprune.metatrain.store import SCHEMA, Architecture, Store
from metaprune.recovery import NoProgress, Progress, torch_device
from metaprune.run import locked
from metaprune.task import logits_of
from metaprune.zoo import MODELS, load_weights, options_for_images

RECORD = "population.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Member:
    """A network of a population.

    Args:
        name: Unique within the population.
        family: The file of the zoo that its network comes from, e.g. ``resnet``; elsewhere the first part of its spec.
        split: ``train`` or ``validation``.
        kind: ``trained``, ``snapshot`` (a copy made during training) or ``pruned`` (partly, at random).
        parent: Name of the trained network that it comes from, None for one itself.
        accuracy: Top-1 on the validation images, in percent.
        example_inputs: A batch of 2, shape (2, C, H, W), the same at every call.
        build: Makes the network with its weights, in evaluation mode, on the CPU.
        folder: Where it is stored, if it is.
    """

    name: str
    family: str
    split: str
    kind: str
    parent: str | None
    accuracy: float
    example_inputs: Tensor
    build: Callable[[], nn.Module]
    folder: Path | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The network, built when first asked for.

        Raises:
            InputError: It cannot be built as it was.
        """
        return self.build()


@dataclass(frozen=True, kw_only=True)
class _Listed:
    """What ``population.json`` says of a member; `key` is that of the store."""

    name: str
    key: str
    split: str
    kind: str
    parent: str | None = None

    def member(self, store: Store) -> Member:
        entry = store.read(self.key)
        return Member(
            name=self.name,
            family=_family(entry.architecture.model),
            split=self.split,
            kind=self.kind,
            parent=self.parent,
            accuracy=entry.accuracy,
            example_inputs=entry.architecture.example_inputs(),
            build=partial(store.model, self.key, entry),
            folder=store.place(self.key),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Population:
    """Networks to fit a metanetwork to, and others to choose it on.

    Args:
        recipe: What it was built from.
        members: In the order of the recipe; each trained network is followed by what was made of it.
        damaged: Name of each network that is not usable, and why.
    """

    recipe: Recipe
    members: tuple[Member, ...]
    damaged: tuple[tuple[str, str], ...] = ()

    @property
    def train(self) -> tuple[Member, ...]:
        """The networks that a metanetwork is fitted to.

        Raises:
            ConfigError: There is none.
        """
        return self._of("train", "to fit a metanetwork to")

    @property
    def validation(self) -> tuple[Member, ...]:
        """The networks that a metanetwork is chosen on.

        Raises:
            ConfigError: There is none.
        """
        return self._of("validation", "to choose a metanetwork on")

    def _of(self, split: str, use: str) -> tuple[Member, ...]:
        found = tuple(member for member in self.members if member.split == split)
        if not found:
            why = f" ({self.damaged[0][0]}: {self.damaged[0][1]})" if self.damaged else ""
            raise ConfigError(
                f"a population needs a usable network of the split {split!r} {use}, but of its {len(self.members)} "
                f"usable ones none is, and {len(self.damaged)} cannot be used{why}. Repair it, or give more members "
                f"`split: {split}`."
            )
        return found

    @classmethod
    def build(
        cls,
        folder: str | Path,
        recipe: Recipe,
        *,
        workers: int | None = None,
        accelerator: str = "auto",
        progress: Progress | None = None,
        seed: int = 0,
    ) -> Self:
        """Train what is missing in a folder, and load it.

        Each network is trained by one process with one thread, so that it is the same whatever the number of processes.
        Processes are spawned: a script that calls this must do so below ``if __name__ == "__main__":``, unless
        `workers` is 1.

        Args:
            folder: Made if there is none. Networks that are there already are used as they are, also damaged ones.
            recipe: What it is to be.
            workers: Processes; None takes as many as there are cores, on a GPU at most 4. With 1, this process works.
            accelerator: ``auto``, ``cpu`` or ``cuda``.
            progress: Is told about every network that is ready.
            seed: Decides every random number, together with the seed of each member.

        Raises:
            ConfigError: The recipe does not fit, or another process works in the folder; nothing was done.
            InputError: Data or a file of weights cannot be used; nothing was done.
            UnsupportedModelError: A network cannot be traced; nothing was done.
            ResourceError: Memory or disk is full. What was ready stays.
        """
        folder, device = Path(folder), torch_device(accelerator)
        if workers is not None and workers < 1:
            raise ConfigError(f"`workers >= 1` must hold, but it is {workers}.")
        store, data = Store(folder), load(recipe.data)
        present = _present(recipe)
        absent = [spec for spec in recipe.members if spec not in present]
        jobs = _checked_jobs(present, recipe, data, store, seed)
        missing = [job for job in jobs if not job.done]
        listed = [one for spec, job in zip(present, jobs) for one in _listed(spec, recipe, job)]
        make_folder(folder)
        with locked(folder):
            content = {"schema": SCHEMA, "recipe": asdict(recipe), "members": [asdict(one) for one in listed]}
            write_atomically(folder / RECORD, json.dumps(content, indent=1).encode())
            workers = number_of_workers(workers, len(missing), device)
            failed = run_jobs(missing, data, workers, device, progress or NoProgress())
        unavailable = {spec.title: f"it is optional, and there is no file {spec.weights}" for spec in absent}
        return cls._loaded(store, recipe, listed, {**unavailable, **failed})

    @classmethod
    def check(cls, folder: str | Path, recipe: Recipe, *, accelerator: str = "auto", seed: int = 0) -> None:
        """Raise what :meth:`build` would raise before it writes or trains anything."""
        torch_device(accelerator)
        _checked_jobs(_present(recipe), recipe, load(recipe.data), Store(Path(folder)), seed)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The population in a folder.

        Raises:
            InputError: There is none.
        """
        folder = Path(folder)
        content = read_json(folder / RECORD, "the record of a population")
        try:
            if content["schema"] != SCHEMA:
                raise InputError(f"{folder / RECORD} must have schema {SCHEMA}, but has another. Build it again.")
            written = content["recipe"]
            recipe = Recipe(**{**written, "members": tuple(MemberSpec(**spec) for spec in written["members"])})
            listed = [_Listed(**one) for one in content["members"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder / RECORD} must be the record of a population, but it is damaged ({error}). Build it again; "
                "what is trained is kept."
            ) from error
        return cls._loaded(Store(folder), recipe, listed, {})

    @classmethod
    def _loaded(cls, store: Store, recipe: Recipe, listed: Sequence[_Listed], known: Mapping[str, str]) -> Self:
        """`known` says why a network is not usable, where that is known."""
        members, damaged = [], dict(known)
        for one in listed:
            try:
                members.append(one.member(store))
            except InputError as error:
                damaged.setdefault(one.name, str(error))
        return cls(recipe=recipe, members=tuple(members), damaged=tuple(damaged.items()))


def _present(recipe: Recipe) -> list[MemberSpec]:
    """The members but optional ones whose weights are not there."""
    return [spec for spec in recipe.members if not spec.optional or Path(str(spec.weights)).is_file()]


def _checked_jobs(specs: Sequence[MemberSpec], recipe: Recipe, data: Dataset, store: Store, seed: int) -> list[Job]:
    """What is to be done for the members; those that are not there yet can be built and take the data."""
    jobs = [_job(spec, recipe, data, store, seed) for spec in specs]
    _require_different(jobs)
    for job in jobs:
        if not job.done:
            _check(job, data)
    return jobs


def _job(spec: MemberSpec, recipe: Recipe, data: Dataset, store: Store, seed: int) -> Job:
    """What is to be done for a member, under keys that name all that decides it."""
    epochs, lr = spec.epochs or recipe.epochs, spec.lr or recipe.lr
    source, _, name = spec.model.rpartition(":")
    followed: dict[str, int] = {}
    if source in ("", "zoo"):
        with _named(spec.title):
            followed = options_for_images(name, data.input_shape, len(data.classes))
    architecture = Architecture(
        model=f"zoo:{name}" if not source else spec.model,
        options={**followed, **spec.options},
        input_shape=data.input_shape,
    )
    if spec.weights is None:
        origin: dict[str, Any] = {"seed": [seed, spec.seed], "epochs": epochs, "lr": lr}
        origin |= {"batch_size": recipe.batch_size, "images": recipe.images}
    else:
        origin = {"weights": _digest_of(Path(spec.weights))}
    decides = {"schema": SCHEMA, "architecture": asdict(architecture), "data": data.fingerprint, **origin}
    shares = () if spec.weights else recipe.snapshots
    ends = {max(1, round(share * epochs)) for share in shares} - {epochs}
    return Job(
        name=spec.title,
        store=store,
        key=_key(decides),
        architecture=architecture,
        seed=seed_of(seed, spec.seed),
        weights=spec.weights,
        data=recipe.data,
        epochs=epochs,
        batch_size=recipe.batch_size,
        lr=lr,
        images=recipe.images,
        snapshots={epoch: _key({**decides, "epoch": epoch}) for epoch in sorted(ends)},
        pruned={share: _key({**decides, "pruned": share, "seeds": [seed, spec.seed]}) for share in recipe.pruned},
    )


def _listed(spec: MemberSpec, recipe: Recipe, job: Job) -> Iterator[_Listed]:
    yield _Listed(name=job.name, key=job.key, split=spec.split, kind="trained")
    for epoch, key in job.snapshots.items():
        name = f"{job.name} after {epoch} of {job.epochs} epochs"
        yield _Listed(name=name, key=key, split=spec.split, kind="snapshot", parent=job.name)
    for share, key in job.pruned.items():
        name = f"{job.name} without {share:.0%}"
        yield _Listed(name=name, key=key, split=spec.split, kind="pruned", parent=job.name)


def _require_different(jobs: Sequence[Job]) -> None:
    """One network under two names could be on both sides of the split."""
    first: dict[str, str] = {}
    for job in jobs:
        if first.setdefault(job.key, job.name) != job.name:
            raise ConfigError(
                f"every member must be a network of its own, but {first[job.key]!r} and {job.name!r} are one. Leave "
                "one out, or change its seed."
            )


def _check(job: Job, data: Dataset) -> None:
    """Whether the network can be built, takes the images, answers with a score for each class, and can be traced."""
    with _named(job.name):
        model = job.architecture.build()
        with torch.no_grad():
            scores = logits_of(model(job.architecture.example_inputs()))
        wanted = (2, len(data.classes))
        if scores.shape != wanted:
            raise ConfigError(
                f"2 images of {job.data!r} must give scores of shape {wanted}, but give {tuple(scores.shape)}. Give "
                "the option of its factory that sets the number of classes."
            )
        if job.weights is not None:
            load_weights(model, job.weights)
        job.architecture.trace(model)


@contextmanager
def _named(title: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, InputError, UnsupportedModelError) as error:
        raise type(error)(f"member {title!r}: {error}") from error


def _family(model: str) -> str:
    source, _, name = model.rpartition(":")
    if source != "zoo":
        return source
    factory = MODELS[name].build
    return str(getattr(factory, "func", factory).__module__.rpartition(".")[2])


def _key(decides: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"the weights of a member must be a readable file, but {path} is not ({error.strerror}). Give the file, or "
            "`optional: true` to leave that member out where there is none."
        ) from error
