import hashlib
import json
import shutil
from pathlib import Path

import onnxruntime
import pytest

from tests.cli.commands import command, entries


def test_a_result_is_exported_again(result_folder: Path, tmp_path: Path) -> None:
    told = command("export", "--run", result_folder, "--out", "again.onnx", "--json").json
    assert told["files"] == {"again.onnx": "again.onnx"}
    assert told["error_max"] < 1e-5
    assert told["batch"] is None
    assert told["checks"][0]["passed"]
    assert told["sha256"] == hashlib.sha256((result_folder / "model.onnx").read_bytes()).hexdigest()
    told = onnxruntime.InferenceSession(result_folder / "model.onnx").get_modelmeta().custom_metadata_map
    for name in ("source", "network", "plan", "budget", "accuracy.dense", "accuracy.recovered", "axes", "opset"):
        assert told[f"metaprune.{name}"], name
    session = onnxruntime.InferenceSession(tmp_path / "again.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]


def test_a_result_is_packed_into_one_folder(result_folder: Path, tmp_path: Path) -> None:
    done = command("export", "--run", result_folder, "--bundle", "packed", "--precision", "int8-dynamic,fp16", "--json")
    assert done.code == 0, done.err
    told = done.json
    names = {"card.md", "model.onnx", "model.safetensors", "plan.json", "report.html", "run.py"}
    assert names <= set(told["files"])
    assert all((tmp_path / name).is_file() for name in told["files"].values())
    assert (tmp_path / "packed" / "model.onnx").read_bytes() == (result_folder / "model.onnx").read_bytes()
    assert [offer["method"] for offer in told["offers"]] == ["int8-dynamic", "fp16"]
    assert "without convolutions" in told["offers"][0]["reason"]
    card = (tmp_path / "packed" / "card.md").read_text()
    assert card.startswith("# zoo:digits_cnn at macs=0.5\n")
    for said in (
        "| MACs per sample |",
        "| exact |",
        "| measured |",
        "digits, 10 classes",
        "int8-dynamic is left out",
        "## Limits",
    ):
        assert said in card, said
    assert {Path(name).parts[0] for name in entries(tmp_path)} == {"packed"}
    again = command("export", "--run", result_folder, "--bundle", "packed")
    assert again.code == 3
    assert "is there already" in again.said


def test_a_network_slower_than_the_dense_one_is_not_packed_silently(result_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(result_folder, tmp_path / "slow")
    outcome = json.loads((tmp_path / "slow" / "outcome.json").read_text())
    outcome["latency"] = {"comparisons": [{"verdict": "slower", "ratio": {"value": 1.25}}]}
    (tmp_path / "slow" / "outcome.json").write_text(json.dumps(outcome))
    done = command("export", "--run", "slow", "--bundle", "packed")
    assert done.code == 0, done.err
    assert "slower than the dense one" in " ".join(done.out.split())
    assert "x1.250 the time" in (tmp_path / "packed" / "card.md").read_text()


def test_a_network_of_the_zoo_is_exported(tmp_path: Path) -> None:
    done = command("export", "--model", "zoo:mlp", "--opset", "18")
    assert done.code == 0
    assert "Wrote mlp.onnx" in done.out
    assert "opset 18" in done.out
    assert entries(tmp_path) == ["mlp.onnx"]


def test_sizes_beside_the_batch_are_free_if_asked_for(tmp_path: Path) -> None:
    done = command("export", "--model", "zoo:lstm_classifier", "--free", "1=length", "--json")
    assert done.code == 0
    assert done.json["axes"] == ["batch", "length"]
    session = onnxruntime.InferenceSession(tmp_path / "lstm_classifier.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[:2] == ["batch", "length"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 3, "one of `--run` and `--model`"),
        (["--run", "nowhere"], 3, "nowhere"),
        (["--run", "{result}", "--model", "zoo:mlp"], 3, "one of `--run` and `--model`"),
        (["--run", "{result}"], 3, "is there already"),
        (["--model", "zoo:mlp", "--opset", "3"], 3, "opset=3"),
        (["--model", "zoo:mlp", "--free", "length"], 3, "must read DIMENSION=NAME"),
        (["--model", "zoo:mlp", "--bundle", "b"], 3, "Give --run"),
        (["--run", "{result}", "--bundle", "b", "--precision", "int3"], 3, "'int3' is not"),
        (["--run", "{result}", "--bundle", "b", "--device", "rpi9"], 3, "'rpi9' is neither"),
        (["--run", "{result}", "--precision", "int8"], 3, "for a bundle"),
        (["--model", "zoo:nothing", "--out", "x.onnx"], 3, "no model is named"),
    ],
)
def test_bad_input_is_refused(result_folder: Path, tmp_path: Path, words: list[str], code: int, said: str) -> None:
    before = entries(result_folder)
    done = command("export", *(word.format(result=result_folder) for word in words))
    assert done.code == code
    assert said in done.said
    assert entries(tmp_path) == []
    assert entries(result_folder) == before
