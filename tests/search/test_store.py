"""Journals that outlive kills, addresses that are checked, results that are found once."""

import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metaprune.errors import ConfigError, InputError, MetapruneError, MissingExtraError, ResourceError
from metaprune.search import results as results_module
from metaprune.search.results import Results, digest
from metaprune.search.store import FileLock, disk_problem, open_storage, repair
from tests.search.player import begun, settings

LONG = "x" * 9999


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("", ""),
        ("one\n", "one\n"),
        ("one\ntw", "one\n"),
        ("tw", ""),
        ("x" * 9999 + "\n" + "y" * 9999, "x" * 9999 + "\n"),
    ],
    ids=["empty", "whole", "torn", "torn first line", "long"],
)
def test_a_torn_last_line_is_cut_off(tmp_path: Path, content: str, left: str) -> None:
    path = tmp_path / "journal.log"
    path.write_text(content)
    assert repair(path) == len(content) - len(left)
    assert path.read_text() == left


def test_whoever_writes_next_repairs_the_journal(tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings())
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_')
    again = begun(tmp_path, settings())
    assert journal.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert len(again.queues[0].tasks()) == len(campaign.queues[0].tasks())


def test_the_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_text("")
    code = (
        "import sys, time; from pathlib import Path; from metaprune.search.store import FileLock\n"
        f"FileLock(Path({str(path)!r})).acquire(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
        began = time.monotonic()
        lock = FileLock(path)
        lock.acquire()
        assert time.monotonic() - began < 5  # Optuna's own lock waits 30 s here
        lock.release()
        lock.release()


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("postgres://host/db", ConfigError, "Did you mean 'postgresql'?"),
        ("somewhere", ConfigError, "must be one of journal, sqlite"),
        ("grpc://host", ConfigError, "grpc://HOST:PORT"),
        ("sqlite:////no/such/folder/x.db", InputError, "must be reachable"),
        ("postgresql://me:secret@127.0.0.1:1/none", MetapruneError, ""),
        ("journal:/no/such/folder/x.log", InputError, "must be a folder that can be written"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused(tmp_path: Path, url: str, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        open_storage(url, tmp_path)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, InputError | MissingExtraError | ConfigError)


def test_sqlite_serves_too(tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings(storage=f"sqlite:///{tmp_path / 'campaign.db'}"))
    assert len(campaign.queues[0].tasks()) == 15


def test_a_full_disk_is_called_one(tmp_path: Path) -> None:
    assert isinstance(disk_problem(OSError(errno.ENOSPC, "No space left on device"), tmp_path), ResourceError)


# ---- results ---------------------------------------------------------------------------------------------------------


def test_results_are_found_once_and_kept_under_their_hash(tmp_path: Path) -> None:
    calls = []

    def find(place: Path) -> dict[str, int]:
        calls.append(place)
        return {"x": len(calls)}

    key = digest({"b": 1, "a": [1, 2]})
    assert Results(tmp_path).once(key, "0-evaluate", {"b": 1}, find) == {"x": 1}
    assert Results(tmp_path).once(key, "0-evaluate", {"b": 1}, find) == {"x": 1}
    assert Results(tmp_path).once(key, "1-finetune", {"b": 1}, find) == {"x": 2}
    assert json.loads((tmp_path / key / "config.json").read_text()) == {"b": 1}
    assert digest({"a": [1, 2], "b": 1}) == key


def test_a_damaged_result_is_found_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.once("k", "f", {}, lambda place: {"x": 1})
    (tmp_path / "k" / "f.json").write_text('{"x"')
    assert results.get("k", "f") is None
    assert results.once("k", "f", {}, lambda place: {"x": 2}) == {"x": 2}


def test_a_full_disk_leaves_no_half_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(results_module, "write_atomically", full)
    with pytest.raises(ResourceError):
        Results(tmp_path).once("k", "f", {}, lambda place: {"x": 1})
    assert Results(tmp_path).get("k", "f") is None
