"""Images and labels in a numpy archive: ``x_train y_train x_test y_test``, or ``x y``.

Images are uint8 (0 to 255) or floating point, of shape (n, channels, height, width) or (n, height, width). The archive
may also hold ``x_validation y_validation``, ``mean`` and ``std`` (one value a channel; without them those of the
training images are taken) and ``classes`` (names). Without validation images, a tenth of the training images is held
out by a hash of each; with ``x y`` alone the images are cut 70/10/20.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metaprune.data._arrays import from_arrays
from metaprune.data._base import DATASETS, Dataset
from metaprune.data._cut import cut, image_keys
from metaprune.errors import ConfigError, InputError, did_you_mean

Arrays = dict[str, npt.NDArray[Any]]
Triple = tuple[Tensor, Tensor, Tensor]  # images, labels, positions

KNOWN = ("x", "y", "x_train", "y_train", "x_validation", "y_validation", "x_test", "y_test", "mean", "std", "classes")


@DATASETS.register("npz")
def npz(argument: str) -> Dataset:
    """The dataset in one ``.npz`` file, read without pickles.

    Args:
        argument: The file.

    Raises:
        ConfigError: No file is given.
        InputError: The file is missing or unreadable, an array is missing, or shapes, types or values do not fit.
    """
    if not argument:
        raise ConfigError("`npz` needs a file: npz:FILE.")
    path = Path(argument)
    arrays = _read(path)
    unknown = sorted(arrays.keys() - set(KNOWN))
    if unknown:
        raise InputError(
            f"{path} holds an array {unknown[0]!r} that has no meaning here.{did_you_mean(unknown[0], KNOWN)} "
            f"Known: {', '.join(KNOWN)}."
        )
    splits = _splits(path, arrays)
    if len({images.dtype for images, _, _ in splits.values()}) > 1:
        raise InputError(f"the images in {path} must all be uint8 or all be floating point, but they are mixed.")
    count = 1 + max(int(labels.max()) for _, labels, _ in splits.values())
    total = sum(len(positions) for _, _, positions in splits.values())
    if count > total:
        raise InputError(
            f"labels must count the classes from 0, but {path} has the label {count - 1} in {total} images."
        )
    if ("mean" in arrays) != ("std" in arrays):
        raise InputError(f"{path} must hold both `mean` and `std` or neither, but holds one of them.")
    classes = tuple(map(str, arrays.get("classes", np.arange(count)).tolist()))
    return from_arrays(
        "npz",
        f"npz:{argument}",
        splits,
        classes=classes,
        scale=1.0 if splits["train"][0].is_floating_point() else 1 / 255,
        mean=_per_channel(path, arrays, "mean"),
        std=_per_channel(path, arrays, "std"),
    )


def _read(path: Path) -> Arrays:
    if not path.is_file():
        siblings = [str(sibling) for sibling in path.parent.glob("*.npz")]
        raise InputError(f"there is no file {path}.{did_you_mean(str(path), siblings)}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zip and header parsers raise many kinds
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a numpy archive without pickles: "
            f"{str(error).rstrip('.')}. It may be truncated; write it with numpy.savez."
        ) from error


def _splits(path: Path, arrays: Arrays) -> dict[str, Triple]:
    names = ("train", "validation", "test")
    if "x" in arrays or "y" in arrays:
        images, labels = _pair(path, arrays, "")
        parts = cut(image_keys(images, "npz"), (0.7, 0.1, 0.2), "images")
        return {name: (images, labels, part) for name, part in zip(names, parts, strict=True)}
    train, train_labels = _pair(path, arrays, "_train")
    test, test_labels = _pair(path, arrays, "_test")
    splits = {"test": (test, test_labels, torch.arange(len(test)))}
    if "x_validation" in arrays or "y_validation" in arrays:
        images, labels = _pair(path, arrays, "_validation")
        splits["train"] = (train, train_labels, torch.arange(len(train)))
        splits["validation"] = (images, labels, torch.arange(len(images)))
    else:
        parts = cut(image_keys(train, "npz"), (0.9, 0.1), "training images")
        splits["train"], splits["validation"] = ((train, train_labels, part) for part in parts)
    return {name: splits[name] for name in names}


def _pair(path: Path, arrays: Arrays, suffix: str) -> tuple[Tensor, Tensor]:
    for name in (f"x{suffix}", f"y{suffix}"):
        if name not in arrays:
            raise InputError(f"{path} must hold an array {name!r}, but it holds {', '.join(sorted(arrays)) or 'none'}.")
    return _images(path, f"x{suffix}", arrays[f"x{suffix}"]), _labels(path, f"y{suffix}", arrays[f"y{suffix}"])


def _images(path: Path, name: str, array: npt.NDArray[Any]) -> Tensor:
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name!r} in {path} must be uint8 or floating point, but it is {array.dtype}.")
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4:
        raise InputError(
            f"{name!r} in {path} must have the shape (n, channels, height, width) or (n, height, width), but it has "
            f"{array.shape}."
        )
    if array.shape[3] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
        raise InputError(
            f"{name!r} in {path} has the shape {array.shape}, with channels last; channels come before height and "
            f"width: store {name}.transpose(0, 3, 1, 2)."
        )
    if array.dtype != np.uint8:
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise InputError(f"{name!r} in {path} must be finite, but {bad} values are NaN or infinite.")
        array = array.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))


def _labels(path: Path, name: str, array: npt.NDArray[Any]) -> Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1 or array.size == 0 or array.min() < 0:
        raise InputError(
            f"{name!r} in {path} must hold a whole number of at least 0 for each image, shape (n,), but it is "
            f"{array.dtype} of shape {array.shape}" + (f" from {array.min()}." if array.size else ".")
        )
    return torch.from_numpy(array.astype(np.int64))


def _per_channel(path: Path, arrays: Arrays, name: str) -> tuple[float, ...] | None:
    if name not in arrays:
        return None
    values = arrays[name].reshape(-1)
    if not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
        raise InputError(f"{name!r} in {path} must hold one finite number for each channel, but it is {values}.")
    return tuple(map(float, values))
