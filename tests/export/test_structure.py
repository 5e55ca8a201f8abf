"""Files from strangers: each thing that is wrong with one is named, and none of them is run."""

import os
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metaprune.errors import ConfigError, InputError
from metaprune.export.session import open_session
from metaprune.export.structure import leaks, paths_in, read


def changed(file: Path, folder: Path, change: object) -> Path:
    model = onnx.load(file)
    change(model)  # type: ignore[operator]
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def test_a_good_file_is_described(file: Path) -> None:
    structure = read(file)
    assert structure.findings == ()
    assert structure.opset == 20
    assert structure.parameters > 100
    assert structure.size_bytes == file.stat().st_size
    assert structure.inputs[0].dtype == "float32"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_called_so(conv_file: Path, tmp_path: Path, share: float) -> None:
    content = conv_file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cut.onnx' is truncated"):
        read(tmp_path / "cut.onnx")


@pytest.mark.parametrize(
    "content", [b"I am no network.", b"PK\x03\x04" + bytes(100), bytes(1000), b"\x08", pickle.dumps(Path("a"))]
)
def test_other_files_are_called_no_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"other.onnx' (is none|holds no graph|is truncated)"):
        read(tmp_path / "other.onnx")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    for path, rule in [(tmp_path, "a folder"), (tmp_path / "x.onnx", "not there"), (tmp_path / "empty.onnx", "empty")]:
        with pytest.raises(InputError, match=rule):
            read(path)


@pytest.mark.parametrize("opset", [28, 99])
def test_a_newer_opset_is_named(conv_file: Path, tmp_path: Path, opset: int) -> None:
    def newer(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = opset

    with pytest.raises(InputError, match=rf"has opset {opset}\. Export it"):
        open_session(changed(conv_file, tmp_path, newer))


def test_custom_operators_are_named(conv_file: Path, tmp_path: Path) -> None:
    def custom(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "my.company"
        model.opset_import.append(helper.make_opsetid("my.company", 1))

    with pytest.raises(InputError, match=r"but 'changed.onnx' uses my\.company\."):
        read(changed(conv_file, tmp_path, custom))


def external(folder: Path, location: str) -> Path:
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir(exist_ok=True)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


def test_external_data_are_read_from_the_folder_alone(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.ones(16, np.float32).tobytes())
    folder = tmp_path / "model"
    with pytest.raises(InputError, match=r"'data\.bin', which is missing"):
        read(external(folder, "data.bin"))
    (folder / "data.bin").write_bytes(secret.read_bytes())
    assert read(external(folder, "data.bin")).external == ("data.bin",)
    assert open_session(folder / "net.onnx").run({"x": np.ones((1, 4), np.float32)})["y"].tolist() == [[4.0] * 4]
    (folder / "link.bin").symlink_to(secret)
    os.link(secret, folder / "hard.bin")
    for location, rule in [
        ("../secret.bin", "in the folder of the file"),
        (str(secret), "in the folder of the file"),
        ("link.bin", "in the folder of the file"),
        ("hard.bin", "hard link"),
        ("", "in the folder of the file"),
    ]:
        with pytest.raises(InputError, match=rule):
            open_session(external(folder, location))


def test_leaks_and_training_are_findings(conv_file: Path, tmp_path: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        model.graph.node[0].doc_string = 'File "/home/someone/nets/net.py", line 3, in forward'
        model.graph.node.append(
            helper.make_node("BatchNormalization", list("abcde"), ["f", "g", "h"], training_mode=1, name="bn")
        )

    path = changed(conv_file, tmp_path, spoil)
    findings = " ".join(read(path).findings)
    assert "'/home/someone/nets/net.py'" in findings
    assert "'bn' normalises by the batch" in findings
    assert "breaks the rules of ONNX" in findings  # the new node reads values that nobody writes


def test_paths_are_known_by_where_they_start(tmp_path: Path) -> None:
    here = str(Path.cwd() / "nets")
    for text in ("/home/me/x.py", r"at C:\Users\me\x.py", "~/x.py", "see /usr/lib/python3/x.py:3", here):
        assert paths_in(text), text
    for text in ("/layer1/conv1/Conv_output_0", "a/b", "ratio 1/2", "https://example.org/home", "sha256:ab/cd"):
        assert not paths_in(text), text
    model = onnx.ModelProto()
    model.metadata_props.add(key="weights", value="/home/me/w.safetensors")
    assert leaks(model) == ("/home/me/w.safetensors",)


def test_sessions_refuse_what_does_not_fit(conv_file: Path) -> None:
    session = open_session(conv_file, threads=1)
    with pytest.raises(InputError, match=r"takes input float32\['batch', 3, 16, 16\], and was given"):
        session.run({"input": np.zeros((1, 3, 8), np.float32)})
    with pytest.raises(InputError, match="was given input float64"):
        session.run({"input": np.zeros((1, 3, 16, 16))})
    with pytest.raises(ConfigError, match="threads"):
        open_session(conv_file, threads=0)


def test_tensors_larger_than_their_file_or_than_any_memory_are_refused(tmp_path: Path) -> None:
    claims = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**20, 2**20], raw_data=b"1234")
    negative = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-4, 4], raw_data=bytes(64))
    asked = numpy_helper.from_array(np.array([2**20, 2**18], np.int64), "s")
    multiply = helper.make_node("MatMul", ["x", "w"], ["y"])
    grow = [
        helper.make_node("ConstantOfShape", ["s"], ["w"]),
        helper.make_node("ReduceSum", ["w"], ["z"]),
        helper.make_node("Add", ["x", "z"], ["y"]),
    ]
    for nodes, weights, rule in [
        ([multiply], [claims], r"claims the shape \[1048576, 1048576\], 4398046511104 bytes, but holds 4"),
        ([multiply], [negative], r"claims the shape \[-4, 4\]"),
        (grow, [asked], r"'w' in 'giant.onnx' has the shape \[1048576, 262144\]"),
    ]:
        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
        graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        (tmp_path / "giant.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match=rule):
            open_session(tmp_path / "giant.onnx")


def test_external_data_shorter_than_their_tensor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(63))
    with pytest.raises(InputError, match="64 bytes, but holds 63"):
        read(external(tmp_path, "data.bin"))
