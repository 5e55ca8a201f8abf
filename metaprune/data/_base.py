"""What every dataset promises: named splits that never change, and batches of normalised images.

Legend of the tensor suffixes: N images, C channels, H rows, W columns.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from metaprune.errors import ConfigError, InputError, MetapruneError, did_you_mean
from metaprune.factory import FORM, import_factory, looks_importable
from metaprune.registry import Registry


class Images(Protocol):
    """Where the pixels are kept: in memory, or in files that are decoded when they are asked for."""

    @property
    def scale(self) -> float:
        """What a stored value is multiplied with before the normalisation, e.g. 1/255."""

    @property
    def lazy(self) -> bool:
        """Whether reading takes so long that the next batch is worth reading ahead."""

    def read(self, positions_N: Tensor) -> Tensor:
        """Stored images (N, C, H, W), uint8 or float32, in the order of `positions_N`."""

    def digest(self) -> bytes:
        """A hash of all contents."""


Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """Some images of a dataset, in a fixed order.

    Args:
        name: ``"train"``, ``"validation"`` or ``"test"``.
        source: Keeps the pixels.
        positions_N: Which images of `source`, int64.
        labels_all: Class of every image of `source`, int64.
        mean: Per channel, on the scale of 0 to 1.
        std: Likewise, above 0.
        augmentation: Changes a batch of stored images (N, C, H, W) at random.
    """

    name: str
    source: Images
    positions_N: Tensor
    labels_all: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation

    def __len__(self) -> int:
        return len(self.positions_N)

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 of shape (len(self),)."""
        return self.labels_all[self.positions_N]

    def images(self, indices: Tensor | None = None) -> Tensor:
        """Normalised float32 images (n, C, H, W); `indices` count within this split, None means all."""
        return self._normalise(self.source.read(self.positions_N if indices is None else self.positions_N[indices]))

    def subset(self, n: int, seed: int) -> "Split":
        """A fixed random choice of `n` images; the choice for a smaller `n` and the same seed is its beginning.

        Raises:
            ConfigError: The split has fewer than `n` images, or `n` is below 1.
        """
        if not 1 <= n <= len(self):
            raise ConfigError(f"`1 <= n <= {len(self)}` must hold for a subset of the split {self.name!r}, but n={n}.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, positions_N=self.positions_N[order[:n]])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the split, as pairs of normalised float32 images (n, C, H, W) and int64 labels (n,).

        Args:
            batch_size: Images per batch; the last batch may have fewer.
            shuffle: A CPU generator that draws the order (and what `augment` does); None keeps the fixed order. Two
                passes with equally seeded generators are equal.
            augment: Whether to change the images at random; needs `shuffle`.
            device: Where the batches are wanted. Normalisation and augmentation run there.
            drop_last: Whether to leave out a last batch that is not full.
            start: Batches to skip. The others are what they would have been, so that a run can go on in mid-pass.

        Raises:
            ConfigError: `batch_size` or `start` is too small, or `augment` lacks a generator.
        """
        if batch_size < 1 or start < 0:
            raise ConfigError(f"`batch_size >= 1` and `start >= 0` must hold, but they are {batch_size} and {start}.")
        if augment and shuffle is None:
            raise ConfigError("`augment=True` needs a generator in `shuffle`, or no run could be repeated.")
        order, seed = torch.arange(len(self)), 0
        if shuffle is not None:  # both are drawn here, so that the generator moves equally far whatever is read
            order = torch.randperm(len(self), generator=shuffle)
            seed = int(torch.randint(2**62, (), generator=shuffle))
        parts = [part for part in torch.split(order, batch_size) if len(part) == batch_size or not drop_last]
        return self._read_batches(parts, start, seed if augment else None, torch.device(device))

    def _read_batches(
        self, parts: list[Tensor], start: int, seed: int | None, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        positions = [self.positions_N[part] for part in parts[start:]]
        stored = _read_ahead(self.source, positions) if self.source.lazy else map(self.source.read, positions)
        for index, (positions_N, images_NCHW) in enumerate(zip(positions, stored, strict=True), start):
            images_NCHW = images_NCHW.to(device, non_blocking=True)
            if seed is not None:  # a generator for each batch, so that `start` need not replay what it skips
                images_NCHW = self.augmentation(images_NCHW, torch.Generator().manual_seed(seed + index))
            yield self._normalise(images_NCHW), self.labels_all[positions_N].to(device, non_blocking=True)

    def _normalise(self, images_NCHW: Tensor) -> Tensor:
        mean_C11 = torch.tensor(self.mean, device=images_NCHW.device).view(-1, 1, 1)
        std_C11 = torch.tensor(self.std, device=images_NCHW.device).view(-1, 1, 1)
        # (x * scale - mean) / std in two passes over the pixels; `mul` makes the copy, so `sub_` harms nobody
        return images_NCHW.to(torch.float32).mul(self.source.scale / std_C11).sub_(mean_C11 / std_C11)


def _read_ahead(source: Images, positions: list[Tensor]) -> Iterator[Tensor]:
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for part in positions:
            upcoming = pool.submit(source.read, part)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Images with classes, in splits that are the same on every machine.

    Networks are trained on `train`, everything is chosen on `validation`, and `test` is only ever reported.

    Args:
        name: Short name, e.g. ``"cifar10"``.
        spec: What :func:`load` was given.
        classes: Names of the classes; a label is an index into them.
        input_shape: (C, H, W).
        mean: Per channel, subtracted from values on the scale of 0 to 1.
        std: Per channel, divides after that.
        splits: ``"train"``, ``"validation"`` and ``"test"``, none of them empty.
        task: ``"classification"``.
    """

    name: str
    spec: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: Mapping[str, Split]
    task: str = "classification"

    def __post_init__(self) -> None:
        require_splits(self.spec, self.splits)

    @property
    def train(self) -> Split:
        """The split that weights are fitted on."""
        return self.splits["train"]

    @property
    def validation(self) -> Split:
        """The split that everything is chosen on."""
        return self.splits["validation"]

    @property
    def test(self) -> Split:
        """The split that is reported and never used to choose anything."""
        return self.splits["test"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of contents, labels, splits and normalisation, in hexadecimal; the folder plays no part."""
        digest = hashlib.sha256(repr((self.name, self.classes, self.input_shape, self.mean, self.std)).encode())
        sources: dict[int, bytes] = {}
        for name, split in sorted(self.splits.items()):
            if id(split.source) not in sources:
                sources[id(split.source)] = split.source.digest()
            digest.update(name.encode() + sources[id(split.source)])
            digest.update(split.positions_N.numpy().tobytes() + split.labels.numpy().tobytes())
        return digest.hexdigest()


def require_splits(spec: str, splits: Mapping[str, Sized]) -> None:
    """Raises InputError unless train, validation and test are there and none of them is empty."""
    lacking = [name for name in ("train", "validation", "test") if name not in splits or len(splits[name]) == 0]
    if lacking:
        raise InputError(f"{spec!r} must have images to train, validate and test on, but has none for {lacking}.")


DATASETS: Registry[Callable[[str], Dataset]] = Registry("dataset", "metaprune.datasets")


def load(spec: str) -> Dataset:
    """The dataset that `spec` names.

    Args:
        spec: ``digits``, ``cifar10:FOLDER``, ``imagefolder:FOLDER[?size=N]``, ``npz:FILE``, or
            ``package.module:factory`` for a function without arguments that returns a :class:`Dataset`.

    Raises:
        ConfigError: Nothing has that name; the nearest one is given.
        InputError: Files are missing, truncated or of another format.

    >>> [len(load("digits").splits[name]) for name in ("train", "validation", "test")]
    [1258, 180, 359]
    """
    name, _, argument = spec.partition(":")
    if name in DATASETS:
        return DATASETS[name](argument)
    if looks_importable(spec):
        return _from_factory(spec)
    raise ConfigError(_no_dataset(name))


def _no_dataset(name: str) -> str:
    return (
        f"{name!r} is neither a dataset nor a module that can be imported.{did_you_mean(name, DATASETS)} "
        f"Known: {', '.join(DATASETS)}, {FORM}."
    )


def _from_factory(spec: str) -> Dataset:
    try:
        dataset = import_factory(spec, _no_dataset(spec.partition(":")[0]))()
    except MetapruneError:
        raise
    except Exception as error:
        raise ConfigError(f"calling {spec!r} without arguments failed: {type(error).__name__}: {error}.") from error
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"{spec!r} must return a metaprune.data.Dataset, but it returned a {type(dataset).__name__}.")
    return dataset
