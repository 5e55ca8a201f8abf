"""What evaluations found, on disk under the hash of what was evaluated, so that nothing is computed twice."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaprune.errors import InputError
from metaprune.files import make_folder, read_json, write_atomically

_DIGITS = 20  # of the hash: 80 bits


def digest(content: Any) -> str:
    """The hash of plain data, whatever the order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class Results:
    """A folder with one folder a key, in which there is one file a fidelity.

    Args:
        folder: Of all results.
    """

    folder: Path

    def place(self, key: str) -> Path:
        """The folder of a key."""
        return self.folder / key

    def get(self, key: str, fidelity: str) -> dict[str, Any] | None:
        """What was found, or None; a damaged file counts as none."""
        try:
            found = read_json(self.place(key) / f"{fidelity}.json", "a result")
        except InputError:
            return None
        return found if isinstance(found, dict) else None

    def once(
        self, key: str, fidelity: str, config: Mapping[str, Any], find: Callable[[Path], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What was found before, by whomever, else what `find` finds now.

        Args:
            key: Hash of what is evaluated.
            fidelity: How well.
            config: What is evaluated, kept beside the results.
            find: Is given the folder of the key, where it may leave files.

        Raises:
            InputError: The folder cannot be written.
            ResourceError: The disk is full.
        """
        make_folder(self.place(key))
        with alone(self.place(key) / ".lock"):
            found = self.get(key, fidelity)
            if found is None:
                found = dict(find(self.place(key)))
                self._write(key, "config", dict(config))
                self._write(key, fidelity, found)
        return found

    def _write(self, key: str, name: str, content: Mapping[str, Any]) -> None:
        write_atomically(self.place(key) / f"{name}.json", json.dumps(content, indent=1, allow_nan=False).encode())


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let no other process of this machine do the same work meanwhile; a kill lets the next one in."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
