"""Workers that reach the trials through Optuna's gRPC proxy."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from metaprune.errors import InputError
from metaprune.search import store
from metaprune.search.store import close, open_storage
from tests.search.crowd import check, evaluated, player, until
from tests.search.player import begun, settings

pytest.importorskip("grpc", reason="grpcio is not installed (pip install metaprune[grpc])")

SERVER = """
import sys, optuna
from optuna.storages import get_storage, run_grpc_proxy_server
run_grpc_proxy_server(get_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    """The address of a proxy before a database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-W", "ignore", "-c", SERVER, f"sqlite:///{tmp_path / 'trials.db'}", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield f"grpc://127.0.0.1:{port}"
        finally:
            server.kill()


def test_a_campaign_through_a_proxy_survives_a_kill(proxy: str, tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings(trials=18, storage=proxy))
    victim, survivor = (player(tmp_path, 0.1) for _ in range(2))
    until(lambda: len(evaluated(tmp_path)) >= 3)
    victim.kill()
    victim.wait()
    assert survivor.wait(100) == 0, (tmp_path / "players.log").read_text()
    check(campaign, tmp_path, 18, kills=1)
    close(campaign.storage)


def test_a_proxy_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PROXY_S", 0.2)
    with pytest.raises(InputError, match="must be reachable"):
        open_storage("grpc://127.0.0.1:1", tmp_path)
