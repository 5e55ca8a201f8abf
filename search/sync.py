"""A campaign in MLflow: one run with its history, a run for each trial worth comparing, the front's networks as models.

All of it is made from the storage and the folder of the campaign, so it can be written when the campaign is over, or
later, or twice: what is there is found by its key.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from metaprune.search.campaign import Campaign, goals
from metaprune.search.pareto import Numbers, Point, best, progress
from metaprune.search.settings import sign_of
from metaprune.tracking import Tracker

TAG = "metaprune.campaign"
ALIASES = ("champion", "smallest", "fastest")


def parent(tracked: Tracker, campaign: Campaign) -> None:
    """Take up the run of this campaign, or make it.

    Raises:
        ConfigError: The store cannot be used.
    """
    settings = campaign.settings
    identity = f"{settings.name}-{settings.identity}"
    if not tracked.take_up(TAG, identity):
        tracked.start("search", settings.deciding, {TAG: identity, "mlflow.runName": settings.name})


def write(tracked: Tracker, campaign: Campaign, folder: Path, networks: Mapping[str, Path]) -> None:
    """Write all of a campaign below its run; what fails is noted by the tracker.

    Args:
        tracked: Its run has been taken up.
        campaign: What was found.
        folder: Of the campaign; its report and tables are kept with the run.
        networks: ONNX files of the front by key.
    """
    tracked.history(history(campaign))
    runs: dict[str, str | None] = {}
    for point in children(campaign):
        runs[point.key] = tracked.child(
            point.key,
            f"trial {point.number} on {point.fidelity}",
            {**point.config, "origin": point.origin, "fidelity": point.fidelity},
            {name: value for name, value in point.metrics.items() if value is not None},
            {"metaprune.front": str(point.front).lower(), "metaprune.feasible": str(point.feasible).lower()},
            point.finished_ms,
        )
    for name in ("pareto.csv", "pareto.json", "report.html", "settings.json"):
        if (folder / name).exists():
            tracked.file(folder / name)
    goal = campaign.settings.objectives[0]
    chosen = aliases([point for point in campaign.result() if point.key in networks], goal)
    for key, path in networks.items():
        run_id = runs.get(key)
        if run_id is not None:
            own = [alias for alias, other in chosen.items() if other == key]
            tracked.register(run_id, path, f"metaprune-{campaign.settings.name}", own)


def history(campaign: Campaign) -> list[tuple[int, int, dict[str, float]]]:
    """What was known after each trial of the first rung: step, time in ms, values."""
    names = goals(campaign.settings, 0)
    points = sorted((point for point in campaign.points(0) if point.feasible), key=lambda point: point.finished_ms)
    losses = _losses(names, points)
    worth, best_so_far = progress(losses), np.minimum.accumulate(losses, axis=0)
    return [
        (
            step,
            point.finished_ms,
            {
                "search/front": worth[step - 1],
                **{f"search/best_{name}": sign_of(name) * best_so_far[step - 1, k] for k, name in enumerate(names)},
            },
        )
        for step, point in enumerate(points, 1)
    ]


def children(campaign: Campaign) -> list[Point]:
    """The points that are worth a run of their own: the front, then baselines, then the rest by rank.

    All have the same metrics, because pages that compare runs leave out those that lack one.
    """
    result = campaign.result()
    if not result:
        return []
    wanted = set(result[0].metrics)
    pool = list(result)
    for number in reversed(range(len(campaign.queues))):
        there = {point.key for point in pool}
        pool += [point for point in campaign.points(number) if point.key not in there and set(point.metrics) == wanted]
    front = [point for point in result if point.front]
    plain = [point for point in pool if point.origin != "sampler" and not point.front]
    rest = [point for point in pool if point not in front and point not in plain]
    most = campaign.settings.children
    first = [*front, *plain][:most]
    return first + [rest[row] for row in best(_losses(campaign.settings.objectives, rest), most - len(first))]


def aliases(front: Sequence[Point], goal: str) -> dict[str, str]:
    """Alias -> key of the network that bears it; the champion is the best in the first objective."""
    if not front:
        return {}
    quickest = "latency_ms" if all(point.metrics.get("latency_ms") is not None for point in front) else "macs"
    return {
        "champion": min(front, key=lambda point: sign_of(goal) * point.metrics[goal]).key,
        "smallest": min(front, key=lambda point: point.metrics["params"]).key,
        "fastest": min(front, key=lambda point: point.metrics[quickest]).key,
    }


def _losses(names: Sequence[str], points: Sequence[Point]) -> Numbers:
    rows = [[sign_of(name) * point.metrics[name] for name in names] for point in points]
    return np.array(rows, np.float64).reshape(len(rows), len(names))
