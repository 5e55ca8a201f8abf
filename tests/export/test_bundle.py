"""One folder that needs nothing else, and says nothing of where it was made."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from metaprune.errors import InputError
from metaprune.export import bundle as room
from metaprune.export.bundle import CARD, MODEL, ORT, RUN, SUMS, write_bundle
from metaprune.export.devices import load_device
from metaprune.export.structure import paths_in


@pytest.fixture
def example() -> dict[str, np.ndarray]:
    return {"input": torch.randn(3, 3, 16, 16).numpy()}


def test_the_folder_is_whole_and_proves_itself(conv_file: Path, example: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"weights": "/home/me/nets/a.safetensors"}')
    made = write_bundle(
        tmp_path / "deep" / "out", conv_file, example=example, card="# A network of /home/me/nets\n",
        beside={"plan.json": tmp_path / "plan.json"}, device=load_device("host"),
    )  # fmt: skip
    folder = Path(made.folder)
    assert made.notes == ()
    assert set(made.files) == {CARD, "example.npz", "expected.npz", MODEL, ORT, "plan.json", RUN}
    assert {path.name for path in folder.iterdir()} == {*made.files, SUMS}
    for line in (folder / SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest == made.files[name]
    for name in (CARD, "plan.json", RUN, SUMS):
        assert not paths_in((folder / name).read_text())
    assert (folder / CARD).read_text() == "# A network of nets\n"
    assert list((tmp_path / "deep").iterdir()) == [folder]
    ort = onnxruntime.InferenceSession(folder / ORT, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(ort.run(None, example)[0], np.load(folder / "expected.npz")["output"], atol=1e-5)


def test_run_py_needs_little_and_notices_another_network(
    conv_file: Path, example: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = Path(write_bundle(tmp_path / "out", conv_file, example=example, card="").folder)
    assert not (folder / ORT).exists()
    text = (folder / RUN).read_text()
    assert len(text.splitlines()) <= 30
    tree = ast.walk(ast.parse(text))
    modules = {name.name for node in tree if isinstance(node, ast.Import) for name in node.names}
    assert modules == {"sys", "numpy", "onnxruntime"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, folder / RUN, *words], cwd=tmp_path, capture_output=True, text=True)

    assert run().stdout == "output (3, 10) is right\n"
    np.savez(tmp_path / "in.npz", input=2 * example["input"])
    assert run("in.npz", "out.npz", MODEL).returncode == 0
    assert np.load(tmp_path / "out.npz")["output"].shape == (3, 10)
    model = onnx.load(folder / MODEL)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(weight), 1, 0).copy(), weight.name))
    onnx.save(model, folder / MODEL)
    assert "output is wrong" in run().stderr


def test_a_folder_is_replaced_only_on_demand_and_nothing_half_is_left(
    conv_file: Path, example: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        write_bundle(tmp_path / "out", conv_file, example=example, card="")
    with pytest.raises(InputError, match="needs all its files"):
        write_bundle(tmp_path / "new", conv_file, example=example, card="", beside={"a": tmp_path / "missing"})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a folder to write in"):
        write_bundle(tmp_path / "file" / "out", conv_file, example=example, card="")
    monkeypatch.setattr(room, "_prove", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "out", conv_file, example=example, card="", overwrite=True)
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file"}
    monkeypatch.undo()
    write_bundle(tmp_path / "out", conv_file, example=example, card="", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
