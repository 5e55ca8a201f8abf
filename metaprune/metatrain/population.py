"""Trained networks that a metanetwork is fitted to and chosen on.

A population is a folder: ``population.json`` says which networks belong to it, and the store beside it holds each under
a hash of all that decides it (architecture, seed, training, data). What is there is never made again, by whatever
recipe it is asked for; a network in training goes on from its checkpoint after a kill.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaprune.data import Dataset, load
from metaprune.errors import ConfigError, InputError
from metaprune.files import make_folder, read_json, write_atomically
from metaprune.metatrain._training import Job, seed_of
from metaprune.metatrain.recipe import MemberSpec, Recipe
from metaprune.metatrain.store import SCHEMA, Architecture, Entry, Store
from metaprune.recovery import NoProgress, Progress, torch_device
from metaprune.run import locked
from metaprune.zoo import MODELS, load_weights, options_for_images

RECORD = "population.json"
GPU_WORKERS = 4  # networks of this size leave most of a GPU idle


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What ``population.json`` says of a member.

    Args:
        name: Unique within the population.
        key: Its key in the store.
        split: ``train`` or ``validation``.
        kind: ``trained``, ``snapshot`` (a copy made during training) or ``pruned`` (partly, at random).
        parent: Name of the trained network that it comes from, None for one itself.
    """

    name: str
    key: str
    split: str
    kind: str
    parent: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Member:
    """A network of a population.

    Args:
        listed: Its name, split and kind.
        entry: What the store knows of it.
        store: Where it is.
    """

    listed: Listed
    entry: Entry
    store: Store

    @property
    def name(self) -> str:
        """Unique within the population."""
        return self.listed.name

    @property
    def split(self) -> str:
        """``train`` or ``validation``."""
        return self.listed.split

    @property
    def kind(self) -> str:
        """``trained``, ``snapshot`` or ``pruned``."""
        return self.listed.kind

    @property
    def parent(self) -> str | None:
        """Name of the trained network that it comes from, None for one itself."""
        return self.listed.parent

    @property
    def accuracy(self) -> float:
        """Top-1 on the validation images, in percent."""
        return self.entry.accuracy

    @property
    def example_inputs(self) -> Tensor:
        """A batch of 2, shape (2, C, H, W), the same at every call."""
        return self.entry.architecture.example_inputs()

    @property
    def family(self) -> str:
        """The file of the zoo that its network comes from, e.g. ``resnet``; elsewhere the first part of its spec."""
        source, _, name = self.entry.architecture.model.rpartition(":")
        if source not in ("", "zoo"):
            return source
        factory = MODELS[name].build
        return str(getattr(factory, "func", factory).__module__.rpartition(".")[2])

    @cached_property
    def model(self) -> nn.Module:
        """The network with its weights, in evaluation mode, on the CPU; built when first asked for.

        Raises:
            InputError: It cannot be built as it was.
        """
        return self.store.model(self.listed.key, self.entry)


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
        absent = [spec for spec in recipe.members if spec.optional and not Path(str(spec.weights)).is_file()]
        present = [spec for spec in recipe.members if spec not in absent]
        jobs = [_job(spec, recipe, data, store, seed) for spec in present]
        missing = [job for job in jobs if not job.done]
        for job in missing:
            _check(job, data)
        listed = [one for spec, job in zip(present, jobs) for one in _listed(spec, recipe, job)]
        make_folder(folder)
        with locked(folder):
            content = {"schema": SCHEMA, "recipe": asdict(recipe), "members": [asdict(one) for one in listed]}
            write_atomically(folder / RECORD, json.dumps(content, indent=1).encode())
            failed = _run(missing, data, _workers(workers, len(missing), device), device, progress or NoProgress())
        unavailable = {spec.title: f"it is optional, and there is no file {spec.weights}" for spec in absent}
        return cls._loaded(store, recipe, listed, {**unavailable, **failed})

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
            listed = [Listed(**one) for one in content["members"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder / RECORD} must be the record of a population, but it is damaged ({error}). Build it again; "
                "what is trained is kept."
            ) from error
        return cls._loaded(Store(folder), recipe, listed, {})

    @classmethod
    def _loaded(cls, store: Store, recipe: Recipe, listed: Sequence[Listed], known: Mapping[str, str]) -> Self:
        """`known` says why a network is not usable, where that is known."""
        members, damaged = [], dict(known)
        for one in listed:
            try:
                members.append(Member(listed=one, entry=store.read(one.key), store=store))
            except InputError as error:
                damaged.setdefault(one.name, str(error))
        return cls(recipe=recipe, members=tuple(members), damaged=tuple(damaged.items()))


