"""Where the trials of a campaign are kept: a journal file in its folder, a database, or Optuna's gRPC proxy.

Optuna's own lock of a journal is a link that a killed process leaves behind, for half a minute in which nobody can
write, and a line that a kill has torn poisons whoever writes next. Here the kernel holds the lock, so that it ends with
its process, and whoever gets it cuts off what was torn.
"""

import errno
import fcntl
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock

from metaprune.errors import ConfigError, InputError, MetapruneError, MissingExtraError, ResourceError, did_you_mean
from metaprune.tracking import without_password

JOURNAL = "journal.log"
SCHEMES = ("journal", "sqlite", "postgresql", "mysql", "grpc")
PROXY_S = 10.0  # that a proxy may take to answer
_CHUNK = 4096  # bytes


class FileLock(BaseJournalFileLock):  # type: ignore[misc]
    """A lock of the kernel on a journal, which ends with the process that holds it.

    Args:
        path: The journal; the lock is a file beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock, then cut off a last line that its writer did not live to end."""
        descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            repair(self._path)
        except BaseException:
            os.close(descriptor)
            raise
        self._held = descriptor
        return True

    def release(self) -> None:
        """Let others write."""
        if self._held is not None:
            descriptor, self._held = self._held, None
            os.close(descriptor)


def repair(path: Path) -> int:
    """Cut off a last line without an end, and say how many bytes that were; nobody else may write meanwhile."""
    with path.open("rb+") as file:
        size = left = file.seek(0, os.SEEK_END)
        while left:
            begin = max(0, left - _CHUNK)
            file.seek(begin)
            end = file.read(left - begin).rfind(b"\n")
            if end >= 0:
                left = begin + end + 1
                break
            left = begin
        if left < size:
            file.truncate(left)
    return size - left


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage of a campaign.

    Args:
        url: ``postgresql://…``, ``mysql://…``, ``sqlite:///FILE``, ``grpc://HOST:PORT`` or ``journal:FILE``; None for a
            journal in `folder`.
        folder: Of the campaign.

    Raises:
        ConfigError: The address names no storage that is known.
        InputError: It cannot be reached.
        MissingExtraError: What speaks to it is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    scheme, _, rest = (url or f"journal:{folder / JOURNAL}").partition(":")
    kind = scheme.partition("+")[0]
    if kind not in SCHEMES:
        raise ConfigError(
            f"a storage must be one of {', '.join(SCHEMES)}, but it is {without_password(url)!r}."
            f"{did_you_mean(kind, SCHEMES)} Give e.g. postgresql://user@host/name, or leave it out."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Optuna calls experimental, and pools of SQLAlchemy
            if kind == "journal":
                path = Path(rest)
                return JournalStorage(JournalFileBackend(str(path), lock_obj=FileLock(path)))
            return _proxy(rest) if kind == "grpc" else optuna.storages.get_storage(_database(scheme, rest))
    except MetapruneError:
        raise
    except ImportError as error:
        package = "grpcio" if kind == "grpc" else str(error.name or kind)
        raise MissingExtraError(
            f"the storage {without_password(url)!r} needs {package!r}, which is not installed. Install "
            f"metaprune[{'grpc' if kind == 'grpc' else 'postgresql'}], or leave `storage` out."
        ) from error
    except Exception as error:
        if kind == "journal" and isinstance(error, OSError):
            raise disk_problem(error, folder) from error
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise InputError(
            f"the storage must be reachable, but {without_password(url)!r} is not: {type(error).__name__}: "
            f"{without_password(said[:200])}. Start it, or correct `storage`."
        ) from error


def close(storage: BaseStorage) -> None:
    """Let go of connections to a database; a journal needs nothing."""
    storage.remove_session()
    engine = getattr(getattr(storage, "_backend", storage), "engine", None)
    if engine is not None:
        engine.dispose()


def disk_is_full(error: BaseException | None) -> bool:
    """Whether that is what an error, or what caused it, says."""
    while error is not None and not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        error = error.__cause__
    return error is not None


def disk_problem(error: OSError, folder: Path) -> InputError | ResourceError:
    """What an error of the file system means for the user."""
    if disk_is_full(error):
        return ResourceError(f"the disk of {folder} is full. Free some space, then `metaprune search resume {folder}`.")
    return InputError(f"{folder} must be a folder that can be written, but {error.strerror or error}.")


def _database(scheme: str, rest: str) -> str | RDBStorage:
    """The address for SQLAlchemy; for PostgreSQL with the driver that is there."""
    if scheme == "postgresql":
        with suppress(ImportError):
            import psycopg  # noqa: F401

            scheme = "postgresql+psycopg"
    return f"{scheme}:{rest}"


def _proxy(rest: str) -> Any:
    host, _, port = rest.removeprefix("//").partition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"a proxy must be grpc://HOST:PORT, but it is 'grpc:{rest}'.")
    from optuna.storages import GrpcStorageProxy

    proxy = GrpcStorageProxy(host=host, port=int(port))
    proxy.wait_server_ready(timeout=PROXY_S)
    return proxy
