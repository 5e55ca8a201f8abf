"""CIFAR-10 from its official files, in the binary or in the python layout.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

The python layout consists of pickles, which can run any code when they are loaded. Here they are read by an unpickler
that knows arrays, bytes, lists, dicts, strings and numbers, and that builds arrays by its own code: nothing that a file
names is ever called.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metaprune.data._arrays import from_arrays
from metaprune.data._base import DATASETS, Dataset
from metaprune.data._cut import cut, image_keys
from metaprune.data.augment import CropFlip
from metaprune.errors import ConfigError, InputError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS  # bytes: a label, then the red, green and blue planes row by row
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"

Bytes = npt.NDArray[np.uint8]


@DATASETS.register("cifar10")
def cifar10(argument: str) -> Dataset:
    """CIFAR-10: a tenth of the training images, by a hash of each, is for validation; ``test_batch`` is for testing.

    Args:
        argument: The folder with the batches, or the one above it. Files may hold any number of images.

    Raises:
        ConfigError: No folder is given.
        InputError: A file is missing, truncated, or holds something else.
    """
    if not argument:
        raise ConfigError("`cifar10` needs the folder with its files: cifar10:FOLDER.")
    folder, suffix = _find(Path(argument))
    paths = [folder / f"{name}{suffix}" for name in (*TRAIN_FILES, TEST_FILE)]
    for path in paths:
        _check_file(path, binary=suffix == ".bin")
    batches = [_read_binary(path) if suffix == ".bin" else _read_python(path) for path in paths]
    train, train_labels = _join(batches[:-1])
    test, test_labels = _join(batches[-1:])
    train_part, validation_part = cut(image_keys(train, "cifar10"), (0.9, 0.1), "training images")
    return from_arrays(
        "cifar10",
        f"cifar10:{argument}",
        {
            "train": (train, train_labels, train_part),
            "validation": (train, train_labels, validation_part),
            "test": (test, test_labels, torch.arange(len(test))),
        },
        classes=CLASSES,
        scale=1 / 255,
        mean=MEAN,
        std=STD,
        augmentation=CropFlip(pad=4, flip=True),
    )


def _find(folder: Path) -> tuple[Path, str]:
    places = [folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"]
    for place in places:
        for suffix in (".bin", ""):
            if any((place / f"{name}{suffix}").exists() for name in (*TRAIN_FILES, TEST_FILE)):
                return place, suffix
    state = "does not exist" if not folder.exists() else "holds none of them"
    raise InputError(
        f"CIFAR-10 is read from a folder with data_batch_1.bin … test_batch.bin or data_batch_1 … test_batch, or from "
        f"the one above it, but {folder} {state}. Unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz there."
    )


def _check_file(path: Path, *, binary: bool) -> None:
    expected = f"a multiple of {RECORD} bytes ({10_000 * RECORD} in the official file)" if binary else "a pickle"
    if not path.is_file():
        raise InputError(f"{path} is missing; {expected} is expected. Unpack the archive again.")
    size = path.stat().st_size
    if size == 0 or (binary and size % RECORD):
        raise InputError(
            f"{path} has {size} bytes, but {expected} is expected: it is truncated, or no CIFAR-10 file. Unpack the "
            "archive again."
        )


def _read_binary(path: Path) -> tuple[Bytes, Bytes]:
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, RECORD)
    return _checked(path, records[:, 1:], records[:, 0])


def _read_python(path: Path) -> tuple[Bytes, Bytes]:
    try:
        with path.open("rb") as file:
            loaded = _Unpickler(file, encoding="bytes").load()
    except Exception as error:  # whatever a damaged or hostile pickle makes the unpickler raise
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) is no CIFAR-10 batch, or it is truncated: {error}"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} must hold a dict with `data` and `labels`, but it holds a {type(loaded).__name__}.")
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    data, labels = fields.get("data"), fields.get("labels")
    pixels = data.value if isinstance(data, _Array) else None
    if isinstance(labels, _Array) and labels.value is not None:
        labels = labels.value.tolist()
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        seen = "nothing" if pixels is None else f"{pixels.dtype} of shape {pixels.shape}"
        raise InputError(f"`data` in {path} must be uint8 of shape (n, {PIXELS}), but it is {seen}.")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(_is_label(label) for label in labels):
        raise InputError(f"`labels` in {path} must be a list of {len(pixels)} numbers from 0 to 9, but it is not.")
    return _checked(path, pixels, np.array(labels, dtype=np.uint8))


def _is_label(label: object) -> bool:
    return isinstance(label, int) and 0 <= label < len(CLASSES)


def _checked(path: Path, pixels: Bytes, labels: Bytes) -> tuple[Bytes, Bytes]:
    if len(labels) == 0 or labels.max() >= len(CLASSES):
        seen = f"the label {labels.max()}" if len(labels) else "no images"
        raise InputError(f"{path} must hold images with labels from 0 to 9, but it has {seen}; it is no CIFAR-10 file.")
    return pixels, labels


def _join(batches: list[tuple[Bytes, Bytes]]) -> tuple[Tensor, Tensor]:
    pixels = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in batches]).astype(np.int64)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


class _Dtype:
    """Stands in for numpy.dtype: unsigned bytes and integers alone."""

    KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        self.order = "|"
        if self.code not in self.KINDS:
            raise pickle.UnpicklingError(f"arrays of {code!r} are not admitted.")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode("latin1") if isinstance(order, bytes) else order
        if self.order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"{order!r} is no byte order.")

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands in for numpy.ndarray: takes the pickled state and checks it before it makes an array."""

    value: npt.NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self._fill(raw, dtype, shape, "F" if fortran else "C")

    def _fill(self, raw: Any, dtype: Any, shape: Any, order: str) -> None:
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array must be made of bytes and a dtype.")
        self.value = np.frombuffer(bytes(raw), dtype.numpy()).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array._fill(raw, dtype, shape, order)
    return array


def _scalar(dtype: Any, raw: Any) -> int:
    return int(np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.numpy())[0])


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not admitted.")
    return text if isinstance(text, bytes) else str(text).encode("latin1")


class _Call:
    """A function that a pickle may call but not change."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function takes no state.")


def _admitted() -> dict[tuple[str, str], Callable[..., Any]]:
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Call(_encode),  # how Python 3 writes bytes in protocols 0 to 2
    }
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        names[f"{core}.multiarray", "_reconstruct"] = _Call(_reconstruct)
        names[f"{core}.multiarray", "scalar"] = _Call(_scalar)
        names[f"{core}.numeric", "_frombuffer"] = _Call(_from_buffer)
    return names


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        stand_in = _admitted().get((module_name, global_name))
        if stand_in is None:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, which is not admitted; only arrays, bytes, lists, dicts, "
                "strings and numbers are."
            )
        return stand_in
