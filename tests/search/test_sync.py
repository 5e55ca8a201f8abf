"""What a campaign becomes in MLflow, told to a tracker that only remembers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from metaprune.search import sync
from metaprune.search.campaign import Campaign
from metaprune.search.settings import Rung
from metaprune.search.worker import work
from metaprune.tracking import Tracker
from tests.search.player import Player, begun, settings


class Remembering(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[tuple[int, int, Mapping[str, float]]] = []
        self.children: dict[str, tuple[Mapping[str, Any], Mapping[str, float]]] = {}
        self.models: dict[str, Sequence[str]] = {}
        self.files: list[str] = []

    def history(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        self.points = list(points)

    def child(
        self, key: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str],
        at_ms: int,
    ) -> str | None:  # fmt: skip
        assert at_ms > 1_600_000_000_000
        self.children[key] = (params, metrics)
        return key

    def register(self, run_id: str, path: str | Path, model: str, aliases: Sequence[str]) -> str | None:
        assert model == "metaprune-played"
        self.models[run_id] = aliases
        return "1"

    def file(self, path: str | Path, folder: str | None = None) -> None:
        self.files.append(Path(path).name)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """One that is over."""
    folder = tmp_path_factory.mktemp("played")
    asked = settings(trials=30, children=20)
    campaign = begun(folder, asked, index=0)
    work(campaign, Player(folder, asked, 0.0))
    return campaign


def test_children_are_few_hold_the_front_and_have_the_same_keys(campaign: Campaign, tmp_path: Path) -> None:
    told = Remembering()
    sync.write(told, campaign, tmp_path, {})
    assert len(told.children) == 20
    assert {point.key for point in campaign.result() if point.front} <= set(told.children)
    assert len({(tuple(sorted(params)), tuple(sorted(metrics))) for params, metrics in told.children.values()}) == 1
    again = Remembering()
    sync.write(again, campaign, tmp_path, {})
    assert again.children == told.children
    assert again.points == told.points


def test_history_tells_the_best_so_far_and_what_the_front_is_worth(campaign: Campaign, tmp_path: Path) -> None:
    points = sync.history(campaign)
    assert [step for step, _, _ in points] == list(range(1, 31))
    for name, rises in (("search/front", True), ("search/best_accuracy", True), ("search/best_macs", False)):
        values = [found[name] for _, _, found in points]
        assert values == sorted(values, reverse=not rises)
    assert [at for _, at, _ in points] == sorted(at for _, at, _ in points)
    assert points[-1][2]["search/best_accuracy"] == max(point.metrics["accuracy"] for point in campaign.points(0))


def test_aliases_are_given_to_the_networks_that_deserve_them(campaign: Campaign, tmp_path: Path) -> None:
    front = [point for point in campaign.result() if point.front]
    for point in front:
        assert isinstance(point.metrics, dict)
        point.metrics["params"] = 1000 - point.metrics["accuracy"]
    (tmp_path / "report.html").write_text("")
    told = Remembering()
    sync.write(told, campaign, tmp_path, {point.key: tmp_path / "model.onnx" for point in front})
    given = {alias: key for key, aliases in told.models.items() for alias in aliases}
    assert set(given) == {"champion", "smallest", "fastest"}
    by = {point.key: point.metrics for point in front}
    assert by[given["champion"]]["accuracy"] == max(metrics["accuracy"] for metrics in by.values())
    assert by[given["fastest"]]["macs"] == min(metrics["macs"] for metrics in by.values())
    assert told.files == ["report.html"]


def test_rungs_that_measure_less_have_no_children(tmp_path: Path) -> None:
    asked = settings(trials=16, rungs=(Rung(kind="curves"), Rung(kind="evaluate", top=2)))
    campaign = begun(tmp_path, asked, index=0)

    def evaluate(key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
        return {"metrics": {("predicted_loss", "accuracy")[rung]: float(len(str(config))), "macs": 1.0}, "limits": {}}

    work(campaign, evaluate)
    assert {point.fidelity for point in sync.children(campaign)} == {"1-evaluate"}


def test_nothing_is_nothing(tmp_path: Path) -> None:
    campaign = begun(tmp_path, settings())
    assert sync.history(campaign) == []
    assert sync.children(campaign) == []
    assert sync.aliases([], "accuracy") == {}
