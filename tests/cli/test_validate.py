import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from safetensors.torch import save_file

from metaprune import data, zoo
from tests.cli.commands import TINY, command, entries

CHECKS = ["structure", "numeric", "third opinion", "agreement", "accuracy"]


def test_a_result_passes_every_check(result_folder: Path) -> None:
    done = command("validate", "--run", result_folder, "--max-drop", "100", "--json")
    assert done.code == 0
    told = done.json
    assert [check["name"] for check in told["checks"]] == CHECKS
    assert all(check["passed"] for check in told["checks"])
    assert (told["split"], told["images"], told["data"]) == ("test", 359, "digits")
    assert told["before"]["metrics"]["accuracy"] >= 0
    assert told["error_max"] < 1e-4
    assert "against_dense" in told["details"][-1]["values"]


def test_a_file_alone_is_checked_as_far_as_that_goes(result_folder: Path) -> None:
    done = command("validate", result_folder / "model.onnx")
    assert done.code == 0
    assert "not made" in done.out
    assert max(map(len, done.out.splitlines())) <= max(80, len(str(result_folder)) + 11)
    told = command("validate", result_folder / "dense.onnx", "--data", "digits", "--json").json
    assert {check["name"]: check["passed"] for check in told["checks"]}["accuracy"]


def test_a_network_of_the_user_is_what_the_file_should_be() -> None:
    assert command("export", "--model", "zoo:mlp", "--out", "net.onnx").code == 0
    told = command("validate", "net.onnx", "--model", "zoo:mlp", "--data", "digits", "--json").json
    assert told["model"] == "zoo:mlp"
    assert told["passed"]  # the same seed draws the same weights


def test_a_file_that_is_another_network_fails_with_4(result_folder: Path, tmp_path: Path) -> None:
    network = onnx.load(result_folder / "model.onnx")
    weight = max(network.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.roll(values, 1, 0).copy(), weight.name))
    onnx.save(network, tmp_path / "other.onnx")
    done = command("validate", "other.onnx", "--run", result_folder, "--json")
    assert done.code == 4
    assert "gate failed: numeric" in done.said
    assert not done.json["passed"]
    shown = command("validate", "other.onnx", "--run", result_folder)
    assert shown.code == 4
    assert "FAILED" in shown.out


def test_too_great_a_loss_fails_with_4(tmp_path: Path) -> None:
    model = zoo.build("digits_cnn", widths=[4, 8])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train = data.load("digits").train
    for _ in range(5):
        for batch in train.batches(64, shuffle=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    small = ["--criterion", "random", "--budget", "macs=0.2", "--no-track", "--no-bench", "--out", "small"]
    assert command("prune", *TINY, "--weights", "trained.safetensors", *small).code == 0
    assert command("validate", "--run", "small", "--max-drop", "99").code == 0
    done = command("validate", "--run", "small", "--max-drop", "5")
    assert done.code == 4
    assert "gate failed: accuracy" in done.said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a file is needed"),
        (["nothing.onnx"], "is not there"),
        (["text.onnx"], "text.onnx"),
        (["cut.onnx"], "cut.onnx"),
        (["--run", "{result}", "--model", "zoo:mlp"], "both say"),
        (["{result}/model.onnx", "--max-drop", "1"], "Give --run"),
        (["--run", "{result}", "--max-drop", "-1"], "at least 0"),
        (["--run", "empty"], "run.json"),
    ],
)
def test_bad_input_is_refused(result_folder: Path, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("not a network")
    (tmp_path / "cut.onnx").write_bytes((result_folder / "model.onnx").read_bytes()[:2000])
    before = entries(tmp_path)
    done = command("validate", *(word.format(result=result_folder) for word in words), "--json")
    assert done.code == 3
    assert said in done.json["error"]["message"]
    assert entries(tmp_path) == before


def test_a_result_that_is_not_finished_is_refused(result_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(result_folder, tmp_path / "half")
    (tmp_path / "half" / "outcome.json").unlink()
    done = command("validate", "--run", "half")
    assert done.code == 3
    assert "--resume" in done.said
