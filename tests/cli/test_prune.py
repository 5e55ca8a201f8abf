"""`metaprune prune`: the whole way, and everything that is refused before a file is written."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import metaprune as mp
from metaprune import tracking, zoo
from metaprune.cli import course, delivery, errand
from metaprune.errors import UnsupportedModelError
from metaprune.export import Check, Validation
from metaprune.pipeline import Result
from tests.cli.commands import TINY, Answer, command, entries

QUICK = ["--no-track", "--no-bench", "--no-export"]
HALF = ["--budget", "macs=0.5"]
ENTRY = [sys.executable, "-m", "metaprune.cli"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path, str]:
    """One run with everything on, and two ways to recover."""
    folder = tmp_path_factory.mktemp("tracked")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    words = ["--recovery", "recalibrate_norm,finetune", "--epochs", "2", "--batch-size", "64", "--tracking-uri", uri]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "BENCH_S", 0.2)
        return command("prune", *TINY, *HALF, *words, "--out", folder / "out", "--json"), folder / "out", uri


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_json_says_everything(tracked: tuple[Answer, Path, str]) -> None:
    done, _, uri = tracked
    assert done.code == 0, done.err
    told = done.json
    assert (told["model"], told["data"], told["split"], told["images"]) == ("zoo:digits_cnn", "digits", "test", 359)
    assert told["budget"] == "macs=0.5"
    assert told["after"]["macs"] <= 0.5 * told["before"]["macs"]
    assert told["error_max"] <= 1e-5
    names = ["verification", "structure", "numeric", "third opinion", "agreement", "accuracy"]
    assert [check["name"] for check in told["checks"]] == names
    assert all(check["passed"] for check in told["checks"])
    assert (told["criterion"], told["allocator"]) == ("taylor", "global")
    assert [part["name"] for part in told["recovery"]] == ["recalibrate_norm", "finetune"]
    assert len(told["recovery"][1]["history"]) == 2
    assert list(told["accuracy"]) == ["dense", "cut", "recovered"]
    difference = told["after"]["metrics"]["accuracy"] - told["before"]["metrics"]["accuracy"]
    assert told["difference"]["value"] == pytest.approx(difference)
    assert told["difference"]["low"] < told["difference"]["value"] < told["difference"]["high"]
    assert told["before"]["latency_ms"] > 0
    assert told["surgery"] == {"way": "attributes", "reason": "", "checked": True}
    assert told["latency"]["comparisons"][0]["verdict"] in ("faster", "slower", "no difference", "too noisy")
    for side, times in (("before", "dense"), ("after", "pruned")):
        modules = told["latency_by_module"][times]
        assert sum(modules.values()) == pytest.approx(told[side]["latency_ms"])
        assert {"block1.conv1", "block2.conv1"} <= set(modules)
    assert told["tracking"]["uri"] == uri
    assert told["seconds"]["profile"] > 0
    assert told["seconds"]["total"] > 0


def test_the_figures_are_those_of_the_files(tracked: tuple[Answer, Path, str]) -> None:
    done, folder, _ = tracked
    told = done.json
    for path in told["files"].values():
        assert Path(path).exists()
    network = zoo.build("digits_cnn", widths=[4, 8])
    slim = mp.load(folder, network)
    assert sum(weight.numel() for weight in slim.parameters()) == told["after"]["params"]
    kept = {axis["name"]: axis["kept"] for axis in told["plan"]["axes"]}
    assert slim.get_submodule("block2.conv1").out_channels == kept["block2.conv1"]
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert stored == told["after"]["bytes"]
    assert json.loads((folder / "outcome.json").read_text()) == told


def test_messages_and_progress_stay_off_standard_output(tracked: tuple[Answer, Path, str]) -> None:
    done, _, _ = tracked
    assert len(done.out.splitlines()) == 1
    for step in ("Choosing what to cut", "Recovering: finetune", "Checking the ONNX file"):
        assert step in done.err


def test_the_run_is_in_mlflow(tracked: tuple[Answer, Path, str]) -> None:
    done, _, uri = tracked
    with tracking._quietly():
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        run = client.get_run(done.json["tracking"]["run_id"])
        epochs = client.get_metric_history(run.info.run_id, "train/loss")
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        models = client.search_logged_models([run.info.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["budget"] == "macs=0.5"
    assert run.data.params["recovery"] == "recalibrate_norm,finetune"
    assert "tracking_uri" not in run.data.params
    assert [point.step for point in epochs] == [1, 2]
    assert run.data.metrics["accuracy"] == pytest.approx(done.json["after"]["metrics"]["accuracy"])
    assert {"plan.json", "report.html", "result.json", "outcome.json"} <= files
    assert [model.name for model in models] == ["model"]


def test_the_summary_fits_into_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "BENCH_S", 0.2)
    done = command("prune", *TINY, *HALF, "--no-track", "--out", "out")
    assert done.code == 0
    lines = done.out.splitlines()
    next_commands = lines[lines.index("Next") + 1 :]
    assert max(map(len, lines[: lines.index("Next")])) <= 80
    for part in ("accuracy, 359 test images", "directly after the cut", "MACs", "latency, batch 1", "points ["):
        assert part in done.out
    assert [shlex.split(line)[:2] for line in next_commands if line] == [
        ["metaprune", "validate"],
        ["metaprune", "bench"],
    ]
    assert "out/report.html" in done.out
    assert entries(tmp_path)[0] == "out"
    assert "no --weights" in done.said


@pytest.mark.parametrize("asked", [["--pattern", "2:4", "--freeze", "conv1"], ["--budget", "nonzeros=0.5"]])
def test_entries_stay_zero_through_every_recovery(asked: list[str], tmp_path: Path) -> None:
    healed = ["--criterion", "obs", "--recovery", "reconstruct,finetune", "--epochs", "1"]
    done = command("prune", *TINY, *asked, *healed, *QUICK, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    told, made_by = done.json, done.json["plan"]["made_by"]
    assert told["budget"] == "nonzeros=0.5"
    assert made_by["nonzeros"] == made_by["entries"] // 2
    assert told["after"]["params"] == told["before"]["params"]
    plan, state = mp.Plan.load(tmp_path / "out" / "plan.json"), load_file(tmp_path / "out" / "model.safetensors")
    masks = plan.draft().masks
    assert sum(int((~kept).sum()) for kept in masks.values()) == made_by["entries"] - made_by["nonzeros"]
    for name, kept in masks.items():
        assert not state[name][~kept].any()
        assert state[name][kept].any()


def test_without_data_the_network_is_cut_by_its_weights(tmp_path: Path) -> None:
    told = command("prune", "--model", "zoo:mlp", *HALF, *QUICK, "--out", "out", "--json").json
    assert (told["criterion"], told["recovery"], told["data"], told["split"]) == ("l2", [], None, None)
    assert told["before"]["metrics"] == {}
    assert told["difference"] is None
    assert "model.onnx" not in told["files"]
    shown = command("prune", "--model", "zoo:mlp", *HALF, *QUICK, "--out", "again")
    assert shown.code == 0
    assert "accuracy" not in shown.out
    assert "metaprune export --run again" in shown.out
    assert "adds up losses" not in shown.said


def test_scores_that_are_no_losses_and_an_allocator_that_adds_them_up_are_told(tmp_path: Path) -> None:
    done = command("prune", "--model", "zoo:mlp", *HALF, *QUICK, "--allocator", "rd", "--out", "out")
    assert done.code == 0
    said = " ".join(done.said.split())
    assert "allocator 'rd' adds up losses, which the scores of 'l2' are not: its sizes may be poor" in said


def test_any_option_of_a_method_can_be_set_and_the_command_says_it_again(tmp_path: Path) -> None:
    """By flags, by a recipe and flags, and by the command that was printed."""
    words = ["prune", *TINY, *HALF, *QUICK, "--criterion", "rank_average", "--allocator", "global_mt"]
    words += ["--recovery", "reconstruct,recalibrate_norm"]
    ways = ["--set", "recovery.only_bias=true", "--set", "recovery.reconstruct.samples=32"]
    sets = ["--set", "criterion.of=l1,wanda", "--set", "allocator.minimum=5e-3", "--set", "recovery.passes=2", *ways]
    told = command(*words, *sets, "--out", "out", "--json").json
    assert (told["criterion"], told["allocator"]) == ("rank_average(of=l1,wanda)", "global_mt")
    given = {
        "criterion.of": ["l1", "wanda"],
        "allocator.minimum": 0.005,
        "recovery.passes": 2,
        "recovery.only_bias": True,
        "recovery.reconstruct.samples": 32,
    }
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["options"]["set"] == given
    again = shlex.split(told["reproduce"])
    assert command(*again[1:], "--resume", "--json").json == told
    (tmp_path / "mine.yaml").write_text(
        "set:\n  criterion.of: [l1, wanda]\n  allocator.minimum: 1e-3\n  recovery.passes: 2\n"
    )
    rest = ["--config", "mine.yaml", "--set", "allocator.minimum=0.005", *ways]
    assert command(*words, *rest, "--out", "out", "--resume", "--json").json == told
    other = command(*words, "--config", "mine.yaml", *ways, "--out", "out", "--resume")
    assert other.code == 3
    assert "`set` was" in other.said


def test_sizes_are_bound_by_kind_and_by_name(tmp_path: Path) -> None:
    bounds = ["--round-to", "channel=2,head=1", "--floor", "block1.*=0.5,block2.*=0.25", "--ceiling", "conv*=0.75"]
    told = command("prune", *TINY, "--budget", "macs=0.7", *QUICK, *bounds, "--out", "out", "--json").json
    made_by = told["plan"]["made_by"]
    assert made_by["round_to"] == {"channel": 2, "head": 1}
    assert made_by["floor"] == {"block1.*": 0.5, "block2.*": 0.25}
    assert made_by["ceiling"] == {"conv*": 0.75}
    assert all(axis["kept"] % 2 == 0 or axis["kept"] == axis["size"] for axis in told["plan"]["axes"])
    again = shlex.split(told["reproduce"])
    assert command(*again[1:], "--resume", "--json").json == told


def test_the_folder_gets_a_name_of_model_and_time(tmp_path: Path) -> None:
    assert command("prune", "--model", "zoo:mlp", *HALF, *QUICK).code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"mlp-\d{8}-\d{6}", folder.name)


def test_a_recipe_gives_options_and_flags_override_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "model: zoo:mlp\nbudget: macs=0.9\nseed: 3\nexport: false\nbench: false\ntrack: false\nout: here\n"
    )
    told = command("prune", "--config", "mine.yaml", "--budget", "params=0.5", "--json").json
    assert told["budget"] == "params=0.5"
    assert told["plan"]["made_by"]["seed"] == 3
    assert told["files"]["folder"] == "here"


def test_the_command_of_the_report_gives_the_same_result_again(
    tracked: tuple[Answer, Path, str], tmp_path: Path
) -> None:
    words = shlex.split(tracked[0].json["reproduce"])
    assert words[:2] == ["metaprune", "prune"]
    words[words.index("--out") + 1] = "again"
    done = command(*words[1:], "--no-track", "--no-bench", "--json")
    assert done.code == 0, done.err
    for name in ("model.safetensors", "plan.json", "model.onnx"):
        assert (tmp_path / "again" / name).read_bytes() == (tracked[1] / name).read_bytes(), name


def test_an_input_shape_comes_from_the_data() -> None:
    words = ["--model", "zoo:cifar_resnet8", "--model-arg", "in_channels=1", "--data", "digits", "--calibration", "16"]
    told = command("prune", *words, *HALF, *QUICK, "--out", "out", "--json")
    if told.code == 3:  # the factory has no such option: it is said before anything is written
        assert "in_channels" in told.said
        return
    assert told.json["before"]["macs"] < 10e6


def test_a_network_whose_code_holds_a_size_says_that_it_became_a_graph(tmp_path: Path) -> None:
    (tmp_path / "literal_nets.py").write_text(
        "import torch\n"
        "class Literal(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.one, self.two = torch.nn.Linear(8, 12), torch.nn.Linear(12, 4)\n"
        "    def forward(self, x):\n"
        "        return self.two(self.one(x).view(-1, 3, 4).flatten(1).relu())\n"
        "def build():\n"
        "    return Literal(), torch.randn(2, 8)\n"
    )
    words = ["--model", "literal_nets:build", *HALF, "--no-track", "--no-bench"]
    told = command("prune", *words, "--out", "out", "--json").json
    assert told["surgery"]["way"] == "graph"
    assert told["surgery"]["reason"]
    assert any("torch.fx.GraphModule" in note for note in told["notes"])
    assert json.loads((tmp_path / "out" / "result.json").read_text())["surgery"] == told["surgery"]
    assert "as a torch.fx.GraphModule, because" in (tmp_path / "out" / "report.html").read_text()


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_a_failed_check_ends_with_4_and_keeps_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, *_: Any, **__: Any) -> Validation:
        return Validation(path=str(path), checks=(Check(name="numeric", passed=False, detail="off by much."),))

    monkeypatch.setattr(delivery, "validate", failing)
    words = ["prune", "--model", "zoo:mlp", *HALF, "--no-track", "--no-bench", "--out", "out"]
    done = command(*words, "--json")
    assert done.code == 4
    assert "gate failed: numeric" in done.said
    assert {"name": "numeric", "passed": False, "detail": "off by much."} in done.json["checks"]
    assert (tmp_path / "out" / "model.safetensors").exists()
    again = command(*words, "--resume")
    assert again.code == 4
    assert "FAILED" in again.out
    assert "off by much." in again.out


def test_a_network_that_cannot_be_exported_keeps_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any, **__: Any) -> None:
        raise UnsupportedModelError("no way of exporting.")

    monkeypatch.setattr(delivery, "export", refusing)
    done = command("prune", "--model", "zoo:mlp", *HALF, "--no-track", "--out", "out", "--json")
    assert done.code == 4
    assert done.json["checks"][-1] == {"name": "export", "passed": False, "detail": "no way of exporting."}
    assert (tmp_path / "out" / "report.html").exists()


def test_files_that_cannot_be_timed_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any, **__: Any) -> None:
        raise mp.errors.ResourceError("killed.")

    monkeypatch.setattr(delivery, "latency", refusing)
    done = command("prune", "--model", "zoo:mlp", *HALF, "--no-track", "--out", "out")
    assert done.code == 0
    assert "could not be timed: killed." in " ".join(done.out.split())


def test_a_slower_network_is_called_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metaprune.measure.latency import Latency, latency

    def slower(*files: Any, **options: Any) -> Latency:
        found = latency(*files, **options | {"rounds": 40, "seconds": 0.2})
        ratio = replace(found.comparisons[0].ratio, value=1.4, low=1.3, high=1.5)
        said = replace(found.comparisons[0], ratio=ratio, verdict="slower", reason="a test says so")
        return replace(found, comparisons=(said,))

    monkeypatch.setattr(delivery, "latency", slower)
    done = command("prune", "--model", "zoo:mlp", *HALF, "--no-track", "--out", "out")
    assert "made it slower here" in done.out
    assert "made it slower here" in (tmp_path / "out" / "report.html").read_text()


def test_a_store_that_dies_on_the_way_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(tracking.Tracker):
        problem = "not everything was tracked: the server is gone"

    monkeypatch.setattr(errand, "tracker", lambda uri, enabled: Dying())
    done = command("prune", "--model", "zoo:mlp", *HALF, "--no-export", "--out", "out")
    assert done.code == 0
    assert "the server is gone" in done.said


# ---- bad input: the rule, the value, the way out; nothing written ----------------------------------------------------


def write_inputs(folder: Path) -> None:
    """Files that are wrong, each in its own way."""
    network = zoo.build("digits_cnn")
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_file({name: tensor for name, tensor in state.items() if "block" not in name}, folder / "lacking.safetensors")
    state["linear.bias"][3] = float("nan")
    save_file(state, folder / "nan.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "nan.safetensors").read_bytes()[:5000])
    (folder / "batches").mkdir()
    for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        (folder / "batches" / name).write_bytes(b"\0" * 3073)
    (folder / "batches" / "test_batch.bin").write_bytes(b"\0" * 1000)
    np.savez(folder / "whole.npz", x=np.zeros(3))
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:60])
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("years of work")
    (folder / "file").write_text("")
    (folder / "set.yaml").write_text("model: zoo:mlp\nallocator: global_mt\nset:\n  allocator.minimum: low\n")
    (folder / "lr.yaml").write_text(
        "{model: zoo:digits_cnn, data: digits,\nrecovery: finetune,\nset: {\n  recovery.lr: 0.2}}\n"
    )
    (folder / "mistyped.yaml").write_text("model: zoo:mlp\nbudgte: macs=0.5\n")
    (folder / "odd_nets.py").write_text(
        "import torch\n"
        "class Nothing(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        self.layer(x)\n"
        "        return 'done'\n"
        "def nothing():\n"
        "    return Nothing(), torch.zeros(2, 4)\n"
        "def no_module():\n"
        "    return 3\n"
        "def no_example():\n"
        "    return torch.nn.Linear(4, 4)\n"
        "def frozen():\n"
        "    return torch.nn.Linear(4, 4), torch.zeros(2, 4)\n"
        "def broken():\n"
        "    raise ValueError('no such size')\n"
    )


MLP, DIGITS, RESNET = ["--model", "zoo:mlp"], ["--model", "zoo:digits_cnn"], ["--model", "zoo:cifar_resnet8"]
IMAGES, SPARSE = ["--data", "digits"], ["--budget", "nonzeros=0.5"]
BAD: dict[str, tuple[list[str], int, list[str]]] = {
    "no model": ([], 3, ["`--model` is needed", "zoo:digits_cnn"]),
    "unknown model": (["--model", "zoo:cifar_resnet57"], 3, ["'cifar_resnet57'", "Did you mean 'cifar_resnet56'"]),
    "shortened model": (["--model", "zoo:vit"], 3, ["Did you mean 'vit_tiny'"]),
    "unknown source": (["--model", "zo:mlp"], 3, ["Did you mean 'zoo'"]),
    "no library": (["--model", "timm:resnet18"], 6, ["pip install timm"]),
    "unknown module": (["--model", "my.nets:build"], 3, ["'my.nets' is neither"]),
    "factory that breaks": (["--model", "odd_nets:broken"], 3, ["no such size"]),
    "factory of no module": (["--model", "odd_nets:no_module"], 3, ["torch.nn.Module", "int"]),
    "no example input": (["--model", "odd_nets:no_example"], 3, ["--input-shape"]),
    "unknown option of the model": ([*MLP, "--model-arg", "withs=8"], 3, ["'withs'", "Did you mean"]),
    "option without a value": ([*MLP, "--model-arg", "widths"], 3, ["NAME=VALUE", "'widths'"]),
    "nothing traceable": (["--model", "odd_nets:nothing"], 5, ["tensor"]),
    "nothing to cut": (["--model", "odd_nets:frozen"], 3, ["prunable axis", "metaprune inspect"]),
    "unknown criterion": ([*MLP, "--criterion", "tailor"], 3, ["'tailor'", "Did you mean 'taylor'", "l2"]),
    "unknown allocator": ([*MLP, "--allocator", "globl"], 3, ["'globl'", "Did you mean 'global'"]),
    "unknown recovery": ([*DIGITS, *IMAGES, "--recovery", "finetun"], 3, ["'finetun'", "Did you mean 'finetune'"]),
    "unknown task": (
        [*DIGITS, *IMAGES, "--task", "clasification"], 3, ["Did you mean 'classification'", "feature_matching"]
    ),
    "no weights": ([*DIGITS, "--weights", "gone.safetensors"], 3, ["there is no file of weights"]),
    "weights of another network": (
        [*DIGITS, "--weights", "lacking.safetensors"],
        3,
        ["'block1.conv1.weight' (16, 16, 3, 3) is missing", "'block1.bn1.weight'", "'block1.bn1.bias'", "and 17 more"],
    ),
    "truncated weights": ([*DIGITS, "--weights", "cut.safetensors"], 3, ["cannot be read as weights", "truncated"]),
    "NaN in the weights": ([*DIGITS, "--weights", "nan.safetensors"], 3, ["must be finite", "'linear.bias'"]),
    "unknown data": ([*DIGITS, "--data", "digitz"], 3, ["Did you mean 'digits'"]),
    "missing data": ([*RESNET, "--data", "cifar10:gone"], 3, ["gone"]),
    "truncated data": ([*RESNET, "--data", "cifar10:batches"], 3, ["_batch"]),
    "truncated npz": ([*DIGITS, "--data", "npz:cut.npz"], 3, ["cut.npz"]),
    "npz without images": ([*DIGITS, "--data", "npz:whole.npz"], 3, ["whole.npz"]),
    "data of another shape": ([*RESNET, *IMAGES], 3, ["take the images of 'digits', (1, 8, 8) each"]),
    "data of other classes": (
        [*DIGITS, "--model-arg", "num_classes=7", *IMAGES], 3, ["(2, 10)", "(2, 7)", "num_classes=10"]
    ),
    "frozen module that is not there": ([*MLP, "--freeze", "layers.9"], 3, ["'layers.9'", "Did you mean 'layers"]),
    "everything frozen": ([*MLP, "--freeze", "*"], 3, ["prunable axis", "metaprune inspect"]),
    "rules that are not there": ([*MLP, "--rules", "my.rules"], 3, ["'my.rules' is none"]),
    "no budget": ([*MLP, "--budget", ""], 3, ["`--budget` must not be empty"]),
    "budget of 0": ([*MLP, "--budget", "macs=0"], 3, ["above 0", "'macs=0'"]),
    "negative budget": ([*MLP, "--budget", "macs=-1"], 3, ["above 0"]),
    "budget above 1": ([*MLP, "--budget", "macs=1.5"], 3, ["macs must reach 1.5", "above 1 an absolute number"]),
    "budget above the network": ([*MLP, "--budget", "macs=40G"], 3, ["at most the dense network"]),
    "budget that is no number": ([*MLP, "--budget", "macs=half"], 3, ["must be a number", "'macs=half'"]),
    "budget of nothing known": ([*MLP, "--budget", "mac=0.5"], 3, ["Did you mean 'macs'"]),
    "budget below the floors": ([*MLP, "--budget", "macs=0.01"], 3, ["cannot go below 993", "0.058", "--floor"]),
    "units and entries": ([*MLP, "--budget", "macs=0.5,nonzeros=0.5"], 3, ["of units or of single entries"]),
    "a pattern of units": ([*MLP, "--pattern", "2:4"], 3, ["macs=0.5 is a budget of units", "nonzeros=0.5"]),
    "no pattern": ([*MLP, "--budget", "", "--pattern", "4:2"], 3, ["1 <= N <= M", "'4:2'"]),
    "a pattern without a budget": ([*MLP, "--budget", "", "--pattern", "row"], 3, ["Give a budget"]),
    "a pattern that divides nothing": (
        [*DIGITS, "--budget", "", "--pattern", "2:4"], 3, ["'conv1.weight'", "4 divides, but it is 1", "--freeze conv1"]
    ),
    "a criterion of units": ([*MLP, *SPARSE, "--criterion", "fpgm"], 3, ["'fpgm' scores whole units", "l1, l2"]),
    "an allocator of units": (
        [*DIGITS, *IMAGES, *SPARSE, "--allocator", "fedtiny"], 3, ["'fedtiny' needs a network", "uniform"]
    ),
    "sizes of entries": ([*MLP, *SPARSE, "--round-to", "8"], 3, ["`--round-to` is for units"]),
    "entries below the floors": ([*MLP, "--budget", "nonzeros=0.01"], 3, ["nonzeros must reach", "--floor"]),
    "entries from file to file": ([*MLP, *SPARSE, "--stream"], 3, ["`--stream` cuts units", "nonzeros=0.5"]),
    "input of another shape": ([*MLP, "--input-shape", "2,3,9,9"], 3, ["rejects an input of shape (2, 3, 9, 9)"]),
    "input shape of 0": ([*MLP, "--input-shape", "0,1,8,8"], 3, ["`--input-shape` must be at least 1"]),
    "input shape of words": ([*MLP, "--input-shape", "big"], 3, ["`--input-shape` must be whole numbers"]),
    "floor above 1": ([*MLP, "--floor", "1.5"], 3, ["`--floor` must be at most 1", "1.5"]),
    "rounding to 0": ([*MLP, "--round-to", "0"], 3, ["`--round-to` must be at least 1"]),
    "negative seed": ([*MLP, "--seed", "-1"], 3, ["`--seed` must be at least 0"]),
    "unknown accelerator": ([*MLP, "--accelerator", "gpu"], 3, ["`--accelerator` must be 'auto', 'cpu' or 'cuda'"]),
    "training without data": ([*MLP, "--epochs", "3"], 3, ["`--epochs` is for training", "--data"]),
    "recovery without data": ([*MLP, "--recovery", "finetune"], 3, ["'finetune' needs data", "--recovery none"]),
    "allocator without data": ([*MLP, "--allocator", "fedtiny"], 3, ["'fedtiny' needs data", "uniform"]),
    "criterion without data": ([*MLP, "--criterion", "taylor"], 3, ["'taylor' needs data", "l1, l2, "]),
    "option of nothing": ([*MLP, "--set", "epochs=3"], 3, ["`--set epochs` must name an option of the criterion, "]),
    "option of an unknown kind": ([*MLP, "--set", "criterium.group=3"], 3, ["Did you mean 'criterion'"]),
    "option that is not set": ([*MLP, "--set", "criterion.group"], 3, ["must read KIND.OPTION=VALUE"]),
    "option set twice": (
        [*MLP, "--set", "criterion.group=1", "--set", "criterion.group=2"], 3, ["may be given once", "'1' and '2'"]
    ),
    "option that no criterion has": (
        [*MLP, "--set", "criterion.samples=3"], 3, ["`--set criterion.samples`: criterion 'l2' has no option", "obs"]
    ),
    "misspelt option of an allocator": (
        [*MLP, "--allocator", "global_mt", "--set", "allocator.minimun=0.1"],
        3,
        ["'global_mt' has no option 'minimun'. Did you mean 'minimum'? Known: minimum."],
    ),
    "option of the wrong type": (
        [*MLP, "--allocator", "global_mt", "--set", "allocator.minimum=low"],
        3,
        ["`--set allocator.minimum` must be a number, but it is 'low'"],
    ),
    "option out of range": (
        [*MLP, "--allocator", "global_mt", "--set", "allocator.minimum=2"], 3, ["`0 <= minimum <= 1` must hold"]
    ),
    "option of a recovery that was not chosen": (
        [*DIGITS, *IMAGES, "--recovery", "finetune", "--set", "recovery.perp.rank=2"],
        3,
        ["`--set recovery.perp.rank`: it is for recovery 'perp', but 'finetune' was chosen", "--recovery perp"],
    ),
    "option of no recovery": (
        [*DIGITS, *IMAGES, "--recovery", "none", "--set", "recovery.rank=2"],
        3,
        ["recovery 'none' has no option 'rank'", "Those that have it: perp"],
    ),
    "option by its flag and set": (
        [*DIGITS, *IMAGES, "--recovery", "finetune", "--lr", "0.1", "--set", "recovery.lr=0.2"],
        3,
        ["may be given once, but `--lr` and `--set recovery.lr` say the same"],
    ),
    "option by its flag and set for one": (
        [*DIGITS, *IMAGES, "--recovery", "finetune", "--lr", "0.1", "--set", "recovery.finetune.lr=0.2"],
        3,
        ["may be given once, but `--lr` and `--set recovery.finetune.lr` say the same"],
    ),
    "parts of a criterion without data": (
        [*MLP, "--criterion", "product", "--set", "criterion.of=l2,taylor"], 3, ["'product(of=l2,taylor)' needs data"]
    ),
    "metanetwork that is not there": (
        [*MLP, "--criterion", "metanet", "--set", "criterion.checkpoint=gone.safetensors"], 3, ["gone.safetensors"]
    ),
    "option in a recipe": (
        ["--config", "set.yaml"], 3, ["set.yaml:4: `set.allocator.minimum` must be a number, but it is 'low'"]
    ),
    "option in a recipe and by its flag": (
        ["--config", "lr.yaml", "--lr", "0.1"], 3, ["`--lr` and lr.yaml:4: `set.recovery.lr` say the same"]
    ),
    "rounding by an unknown kind": ([*MLP, "--round-to", "chanel=8"], 3, ["'chanel'", "Did you mean 'channel'"]),
    "rounding to words": ([*MLP, "--round-to", "channel=much"], 3, ["`--round-to` must be a whole number", "head=1"]),
    "option that no recovery has": (
        [*DIGITS, *IMAGES, "--recovery", "recalibrate_norm", "--epochs", "2"], 3, ["no option 'epochs'"]
    ),
    "rate of 0": ([*DIGITS, *IMAGES, "--recovery", "finetune", "--lr", "0"], 3, ["`--lr` must be above 0"]),
    "folder that is not empty": ([*MLP, "--out", "full"], 3, ["full holds thesis.tex"]),
    "folder that is no run": ([*MLP, "--out", "full", "--force"], 3, ["--force deletes only what a run wrote"]),
    "folder that is a file": ([*MLP, "--out", "file"], 3, ["must be a folder, but file is none"]),
    "nothing to resume": ([*MLP, "--out", "new", "--resume"], 3, ["--resume needs the folder of an earlier run"]),
    "force and resume": ([*MLP, "--out", "new", "--resume", "--force"], 3, ["Give one of them"]),
    "no store": ([*MLP, "--track", "--tracking-uri", "store.db"], 3, ["sqlite:///store.db"]),
    "server that is not there": ([*MLP, "--track", "--tracking-uri", "http://127.0.0.1:9"], 3, ["--no-track"]),
    "no recipe": (["--config", "digitz"], 3, ["Did you mean 'digits'"]),
    "recipe with an unknown key": (["--config", "mistyped.yaml"], 3, ["mistyped.yaml:2", "Did you mean 'budget'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    words, code, said = BAD[case]
    write_inputs(tmp_path)
    before = entries(tmp_path)
    rest = [*([] if "--budget" in words else HALF), *([] if "--track" in words else ["--no-track"])]
    done = command("prune", *words, *rest, "--json")
    assert done.code == code, done.err
    error = done.json["error"]
    assert error["exit_code"] == code
    for part in said:
        assert part in error["message"], error["message"]
    assert error["message"] in done.said
    assert "Traceback" not in done.err
    after = [entry for entry in entries(tmp_path) if "__pycache__" not in entry]  # Python's own, of odd_nets.py
    assert after == before


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = command("prune", *MLP, *HALF, "--accelerator", "cuda")
    assert done.code == 3
    assert "needs a GPU" in done.said
    assert entries(tmp_path) == []


def test_how_far_losses_add_up_is_told_where_a_knapsack_hangs_on_it(tmp_path: Path) -> None:
    words = [*TINY, *HALF, *QUICK, "--criterion", "obs", "--recovery", "none"]
    knapsack = command("prune", *words, "--allocator", "rd", "--out", tmp_path / "rd", "--json")
    (said,) = [note for note in knapsack.json["notes"] if "add up" in note]
    assert said.endswith(f"with R2 {knapsack.json['plan']['made_by']['additivity']:.2f}")
    threshold = command("prune", *words, "--allocator", "uniform", "--out", tmp_path / "uniform", "--json")
    assert not [note for note in threshold.json["notes"] if "add up" in note]


# ---- interrupted and resumed -----------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_ctrl_c_prints_the_command_that_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    words = [*TINY, *HALF, "--recovery", "finetune", "--epochs", "15", "--no-track", "--no-bench"]
    out = tmp_path / "a folder"  # a space, so that quoting is tested too
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums hang on the number of threads
    with subprocess.Popen(
        [*ENTRY, "prune", *words, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=one_thread,
    ) as child:
        until = time.monotonic() + 60
        while not list(out.glob("checkpoints/*.safetensors")):
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        shown, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert shown == ""
    assert "Traceback" not in said
    assert "what was done is kept" in said
    (line,) = [line for line in said.splitlines() if line.startswith("  metaprune ")]
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"

    again = command(*shlex.split(line)[1:], "--json")
    assert again.code == 0, again.err
    assert any("went on at step" in note for note in again.json["recovery"][0]["notes"])
    whole = command("prune", *words, "--out", "whole", "--json")
    assert whole.code == 0
    for name in ("model.safetensors", "plan.json", "model.onnx", "dense.onnx"):
        assert digest(out / name) == digest(tmp_path / "whole" / name), name
    assert again.json["after"] == whole.json["after"]


def test_a_finished_run_prints_its_result_again(result_folder: Path) -> None:
    words = ["prune", *TINY, *HALF, "--no-track", "--no-bench", "--out", result_folder, "--resume"]
    before = entries(result_folder)
    start = time.perf_counter()
    done = command(*words, "--json")
    assert done.code == 0, done.err
    assert done.json == json.loads((result_folder / "outcome.json").read_text())
    assert "finished run" in done.said
    assert time.perf_counter() - start < 2
    assert entries(result_folder) == before


def test_a_resumed_run_must_be_asked_the_same(result_folder: Path) -> None:
    words = ["prune", *TINY, "--budget", "macs=0.4", "--no-bench", "--no-track", "--out", result_folder, "--resume"]
    done = command(*words)
    assert done.code == 3
    assert "`budget` was" in done.said


def test_force_starts_over(tmp_path: Path) -> None:
    words = ["prune", *MLP, *QUICK, "--out", "out"]
    assert command(*words, *HALF).code == 0
    assert command(*words, "--budget", "macs=0.4").code == 3
    told = command(*words, "--budget", "macs=0.4", "--force", "--json").json
    assert told["budget"] == "macs=0.4"


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_says_whether_something_is_kept(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "read_subject" if when == "before" else "prune", interrupted)
    told = command("prune", *MLP, *HALF, *QUICK, "--out", "out", "--json")
    assert told.code == 130
    error = told.json["error"]
    assert error["kind"] == "Interrupted"
    assert error["again"].endswith("--resume") == (when == "after")
    assert Path("out").exists() == (when == "after")
    assert error["again"] in told.err


# ---- real images -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("name", "peer"), [("cifar_resnet56", 81.4), ("cifar_resnet20", 0.0)])
def test_half_the_macs_of_a_real_network_without_training(
    name: str, peer: float, cifar10: Path, cifar10_weights: Path, tmp_path: Path
) -> None:
    weights = cifar10_weights / f"{name.replace('cifar_', 'cifar10_')}.safetensors"
    done = command(
        *("prune", "--model", f"zoo:{name}", "--weights", weights, "--data", f"cifar10:{cifar10}", *HALF),
        *("--criterion", "taylor", "--allocator", "global", "--recovery", "recalibrate_norm", "--out", "out"),
        *("--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--json"),
    )
    told = done.json
    assert done.code == 0
    assert (told["split"], told["images"]) == ("test", 5000)
    assert told["error_max"] <= 1e-5
    assert all(check["passed"] for check in told["checks"])
    assert told["after"]["macs"] <= 0.5 * told["before"]["macs"]
    assert told["accuracy"]["recovered"]["low"] > peer


def test_a_device_decides_alignment_and_shows_what_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "BENCH_S", 0.2)
    (tmp_path / "board.yaml").write_text(
        "label: emulated\nround_to: 4\nprecision: [int8]\nstorage: 5KB\nruntime: false\n"
    )
    words = [
        "--model",
        "zoo:digits_cnn",
        "--budget",
        "macs=0.7",
        "--device",
        "board.yaml",
        "--no-track",
        "--out",
        "made",
    ]
    done = command("prune", *words, "--json")
    assert done.code in (0, 4), done.said
    told = done.json
    assert told["budget"] == "macs=0.7,params=5000"
    assert {axis["kept"] % 4 for axis in told["plan"]["axes"]} == {0}
    assert told["device"]["name"] == "board"
    assert told["device"]["round_to"] == 4
    check = next(check for check in told["checks"] if check["name"] == "device")
    assert "weights take" in check["detail"]
    assert "(projected)" in check["detail"]
    assert [note for note in told["notes"] if "sizes of any number take" in note]
    assert [note for note in told["notes"] if "board asks for params=5000" in note]
    assert "sizes of any number" in (tmp_path / "made" / "report.html").read_text()


def test_a_device_that_the_network_fits_still_needs_a_budget() -> None:
    done = command("prune", "--model", "zoo:mlp", "--device", "mcu-512k", "--out", "made")
    assert done.code == 3
    assert "fits mcu-512k as it is" in done.said
    assert command("prune", "--model", "zoo:mlp", "--budget", "macs=0.5", "--device", "rpi9").code == 3
