"""The demo is the first thing that a user runs: it must be quick, right, and say what to do next."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from metaprune.cli import course, delivery, searchcourse
from metaprune.cli import demo as demo_module
from metaprune.cli.answer import schema
from tests.cli.commands import Answer, command

CAMPAIGN = """# Two trials, without training.
model: zoo:digits_cnn
data: digits
train: {epochs: 1}
choices: {budget: macs=0.5, criterion: l2, recovery: none}
baselines: [uniform, global]
stop: {trials: 2}
calibration: 64
networks: 1
accelerator: cpu
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path, float]:
    folder = tmp_path_factory.mktemp("demo")
    before = os.times()
    done = command("demo", "--out", folder / "demo", "--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}", "--json")
    return done, folder / "demo", sum(os.times()[:4]) - sum(before[:4])


def test_it_takes_at_most_two_minutes(demo: tuple[Answer, Path, float]) -> None:
    """Of processors, so that it does not hang on what else they do; most of it is one process after another."""
    done, _, seconds = demo
    assert done.code == 0, done.err
    assert seconds < 120


def test_the_network_is_good_and_half_the_work_is_gone(demo: tuple[Answer, Path, float]) -> None:
    told = demo[0].json
    assert (told["split"], told["images"]) == ("test", 359)
    assert told["before"]["metrics"]["accuracy"] >= 97
    assert told["after"]["macs"] <= 0.5 * told["before"]["macs"]
    assert told["after"]["metrics"]["accuracy"] >= told["before"]["metrics"]["accuracy"] - 1.5
    assert told["error_max"] <= 1e-5
    assert all(check["passed"] for check in told["checks"])
    assert told["latency"]["comparisons"][0]["ratio"]["n"] >= 200
    assert told["tracking"]["run_id"]


def test_a_search_follows_on_the_same_network(demo: tuple[Answer, Path, float]) -> None:
    told, folder, _ = demo[0].json, *demo[1:]
    found = told["search"]
    jsonschema.validate(found, json.loads(schema("search run")))
    assert found["over"]
    assert found["rungs"][0]["done"] == 20
    assert len(found["networks"]) == min(3, len(found["front"]))
    assert all(check["passed"] is not False for check in found["checks"])
    assert {name: found["dense"][name] for name in ("macs", "params")} == {
        name: told["before"][name] for name in ("macs", "params")
    }
    assert found["tracking"]["uri"] == told["tracking"]["uri"]
    assert found["tracking"]["run_id"] not in (None, told["tracking"]["run_id"])
    assert (folder / "search" / "report.html").stat().st_size > 0
    assert told["seconds"]["total"] > told["seconds"]["search"] == found["seconds"]["total"]


def test_it_explains_itself(demo: tuple[Answer, Path, float]) -> None:
    assert "Welcome to metaprune" in demo[0].said
    assert max(map(len, demo[0].err.splitlines())) <= 80
    for step in (
        "Training the network",
        "Choosing what to cut",
        "Recovering",
        "Exporting",
        "Timing",
        "Now it is pruned in 20",
    ):
        assert step in demo[0].err


def test_everything_lies_in_the_folder(demo: tuple[Answer, Path, float]) -> None:
    done, folder, _ = demo
    for name in ("model.onnx", "dense.onnx", "dense.safetensors", "plan.json", "report.html", "run.json"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "checkpoints").exists()
    assert {Path(path).name for path in done.json["files"].values()} <= {
        folder.name,
        *(p.name for p in folder.iterdir()),
    }


def test_what_it_says_to_try_next_works(demo: tuple[Answer, Path, float], tmp_path: Path) -> None:
    tried = []
    for line in demo[0].json["next"]:
        words = shlex.split(line)
        assert words.pop(0) == "metaprune"
        extra = {
            "prune": ["--no-track", "--no-bench", "--no-export", "--epochs", "1", "--out", str(tmp_path / "next")],
            "bench": ["--rounds", "40", "--seconds", "0.2", "--no-memory"],
            "search": ["--trials", "20", "--workers", "1", "--no-track"],
        }
        if words[0] != "ui":  # it does not end by itself
            assert command(*words, *extra.get(words[0], [])).code in (0, 7), line
        tried.append(words[0])
    assert tried == ["search", "inspect", "prune", "validate", "bench", "ui"]


def test_a_second_demo_needs_force(demo: tuple[Answer, Path, float]) -> None:
    again = command("demo", "--out", demo[1])
    assert again.code == 3
    assert "--force" in again.said
    resumed = command("demo", "--out", demo[1], "--resume", "--json")
    assert resumed.code == 0
    assert resumed.json == demo[0].json
    shown = [
        line
        for line in command("demo", "--out", demo[1], "--resume").out.splitlines()
        if str(demo[1].parent) not in line  # never broken
    ]
    assert max(map(len, shown)) <= 80
    for part in ("zoo:digits_cnn at macs=0.5", "trial  accuracy", "On 359 test images", "over uniform"):
        assert any(part in line for line in shown), part


def test_an_interrupted_demo_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        assert command("demo", "--force", "--no-track").code == 3  # nobody deletes what is worked on
        raise KeyboardInterrupt

    (tmp_path / "tiny.yaml").write_text(CAMPAIGN)
    monkeypatch.setattr(demo_module, "CAMPAIGN", str(tmp_path / "tiny.yaml"))
    monkeypatch.setitem(demo_module.DENSE, "epochs", 2)
    monkeypatch.setitem(demo_module.RECOVERY, "epochs", 1)
    monkeypatch.setattr(delivery, "BENCH_S", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(course, "prune", interrupted)
        stopped = command("demo", "--no-track", "--no-search", "--json")
    assert stopped.code == 130
    assert stopped.json["error"]["again"] == "metaprune demo --out demo --no-track --no-search --resume"
    weights = (tmp_path / "demo" / "dense.safetensors").read_bytes()
    pruned = command("demo", "--no-track", "--no-search", "--resume", "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.json["search"] is None
    with monkeypatch.context() as patch:
        patch.setattr(searchcourse, "work", interrupted)
        stopped = command("demo", "--no-track", "--resume", "--json")
    assert stopped.code == 130
    assert stopped.json["error"]["again"] == "metaprune demo --out demo --no-track --resume"
    done = command("demo", "--no-track", "--resume", "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "demo" / "dense.safetensors").read_bytes() == weights
    assert done.json["search"]["rungs"][0]["done"] == 2
    assert done.json["search"]["tracking"]["run_id"] is None
    assert {name: done.json[name] for name in ("before", "after", "checks")} == {
        name: pruned.json[name] for name in ("before", "after", "checks")
    }


def test_the_page_tells_the_story(demo: tuple[Answer, Path, float]) -> None:
    page = (demo[1] / "report.html").read_text()
    assert "zoo:digits_cnn at macs=0.5" in page
    assert re.search(r"right on \d+\.\d+ % of 359 test images", page)
    assert "training loss by epoch" in page
