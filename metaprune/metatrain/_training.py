"""How one network of a population comes about: trained, copied on the way, cut at random. Runs in any process."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from metaprune.data import Dataset, Split
from metaprune.edits import Keep
from metaprune.errors import ConfigError, InputError, UnsupportedModelError
from metaprune.graph import Network
from metaprune.measure.accuracy import accuracy
from metaprune.metatrain.store import Architecture, Entry, Store
from metaprune.modes import evaluating
from metaprune.plans import Plan
from metaprune.recovery import Context, Finetune, Progress, RecalibrateNorm
from metaprune.zoo import load_weights

CALIBRATION = 1024  # training images that BatchNorm is re-estimated on


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network to train, and what is made of it. All of it can be pickled.

    Args:
        name: Of the network.
        store: Where everything goes.
        key: Of the trained network in the store.
        architecture: Of the network.
        seed: Decides every random number.
        weights: A file with its weights; None trains it.
        data: What :func:`metaprune.data.load` takes.
        epochs: As in the recipe, like all that follows.
        batch_size: Likewise.
        lr: Likewise.
        images: Likewise.
        snapshots: Key in the store for each epoch, counted from 1, after which a copy is kept.
        pruned: Key in the store for each share of units that is taken out.
    """

    name: str
    store: Store
    key: str
    architecture: Architecture
    seed: int
    weights: str | None
    data: str
    epochs: int
    batch_size: int
    lr: float
    images: int | None
    snapshots: Mapping[int, str]
    pruned: Mapping[float, str]

    @property
    def done(self) -> bool:
        """Whether everything is in the store."""
        return all(key in self.store for key in (self.key, *self.snapshots.values(), *self.pruned.values()))

    def run(self, data: Dataset, device: torch.device, progress: Progress) -> str | None:
        """Make what is missing. Training that was interrupted goes on from its checkpoint.

        Returns:
            Why something could not be made, or None.

        Raises:
            ResourceError: Memory or disk is full.
        """
        train = data.train if self.images is None else data.train.subset(min(self.images, len(data.train)), seed=0)
        bench = _Bench(train, data.validation, device, progress)
        try:
            if any(key not in self.store for key in (self.key, *self.snapshots.values())):
                self._train(bench)
            if any(key not in self.store for key in self.pruned.values()):
                self._prune(bench)
        except (ConfigError, InputError, UnsupportedModelError) as error:
            return str(error)
        return None

    def _train(self, bench: "_Bench") -> None:
        model = self.architecture.build(self.seed)
        if self.weights is not None:
            load_weights(model, self.weights)
            self._keep(self.key, model.to(bench.device), bench)
            return

        def snapshot(model: nn.Module, epoch: int) -> None:
            if epoch in self.snapshots:
                with evaluating(model):
                    self._keep(self.snapshots[epoch], model, bench)

        folder = self.store.place(self.key) / f"training-{bench.device.type}"
        recipe = Finetune(
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            recalibrate=False,
            precision="auto" if bench.device.type == "cuda" else "fp32",  # casts cost small networks more
        )
        context = Context(
            train=bench.train,
            device=bench.device,
            seed=self.seed,
            folder=folder,
            resume=True,
            progress=bench.progress,
            after_epoch=snapshot,
        )
        trained = recipe.recover(model, context)
        self._keep(self.key, trained.model, bench, seconds=trained.seconds, history=trained.history)
        shutil.rmtree(folder)

    def _prune(self, bench: "_Bench") -> None:
        network = self.architecture.trace(self.store.model(self.key, self.store.read(self.key)))
        chosen = bench.train.subset(min(CALIBRATION, len(bench.train)), self.seed)
        context = Context(
            calibration=lambda: chosen.batches(
                64, shuffle=torch.Generator().manual_seed(self.seed), augment=True, device=bench.device
            ),
            device=bench.device,
        )
        for share, key in self.pruned.items():
            plan = random_plan(network, share, seed_of(self.seed, share))
            healed = RecalibrateNorm().recover(network.apply(plan).eval(), context)
            self._keep(key, healed.model, bench, seconds=healed.seconds, plan=plan)

    def _keep(
        self,
        key: str,
        model: nn.Module,
        bench: "_Bench",
        *,
        seconds: float = 0.0,
        history: Sequence[Mapping[str, float]] = (),
        plan: Plan | None = None,
    ) -> None:
        if key in self.store:
            return
        measured = accuracy(lambda images: model(images.to(bench.device)), bench.validation)
        entry = Entry(
            architecture=self.architecture,
            accuracy=measured.top1,
            images=measured.n,
            seconds=round(seconds, 3),
            history=tuple(history),
            plan=plan,
        )
        self.store.write(key, model, entry)


@dataclass(frozen=True, eq=False)
class _Bench:
    """What a job works with."""

    train: Split
    validation: Split
    device: torch.device
    progress: Progress


def random_plan(network: Network, share: float, seed: int) -> Plan:
    """Takes a share of the units, rounded down, from every prunable axis, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for axis in network.axes:
        gone = int(share * axis.size) if axis.prunable else 0
        if gone:
            kept = torch.randperm(axis.size, generator=generator)[gone:].sort().values
            edits.append(Keep(axis.name, axis.size, tuple(kept.tolist())))
    return Plan(tuple(edits), network.fingerprint, {"share": share, "seed": seed})


def seed_of(*parts: object) -> int:
    """A seed that is unrelated to that of other parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
