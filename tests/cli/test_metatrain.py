"""`metaprune metatrain`: a tiny population on digits, the whole way."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from metaprune import tracking
from metaprune.cli import metacourse
from metaprune.cli.metacourse import read_recipe
from metaprune.config import shipped_recipes
from metaprune.metanet import PaperShape, Shape, load_checkpoint
from metaprune.metatrain import MetaTraining, Survey
from tests.cli.commands import TINY, Answer, command, entries

RECIPE = """
# Three tiny networks.
data: digits
epochs: 2
batch_size: 16
lr: 0.1
images: 320
members:
  - {model: mlp, options: {widths: [16]}}
  - {model: digits_cnn, options: {widths: [4, 8]}, seed: 1}
  - {model: digits_cnn, options: {widths: [4, 8]}, seed: 2, split: validation, name: judge}
survey: {images: 64, alone: 8, together: 16}
shape: {hidden: 16, layers: 1, heads: 4, rank: 2}
training: {steps: 24, validate_every: 8, images: 60, calibration: 64}
"""
QUIET = ["--workers", "1", "--no-track"]


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path, str]:
    """One run with everything on."""
    folder = tmp_path_factory.mktemp("metatrained")
    (folder / "tiny.yaml").write_text(RECIPE)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    words = ["--out", folder / "out", "--workers", "1", "--tracking-uri", uri]
    return command("metatrain", folder / "tiny.yaml", *words, "--json"), folder / "out", uri


@pytest.fixture
def population(tracked: tuple[Answer, Path, str], tmp_path: Path) -> list[str]:
    """Options that use trained networks."""
    shutil.copytree(tracked[1] / "population", tmp_path / "networks")
    return ["--population", "networks"]


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_json_says_everything(tracked: tuple[Answer, Path, str]) -> None:
    done, folder, uri = tracked
    assert done.code == 0, done.err
    told = done.json
    assert (told["data"], told["split"], told["images"]) == ("digits", "validation", 60)
    assert told["population"]["families"] == ["digits", "mlp"]
    assert told["population"]["train"] == ["mlp widths=16 seed=0", "digits_cnn widths=4x8 seed=1"]
    assert told["population"]["validation"] == ["judge"]
    (network,) = told["networks"]
    assert list(network["curves"]) == list(told["areas"]) == ["metanet", "taylor", "l2"]
    assert {name: curve["area"] for name, curve in network["curves"].items()} == told["areas"]
    assert [look["step"] for look in told["history"]] == [0, 8, 16, 24]
    assert {"step": told["step"], "area": told["areas"]["metanet"]} in told["history"]
    assert told["areas"]["metanet"] == max(look["area"] for look in told["history"])
    assert json.loads((folder / "outcome.json").read_text()) == told
    assert told["tracking"]["uri"] == uri
    assert not (folder / "checkpoints").exists()
    for path in told["files"].values():
        assert Path(path).exists()


def test_the_card_tells_all_but_where(tracked: tuple[Answer, Path, str]) -> None:
    done, folder, _ = tracked
    found = load_checkpoint(folder / "metanet.safetensors")
    card = found.card
    assert sum(parameter.numel() for parameter in found.metanet.parameters()) == done.json["params"]
    assert {"population", "data", "seed", "survey", "shape", "training", "versions", "areas", "networks"} <= set(card)
    assert card["population"] == done.json["population"]
    assert card["data"]["name"] == "digits"
    assert len(card["data"]["fingerprint"]) == 64
    assert card["training"]["steps"] == 24
    assert card["versions"]["torch"]
    assert "learnt from 2 networks on digits" in card["about"]
    assert str(folder.parent) not in json.dumps(card)


def test_the_run_is_in_mlflow(tracked: tuple[Answer, Path, str]) -> None:
    done, _, uri = tracked
    with tracking._quietly():
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        run = client.get_run(done.json["tracking"]["run_id"])
        looks = client.get_metric_history(run.info.run_id, "validation/area")
        steps = client.get_metric_history(run.info.run_id, "loss")
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert run.info.status == "FINISHED"
    assert run.data.params["training.steps"] == "24"
    assert [(point.step, point.value) for point in looks] == [
        (look["step"], pytest.approx(look["area"])) for look in done.json["history"]
    ]
    assert [point.step for point in steps] == [9, 19]
    assert run.data.metrics["area/taylor"] == pytest.approx(done.json["areas"]["taylor"])
    assert {"curves.png", "metanet.safetensors", "outcome.json"} <= files


def test_the_summary_fits_into_80_columns_and_says_how_to_go_on(population: list[str]) -> None:
    done = command("metatrain", "tiny.yaml", *population, *QUIET, "--out", "a folder")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    shown = lines[: lines.index("Next")]
    assert max(map(len, shown)) <= 80
    assert "of networks that it did not learn from" in " ".join(done.out.split())
    (row,) = [line for line in shown if line.startswith("judge")]
    assert row.count("%") == 4
    (way,) = [line for line in lines if line.startswith("  metaprune prune --metanet ")]
    words = shlex.split(way)
    assert words[3] == "a folder/metanet.safetensors"
    pruned = command("prune", *TINY, *words[2:4], "--budget", "macs=0.5", "--no-track", "--no-export", "--out", "slim")
    assert pruned.code == 0, pruned.err


@pytest.mark.parametrize(
    ("areas", "said"),
    [
        ({"metanet": 80.0, "taylor": 78.5, "l2": 70.0}, "It gains 1.50 points over the best plain criterion, taylor."),
        ({"metanet": 80.0, "taylor": 78.5, "l2": 81.0}, "It loses 1.00 points to the best plain criterion, l2:"),
        ({"metanet": 80.0, "taylor": 80.001, "l2": 70.0}, "as good as the best plain criterion, taylor"),
    ],
)
def test_a_loss_is_called_one(areas: dict[str, float], said: str) -> None:
    assert said in metacourse._verdict(areas)


def test_every_network_has_a_panel_with_all_curves(tracked: tuple[Answer, Path, str]) -> None:
    (network,) = tracked[0].json["networks"]
    figure = metacourse._figure(
        [{**network, "name": f"cifar_mobilenet_v2 {'x'.join('12345678')} {k}"} for k in range(4)]
    )
    assert len(figure.axes) == 4
    for panel in figure.axes:
        drawn = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
        assert drawn.pop("dense") == [network["dense"]] * 2
        assert drawn == {name: curve["accuracies"] for name, curve in network["curves"].items()}


def test_trained_networks_are_used_again(population: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = entries(Path("networks"))
    done = command("metatrain", "tiny.yaml", *population, *QUIET, "--steps", "2", "--seed", "5", "--out", "o", "--json")
    assert done.code == 0, done.err
    assert [look["step"] for look in done.json["history"]] == [0, 2]
    assert load_checkpoint("o/metanet.safetensors").card["seed"] == 5
    assert entries(Path("networks")) == before
    assert "--population networks" in done.json["reproduce"]


def test_damaged_networks_are_named_and_left_out(population: list[str]) -> None:
    record = json.loads(Path("networks/population.json").read_text())
    key = next(one["key"] for one in record["members"] if one["name"].startswith("mlp"))
    (Path("networks/networks") / key / "model.safetensors").write_bytes(b"")
    done = command("metatrain", "tiny.yaml", *population, *QUIET, "--steps", "1", "--out", "out", "--json")
    assert done.code == 0, done.err
    assert "mlp widths=16 seed=0 is left out: " in done.said
    assert done.json["notes"] == ["mlp widths=16 seed=0 was left out"]
    assert done.json["population"]["train"] == ["digits_cnn widths=4x8 seed=1"]


def test_without_a_usable_network_to_choose_on_nothing_is_trained(population: list[str]) -> None:
    record = json.loads(Path("networks/population.json").read_text())
    key = next(one["key"] for one in record["members"] if one["name"] == "judge")
    (Path("networks/networks") / key / "entry.json").write_text("{}")
    done = command("metatrain", "tiny.yaml", *population, *QUIET, "--out", "out")
    assert done.code == 3
    assert "split 'validation'" in done.said
    assert "judge" in done.said


# ---- refused before anything is written ------------------------------------------------------------------------------


BAD: dict[str, tuple[str, list[str], list[str]]] = {
    "unknown key": ("memberz: []\n", [], [":15: no key is named 'memberz'", "Did you mean 'members'"]),
    "unknown key of a section": (
        "@images: 60@imagez: 60@",
        [],
        [":14: `training.imagez` is no key", "Did you mean 'images'"],
    ),
    "value of a section": ("@hidden: 16@hidden: many@", [], [":13: `shape.hidden` must be a whole number"]),
    "rule of a section": ("@alone: 8@alone: -1@", [], [":12: `survey`: ", "no negative numbers"]),
    "rule of the population": ("@epochs: 2@epochs: 0@", [], ["tiny.yaml: `epochs >= 1` must hold"]),
    "objective": ("@steps: 24@objectives: {amortized: 1}@", [], [":14: `training`: ", "Did you mean 'amortised'"]),
    "criterion to read": ("@rank: 2@reads: [tailor]@", [], ["Did you mean 'taylor'"]),
    "population": ("population: 3\n", [], ["`population` must be a recipe"]),
    "two populations": (
        "population: default\n",
        [],
        ["what the population is, the recipe 'default' says", "Leave `data` or `population` out"],
    ),
    "mode": ("@rank: 2@mode: old@", [], [":13: `shape.mode` must be 'default'"]),
    "mode that is no word": ("@rank: 2@mode: [old]@", [], [":13: `shape.mode` must be 'default'"]),
    "scores of what only edits": (
        "@{hidden: 16, layers: 1, heads: 4, rank: 2}@{mode: paper, hidden: 16}@",
        [],
        ["'amortised' asks what units are worth", "objectives: {paper: 1}"],
    ),
    "itself to read": ("@rank: 2@reads: [metanet]@", [], ["must read plain criteria"]),
    "no validation network": ("@split: validation@split: train@", [], ["must have `split: validation`"]),
    "network": ("@model: mlp@model: mpl@", [], ["Did you mean 'mlp'"]),
    "options of a network": ("@widths: [16]@width: [16]@", [], ["Did you mean 'widths'"]),
    "data": ("@data: digits@data: digit@", [], ["Did you mean 'digits'"]),
    "device": ("", ["--accelerator", "gpu"], ["accelerator"]),
    "store": ("", ["--track", "--tracking-uri", "store.db"], ["sqlite:///store.db"]),
    "folder": ("", ["--out", "full"], ["must be new or empty", "full holds something"]),
    "force and resume": ("", ["--force", "--resume"], ["Give one of them"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case: str, recipe: Path, tmp_path: Path) -> None:
    change, words, said = BAD[case]
    text = recipe.read_text()
    recipe.write_text(text.replace(*change.split("@")[1:3]) if change.startswith("@") else text + change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    before = entries(tmp_path)
    done = command("metatrain", "tiny.yaml", *QUIET, "--out", "out", *words, "--json")
    assert done.code == 3, done.err
    error = done.json["error"]
    for part in said:
        assert part in error["message"], error["message"]
    assert entries(tmp_path) == before


def test_no_recipe_names_what_ships() -> None:
    done = command("metatrain", "defualt")
    assert done.code == 3
    assert "Did you mean 'default'" in done.said
    assert "Did you mean" not in command("metatrain", "digits").said  # a recipe of another verb
    assert command("metatrain").code == 2
    assert command("metatrain", "tiny.yaml", "--steps", "0").code == 2


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("metatrain/")])
def test_shipped_recipes_say_all_that_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPRUNE_CIFAR10", "somewhere")
    asked = read_recipe(name, steps=3)
    assert asked.training.steps == 3
    assert isinstance(asked.survey, Survey)


def test_a_recipe_may_take_the_population_of_another(recipe: Path) -> None:
    recipe.write_text("population: default\nshape: {mode: paper, hidden: 8}\n")
    asked = read_recipe(recipe)
    assert asked.population == read_recipe("default").population
    assert asked.shape == PaperShape(hidden=8)


def test_sections_are_read_and_flags_go_over_them(recipe: Path) -> None:
    asked = read_recipe(recipe, steps=7)
    assert asked.survey == Survey(images=64, alone=8, together=16)
    assert asked.shape == Shape(hidden=16, layers=1, heads=4, rank=2)
    assert asked.training == MetaTraining(steps=7, validate_every=8, images=60, calibration=64)
    recipe.write_text(RECIPE.replace("{steps: 24,", "{objectives: {direct: 1, amortised: 0.5},"))
    assert read_recipe(recipe).training.objectives == {"direct": 1.0, "amortised": 0.5}


# ---- interrupted and resumed -----------------------------------------------------------------------------------------


STEPS = ["--steps", "64"]  # with checkpoints before the first and after every eighth


@pytest.fixture(scope="module")
def whole(tracked: tuple[Answer, Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path]:
    """A run that nothing ended."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(tracked[1] / "population", folder / "networks")
    words = ["--population", folder / "networks", *QUIET, *STEPS, "--out", folder / "out"]
    return command("metatrain", tracked[1].parent / "tiny.yaml", *words, "--json"), folder / "out"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_ended_goes_on_to_the_same_end(
    whole: tuple[Answer, Path], population: list[str], tmp_path: Path, ending: signal.Signals
) -> None:
    words = ["metatrain", "tiny.yaml", *population, *QUIET, *STEPS, "--out", "a folder"]
    out = tmp_path / "a folder"
    with subprocess.Popen(
        [sys.executable, "-m", "metaprune.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as child:
        until = time.monotonic() + 100
        written = set()
        while len(written) < 2:
            assert child.poll() is None
            assert time.monotonic() < until
            written |= {path.stat().st_mtime_ns for path in out.glob("checkpoints/metatrain.safetensors")}
            time.sleep(0.02)
        time.sleep(0.1)
        child.send_signal(ending)
        shown, said = child.communicate(timeout=60)
    assert child.returncode == (130 if ending == signal.SIGINT else -signal.SIGKILL), said
    assert shown == ""
    assert not (out / "metanet.safetensors").exists()
    again = [*words, "--resume"]
    if ending == signal.SIGINT:
        assert "what was done is kept" in said
        (line,) = [line for line in said.splitlines() if line.startswith("  metaprune ")]
        again = shlex.split(line)[1:]
    changed = command(*words, "--resume", "--seed", "3")
    assert changed.code == 3
    assert "`seed` was 0 and is now 3" in changed.said
    resumed = command(*again, "--json")
    assert resumed.code == 0, resumed.err
    never_ended, folder = whole
    assert never_ended.code == 0, never_ended.err
    for key in ("areas", "networks", "history", "step"):
        assert resumed.json[key] == never_ended.json[key], key
    ours, theirs = load_file(out / "metanet.safetensors"), load_file(folder / "metanet.safetensors")
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_finished_run_prints_its_result_again(tracked: tuple[Answer, Path, str]) -> None:
    done, folder, uri = tracked
    words = ["metatrain", folder.parent / "tiny.yaml", "--out", folder, "--tracking-uri", uri, "--resume"]
    again = command(*words, "--json")
    assert again.json == done.json
    assert "finished run" in again.said


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_says_whether_something_is_kept(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if when == "before":
        monkeypatch.setattr(metacourse, "load", interrupted)
    else:
        monkeypatch.setattr(metacourse, "survey_population", interrupted)
    done = command("metatrain", "tiny.yaml", *QUIET, "--out", "out", "--json")
    assert done.code == 130
    assert done.json["error"]["again"].endswith(" --resume") == (when == "after")
    assert Path("out").exists() == (when == "after")
