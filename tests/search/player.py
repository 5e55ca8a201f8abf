"""A worker without a network: what a configuration is worth is a formula, and finding it takes as long as it is told.

As a script: ``player.py FOLDER SECONDS [CPU]`` works on the campaign of a folder until it is over; a third word makes
evaluations compute instead of sleep.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from metaprune.search.campaign import Campaign
from metaprune.search.results import Results
from metaprune.search.settings import Choices, Rung, Settings, Stop
from metaprune.search.store import open_storage
from metaprune.search.worker import work

ABOUT = {"network": "none", "data": "none"}


def settings(trials: int = 30, **given: Any) -> Settings:
    """A campaign of two rungs over 2,160 configurations."""
    known: dict[str, Any] = {
        "name": "played",
        "model": "none",
        "data": "none",
        "choices": Choices(
            budget={"macs": (0.2, 0.7)},
            criterion=("l2", "taylor", "obs"),
            recovery=("none", "reconstruct"),
            floor=(0.05, 0.1, 0.2),
            round_to=(1, 8),
        ),
        "rungs": (Rung(kind="evaluate"), Rung(kind="finetune", top=3)),
        "stop": Stop(trials=trials),
        "limits": "macs=0.9",
        "lease": 30.0,
    }
    return Settings(**{**known, **given})


def worth(config: Mapping[str, Any], rung: int) -> dict[str, Any]:
    """What a configuration gives: the knapsack and small budgets have their price."""
    share = float(config["budget"].partition("=")[2])
    accuracy = 90 * share**0.1 + (config["allocator"] == "rd") + (config["criterion"] == "obs") + rung
    return {"metrics": {"accuracy": accuracy, "macs": 1e6 * share}, "limits": {"macs": 0.9e6}}


class Player:
    """An evaluator that waits, keeps what it found, and writes down what it evaluated."""

    def __init__(self, folder: Path, asked: Settings, seconds: float, busy: bool = False) -> None:
        self.folder, self.asked, self.seconds, self.busy = folder, asked, seconds, busy
        self.results = Results(folder / "results")

    def __call__(self, key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
        def find(place: Path) -> dict[str, Any]:
            self._wait()
            with (self.folder / "evaluated.log").open("a") as log:
                log.write(f"{time.time()} {key} {rung}\n")
            return worth(config, rung)

        return self.results.once(key, self.asked.fidelity(rung), config, find)

    def _wait(self) -> None:
        until = time.process_time() + self.seconds
        while self.busy and time.process_time() < until:
            pass
        if not self.busy:
            time.sleep(self.seconds)


def begun(folder: Path, asked: Settings, index: int | None = None) -> Campaign:
    """The campaign of a folder, begun or gone on with."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(asdict(asked)))
    return Campaign.begin(asked, open_storage(asked.storage, folder), ABOUT, index=index)


def main() -> None:
    """Work."""
    folder, seconds, busy = Path(sys.argv[1]), float(sys.argv[2]), len(sys.argv) > 3
    asked = TypeAdapter(Settings).validate_python(json.loads((folder / "settings.json").read_text()))
    campaign = Campaign(asked, open_storage(asked.storage, folder))
    work(campaign, Player(folder, asked, seconds, busy))


if __name__ == "__main__":
    main()
