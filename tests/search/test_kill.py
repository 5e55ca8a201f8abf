"""Workers are killed at random moments: nothing is lost, nobody is waited for."""

import time
from pathlib import Path

import pytest

from tests.search.crowd import check, evaluated, killed, player, until
from tests.search.player import begun, settings

RESTART_S = 2.0  # from the start of a process to its first evaluation


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_killed_workers_cost_nothing_but_their_time(tmp_path: Path, kills: int) -> None:
    trials = 20 + 8 * kills
    campaign = begun(tmp_path, settings(trials=trials, sampler="random"))
    assert killed(campaign, tmp_path, kills, 0.15) > kills / 2
    check(campaign, tmp_path, trials, kills)
    assert sum(task.deaths for queue in campaign.queues for task in queue.tasks().values()) > kills / 4


def test_the_next_trial_begins_soon_after_all_were_killed(tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings(trials=20))
    first = player(tmp_path, 0.3)
    until(lambda: len(evaluated(tmp_path)) >= 2)
    time.sleep(0.1)  # in the middle of the third
    first.kill()
    first.wait()
    before = len(evaluated(tmp_path))
    began = time.time()
    second = player(tmp_path, 0.01)
    until(lambda: len(evaluated(tmp_path)) > before)
    took = evaluated(tmp_path)[before][0] - began
    assert second.wait(120) == 0, (tmp_path / "players.log").read_text()
    check(campaign, tmp_path, 20, kills=1)
    assert took < 4 * RESTART_S  # measured: 0.6 s on an idle machine; the bound is for busy ones
