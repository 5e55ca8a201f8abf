import resource
import subprocess
import sys
from pathlib import Path

import pytest

from metaprune.cli import doctor
from metaprune.criteria import CRITERIA
from tests.cli.commands import command, entries


def test_it_tells_what_is_here() -> None:
    told = command("doctor", "--json").json
    assert told["libraries"]["torch"]
    assert told["missing"] == []
    assert told["threads"] >= 1
    assert "CPUExecutionProvider" in told["providers"]
    done = command("doctor")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    assert "torch threads" in done.out


def test_it_computes_for_a_few_seconds_at_most() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-m", "metaprune.cli", "doctor"], check=True, capture_output=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10  # 2 s, which do not hang on other load


def test_a_missing_library_ends_with_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such-library"))
    done = command("doctor")
    assert done.code == 6
    assert "no-such-library: pip install no-such-library" in done.out


def test_broken_plugins_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA.broken, "bad", "ImportError: gone")
    done = command("doctor")
    assert done.code == 0
    assert "metaprune.criteria: bad: ImportError: gone" in " ".join(done.out.split())


def test_the_cache_is_listed_and_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("METAPRUNE_CACHE", str(cache))
    assert command("doctor", "--cache", "--json").json["cache"] == {"folder": str(cache), "entries": []}
    (cache / "test-data" / "deep").mkdir(parents=True)
    (cache / "test-data" / "deep" / "file").write_bytes(b"12345")
    (cache / "holiday.jpg").write_bytes(b"123")
    told = command("doctor", "--cache", "--json").json["cache"]["entries"]
    assert [(entry["name"], entry["bytes"], entry["deleted"]) for entry in told] == [
        ("holiday.jpg", 3, False),
        ("test-data", 5, False),
    ]
    assert entries(cache) == ["holiday.jpg", "test-data", "test-data/deep", "test-data/deep/file"]
    done = command("doctor", "--cache", "--clean")
    assert done.code == 0
    assert "not of metaprune; it stays" in done.out
    assert entries(cache) == ["holiday.jpg"]


def test_clean_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPRUNE_CACHE", str(tmp_path))
    (tmp_path / "test-data").mkdir()
    assert command("doctor", "--clean").code == 3
    assert (tmp_path / "test-data").exists()
