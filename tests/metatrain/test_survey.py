"""Measuring a population over processes: they end with the one that began them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metaprune.criteria import CRITERIA, Calibration
from metaprune.data import load
from metaprune.errors import ResourceError
from metaprune.metatrain import Population, Survey, survey_population
from tests.metatrain.test_population import TINY, children, kill_workers, runs, wait_for

ONE_EPOCH = replace(TINY, epochs=1, snapshots=(), pruned=())
SHORT = Survey(images=32, alone=3, together=3)
SCRIPT = """
import sys
from metaprune.data import load
from metaprune.metatrain import Population, Survey, survey_population
if __name__ == "__main__":
    members = Population.load(sys.argv[1]).members
    survey_population(sys.argv[1], members, load("digits"), Survey(alone=100_000), ["l2"], workers=2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("population")
    Population.build(folder, ONE_EPOCH, workers=1)
    return folder


def test_what_was_measured_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, data = Population.load(folder).members, load("digits")
    found, failed = survey_population(folder, members, data, SHORT, ["l2"], workers=1)
    assert [subject.name for subject in found] == [member.name for member in members]
    assert not failed
    monkeypatch.setattr("metaprune.metatrain.survey.measure_distortions", None)
    again, _ = survey_population(folder, members, data, SHORT, ["l2"], workers=1)
    for one, other in zip(found, again, strict=True):
        assert one.distortions.distortion_C.tolist() == other.distortions.distortion_C.tolist()


def test_another_criterion_is_added_to_what_was_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, data = Population.load(folder).members, load("digits")
    found, _ = survey_population(folder, members, data, SHORT, ["l2"], workers=1)
    monkeypatch.setattr("metaprune.metatrain.survey.measure_distortions", None)
    again, failed = survey_population(folder, members, data, SHORT, ["l2", "bn_scale", "l1"], workers=1)
    assert not failed
    for member, one, other in zip(members, found, again, strict=True):
        assert torch.equal(one.distortions.distortion_C, other.distortions.distortion_C)
        judges = CRITERIA["bn_scale"]().score(other.network, Calibration()) if member.family != "mlp" else {}
        assert list(other.distortions.reads) == ["l2", *(["bn_scale"] if judges else []), "l1"]


def test_a_worker_that_is_killed_is_said(folder: Path) -> None:
    members, survey = Population.load(folder).members, Survey(alone=100_000)

    def kill() -> None:
        wait_for(multiprocessing.active_children)
        kill_workers()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ResourceError, match="was killed, most likely for memory"):
        survey_population(folder, members, load("digits"), survey, ["l2"], workers=2)
    killer.join()


def test_a_worker_that_is_killed_while_others_begin_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, given = ProcessPoolExecutor.submit, []

    def broken(pool: ProcessPoolExecutor, *work: object) -> object:
        given.append(work)
        if len(given) == 2:
            raise BrokenProcessPool
        return submit(pool, *work)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", broken)
    members = Population.load(folder).members
    with pytest.raises(ResourceError, match="was killed, most likely for memory"):
        survey_population(folder, members, load("digits"), Survey(alone=100_000), ["l2"], workers=2)
    assert len(given) == 2
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("when", [0, 6])
def test_processes_end_at_once_and_quietly(folder: Path, tmp_path: Path, ending: signal.Signals, when: float) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, script, folder], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: len(children(process.pid)) == 3)  # one of them keeps track of what they share
        time.sleep(when)
        working = [process.pid, *children(process.pid)]
        if ending == signal.SIGINT:
            os.killpg(process.pid, ending)  # as a terminal does
        else:
            process.send_signal(ending)
        assert process.wait(60) != 0
        wait_for(lambda: not any(runs(one) for one in working))
        assert process.stderr is not None
        said = process.stderr.read()
    assert "SpawnProcess" not in said
