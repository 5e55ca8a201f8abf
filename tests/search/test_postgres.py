"""A campaign on a real PostgreSQL server: four workers, two of them killed, every trial accounted for once."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from metaprune.errors import InputError
from metaprune.search.store import close, open_storage
from tests.search.crowd import check, evaluated, player, until
from tests.search.player import begun, settings

TRIALS = 30


def programs() -> Path:
    """Where PostgreSQL's server programs are; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not places or not (places[-1] / "initdb").exists():
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    return places[-1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server of our own, in a folder of its own, on a free port; it will not run as root."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install metaprune[postgresql])")
    bin_ = programs()
    as_other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="metaprune-postgres-", dir="/tmp"))  # a socket's path must be short
    data = folder / "data"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        if as_other:
            shutil.chown(folder, "postgres")
        initdb = [*as_other, str(bin_ / "initdb"), "-D", str(data), "-A", "trust", "-U", "tester", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        control = [*as_other, str(bin_ / "pg_ctl"), "-D", str(data)]
        start = [*control, "-w", "-o", options, "-l", str(folder / "log"), "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
        try:
            yield f"postgresql://tester@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=False, capture_output=True, cwd="/")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_two_of_four_workers_are_killed_and_nothing_is_lost(server: str, tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings(trials=TRIALS, storage=server))
    workers = [player(tmp_path, 0.1) for _ in range(4)]
    until(lambda: len(evaluated(tmp_path)) >= 6)
    for victim in workers[:2]:
        victim.kill()
        victim.wait()
        time.sleep(0.3)
    for survivor in workers[2:]:
        assert survivor.wait(120) == 0, (tmp_path / "players.log").read_text()
    check(campaign, tmp_path, TRIALS, kills=2)
    close(campaign.storage)


def test_a_database_that_is_not_there_is_named(server: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        open_storage(server.replace("/postgres", "/nowhere"), tmp_path)
