"""The folder of one command: what was asked, by which versions, how it ended; one process at a time works in it.

``run.json`` is whole at any moment, so a killed command leaves a folder that ``--resume`` can go on in. Importing this
module imports neither torch nor numpy: every command does so before it knows whether it has anything to do.
"""

import fcntl
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from metaprune.errors import ConfigError, InputError, MetapruneError
from metaprune.files import read_json, write_atomically

RECORD = "run.json"
LOCK = ".lock"
SCHEMA = 1

Status = Literal["finished", "failed", "interrupted"]  # on disk also `running`, and `clearing` while --force deletes

_WAYS_OUT = "Give --resume to go on in it, --force to delete what is in it, or another folder."


class Run:
    """A folder that this process alone works in, from :meth:`open` to :meth:`finish`.

    As a context manager it marks the run failed or interrupted when that happens, else finished.

    Attributes:
        folder: Where the command writes.
        resumed: The command goes on with what an earlier process left here.
    """

    def __init__(self, folder: Path, record: dict[str, Any], lock: int, resumed: bool) -> None:
        self.folder = folder
        self.resumed = resumed
        self._record = record
        self._lock: int | None = lock

    @classmethod
    def open(
        cls,
        folder: str | Path,
        command: str,
        options: Mapping[str, Any],
        *,
        force: bool = False,
        resume: bool = False,
    ) -> "Run":
        """Take a folder for one command and write its ``run.json``.

        Args:
            folder: New or empty, unless `force` or `resume` is set; parents are made.
            command: The verb, e.g. ``"prune"``.
            options: Plain JSON values: all that decides the result, ``seed`` among them, and nothing else (no
                ``--force``, no ``--json``), because a resumed run must have the same.
            force: Delete what an earlier run left in the folder.
            resume: Go on in the folder of an earlier run.

        Raises:
            ConfigError: The folder holds something and neither flag is set, `force` would delete what no run of ours
                wrote, `resume` finds no run of this command and these options, or another process works here.
            InputError: There cannot be a folder of that name. In both cases nothing was written.
        """
        folder = Path(folder)
        asked = _as_json(options)
        _check(folder, command, asked, force, resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} must be a folder that can be made, but {error.strerror}.") from error
        lock = _lock(folder)
        try:
            _check(folder, command, asked, force, resume)  # once more: nobody else changes it from here on
            record, resumed = _begin(folder, command, asked, force, resume)
        except BaseException:
            os.close(lock)
            raise
        return cls(folder.absolute(), record, lock, resumed)

    def path(self, name: str) -> Path:
        """Where a file of this run belongs; folders in `name` are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def load(self) -> dict[str, Any]:
        """What ``run.json`` says now."""
        return read(self.folder)

    def finish(self, status: Status = "finished") -> None:
        """Write how the run ended and let others into the folder. Further calls do nothing."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            _write(self.folder, self._record | {"status": status, "ended": _now()})
        finally:
            os.close(lock)  # this releases the lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.finish()
            return
        with suppress(OSError, MetapruneError):  # a full disk must not hide why the command failed
            self.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")


def check(
    folder: str | Path,
    command: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    resume: bool = False,
) -> None:
    """Whether :meth:`Run.open` would take the folder; writes nothing, so that a command can ask before any work.

    Args:
        folder: As for :meth:`Run.open`.
        command: Likewise; None leaves out the comparison with the run that is to be resumed.
        options: Likewise.
        force: Likewise.
        resume: Likewise.

    Raises:
        ConfigError: As :meth:`Run.open`.
        InputError: Likewise.
    """
    folder = Path(folder)
    _check(folder, command, None if options is None else _as_json(options), force, resume)
    with suppress(FileNotFoundError):
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(_taken(folder, descriptor)) from None
        finally:
            os.close(descriptor)


def read(folder: str | Path) -> dict[str, Any]:
    """The ``run.json`` of a folder.

    Raises:
        InputError: There is none, or it is not ours.
    """
    path = Path(folder) / RECORD
    record = read_json(path, "the record of a run")
    if not isinstance(record, dict) or record.get("made_by") != "metaprune" or record.get("schema") != SCHEMA:
        raise InputError(f"{path} must be a run.json of schema {SCHEMA} that metaprune wrote, but it is not.")
    return record


