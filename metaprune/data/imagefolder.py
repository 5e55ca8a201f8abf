"""Image files in one folder per class, decoded when they are asked for.

Two layouts are read. With splits: ``train/CLASS/…``, ``validation/CLASS/…`` (or ``val``), ``test/CLASS/…``. Without:
``CLASS/…``, which is cut 70/10/20 by a hash of each path below the folder. Where a layout with splits lacks
``validation``, a tenth of ``train`` is held out by the same hash. Where it lacks ``test`` (ImageNet's layout), the
images of ``validation`` are the test split and a tenth of ``train`` is held out to choose on.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metaprune.data._base import DATASETS, Dataset, Split
from metaprune.data._cut import content_keys, cut
from metaprune.data.augment import CropFlip
from metaprune.errors import ConfigError, InputError, did_you_mean

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, which pretrained weights expect
STD = (0.229, 0.224, 0.225)
SIZE = 224
HEAD_BYTES = 65_536
SPLIT_FOLDERS = {"train", "validation", "val", "test"}

Labelled = list[tuple[str, str]]  # path below the folder, class


@dataclass(frozen=True, eq=False)
class FileImages:
    """Image files; each is read as RGB, its shorter side brought to `size`, and its centre cut out.

    Args:
        folder: Where the paths start.
        paths: Below `folder`, with forward slashes.
        size: Height and width in pixels.
    """

    folder: Path
    paths: tuple[str, ...]
    size: int
    scale: float = 1 / 255
    lazy: bool = True

    def read(self, positions_N: Tensor) -> Tensor:
        """Decoded images (N, 3, size, size), uint8.

        Raises:
            InputError: A file is no image, or is truncated.
        """
        images_NHWC = np.empty((len(positions_N), self.size, self.size, 3), dtype=np.uint8)

        def decode(row: int, position: int) -> None:
            images_NHWC[row] = self._decode(self.folder / self.paths[position])

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter lock
            list(pool.map(decode, range(len(positions_N)), positions_N.tolist()))
        return torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).contiguous()

    def digest(self) -> bytes:
        """SHA-256 over the path, the size and the first 64 KiB of each file: a whole ImageNet would take too long."""
        digest = hashlib.sha256()
        for path in self.paths:
            with (self.folder / path).open("rb") as file:
                head = file.read(HEAD_BYTES)
                digest.update(f"{path}\0{os.fstat(file.fileno()).st_size}\0".encode())
                digest.update(hashlib.sha256(head).digest())
        return digest.digest()

    def _decode(self, path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # Pillow's parsers raise many kinds
            raise InputError(f"{path} cannot be read as an image: {type(error).__name__}: {error}.") from error
        ratio = self.size / min(image.size)
        width, height = (max(self.size, round(side * ratio)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


@DATASETS.register("imagefolder")
def imagefolder(argument: str) -> Dataset:
    """Images in class folders.

    Args:
        argument: ``FOLDER`` or ``FOLDER?size=N`` for images of N x N pixels (224 without it).

    Raises:
        ConfigError: No folder is given, or an option is unknown or no number.
        InputError: The folder has neither layout, or a file in it is empty.
    """
    place, size = _parse(argument)
    folder = Path(place)
    if not folder.is_dir():
        raise InputError(f"`imagefolder` reads a folder with one subfolder per class, but {folder} is no folder.")
    splits = _list_splits(folder)
    classes = tuple(sorted({label for _, label in splits["train"]}))
    paths = tuple(path for files in splits.values() for path, _ in files)
    labels = [label for files in splits.values() for _, label in files]
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise InputError(f"every class must have training images, but {unknown[0]!r} in {folder} has none.")
    ids = {label: index for index, label in enumerate(classes)}
    source = FileImages(folder, paths, size)
    labels_all = torch.tensor([ids[label] for label in labels], dtype=torch.int64)
    ends = np.cumsum([len(files) for files in splits.values()]).tolist()
    made = {
        name: Split(
            name=name,
            source=source,
            positions_N=torch.arange(end - len(files), end),
            labels_all=labels_all,
            mean=MEAN,
            std=STD,
            augmentation=CropFlip(pad=max(1, size // 8), flip=True),
        )
        for (name, files), end in zip(splits.items(), ends, strict=True)
    }
    return Dataset(
        name="imagefolder",
        spec=f"imagefolder:{argument}",
        classes=classes,
        input_shape=(3, size, size),
        mean=MEAN,
        std=STD,
        splits=made,
    )


def _parse(argument: str) -> tuple[str, int]:
    place, _, query = argument.partition("?")
    if not place:
        raise ConfigError("`imagefolder` needs a folder: imagefolder:FOLDER or imagefolder:FOLDER?size=N.")
    size = SIZE
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key != "size":
            raise ConfigError(f"`imagefolder` has no option {key!r}.{did_you_mean(key, ['size'])} Known: size.")
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"`size` must be a whole number of pixels of at least 1, but it is {value!r}.")
        size = int(value)
    return place, size


def _list_splits(folder: Path) -> dict[str, Labelled]:
    validation_name = "validation" if (folder / "validation").is_dir() else "val"
    if not any(child.is_dir() for child in (folder / "train").glob("*")):
        files = _list_classes(folder, "")
        if {label for _, label in files} <= SPLIT_FOLDERS:
            raise InputError(f"the splits in {folder} must hold one subfolder per class, but they hold the images.")
        parts = _cut(files, (0.7, 0.1, 0.2))
        return dict(zip(("train", "validation", "test"), parts, strict=True))
    train = _list_classes(folder, "train")
    held_back = _list_classes(folder, validation_name) if (folder / validation_name).is_dir() else None
    test = _list_classes(folder, "test") if (folder / "test").is_dir() else None
    if test is None and held_back is None:
        raise InputError(f"{folder} has train/ but neither test/ nor val/, so that nothing could be reported. Add one.")
    if test is None or held_back is None:
        test = test or held_back or []
        train, held_back = _cut(train, (0.9, 0.1))
    return {"train": train, "validation": held_back, "test": test}


def _cut(files: Labelled, shares: tuple[float, ...]) -> list[Labelled]:
    keys = content_keys((path.encode() for path, _ in files), "imagefolder")
    return [[files[index] for index in part.tolist()] for part in cut(keys, shares, "images")]


def _list_classes(folder: Path, split: str) -> Labelled:
    found: Labelled = []
    for top in sorted(child.name for child in (folder / split).iterdir() if child.is_dir()):
        if top.startswith("."):
            continue
        paths = []
        for place, _, names in os.walk(folder / split / top):
            below = Path(place).relative_to(folder).as_posix()
            paths += [f"{below}/{name}" for name in names if _is_image(name)]
        found += [(path, top) for path in sorted(paths)]
    if not found:
        raise InputError(
            f"{folder / split} must have one subfolder per class with images ({', '.join(sorted(SUFFIXES))}), but none "
            "was found."
        )
    for path, _ in found:
        if (folder / path).stat().st_size == 0:
            raise InputError(f"{folder / path} is empty (0 bytes), so it is no image. Remove it or copy it again.")
    return found


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
