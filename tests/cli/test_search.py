"""`metaprune search`: a tiny campaign on digits, the whole way."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from metaprune import tracking
from metaprune.cli import delivery, searchcourse
from metaprune.cli.searchboard import draw_end
from metaprune.cli.searchcourse import load_settings
from metaprune.search.campaign import Campaign
from metaprune.search.settings import read_settings
from metaprune.search.store import open_storage
from metaprune.tracking import MlflowTracker
from tests.cli.commands import Answer, command, entries

CONFIG = """# Eight trials of a tiny network.
model: zoo:digits_cnn
model_args: {widths: [4, 8]}
data: digits
choices:
  budget: [macs=0.6, macs=0.4]
  criterion: [taylor, l2]
  recovery: [recalibrate_norm, none]
rungs:
  - {kind: evaluate, images: 60}
  - {kind: finetune, top: 1, lr: 0.05, batch_size: 64}
baselines: [rd, uniform, global]
stop: {trials: 8}
calibration: 64
networks: 1
accelerator: cpu
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path, str]:
    """One campaign with two workers and everything on."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "tiny.yaml").write_text(CONFIG + "train: {epochs: 3, lr: 0.1}\n")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    words = ["--out", folder / "out", "--workers", "2", "--tracking-uri", uri, "--json"]
    return command("search", "run", folder / "tiny.yaml", *words), folder / "out", uri


@pytest.fixture
def copied(done: tuple[Answer, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of that campaign, to be changed."""
    shutil.copytree(done[1], tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "again"


def test_json_says_everything(done: tuple[Answer, Path, str]) -> None:
    answer, _, uri = done
    assert answer.code == 0, answer.err
    told = answer.json
    assert (told["model"], told["data"], told["split"], told["images"]) == (
        "zoo:digits_cnn",
        "digits",
        "validation",
        180,
    )
    assert [rung["name"] for rung in told["rungs"]] == ["0-evaluate", "1-finetune"]
    assert told["rungs"][0]["done"] == 8
    assert told["closed"] == "8 trials"
    assert told["over"]
    assert {check["passed"] for check in told["checks"]} <= {True, None}
    assert told["tracking"]["uri"] == uri
    for path in told["files"].values():
        assert Path(path).exists()
    assert told["dense"]["accuracy"] > 20
    assert set(told["front"][0]) >= {"accuracy", "macs", "gain_over_rd", "gain_over_uniform", "gain_over_global"}


def test_every_network_of_the_front_is_proved_and_can_be_loaded(done: tuple[Answer, Path, str]) -> None:
    import metaprune as mp
    from metaprune import zoo

    answer, folder, _ = done
    networks = answer.json["networks"]
    assert len(networks) == 1
    for network in networks:
        place = folder / network["folder"]
        assert {"plan.json", "model.safetensors", "model.onnx", "result.json"} <= set(entries(place))
        assert "dense.onnx" not in entries(place)
        slim = mp.load(place, zoo.build("digits_cnn", widths=[4, 8]))
        row = next(row for row in answer.json["front"] if row["key"] == network["key"])
        assert sum(part.numel() for part in slim.parameters()) == row["params"]
        assert network["error_max"] <= 1e-5
        assert network["failed"] == []


def test_gains_are_told_on_test_images_with_intervals(done: tuple[Answer, Path, str]) -> None:
    answer, folder, _ = done
    (network,) = answer.json["networks"]
    rows = {row["key"]: row for row in csv.DictReader((folder / "pareto.csv").read_text().splitlines())}
    own = rows[network["key"]]
    plain = {row["allocator"] for row in rows.values() if row["origin"] == row["allocator"] != "sampler"}
    assert set(network["gains"]) == plain & {"rd", "uniform", "global"} - {own["origin"]}
    for name, gain in network["gains"].items():
        assert (gain["split"], gain["n"]) == ("test", 359)
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert gain["value"] == pytest.approx(100 * (gain["only_second"] - gain["only_first"]) / 359)
        columns = [float(own[f"test_gain_over_{name}{end}"]) for end in ("", "_low", "_high")]
        assert columns == [gain["value"], gain["low"], gain["high"]]
        assert f"over {name}" in (folder / "report.html").read_text()
    assert sum(bool(row["test_accuracy"]) for row in rows.values()) == 1


def test_the_files_say_what_was_found_without_paths_of_this_machine(done: tuple[Answer, Path, str]) -> None:
    _, folder, _ = done
    found = json.loads((folder / "pareto.json").read_text())
    assert str(folder.parent) not in (folder / "pareto.json").read_text()
    lines = (folder / "pareto.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found["evaluated"])
    assert lines[0].startswith("key,trial,origin,fidelity,feasible,front,criterion")
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    for part in (
        "The front",
        "On test images",
        "Who won where",
        "How it went",
        "What each network of the front keeps of each axis",
    ):
        assert part in page
    targets = re.findall(r'href="#(trial-[^"]+)"', page)
    assert targets
    assert all(f'id="{target}"' in page for target in targets)


def test_the_campaign_is_in_mlflow_and_stays_the_same_when_it_is_written_again(
    done: tuple[Answer, Path, str], tmp_path: Path
) -> None:
    answer, folder, uri = done

    def stored() -> tuple[Any, ...]:
        with tracking._quietly():
            from mlflow import MlflowClient

            client = MlflowClient(uri, uri)
            (experiment,) = [one for one in client.search_experiments() if one.name == "metaprune"]
            runs = client.search_runs([experiment.experiment_id], max_results=500)
            parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
            children = [run for run in runs if run not in parents]
            (model,) = client.search_registered_models()
            history = client.get_metric_history(parents[0].info.run_id, "search/best_accuracy")
            files = sorted(file.path for file in client.list_artifacts(parents[0].info.run_id))
            versions = len(client.search_model_versions(f"name='{model.name}'"))
        assert [run.info.status for run in runs] == ["FINISHED"] * len(runs)
        keys = {(tuple(sorted(run.data.metrics)), tuple(sorted(run.data.params))) for run in children}
        assert len(keys) == 1
        assert len(children) <= 100
        return parents[0].info.run_id, len(parents), len(children), len(history), files, dict(model.aliases), versions

    before = stored()
    assert before[0] == answer.json["tracking"]["run_id"]
    assert before[1:4] == (1, before[2], 8)
    assert before[4] == ["pareto.csv", "pareto.json", "report.html", "settings.json"]
    assert set(before[5]) == {"champion", "smallest", "fastest"}
    again = command("search", "sync", folder, "--tracking-uri", uri, "--json")
    assert again.code == 0, again.err
    assert again.json["tracking"]["run_id"] == before[0]
    assert stored() == before


def test_status_tells_where_it_stands(done: tuple[Answer, Path, str]) -> None:
    answer, folder, _ = done
    told = command("search", "status", folder, "--json").json
    assert {key: told[key] for key in ("rungs", "front", "over")} == {
        key: answer.json[key] for key in ("rungs", "front", "over")
    }
    shown = command("search", "status", folder).out
    assert max(map(len, shown.splitlines())) <= 80
    assert "0-evaluate: 8 done" in shown


def test_the_end_fits_into_80_columns(done: tuple[Answer, Path, str]) -> None:
    console = Console(file=io.StringIO(), width=80)
    draw_end(done[0].json, console)
    shown = console.file.getvalue().splitlines()
    assert max(len(line) for line in shown if str(done[1].parent) not in line) <= 80
    assert any("On 359 test images" in line for line in shown)


def test_it_goes_on_for_more_trials_and_computes_nothing_twice(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copied / "results").rglob("0-evaluate.json")}
    done = command("search", "resume", copied, "--trials", "9", "--workers", "1", "--no-track", "--json")
    assert done.code == 0, done.err
    assert done.json["rungs"][0]["done"] == 9
    after = {path: path.stat().st_mtime_ns for path in (copied / "results").rglob("0-evaluate.json")}
    assert len(after) == 9
    assert {path: after[path] for path in before} == before


def test_a_folder_with_a_campaign_is_not_begun_again(copied: Path) -> None:
    Path("tiny.yaml").write_text(CONFIG)
    done = command("search", "run", "tiny.yaml", "--out", copied)
    assert done.code == 3
    assert "holds a campaign. Go on with `metaprune search resume" in done.said


def test_a_worker_of_a_campaign_that_is_over_has_nothing_to_do(copied: Path) -> None:
    done = command("search", "worker", copied, "--json")
    assert done.code == 0, done.err
    assert done.json["trials"] == 0


def test_the_front_is_written_again_with_times(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "BENCH_S", 0.2)
    shutil.rmtree(copied / "front")
    done = command("search", "export", copied, "--bench", "--json")
    assert done.code in (0, 4), done.err
    assert {network["latency"] is not None for network in done.json["networks"]} == {True}


def test_other_weights_or_data_are_refused(copied: Path) -> None:
    weights = load_file(copied / "dense.safetensors")
    save_file({name: part + 1 for name, part in weights.items()}, copied / "dense.safetensors")
    done = command("search", "worker", copied)
    assert done.code == 3
    assert "with network" in done.said


def test_a_campaign_may_be_begun_for_others_to_work_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG.replace("trials: 8", "trials: 4").replace("networks: 1", "networks: 0"))
    begun = command("search", "run", "tiny.yaml", "--out", "out", "--workers", "0", "--no-track", "--json")
    assert begun.code == 0, begun.err
    assert (begun.json["rungs"][0]["waiting"], begun.json["rungs"][0]["done"], begun.json["over"]) == (4, 0, False)
    assert command("search", "worker", "out", "--index", "1", "--json").json["trials"] >= 4
    assert command("search", "export", "out", "--json").json["over"]