def versions() -> dict[str, str | None]:
    """Versions of what results depend on, None for what is not installed; imports none of it."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for distribution in ("metaprune", "torch", "numpy", "onnxruntime-gpu", "onnxruntime"):
        name = distribution.removesuffix("-gpu")
        found.setdefault(name, None)
        with suppress(PackageNotFoundError):
            found[name] = version(distribution)
    return found


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, and let cuDNN choose repeatable kernels.

    Raises:
        ConfigError: `seed` is outside of [0, 2**32).
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"`0 <= seed < 2**32` must hold, but seed={seed}.")
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _check(folder: Path, command: str | None, options: dict[str, Any] | None, force: bool, resume: bool) -> None:
    if force and resume:
        raise ConfigError("--force starts over and --resume goes on, but both were given. Give one of them.")
    _require_place(folder)
    entries = _entries(folder)
    if resume:
        _require_same(folder, entries, command, options)
    elif entries and force:
        _require_clearable(folder)
    elif entries:
        shown = ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
        raise ConfigError(f"the folder of a run must be new or empty, but {folder} holds {shown}. {_way_out(folder)}")


def _require_place(folder: Path) -> None:
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder} must be a folder, but {place} is none. Give another folder.")
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"{folder} must be a folder that can be written, but {place} cannot. Give another folder.")


def _entries(folder: Path) -> list[str]:
    """What is in the folder, without the traces that a kill in :meth:`Run.open` leaves."""
    if not folder.exists():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name != LOCK and not name.startswith(f".{RECORD}.")]


def _way_out(folder: Path) -> str:
    try:
        record = read(folder)
    except InputError:
        return f"Give another folder; --force deletes only what a run wrote, and this one has no {RECORD} of ours."
    return f"It is from `{record['command']}`, started {record['started']}, {record['status']}. {_WAYS_OUT}"


def _require_same(folder: Path, entries: list[str], command: str | None, options: dict[str, Any] | None) -> None:
    if not entries:
        raise ConfigError(f"--resume needs the folder of an earlier run, but {folder} is new or empty. Leave it out.")
    try:
        record = read(folder)
    except InputError as error:
        raise ConfigError(f"--resume needs the folder of an earlier run, but {folder} is none: {error}") from error
    if command is not None and record["command"] != command:
        raise ConfigError(
            f"--resume needs a run of the same command, but {folder} is from `{record['command']}` and this is "
            f"`{command}`. Give another folder, or --force to delete what is in it."
        )
    before = record["options"]
    if options is not None and (changes := list(_changes(before, options))):
        raise ConfigError(
            f"--resume needs the same options as before, but in {folder} {'; '.join(changes)}. Give the old values, "
            "another folder, or --force to start over in this one."
        )


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *after}):
        old, new = (json.dumps(values[name], sort_keys=True) if name in values else None for values in (before, after))
        if old != new:
            yield f"`{name}` was {old or 'not given'} and is now {new or 'not given'}"


def _require_clearable(folder: Path) -> None:
    kept = [Path.cwd()]
    with suppress(RuntimeError):  # a user without a home
        kept.append(Path.home())
    target = folder.resolve()
    for place in kept:
        if target == place.resolve() or target in place.resolve().parents:
            raise ConfigError(
                f"--force deletes what is in {folder}, but that is or holds {place}. Give another folder."
            )
    try:
        read(folder)
    except InputError as error:
        raise ConfigError(
            f"--force deletes only what a run wrote, but {folder} is no folder of a run: {error} Give another folder."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let no other process work in a folder meanwhile.

    Raises:
        ConfigError: Another one does.
        InputError: The folder cannot be written.
    """
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{folder} must be a folder that can be written, but {error.strerror}.") from error
    for attempt in range(5):  # `check` of another process holds it for a moment
        time.sleep(0.02 * attempt)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except OSError as error:
            os.close(descriptor)
            raise InputError(f"{folder} must be on a file system with locks, but {error.strerror}.") from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        return descriptor
    with _closing(descriptor):
        raise ConfigError(_taken(folder, descriptor))


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def _taken(folder: Path, descriptor: int) -> str:
    pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
    who = f"process {pid}" if pid.isdigit() else "another process"
    return f"one process at a time may work in {folder}, but {who} does. Wait for it, end it, or give another folder."


def _begin(
    folder: Path, command: str, options: dict[str, Any], force: bool, resume: bool
) -> tuple[dict[str, Any], bool]:
    for leftover in folder.glob(f".{RECORD}.*"):
        leftover.unlink()
    before = read(folder) if resume else {}
    if resume and before["status"] != "clearing":
        again = {"at": _now(), "versions": versions()}
        record = before | {"status": "running", "resumed": [*before["resumed"], again]}
        record.pop("ended", None)
        _write(folder, record)
        return record, True
    record = {
        "schema": SCHEMA,
        "made_by": "metaprune",
        "command": command,
        "options": options,
        "seed": options.get("seed"),
        "versions": versions(),
        "started": _now(),
        "status": "running",
        "resumed": [],
    }
    if force or resume:
        # Said first: a kill half-way must not leave a folder that looks like a run to go on with.
        _write(folder, record | {"status": "clearing"})
        _clear(folder)
    _write(folder, record)
    return record, False


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in (RECORD, LOCK):
            continue
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            raise InputError(f"--force must delete {path}, but {error.strerror}.") from error


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomically(folder / RECORD, json.dumps(record, indent=1).encode())


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they come back from the file: tuples are lists there."""
    return dict(json.loads(json.dumps(dict(options))))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
