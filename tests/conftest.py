"""Fixtures of all rooms: a fixed seed, and the real data of the folder that METAPRUNE_DATA names."""

import fcntl
import gc
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import platformdirs
import pytest
import torch

# Read once: a test that changes the environment must not move the shared cache.
DATA = os.environ.get("METAPRUNE_DATA")
CACHE = Path(os.environ.get("METAPRUNE_CACHE") or platformdirs.user_cache_dir("metaprune"))


# A shell makes what it starts in the background deaf to Ctrl-C, and processes that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through it in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # results and times then do not hang on the number of cores


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with `unpack_cifar10.py` and `weights/`."""
    if not DATA:
        pytest.skip("METAPRUNE_DATA is not set (a folder with unpack_cifar10.py and weights/)")
    return Path(DATA)


@pytest.fixture(scope="session")
def cifar10(data_folder: Path) -> Path:
    """Real CIFAR-10 in the binary layout: the folder above `cifar-10-batches-bin`, unpacked once and kept."""
    script = data_folder / "unpack_cifar10.py"
    if not script.is_file():
        pytest.skip(f"METAPRUNE_DATA has no {script.name}")
    sources = sorted((path.name, path.stat().st_size) for path in (data_folder / "cifar10").glob("*"))
    key = hashlib.sha256(script.read_bytes() + repr(sources).encode()).hexdigest()[:16]
    folder = CACHE / "test-data" / f"cifar10-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of pytest-xdist's workers unpacks, the others wait
        if not folder.exists():
            partial = tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent)
            try:
                subprocess.run([sys.executable, str(script), partial], check=True, capture_output=True)
                Path(partial).rename(folder)  # all or nothing: a killed run leaves no half-filled folder behind
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


@pytest.fixture(scope="session")
def cifar10_weights(data_folder: Path) -> Path:
    """The folder with `cifar10_resnet{20,32,44,56}.safetensors`."""
    folder = data_folder / "weights"
    if not folder.is_dir():
        pytest.skip("METAPRUNE_DATA has no weights/")
    return folder
