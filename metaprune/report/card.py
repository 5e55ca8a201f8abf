"""What a person who gets a network must know, on one page of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from metaprune.data import Dataset
from metaprune.report import numbers


def card(told: Mapping[str, Any], data: Dataset | None = None, sentences: Sequence[str] = ()) -> str:
    """The card of a network.

    Args:
        told: What ``metaprune prune --json`` says of it.
        data: What it was trained on, where that is known.
        sentences: What else should be known.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("metaprune.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md").render(
        told=told,
        made_by=told["plan"]["made_by"],
        cut=sum(axis["kept"] < axis["size"] for axis in told["plan"]["axes"]),
        rows=_rows(told),
        data=data,
        sentences=[*told["notes"], *sentences],
        numbers=numbers,
    )


def _rows(told: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, dense, this network, and where the numbers come from."""
    before, after = told["before"], told["after"]
    rows = [
        ("MACs per sample", numbers.count(before["macs"]), numbers.count(after["macs"]), "exact"),
        ("parameters", numbers.count(before["params"]), numbers.count(after["params"]), "exact"),
        ("bytes in memory", numbers.size(before["bytes"]), numbers.size(after["bytes"]), "exact"),
    ]
    for name, value in after["metrics"].items():
        rows.append((name, numbers.percent(before["metrics"][name]), numbers.percent(value), "measured"))
    times = {"latency": (before["latency_ms"], after["latency_ms"], "measured")}
    if (device := told["device"]) is not None:
        projected = device["projected_ms"]
        times[f"latency on {device['name']}"] = (projected["before"], projected["after"], "projected")
    for name, (dense, small, label) in times.items():
        if dense is not None and small is not None:
            rows.append((name, numbers.milliseconds(dense), numbers.milliseconds(small), label))
    return rows
