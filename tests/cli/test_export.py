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
    told = onnxruntime.InferenceSession(result_folder / "model.onnx").get_modelmeta().custom_metadata_map
    for name in ("source", "network", "plan", "budget", "accuracy.dense", "accuracy.recovered", "axes", "opset"):
        assert told[f"metaprune.{name}"], name
    session = onnxruntime.InferenceSession(tmp_path / "again.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]


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
