import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from metaprune.tracking import tracker
from tests.cli.commands import command, entries


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_page_comes_up_and_goes_with_ctrl_c(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with tracker(uri).start("prune"):
        pass
    port = free_port()
    words = [sys.executable, "-m", "metaprune.cli", "ui", "--tracking-uri", uri, "--port", str(port)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                        assert answer.status == 200
                    break
                except (urllib.error.URLError, OSError):
                    assert time.monotonic() < until, "the page did not come up"
                    assert server.poll() is None
                    time.sleep(0.2)
            os.kill(server.pid, signal.SIGINT)
            _, said = server.communicate(timeout=90)
        finally:
            server.kill()
    assert server.returncode == 0
    assert f"http://127.0.0.1:{port}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Run a command first"),
        (["--tracking-uri", "mlflow.db"], "must start with one of"),
        (["--tracking-uri", "http://127.0.0.1:1"], "page of its own"),
        (["--port", "0"], "port=0"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    done = command("ui", *words)
    assert done.code == 3
    assert said in done.said
    assert entries(tmp_path) == []


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = command("ui", "--port", taken.getsockname()[1])
    assert done.code == 7
    assert "is taken" in done.said