def _job(spec: MemberSpec, recipe: Recipe, data: Dataset, store: Store, seed: int) -> Job:
    """What is to be done for a member, under keys that name all that decides it."""
    epochs, lr = spec.epochs or recipe.epochs, spec.lr or recipe.lr
    source, _, name = spec.model.rpartition(":")
    followed = options_for_images(name, data.input_shape, len(data.classes)) if source in ("", "zoo") else {}
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
    ends = {} if spec.weights else {max(1, round(share * epochs)): None for share in recipe.snapshots}
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
        snapshots={epoch: _key({**decides, "epoch": epoch}) for epoch in sorted(ends) if epoch < epochs},
        pruned={share: _key({**decides, "pruned": share, "seeds": [seed, spec.seed]}) for share in recipe.pruned},
    )


def _listed(spec: MemberSpec, recipe: Recipe, job: Job) -> Iterator[Listed]:
    yield Listed(name=job.name, key=job.key, split=spec.split, kind="trained")
    for epoch, key in job.snapshots.items():
        name = f"{job.name} after {epoch} of {job.epochs} epochs"
        yield Listed(name=name, key=key, split=spec.split, kind="snapshot", parent=job.name)
    for share, key in job.pruned.items():
        name = f"{job.name} without {share:.0%}"
        yield Listed(name=name, key=key, split=spec.split, kind="pruned", parent=job.name)


def _check(job: Job, data: Dataset) -> None:
    """Whether the network can be built, takes the images, answers with a score for each class, and can be traced."""
    model = job.architecture.build()
    with torch.no_grad():
        scores = model(job.architecture.example_inputs())
    wanted = (2, len(data.classes))
    if not isinstance(scores, Tensor) or scores.shape != wanted:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(
            f"member {job.name!r} must answer 2 images of {job.data!r} with scores of shape {wanted}, but answers with "
            f"{found}. Give the option of its factory that sets the number of classes."
        )
    if job.weights is not None:
        load_weights(model, job.weights)
    job.architecture.trace(model)


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


def _workers(asked: int | None, jobs: int, device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(jobs, asked or (cores if device.type == "cpu" else min(cores, GPU_WORKERS))))


def _run(jobs: Sequence[Job], data: Dataset, workers: int, device: torch.device, progress: Progress) -> dict[str, str]:
    """Do all jobs; why those failed that did, by name."""
    failed: dict[str, str] = {}
    progress.start(len(jobs), "networks", "training the population")
    try:
        for job, why in _outcomes(jobs, data, workers, device):
            if why is not None:
                failed[job.name] = why
            progress.advance(1, f"{job.name}: {why or 'ready'}")
    finally:
        progress.close()
    return failed


def _outcomes(
    jobs: Sequence[Job], data: Dataset, workers: int, device: torch.device
) -> Iterator[tuple[Job, str | None]]:
    if workers == 1:
        with _repeatable():
            for job in jobs:
                yield job, job.run(data, device, NoProgress())
        return
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    with ProcessPoolExecutor(workers, spawn, _begin_worker, (stop,)) as pool:
        running = {pool.submit(_run_in_worker, job, device): job for job in jobs}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            stop.set()  # the workers write their checkpoints and end
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _repeatable() -> Iterator[None]:
    """One thread and repeatable kernels, so that a network does not depend on what else this machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


_stop: Event | None = None


def _begin_worker(stop: Event) -> None:
    """Ctrl-C is for the parent, which tells its workers; they end with it, also when it is killed."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_the_parent() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def _run_in_worker(job: Job, device: torch.device) -> str | None:
    with _repeatable():
        return job.run(_dataset(job.data), device, _UntilStopped())


@cache
def _dataset(spec: str) -> Dataset:
    return load(spec)


class _UntilStopped(NoProgress):
    """Ends the work between two steps once the parent says so."""

    def advance(self, amount: int = 1, status: str = "") -> None:
        """Interrupt, if that was asked for."""
        if _stop is not None and _stop.is_set():
            raise KeyboardInterrupt
