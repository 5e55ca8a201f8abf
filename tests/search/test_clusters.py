"""The recipes of docs/search.md for Ray and Slurm, as they stand there, on whatever this machine has of them."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metaprune.cli.searchcourse import load_settings
from metaprune.search.campaign import Campaign
from metaprune.search.store import open_storage
from tests.cli.commands import command
from tests.search.crowd import until, works

pytestmark = pytest.mark.long

DOCS = Path(__file__).parents[2] / "docs" / "search.md"
CONFIG = """# So many trials that some are at work whenever one looks.
model: zoo:digits_cnn
data: digits
choices: {budget: {macs: [0.3, 0.7]}, criterion: [l2, taylor], floor: [0.1, 0.05, 0.2]}
rungs: [{kind: finetune, epochs: 2}]
stop: {trials: 16}
calibration: 64
accelerator: cpu
"""


def recipe(heading: str, **changes: str) -> str:
    """The first program under a heading of the page, with some of its words changed."""
    (text,) = re.findall(rf"### {heading}\n.*?```(?:bash|python)\n(.*?)```", DOCS.read_text(), re.DOTALL)[:1]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """One that was begun for others to work on."""
    (tmp_path / "played.yaml").write_text(CONFIG)
    begun = command("search", "run", tmp_path / "played.yaml", "--out", tmp_path / "c", "--workers", "0", "--no-track")
    assert begun.code == 0, begun.err
    return Campaign(load_settings(tmp_path / "c"), open_storage(None, tmp_path / "c"))


@pytest.fixture
def environment() -> dict[str, str]:
    """Where `metaprune` is found, and no cluster of somebody else."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}


def at_work(campaign: Campaign, folder: Path) -> int:
    """A process that has a trial, waited for."""
    found: list[int] = []

    def look() -> bool:
        said = subprocess.run(["pgrep", "-f", f"search worker {folder}"], capture_output=True, text=True, check=False)
        found[:] = [pid for pid in map(int, said.stdout.split()) if works(campaign, pid)]
        return bool(found)

    until(look, 120)
    return found[0]


def check(campaign: Campaign) -> None:
    """Every trial is there once, whatever was killed."""
    assert campaign.over
    assert [task.state for task in campaign.queues[0].tasks().values()] == ["done"] * 16


def test_a_worker_that_is_killed_under_ray_is_started_again(
    campaign: Campaign, environment: dict[str, str], tmp_path: Path
) -> None:
    ray = shutil.which("ray")
    if ray is None:
        pytest.skip("ray is not installed (pip install ray, anywhere on PATH)")
    script = tmp_path / "workers.py"
    script.write_text(recipe("Ray", **{"/shared/r56": str(tmp_path / "c"), "range(1, 17)": "range(1, 3)"}))
    python = Path(ray).with_name("python")
    with subprocess.Popen([python, script], env=environment, stdout=subprocess.PIPE, text=True) as driver:
        os.kill(at_work(campaign, tmp_path / "c"), signal.SIGKILL)
        said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0
    assert "[0, 0]" in said
    check(campaign)


def test_jobs_of_slurm_that_are_cancelled_give_their_trials_back(
    campaign: Campaign, environment: dict[str, str], tmp_path: Path
) -> None:
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, check=False).returncode:
        pytest.skip("no Slurm answers (apt-get install slurm-wlm munge, and start its daemons)")
    script = tmp_path / "workers.sh"
    script.write_text(recipe("Slurm", **{"/shared/r56": str(tmp_path / "c"), "--array=1-16": "--array=1-3"}))
    submit = ["sbatch", "--parsable", script]
    job = subprocess.run(
        submit, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        at_work(campaign, tmp_path / "c")
        subprocess.run(["scancel", f"{job}_1"], check=True)
        until(lambda: campaign.over, 300)
    finally:
        subprocess.run(["scancel", job], check=False)
    check(campaign)
    assert not any(task.deaths for task in campaign.queues[0].tasks().values())
