"""A folder of its own for every command, and a result folder that several tests read."""

import sys
from pathlib import Path

import pytest
import torch

from tests.cli.commands import TINY, command


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write to the current folder unless told otherwise, and import modules of users from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Fixtures of a module come before those of a test, and sums must not hang on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def result_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished result: an untrained network, half its MACs, on digits."""
    folder = tmp_path_factory.mktemp("results") / "tiny"
    done = command("prune", *TINY, "--budget", "macs=0.5", "--no-track", "--no-bench", "--out", folder, "--json")
    assert done.code == 0, done.err
    return folder
