from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metaprune import measure
from metaprune.measure.latency import Latency, latency
from tests.cli.commands import command, entries

QUICK = ["--rounds", "40", "--seconds", "0.2", "--limit", "5"]


def test_files_are_compared_with_the_first(result_folder: Path) -> None:
    files = [result_folder / "dense.onnx", result_folder / "model.onnx"]
    done = command("bench", *files, *QUICK, "--json")
    assert done.code in (0, 7)  # 7: too noisy a machine for a verdict
    told = done.json
    assert told["files"] == {"dense.onnx": str(files[0]), "model.onnx": str(files[1])}
    assert [arm["file"] for arm in told["latency"]["arms"]] == [str(file) for file in files]
    assert told["latency"]["comparisons"][0]["ratio"]["n"] >= 40
    assert len(told["memory"]) == 2


def test_the_table_says_what_may_be_claimed(result_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(result_folder)
    before = entries(result_folder)
    done = command("bench", "dense.onnx", "model.onnx", "dense.onnx", *QUICK, "--no-memory")
    assert done.code in (0, 7)
    assert max(map(len, done.out.splitlines())) <= 80
    assert "The first file against itself" in " ".join(done.out.split())
    assert entries(result_folder) == before


def test_a_machine_too_noisy_for_a_verdict_ends_with_7(result_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*files: Any, **options: Any) -> Latency:
        found = latency(*files, **options)
        said = replace(found.comparisons[0], verdict="too noisy", reason="a test says so")
        return replace(found, comparisons=(said,))

    monkeypatch.setattr(measure, "latency", noisy)
    done = command("bench", result_folder / "dense.onnx", result_folder / "model.onnx", *QUICK, "--no-memory")
    assert done.code == 7
    assert "too noisy for a verdict on model.onnx" in done.said
    assert "too noisy to tell, a test says so" in done.out


def test_nodes_are_shown_on_demand(result_folder: Path) -> None:
    file = result_folder / "model.onnx"
    told = command("bench", file, *QUICK, "--no-memory", "--profile", "--json").json
    (nodes,) = told["profile"]
    assert {"Conv", "Gemm"} <= {node["operator"] for node in nodes}
    convolutions = [node["module"] for node in nodes if node["operator"] == "Conv"]
    assert convolutions
    assert all(module.rpartition(".")[2].startswith("conv") for module in convolutions)
    done = command("bench", file, *QUICK, "--profile")
    assert "Slowest nodes of model.onnx" in done.out
    assert "load" in done.out
    assert convolutions[0] in done.out
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.onnx"], "is not there"),
        (["{result}/model.onnx", "missing.onnx"], "is not there"),
        (["{result}/plan.json"], "plan.json"),
        (["{result}/model.onnx", "--batch", "0"], "`batch` must be at least 1"),
        (["{result}/model.onnx", "--seconds", "0"], "`seconds` must be above 0"),
    ],
)
@pytest.mark.parametrize("memory", ["--memory", "--no-memory"])
def test_bad_input_is_refused(result_folder: Path, words: list[str], said: str, memory: str) -> None:
    done = command("bench", *(word.format(result=result_folder) for word in words), memory)
    assert done.code == 3
    assert said in done.said
    assert done.out == ""
