"""Files that are whole or absent: a kill at any moment leaves the old content or the new."""

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from metaprune.errors import InputError, ResourceError


def cache_folder() -> Path:
    """Where what was measured or unpacked once is kept: ``METAPRUNE_CACHE``, or the platform's folder for caches."""
    import platformdirs

    return Path(os.environ.get("METAPRUNE_CACHE") or platformdirs.user_cache_dir("metaprune"))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: Something that is no folder stands in the way, or it must not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} must be a folder that can be made, but {error.strerror}.") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then rename over it.

    Raises:
        InputError: The folder cannot be written.
        ResourceError: The disk is full.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"{path.parent} must be a folder that can be written, but {error.strerror}.") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{path} needs {len(content)} bytes, but the disk is full. Nothing was lost."
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; `what` names it in messages.

    Raises:
        InputError: No such file, or no JSON in it.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{what} must be a file, but {path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} must be a readable JSON file, but {path} is not ({error}).") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{what} must be JSON, but {path} is not: {error}.") from error
