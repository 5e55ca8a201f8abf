"""The page of a campaign: no script, no network, and what it says is what was found."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from metaprune import report
from metaprune.report.campaign import CampaignFindings, baselines, growth, render, scatter
from metaprune.search.pareto import Point

TEMPLATES = Path(report.__file__).parent / "templates"


def point(
    number: int, accuracy: float, macs: float, origin: str = "sampler", budget: str = "macs=0.5", **k: bool
) -> Point:
    config = {"criterion": "l2", "allocator": origin, "metanet": "off", "recovery": "none", "round_to": 1, "floor": 0.1}
    return Point(
        key=f"key{number}",
        number=number,
        origin=origin,
        fidelity="0-evaluate",
        config={**config, "budget": budget},
        metrics={"accuracy": accuracy, "macs": macs, "params": 5},
        feasible=k.get("feasible", True),
        front=k.get("front", False),
        gains={"rd": None, "uniform": 1.5},
        sizes={"conv1": 8},
    )


POINTS = [
    point(0, 80.0, 100.0, "rd"),
    point(1, 90.0, 50.0, "uniform", front=True),
    point(2, 95.0, 90.0, front=True),
    point(3, 70.0, 40.0, "rd", "macs=0.3", front=True),
    point(4, 99.0, 10.0, feasible=False),
]

NETWORK = {
    "key": "key2", "trial": 2, "folder": "front/key2", "accuracy": 94.0, "failed": [], "test_images": 359,
    "difference": {"value": -1.95, "low": -3.5, "high": -0.1},
    "gains": {"uniform": {"value": 2.23, "low": 0.4, "high": 4.1}},
}  # fmt: skip


@pytest.fixture
def findings() -> CampaignFindings:
    return CampaignFindings(
        name="mine",
        model="zoo:<none>",
        data="digits",
        split="validation",
        images=180,
        objectives=("accuracy", "macs"),
        dense={"accuracy": 97.0},
        sizes={"conv1": 16},
        closed="5 trials",
        first=POINTS,
        last=POINTS,
        failures=[{"trial": 7, "why": "accuracy is <nan>", "config": {"criterion": "l2"}}],
        networks={"key2": NETWORK},
        commands=["metaprune search resume x"],
        files={"pareto.csv": "a table"},
    )


def test_a_page_needs_nothing_but_itself(findings: CampaignFindings) -> None:
    page = render(findings)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert "zoo:&lt;none&gt;" in page
    assert "accuracy is &lt;nan&gt;" in page
    links = re.findall(r'href="#([^"]+)"', page)
    assert set(links) == {f"trial-key{k}" for k in range(5)}
    assert all(page.count(f'id="{link}"') == 1 for link in links)


def test_the_front_comes_first(findings: CampaignFindings) -> None:
    assert [found.number for found in findings.front] == [2, 1, 3]
    assert re.findall(r'<tr id="trial-key(\d)"', render(findings)) == ["2", "1", "3", "0", "4"]


def test_points_lie_where_their_numbers_say(findings: CampaignFindings) -> None:
    found = scatter(findings)
    assert found is not None
    places = {dot.point.number: (dot.x, dot.y) for dot in found.dots}
    assert places[0][0] == max(x for x, _ in places.values())  # most MACs: to the right
    assert places[4][1] == min(y for _, y in places.values())  # most accurate: up
    assert (found.left, found.right, found.top, found.bottom) == (
        "10",
        "100.0",
        "99.00 %",
        "70.00 %",
    ) or found.left == "10"
    assert len(found.steps.split()) == 3


def test_small_is_up_where_small_is_good(findings: CampaignFindings) -> None:
    found = scatter(replace(findings, objectives=("macs",)))
    assert found is not None
    places = {dot.point.number: dot.y for dot in found.dots}
    assert places[4] < places[0]


def test_winners_are_told_by_budget(findings: CampaignFindings) -> None:
    names, rows = baselines(findings)
    assert names == ["rd", "uniform", "sampler"]
    assert [budget for budget, _ in rows] == ["macs=0.5", "macs=0.3"]
    assert [(text, best) for text, best in rows[0][1]] == [("80.00 %", False), ("90.00 %", False), ("95.00 %", True)]


def test_growth_is_drawn_from_two_points_on(findings: CampaignFindings) -> None:
    line = growth(findings)
    assert line is not None
    heights = [float(place.partition(",")[2]) for place in line.split()]
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] == 0
    assert growth(replace(findings, first=POINTS[:1])) is None


def test_a_campaign_without_a_point_has_a_page(findings: CampaignFindings) -> None:
    assert "What failed" in render(replace(findings, first=[], last=[], networks={}))


def test_the_two_style_sheets_name_different_things() -> None:
    def classes(sheet: str) -> set[str]:
        rules = (TEMPLATES / sheet).read_text()
        return set(re.findall(r"\.([a-zA-Z][\w-]*)(?=[\s.:,{>])", re.sub(r"\{[^}]*\}", "{", rules)))

    assert classes("campaign.css")
    assert classes("report.css")
    assert not classes("campaign.css") & classes("report.css")  # a page of a campaign has both
