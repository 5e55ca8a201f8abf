"""Images that fit into memory: one tensor of stored values, which all splits share."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metaprune.data._base import Augmentation, Dataset, Split, require_splits
from metaprune.data.augment import CropFlip
from metaprune.errors import InputError


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Stored images (N, C, H, W), uint8 or float32, and the factor that brings them to the scale of 0 to 1."""

    images_NCHW: Tensor
    scale: float
    lazy: bool = False

    def read(self, positions_N: Tensor) -> Tensor:
        """The images at `positions_N`, as stored."""
        return self.images_NCHW[positions_N]

    def digest(self) -> bytes:
        """SHA-256 of the stored values."""
        return hashlib.sha256(self.images_NCHW.flatten().numpy().data).digest()


def from_arrays(
    name: str,
    spec: str,
    splits: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    *,
    classes: tuple[str, ...],
    scale: float,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    augmentation: Augmentation | None = None,
) -> Dataset:
    """A dataset of images in memory; factories of users may call it.

    Args:
        name: Short name.
        spec: What named it.
        splits: For ``train``, ``validation`` and ``test``: images (N, C, H, W) in uint8 or float32, labels (N,) in
            int64, and the positions in both that belong to the split. Splits that pass the same tensors share them.
        classes: Names of the classes.
        scale: Factor that brings stored values to the scale of 0 to 1.
        mean: Per channel; None takes that of the training images.
        std: Likewise.
        augmentation: Random change of a training batch; None shifts by an eighth of the height.

    Raises:
        InputError: A split is missing or empty, shapes differ, a value is not finite, or a label has no class.
    """
    require_splits(spec, splits)
    shape = tuple(splits["train"][0].shape[1:])
    for split_name, (images_NCHW, labels_N, _) in splits.items():
        _check(f"{spec!r}, split {split_name!r}", images_NCHW, labels_N, shape, len(classes))
    if mean is None or std is None:
        images_NCHW, _, positions_N = splits["train"]
        mean, std = _statistics(images_NCHW[positions_N], scale)
    if len(mean) != shape[0] or len(std) != shape[0] or min(std) <= 0:
        raise InputError(f"{spec!r} needs {shape[0]} means and as many positive stds, but has {mean} and {std}.")
    augmentation = augmentation or CropFlip(pad=max(1, shape[1] // 8), flip=False)
    sources = {id(images): ArrayImages(images.contiguous(), scale) for images, _, _ in splits.values()}
    return Dataset(
        name=name,
        spec=spec,
        classes=classes,
        input_shape=(shape[0], shape[1], shape[2]),
        mean=mean,
        std=std,
        splits={
            split_name: Split(
                name=split_name,
                source=sources[id(images)],
                positions_N=positions_N,
                labels_all=labels_N,
                mean=mean,
                std=std,
                augmentation=augmentation,
            )
            for split_name, (images, labels_N, positions_N) in splits.items()
        },
    )


def _check(where: str, images_NCHW: Tensor, labels_N: Tensor, shape: tuple[int, ...], classes: int) -> None:
    if images_NCHW.dtype not in (torch.uint8, torch.float32) or images_NCHW.ndim != 4:
        raise InputError(
            f"images must be uint8 or float32 of shape (n, channels, height, width), but {where} has "
            f"{images_NCHW.dtype} of shape {tuple(images_NCHW.shape)}."
        )
    if tuple(images_NCHW.shape[1:]) != shape:
        raise InputError(
            f"all splits must have images of one shape, but {where} has {tuple(images_NCHW.shape[1:])} where the "
            f"training images have {shape}."
        )
    if len(images_NCHW) == 0 or labels_N.shape != images_NCHW.shape[:1] or labels_N.dtype != torch.int64:
        raise InputError(
            f"there must be an int64 label for each of at least 1 image, but {where} has {len(images_NCHW)} images and "
            f"labels {labels_N.dtype} of shape {tuple(labels_N.shape)}."
        )
    if not 0 <= int(labels_N.min()) <= int(labels_N.max()) < classes:
        raise InputError(
            f"`0 <= label < {classes}` must hold, but {where} has labels from {int(labels_N.min())} to "
            f"{int(labels_N.max())}."
        )
    if images_NCHW.is_floating_point() and not images_NCHW.isfinite().all():
        bad = int((~images_NCHW.isfinite()).sum())
        raise InputError(f"images must be finite, but {where} has {bad} values that are NaN or infinite.")


def _statistics(images_NCHW: Tensor, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = [images_NCHW[:, channel].double() * scale for channel in range(images_NCHW.shape[1])]
    mean = tuple(float(values.mean()) for values in channels)
    std = tuple(float(values.std(correction=0)) for values in channels)
    return mean, tuple(value if value > 0 else 1.0 for value in std)  # a constant channel stays at 0
