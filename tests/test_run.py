"""A folder belongs to one command, one process at a time, and nothing else is ever deleted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaprune.errors import ConfigError, InputError
from metaprune.run import LOCK, RECORD, Run, check, read, seed_everything, versions

OPTIONS = {"budget": "macs=0.5", "seed": 3, "shape": (1, 3)}

CHILD = """
import sys, time
from pathlib import Path
from metaprune.run import Run
run = Run.open(sys.argv[1], "prune", {"seed": 1}, **{flag: True for flag in sys.argv[2:]})
print("open", run.resumed, flush=True)
while True:
    run.path("log").open("a").write("x")
    time.sleep(0.001)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(folder: Path, *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", CHILD, folder, *flags], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


@pytest.fixture
def finished(folder: Path) -> Path:
    with Run.open(folder, "prune", OPTIONS) as run:
        run.path("figures/tree.svg").write_text("<svg/>")
    return folder


class TestOpen:
    def test_a_new_folder(self, folder):
        run = Run.open(folder, "prune", OPTIONS)
        record = run.load()
        assert record["command"] == "prune"
        assert record["options"] == {"budget": "macs=0.5", "seed": 3, "shape": [1, 3]}
        assert (record["seed"], record["status"], record["resumed"]) == (3, "running", [])
        assert record["versions"] == versions()
        assert not run.resumed
        run.finish()
        assert run.load()["status"] == "finished"
        assert run.load()["ended"] >= record["started"]

    def test_an_empty_folder(self, folder):
        folder.mkdir(parents=True)
        Run.open(folder, "prune", {}).finish()
        assert read(folder)["seed"] is None

    def test_paths_within_it(self, folder):
        with Run.open(folder, "prune", {}) as run:
            assert run.path("a/b/c.txt") == folder / "a/b/c.txt"
            assert (folder / "a/b").is_dir()

    def test_what_a_kill_in_open_leaves_is_empty(self, folder):
        folder.mkdir(parents=True)
        (folder / LOCK).write_text("99")
        (folder / f".{RECORD}.x1y2").write_text("{")
        Run.open(folder, "prune", {}).finish()
        assert sorted(path.name for path in folder.iterdir()) == [LOCK, RECORD]

    def test_a_folder_with_something_in_it(self, finished):
        before = contents(finished)
        for attempt in (check, Run.open):
            with pytest.raises(ConfigError, match=r"holds figures, run.json. It is from `prune`.*--resume.*--force"):
                attempt(finished, "prune", OPTIONS)
        assert contents(finished) == before

    def test_a_foreign_folder_names_no_flag_that_would_fail(self, tmp_path):
        for name in "abcde":
            (tmp_path / name).write_text(name)
        with pytest.raises(ConfigError, match=r"holds a, b, c and 2 more. Give another folder"):
            Run.open(tmp_path, "prune", {})

    def test_both_flags(self, finished):
        with pytest.raises(ConfigError, match="Give one of them"):
            Run.open(finished, "prune", OPTIONS, force=True, resume=True)

    @pytest.mark.parametrize("flags", [{}, {"force": True}, {"resume": True}])
    def test_a_file_in_its_place(self, flags, tmp_path):
        (tmp_path / "file").write_text("precious")
        for place in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
            for attempt in (check, Run.open):
                with pytest.raises(InputError, match="must be a folder"):
                    attempt(place, "prune", {}, **flags)
        assert contents(tmp_path) == {"file": b"precious"}

    def test_a_link_to_nowhere(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match="must be a folder"):
            Run.open(tmp_path / "link", "prune", {})
        assert not (tmp_path / "nowhere").exists()

    def test_an_unwritable_parent(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
        for attempt in (check, Run.open):
            with pytest.raises(InputError, match=r"can be written, but .* cannot"):
                attempt(tmp_path / "a" / "b", "prune", {})
        assert list(tmp_path.iterdir()) == []

    def test_a_parent_that_refuses(self):
        with pytest.raises(InputError, match="must be a folder"):
            Run.open("/proc/metaprune/out", "prune", {})

    def test_checking_writes_nothing(self, folder, finished):
        before = contents(finished)
        check(finished.parent / "new")
        check(finished, force=True)
        check(finished, resume=True)
        check(finished, "prune", OPTIONS, resume=True)
        assert contents(finished) == before
        assert not (finished.parent / "new").exists()


class TestResume:
    def test_it_goes_on(self, finished):
        before = read(finished)
        with Run.open(finished, "prune", OPTIONS, resume=True) as run:
            assert run.resumed
            assert run.path("figures/tree.svg").exists()
            assert run.load()["status"] == "running"
            assert "ended" not in run.load()
        after = read(finished)
        assert after["started"] == before["started"]
        assert [entry["versions"] for entry in after["resumed"]] == [versions()]

    def test_nothing_to_go_on_with(self, folder):
        for attempt in (check, Run.open):
            with pytest.raises(ConfigError, match="new or empty"):
                attempt(folder, "prune", {}, resume=True)
        assert not folder.exists()

    @pytest.mark.parametrize("content", [None, "{", "[]", '{"status": "finished"}'])
    def test_no_run_of_ours(self, content, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        if content is not None:
            (tmp_path / RECORD).write_text(content)
        for flag in ("resume", "force"):
            with pytest.raises(ConfigError, match="folder of a"):
                Run.open(tmp_path, "prune", {}, **{flag: True})
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_another_command(self, finished):
        with pytest.raises(ConfigError, match="is from `prune` and this is `search`"):
            Run.open(finished, "search", OPTIONS, resume=True)

    def test_other_options_are_named(self, finished):
        options = {"budget": "macs=0.4", "shape": [1, 3], "criterion": "l2"}
        message = (
            r"`budget` was \"macs=0.5\" and is now \"macs=0.4\"; `criterion` was not given and is now \"l2\"; "
            r"`seed` was 3 and is now not given. Give the old values"
        )
        with pytest.raises(ConfigError, match=message):
            Run.open(finished, "prune", options, resume=True)
        assert read(finished)["status"] == "finished"


class TestForce:
    def test_it_starts_over(self, finished):
        outside = finished.parent / "outside"
        outside.mkdir()
        (outside / "kept").write_text("kept")
        (finished / "link").symlink_to(outside)
        with Run.open(finished, "search", {}, force=True) as run:
            assert not run.resumed
            assert sorted(path.name for path in finished.iterdir()) == [LOCK, RECORD]
            assert run.load()["command"] == "search"
        assert (outside / "kept").exists()

    def test_a_new_folder_needs_no_clearing(self, folder):
        Run.open(folder, "prune", {}, force=True).finish()
        assert read(folder)["status"] == "finished"

    def test_never_where_somebody_is_at_home(self, finished, monkeypatch):
        inside = finished / "figures"
        for place in (finished, inside):
            monkeypatch.chdir(place)
            with pytest.raises(ConfigError, match="Give another folder"):
                Run.open(finished, "prune", OPTIONS, force=True)
            with pytest.raises(ConfigError, match="Give another folder"):
                check(Path(os.path.relpath(finished)), force=True)
        monkeypatch.chdir("/")
        for place in (finished, inside):
            monkeypatch.setenv("HOME", str(place))
            with pytest.raises(ConfigError, match="Give another folder"):
                Run.open(finished, "prune", OPTIONS, force=True)
        with pytest.raises(ConfigError, match="Give another folder"):
            check("/", force=True)
        assert (inside / "tree.svg").exists()

    @pytest.mark.parametrize("flag", ["force", "resume"])
    def test_a_kill_while_it_deletes_is_made_good(self, flag, finished):
        record = read(finished) | {"status": "clearing"}
        (finished / RECORD).write_text(json.dumps(record))
        with Run.open(finished, "prune", OPTIONS, **{flag: True}) as run:
            assert not run.resumed
            assert not (finished / "figures").exists()


class TestEnd:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (RuntimeError(), "failed"),
            (ConfigError("no"), "failed"),
            (KeyboardInterrupt(), "interrupted"),
            (SystemExit(3), "failed"),
            (SystemExit(0), "finished"),
        ],
    )
    def test_status(self, error, status, folder):
        with pytest.raises(type(error)), Run.open(folder, "prune", {}):
            raise error
        assert read(folder)["status"] == status

    def test_the_first_status_counts(self, folder):
        with Run.open(folder, "prune", {}) as run:
            run.finish("failed")
        run.finish("interrupted")
        assert read(folder)["status"] == "failed"

    def test_a_folder_that_is_gone_does_not_hide_the_error(self, folder):
        def work() -> None:
            with Run.open(folder, "prune", {}):
                shutil.rmtree(folder)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            work()


class TestLock:
    def test_one_at_a_time_and_free_after_a_kill(self, folder):
        with child(folder) as other:
            assert other.stdout.readline() == "open False\n"
            for attempt in (check, Run.open):
                for flags in ({"resume": True}, {"force": True}):
                    with pytest.raises(ConfigError, match=f"but process {other.pid} does"):
                        attempt(folder, "prune", {"seed": 1}, **flags)
            other.send_signal(signal.SIGKILL)
        assert read(folder)["status"] == "running"
        with pytest.raises(ConfigError, match=r"started .*, running\. Give --resume"):
            check(folder)
        with Run.open(folder, "prune", {"seed": 1}, resume=True) as run:
            assert run.resumed
            assert (folder / "log").stat().st_size > 0
        assert read(folder)["status"] == "finished"

    def test_of_many_that_start_together_one_works(self, tmp_path):
        children = [child(tmp_path / "out") for _ in range(4)]
        try:
            time.sleep(0.1)
            deadline = time.monotonic() + 60
            while sum(process.poll() is None for process in children) > 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            working = [process for process in children if process.poll() is None]
            assert len(working) == 1
            assert working[0].stdout.readline() == "open False\n"
            assert all(process.stdout.read() == "" for process in children if process is not working[0])
        finally:
            for process in children:
                process.kill()
                process.communicate()

    def test_the_same_process_twice(self, folder):
        run = Run.open(folder, "prune", {})
        with pytest.raises(ConfigError, match=f"process {os.getpid()} does"):
            Run.open(folder, "prune", {}, resume=True)
        run.finish()
        Run.open(folder, "prune", {}, resume=True).finish()

    def test_a_refused_open_leaves_no_lock(self, finished):
        with pytest.raises(ConfigError):
            Run.open(finished, "search", OPTIONS, resume=True)
        Run.open(finished, "prune", OPTIONS, resume=True).finish()

    def test_a_kill_at_any_moment_leaves_a_folder_to_go_on_in(self, folder):
        chance, flags = random.Random(), ()
        for _ in range(6):
            with child(folder, *flags) as other:
                time.sleep(chance.uniform(0.02, 0.4))
                other.kill()
            if (folder / RECORD).exists():
                assert read(folder)["status"] in ("running", "clearing")
                flags = (chance.choice(["resume", "force"]),)
        Run.open(folder, "prune", {"seed": 1}, **dict.fromkeys(flags, True)).finish()
        assert read(folder)["status"] == "finished"


def test_versions_name_what_is_installed() -> None:
    found = versions()
    assert list(found) == ["python", "metaprune", "torch", "numpy", "onnxruntime"]
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__


def test_importing_it_imports_nothing_heavy() -> None:
    script = "import sys, metaprune.run as r; r.versions(); print({'torch', 'numpy', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_seed_everything() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(7)
    first = draw()
    seed_everything(7)
    assert draw() == first
    seed_everything(8)
    assert draw() != first
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match="0 <= seed"):
            seed_everything(seed)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path)
