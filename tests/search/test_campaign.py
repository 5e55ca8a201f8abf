"""What comes first, what comes next, when it ends, and what is refused; with evaluations that are formulas."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from metaprune.errors import ConfigError, InputError, ResourceError
from metaprune.search.campaign import ABOUT, Campaign, Job
from metaprune.search.queue import KEY, ORIGIN
from metaprune.search.settings import Choices, Rung, Settings, Stop
from metaprune.search.store import open_storage
from metaprune.search.worker import reason, work
from tests.search.player import ABOUT as FINGERPRINTS
from tests.search.player import Player, begun, settings, worth

PLAIN = ("rd", "uniform", "global", "lamp", "erk")


def played(folder: Path, asked: Settings, **bad: Any) -> Campaign:
    """A campaign, carried out by one worker."""
    campaign = begun(folder, asked, index=0)
    work(campaign, Player(folder, asked, 0.0))
    return campaign


def origins(campaign: Campaign) -> list[str]:
    return [task.trial.user_attrs[ORIGIN] for task in campaign.queues[0].tasks().values()]


def test_baselines_come_first_at_every_budget(tmp_path: Path) -> None:
    asked = settings(choices=Choices(budget=("macs=0.5", "macs=0.3"), metanet=("off", "edit", "both")))
    campaign = begun(tmp_path, asked)
    assert origins(campaign) == [*PLAIN, "metanet edit", "metanet both"] * 2
    first = [campaign.config(task.trial.params) for task in campaign.queues[0].tasks().values()]
    assert [config["allocator"] for config in first[:5]] == list(PLAIN)
    assert {config["budget"] for config in first[:7]} == {"macs=0.5"}
    assert [config["criterion"] for config in first[5:7]] == ["taylor", "metanet"]
    for trial in campaign.queues[0].trials():
        assert set(trial.params) == set(campaign.distributions)
    assert origins(begun(tmp_path, asked)) == origins(campaign)  # filing them again changes nothing


def test_a_whole_campaign(tmp_path: Path) -> None:
    campaign = played(tmp_path, settings(trials=30))
    assert campaign.over
    assert campaign.closed == "30 trials"
    assert origins(campaign) == [*PLAIN * 3, *["sampler"] * 15]
    assert len(set(campaign.queues[0].tasks())) == 30
    above = campaign.points(1)
    assert sum(point.origin == "sampler" for point in above) >= 1
    assert len(above) == 3 + sum(point.origin in ("rd", "uniform", "global") for point in above if point.number >= 3)
    best = max(campaign.points(0), key=lambda point: point.metrics["accuracy"])
    assert best.front
    assert best.feasible


def test_the_same_seed_gives_the_same_trials(tmp_path: Path) -> None:
    once, again = (played(tmp_path / name, settings(trials=24, sampler="nsga2")) for name in ("once", "again"))
    assert [list(queue.tasks()) for queue in once.queues] == [list(queue.tasks()) for queue in again.queues]
    other = played(tmp_path / "other", settings(trials=24, sampler="nsga2", seed=1))
    assert set(other.queues[0].tasks()) != set(once.queues[0].tasks())


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_samplers_propose_what_was_not_tried(tmp_path: Path, sampler: str) -> None:
    campaign = played(tmp_path, settings(trials=40, sampler=sampler))
    configs = [json.dumps(campaign.config(task.trial.params)) for task in campaign.queues[0].tasks().values()]
    assert len(set(configs)) == 40


def test_the_gaussian_process_takes_constraints(tmp_path: Path) -> None:
    assert played(tmp_path, settings(trials=17, sampler="gp", limits="macs=0.9,accuracy=80")).closed == "17 trials"


def test_a_small_space_ends_when_all_was_tried(tmp_path: Path) -> None:
    asked = settings(choices=Choices(budget=("macs=0.5",), allocator=("rd",)), baselines=("rd",))
    assert played(tmp_path / "one", asked).closed == "no choice was found that had not been tried"
    asked = settings(choices=Choices(budget=("macs=0.5", "macs=0.4"), allocator=("rd", "erk")), baselines=("rd",))
    campaign = played(tmp_path / "four", asked)
    assert len(campaign.queues[0].tasks()) == 4
    assert campaign.over


# ---- when it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "why", "trials"),
    [
        (Stop(trials=18), "18 trials", 18),
        (Stop(trials=99, evaluations=20), "20 evaluations", 20),
        (Stop(trials=99, plateau=12), "the front has not changed for 12 trials", None),
        (Stop(trials=7), "7 trials", 7),
    ],
)
def test_it_ends_when_it_should(tmp_path: Path, stop: Stop, why: str, trials: int | None) -> None:
    campaign = played(tmp_path, settings(stop=stop))
    assert campaign.closed == why
    assert campaign.over
    if trials is not None:
        assert len(campaign.queues[0].tasks()) == trials
    if stop.evaluations is not None:
        assert campaign.queues[1].tasks() == {}


def test_it_ends_in_time(tmp_path: Path) -> None:
    asked = settings(stop=Stop(trials=10_000, seconds=1))
    campaign = played(tmp_path, asked)
    assert campaign.closed == "1 s"


def test_it_goes_on_for_more_trials(tmp_path: Path) -> None:
    first = played(tmp_path, settings(trials=16))
    keys = list(first.queues[0].tasks())
    more = played(tmp_path, settings(trials=22))
    assert list(more.queues[0].tasks())[:16] == keys
    assert len(more.queues[0].tasks()) == 22
    assert more.over


# ---- what fails ------------------------------------------------------------------------------------------------------


class Failing(Player):
    """Some configurations fail, each in its own way."""

    def __call__(self, key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
        found = worth(config, rung)
        match config["allocator"]:
            case "uniform":
                found["metrics"]["accuracy"] = float("nan")
            case "global":
                raise MemoryError("8 GB")
            case "lamp":
                del found["metrics"]["loss"]
            case "erk":
                raise InputError("the disk is full.")
        return found


def test_failures_are_named_and_never_feasible(tmp_path: Path) -> None:
    asked = settings(trials=15, limits="macs=0.9,loss=2", objectives=("accuracy", "macs"))
    campaign = begun(tmp_path, asked, index=0)

    class Found(Failing):
        def __call__(self, key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
            metrics = {"loss": 1.0}
            if config["allocator"] == "lamp":
                return worth(config, rung)
            found = super().__call__(key, config, rung)
            return {**found, "metrics": {**metrics, **found["metrics"]}}

    told: list[str] = []
    work(campaign, Found(tmp_path, asked, 0.0), lambda job, how: told.append(how))
    whys = {task.trial.user_attrs[ORIGIN]: task.failure for task in campaign.queues[0].tasks().values()}
    assert whys == {
        "rd": "",
        "uniform": "accuracy must be a finite number, but it is nan.",
        "global": "out of memory: 8 GB",
        "lamp": "loss must be a finite number, but it is missing.",
        "erk": "the disk is full.",
    }
    assert {point.config["allocator"] for point in campaign.points(0)} == {"rd"}
    assert set(told) >= {"done", "out of memory: 8 GB"}
    assert campaign.over


def test_limits_that_are_exceeded_keep_a_network_from_the_front(tmp_path: Path) -> None:
    campaign = played(tmp_path, settings(trials=20, limits="accuracy=85"))
    for point in campaign.points(0):
        assert point.feasible == (point.metrics["accuracy"] >= 85)
        assert point.feasible or not point.front
    assert {point.feasible for point in campaign.points(0)} == {True, False}
    assert all(point.feasible or point.origin in PLAIN for point in campaign.points(1))


def test_reasons_are_one_line() -> None:
    assert reason(ValueError("two\nlines")) == "ValueError: two"
    assert reason(KeyError()) == "KeyError: no message"


def test_an_interrupted_worker_gives_its_trial_back(tmp_path: Path) -> None:
    asked = settings(trials=15)
    campaign = begun(tmp_path, asked)

    def interrupted(key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(campaign, interrupted)
    assert {task.state for task in campaign.queues[0].tasks().values()} == {"waiting"}
    assert max(task.deaths for task in campaign.queues[0].tasks().values()) == 0
    assert played(tmp_path, asked).over


def test_a_full_disk_ends_the_worker_and_costs_no_trial(tmp_path: Path) -> None:
    asked = settings(trials=15)
    campaign = begun(tmp_path, asked)

    def full(key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ResourceError("the disk is full") from error

    with pytest.raises(ResourceError):
        work(campaign, full)
    assert {task.state for task in campaign.queues[0].tasks().values()} == {"waiting"}
    assert played(tmp_path, asked).over


def test_a_campaign_can_be_forgotten(tmp_path: Path) -> None:
    campaign = played(tmp_path, settings(trials=15))
    Campaign.forget(campaign.settings, campaign.storage)
    Campaign.forget(campaign.settings, campaign.storage)
    again = begun(tmp_path, settings(calibration=64))
    assert {task.state for task in again.queues[0].tasks().values()} == {"waiting"}


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_gains_are_over_plain_allocators_at_the_same_budget(tmp_path: Path) -> None:
    campaign = played(tmp_path, settings(trials=25, rungs=(Rung(kind="evaluate"), Rung(kind="finetune", share=0.8))))
    points = campaign.points(1)
    by = {(point.origin, point.config["budget"]): point for point in points}
    for point in points:
        rivals = campaign.rivals(point, points)
        assert point not in rivals.values()
        for name in ("rd", "uniform", "global"):
            other = by.get((name, point.config["budget"]))
            if other is not None:
                gain = point.metrics["accuracy"] - other.metrics["accuracy"]
                assert point.gains[name] == pytest.approx(gain)
                assert rivals.get(name, point) == other
    climbed = [point for point in points if point.origin == "sampler"]
    assert climbed
    for point in climbed:
        assert None not in point.gains.values()


def test_a_rung_of_curves_takes_the_predicted_loss(tmp_path: Path) -> None:
    asked = settings(trials=16, rungs=(Rung(kind="curves"), Rung(kind="evaluate", share=0.2)))
    campaign = begun(tmp_path, asked, index=0)

    def evaluate(key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
        found = worth(config, rung)
        if rung == 0:
            found["metrics"]["predicted_loss"] = 100 - found["metrics"].pop("accuracy")
        return found

    work(campaign, evaluate)
    assert campaign.over
    assert campaign.queues[0].study.directions[0].name == "MINIMIZE"
    assert campaign.queues[1].study.directions[0].name == "MAXIMIZE"
    assert len(campaign.points(1)) >= 4


def test_no_transaction_a_choice(tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings(trials=20, baselines=()))
    before = (tmp_path / "journal.log").read_text().count("\n")
    job = campaign.next()
    assert isinstance(job, Job)
    assert (tmp_path / "journal.log").read_text().count("\n") - before == 4  # filed, wanted, claimed, leased


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_another_config_network_or_optuna_is_refused(tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings())
    storage = open_storage(None, tmp_path)
    with pytest.raises(ConfigError, match="with config"):
        Campaign.begin(settings(calibration=64), storage, FINGERPRINTS)
    with pytest.raises(ConfigError, match="with network 'none'"):
        Campaign.begin(settings(), storage, {**FINGERPRINTS, "network": "other"})
    study = campaign.queues[0].study
    study.set_user_attr(ABOUT, {**study.user_attrs[ABOUT], "optuna": "4"})
    with pytest.raises(ConfigError, match="with optuna '4'"):
        Campaign.begin(settings(), storage, FINGERPRINTS)


def test_a_worker_needs_a_campaign(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="metaprune search run"):
        Campaign(settings(), open_storage(None, tmp_path))


def test_a_worker_that_comes_early_waits(tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings(baselines=()))
    study = optuna.create_study(study_name="early/0-evaluate", storage=campaign.storage, directions=["maximize"] * 2)
    optuna.create_study(study_name="early/1-finetune", storage=campaign.storage, directions=["maximize"] * 2)
    early = Campaign(settings(name="early", baselines=()), campaign.storage)
    assert early.next() is None
    assert not early.over
    assert study.trials == []


def test_keys_are_of_what_decides(tmp_path: Path) -> None:
    choices = Choices(budget=("macs=0.5",), criterion=("l2", "obs"), metanet=("off", "both"))
    campaign = begun(tmp_path, settings(choices=choices))
    assert campaign.key({"metanet": "both", "criterion": "l2"}) == campaign.key({"metanet": "both", "criterion": "obs"})
    assert campaign.key({"criterion": "l2"}) != campaign.key({"criterion": "obs"})
    assert {trial.user_attrs[KEY] for trial in campaign.queues[0].trials()} == set(campaign.queues[0].tasks())
