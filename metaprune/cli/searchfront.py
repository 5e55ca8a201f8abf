"""The networks of a front as files that can be deployed, each of them proved as that of `metaprune prune` is."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaprune.cli.delivery import deliver
from metaprune.cli.screen import Watch
from metaprune.cli.summary import PRUNED
from metaprune.config import PruneOptions
from metaprune.measure.accuracy import compare
from metaprune.search.campaign import Campaign
from metaprune.search.fidelity import Laboratory
from metaprune.search.pareto import Point

FRONT = "front"


def write_networks(
    campaign: Campaign, laboratory: Laboratory, folder: Path, watch: Watch, *, bench: bool = False
) -> list[dict[str, Any]]:
    """Plan, weights and ONNX file of each network of the front, in a folder of its own, with every check.

    Args:
        campaign: What was found.
        laboratory: Makes the networks again.
        folder: Of the campaign.
        watch: Is told about the steps.
        bench: Time each against the dense network.

    Returns:
        What was written, as plain data, the best in the first objective first.
    """
    goal = campaign.settings.objectives[0]
    points = campaign.result()
    front = [point for point in points if point.front]
    chosen = campaign.spread(front, campaign.settings.networks)
    chosen.sort(key=lambda point: point.metrics[goal], reverse=goal == "accuracy")
    networks = []
    for point in chosen:
        network = _write(campaign, laboratory, folder, point, watch, bench)
        network["gains"] = _gains(campaign, laboratory, point, points, watch)
        networks.append(network)
    return networks


def files_of(folder: Path) -> dict[str, Path]:
    """The ONNX files that were written, by the key of their network."""
    return {path.parent.name: path for path in sorted((folder / FRONT).glob(f"*/{PRUNED}"))}


def tested(network: Mapping[str, Any]) -> dict[str, Any]:
    """What was found of a network on test images, as columns of a table."""
    row = {"test_accuracy": network["accuracy"]}
    for name, gain in network["gains"].items():
        column = f"test_gain_over_{name}"
        row |= {column: gain["value"], f"{column}_low": gain["low"], f"{column}_high": gain["high"]}
    return row


def _write(
    campaign: Campaign, laboratory: Laboratory, folder: Path, point: Point, watch: Watch, bench: bool
) -> dict[str, Any]:
    place, settings = folder / FRONT / point.key, campaign.settings
    options = PruneOptions(
        model=settings.model,
        data=settings.data,
        budget=str(settings.budget(str(point.config["budget"]))),
        bench=bench,
        seed=settings.seed,
    )

    def quiet(description: str) -> None:
        watch.step(f"{description}, trial {point.number}")

    quiet("Writing the network")
    result = laboratory.result(point.key, point.config, _rung(point))
    result.save(place)
    dense = laboratory.network.model
    dense = dense if laboratory.device.type == "cpu" else copy.deepcopy(dense).cpu()  # files are made and tried there
    delivery = deliver(result, dense, laboratory.subject, options, place, watch, alone=not bench)
    watch.end()
    found = result.accuracy["recovered"]
    return {
        "key": point.key,
        "trial": point.number,
        "folder": f"{FRONT}/{point.key}",
        "accuracy": result.after.metrics.get("accuracy"),
        "difference": None if result.difference is None else result.difference.to_json(),
        "test_images": found.n,
        "error_max": result.verification.max_error,
        "checks": delivery.checks,
        "failed": [check["name"] for check in delivery.checks if check["passed"] is False],
        "latency": None if delivery.latency is None else delivery.latency.to_json(),
        "notes": delivery.notes,
    }


def _gains(
    campaign: Campaign, laboratory: Laboratory, point: Point, points: Sequence[Point], watch: Watch
) -> dict[str, Any]:
    """By plain allocator, how many points better a network is than its own at the same budget on the same test images.

    These images chose neither of them, so that no search flatters the difference.
    """
    watch.step(f"Testing plain allocators beside trial {point.number}")
    own = laboratory.on_test(point.key, point.config, _rung(point))
    gains = {
        name: compare(laboratory.on_test(rival.key, rival.config, _rung(rival)), own).to_json()
        for name, rival in campaign.rivals(point, points).items()
    }
    watch.end()
    return gains


def _rung(point: Point) -> int:
    return int(point.fidelity.partition("-")[0])