def test_the_space_is_shown_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    shown = command("search", "space", "tiny.yaml")
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "4 axes may be cut" in shown.out
    told = command("search", "space", "tiny.yaml", "--json").json
    assert told["ranges"]["macs"]["least"] < told["ranges"]["macs"]["most"]
    assert entries(tmp_path) == ["tiny.yaml"]


def test_no_password_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings(
        "digits", storage="postgresql://me:secret@host/db", weights="w.safetensors", train=None, workers=2
    )
    saved = searchcourse._saved(settings)
    assert "secret" not in json.dumps(saved)
    assert saved["storage"] == "postgresql://me@host/db"
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    assert load_settings(tmp_path).identity == settings.identity
    monkeypatch.setenv("METAPRUNE_STORAGE", "postgresql://me:secret@host/db")
    assert load_settings(tmp_path).storage == settings.storage


BAD: dict[str, tuple[str, str, list[str], str]] = {
    "limit out of reach": ("macs=0.4", "macs=0.0001", [], "cannot go below"),
    "unknown network": ("zoo:digits_cnn", "zoo:digit_cnn", [], "Did you mean 'digits_cnn'"),
    "unknown data": ("data: digits", "data: digit", [], "Did you mean 'digits'"),
    "storage that is not there": ("networks", "storage: sqlite:////no/such/x.db\nnetworks", [], "must be reachable"),
    "store that is none": ("networks", "networks", ["--tracking-uri", "store.db"], "sqlite:///store.db"),
    "folder": ("networks", "networks", ["--out", "full"], "must be new or empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, words, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG.replace(old, new))
    Path("full").mkdir()
    Path("full/something").write_text("")
    before = entries(tmp_path)
    done = command("search", "run", "tiny.yaml", "--out", "out", *words, "--json")
    assert done.code == 3, done.err
    assert said in done.json["error"]["message"]
    assert done.json["command"] == "search run"
    assert entries(tmp_path) == before


def test_folders_without_a_campaign_are_refused(tmp_path: Path) -> None:
    for verb in ("resume", "status", "worker", "sync", "export"):
        done = command("search", verb, tmp_path)
        assert done.code == 3, verb
        assert "settings.json" in done.said.replace(" ", "")  # long paths are broken over lines


def test_a_dead_mlflow_does_not_stop_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG.replace("trials: 8", "trials: 3"))
    start = MlflowTracker.start

    def dying(self: MlflowTracker, *given: Any, **named: Any) -> MlflowTracker:
        start(self, *given, **named)
        Path("mlflow.db").write_bytes(b"gone")
        return self

    monkeypatch.setattr(MlflowTracker, "start", dying)
    monkeypatch.setattr(
        MlflowTracker,
        "start",
        lambda self, *a, **k: setattr(self, "_open", True) or setattr(self, "run_id", "r") or self,
    )
    done = command("search", "run", "tiny.yaml", "--out", "out", "--tracking-uri", "sqlite:///mlflow.db", "--json")
    assert done.code == 0, done.err
    assert done.json["rungs"][0]["done"] == 3
    assert "metaprune search sync out" in done.said


@pytest.mark.parametrize(
    "ending", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_search_that_was_ended_goes_on(tmp_path: Path, ending: signal.Signals) -> None:
    (tmp_path / "slow.yaml").write_text(CONFIG.replace("networks: 1", "networks: 0\nworkers: 2"))
    words = ["search", "run", str(tmp_path / "slow.yaml"), "--no-track", "--out", str(tmp_path / "a folder")]
    with subprocess.Popen(
        [sys.executable, "-m", "metaprune.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as child:
        until = time.monotonic() + 100
        while not list((tmp_path / "a folder" / "results").glob("*/0-evaluate.json")):
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        child.send_signal(ending)
        _, said = child.communicate(timeout=60)
    folder = tmp_path / "a folder"
    again = ["search", "resume", str(folder)]
    until_s = time.monotonic() + 60
    while subprocess.run(["pgrep", "-f", f"search worker {folder}"], capture_output=True, check=False).stdout:
        assert time.monotonic() < until_s, "a worker has outlived the run that started it"
        time.sleep(0.1)
    if ending != signal.SIGKILL:
        assert child.returncode == 130, said
        (line,) = [line for line in said.splitlines() if line.startswith("  metaprune ")]
        again = shlex.split(line)[1:]
    done = command(*again, "--workers", "1", "--no-track", "--json")
    assert done.code == 0, done.err
    (first, _) = done.json["rungs"]
    assert (first["done"], first["deaths"] <= 1) == (8, True)
    campaign = Campaign(load_settings(folder), open_storage(None, folder))
    assert campaign.over
    assert campaign.settings == read_settings(tmp_path / "slow.yaml", workers=1)
