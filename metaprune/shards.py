"""Weights in safetensors files, one or many, read and written tensor by tensor.

A network in many files has an index beside them (``model.safetensors.index.json``: which tensor is in which file), as
the large public ones have.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metaprune.errors import InputError, ResourceError
from metaprune.files import make_folder, read_json, write_atomically

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30  # no file grows larger, except by one tensor that is larger by itself
_BITS = {"BOOL": 8, "BF16": 16}  # the others say it: F32, I64, F8_E4M3, …


class Entry(NamedTuple):
    """Type (as safetensors calls it, e.g. ``F32``) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Its size in a file."""
        digits = "".join(letter for letter in self.dtype.partition("_")[0] if letter.isdigit())
        bits = _BITS.get(self.dtype) or int(digits or 0)
        count = 1
        for size in self.shape:
            count *= size
        return count * bits // 8


class Shards(Mapping[str, Tensor]):
    """Tensors by name; each is read when it is asked for and forgotten by the reader.

    Args:
        path: A ``.safetensors`` file, an index, or a folder with ``model.safetensors`` or an index.

    Attributes:
        path: That.
        entries: Type and shape of each tensor, from the headers of the files.

    Raises:
        InputError: There is no such file, or one is damaged, or the index does not fit them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._home: dict[str, Path] = {}
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            with _opened(file) as shard:
                for name in list(shard.keys()):
                    if name in self._home:
                        raise InputError(f"{name!r} must be in one file, but is in {self._home[name]} and {file}.")
                    part = shard.get_slice(name)
                    self._home[name], self.entries[name] = file, Entry(part.get_dtype(), tuple(part.get_shape()))
        self._check_index()

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._home[name]) as shard:  # opened anew, so that no memory stays with the file
            tensor: Tensor = shard.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def _files(self) -> list[Path]:
        self._index: Path | None = self.path if self.path.name.endswith(".index.json") else None
        if self.path.is_dir():
            if not (self.path / INDEX).is_file():
                return [self.path / SINGLE]
            self._index = self.path / INDEX
        if self._index is None:
            return [self.path]
        return sorted({self._index.parent / file for file in self._weight_map().values()})

    def _weight_map(self) -> dict[str, str]:
        content = read_json(self._index or self.path, "an index of weights")
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or any(Path(str(file)).name != file for file in found.values()):
            raise InputError(f"{self._index} must name a file beside it for every tensor (`weight_map`), but does not.")
        return found

    def _check_index(self) -> None:
        if self._index is None:
            return
        promised = {name: self._index.parent / file for name, file in self._weight_map().items()}
        for name in (*promised, *self._home):
            if promised.get(name) != self._home.get(name):
                raise InputError(
                    f"{self._index} must say where every tensor is, but {name!r} is in "
                    f"{self._home.get(name, 'no file')} and should be in {promised.get(name, 'none')}."
                )


def write_shards(
    folder: Path, entries: Mapping[str, Entry], read: Callable[[str], Tensor], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors one by one, in as many files as it takes.

    Args:
        folder: Where the files go; it is made.
        entries: What is to be written, in order.
        read: Gives a tensor of that type and shape; asked once for each.
        shard_bytes: Largest size of a file that holds more than one tensor, in bytes.

    Returns:
        The files: ``model.safetensors`` if one is enough, else the shards, and their index last.

    Raises:
        InputError: The folder cannot be written.
        ResourceError: The disk is full.
    """
    make_folder(folder)
    shards: list[dict[str, Entry]] = []
    filled = shard_bytes
    for name, entry in entries.items():
        if not shards or filled + entry.size_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.size_bytes
    names = [SINGLE] if len(shards) < 2 else [_shard(k, len(shards)) for k in range(len(shards))]
    for old in (SINGLE, INDEX):  # else a reader might find what lies there from before
        (folder / old).unlink(missing_ok=True)
    for file, shard in zip(names, shards or [{}]):
        _write_file(folder / file, shard, read)
    written = [folder / file for file in names]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.size_bytes for entry in entries.values())},
            "weight_map": {name: file for file, shard in zip(names, shards) for name in shard},
        }
        write_atomically(folder / INDEX, json.dumps(index, indent=2).encode())
        written.append(folder / INDEX)
    return written


def _shard(k: int, count: int) -> str:
    return f"model-{k + 1:05d}-of-{count:05d}.safetensors"


def _write_file(path: Path, shard: Mapping[str, Entry], read: Callable[[str], Tensor]) -> None:
    """The format: length of the header, header, tensors without gaps; larger types first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    names = sorted(shard, key=lambda name: (-_item_bytes(shard[name]), name))
    for name in names:
        entry = shard[name]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape)}
        header[name]["data_offsets"] = [start, start + entry.size_bytes]
        start += entry.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name)
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            assert content.numel() == shard[name].size_bytes, name
            file.write(content.numpy().data)
            del tensor, content


def _item_bytes(entry: Entry) -> int:
    return Entry(entry.dtype, (1,)).size_bytes


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of another once it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{path} cannot be written, because the disk is full. Free some space.") from error
        raise


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputError(f"weights must be in safetensors files, but {path} does not exist.")
    try:
        with safe_open(path, "pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as safetensors: {error}. It may be truncated."
        ) from error
