"""What is exported is the network, at every batch size it claims, and tells nothing of where it was made."""

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from metaprune.errors import ConfigError, InputError, UnsupportedModelError
from metaprune.export import to_onnx
from metaprune.export.session import newest_opset, open_session
from metaprune.export.structure import read
from metaprune.export.to_onnx import export


def test_the_file_is_the_network_at_three_batch_sizes(file: Path, net: nn.Module, images: Tensor) -> None:
    session = open_session(file)
    assert session.batch is None
    for batch in (1, 2, 5):
        expected = net(images[:batch]).detach()
        torch.testing.assert_close(session.predict(images[:batch]), expected, rtol=0, atol=1e-5)


def test_the_record_tells_all(tmp_path: Path, conv: nn.Module) -> None:
    result = export(conv, torch.randn(3, 3, 16, 16), tmp_path / "deep" / "net.onnx")
    assert (result.rung, result.batch, result.opset, result.refused) == ("named axes", None, 20, ())
    assert result.axes == ("batch",)
    assert {probe.sizes["batch"] for probe in result.probes} == {1, 3, 5}
    assert 0 < result.max_error < 1e-6
    assert result.inputs[0].shape == ("batch", 3, 16, 16)
    assert [port.name for port in result.outputs] == ["output"]
    assert result.files == (str(tmp_path / "deep" / "net.onnx"),)
    assert result.size_bytes == (tmp_path / "deep" / "net.onnx").stat().st_size
    record = json.loads(json.dumps(result.to_json()))
    assert record["probes"][0]["passed"] is True
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "net.onnx"]


def test_the_network_stays_as_it_is(tmp_path: Path, conv: nn.Module) -> None:
    conv.train()
    conv[2].eval()
    before, flags = copy.deepcopy(conv.state_dict()), [module.training for module in conv.modules()]
    export(conv, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx")
    assert [module.training for module in conv.modules()] == flags
    assert all(parameter.requires_grad for parameter in conv.parameters())
    for name, value in conv.state_dict().items():
        assert torch.equal(value, before[name]), name
    # and the file is the network in eval mode: no dropout, no statistics of the batch
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(open_session(tmp_path / "net.onnx").predict(x), conv.eval()(x), rtol=0, atol=1e-5)


def test_nothing_tells_where_it_was_made(file: Path) -> None:
    content = file.read_bytes()
    for place in (str(Path.cwd()), str(Path.home()) + "/", "site-packages", 'File "', "stack_trace", "nn.modules"):
        assert place.encode() not in content
    model = onnx.load(file)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not any(value.metadata_props for value in (*model.graph.value_info, *model.graph.input, *model.graph.output))
    assert not any(tensor.metadata_props or tensor.doc_string for tensor in model.graph.initializer)
    assert not model.graph.metadata_props


def test_metadata_are_read_back(tmp_path: Path, conv: nn.Module) -> None:
    export(conv, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", metadata={"plan": "sha256:ab", "größe": "½"})
    metadata = open_session(tmp_path / "net.onnx").metadata
    assert metadata["plan"] == "sha256:ab"
    assert metadata["größe"] == "½"
    assert metadata["metaprune.rung"] == "named axes"
    assert read(tmp_path / "net.onnx").metadata == metadata


@pytest.mark.parametrize("metadata", [{"weights": "/home/me/net.safetensors"}, {"metaprune.rung": "mine"}])
def test_metadata_that_leak_or_pretend_are_refused(tmp_path: Path, conv: nn.Module, metadata: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(metadata))):
        export(conv, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [18, 26])
def test_the_opset_asked_for_is_the_one_written(tmp_path: Path, conv: nn.Module, opset: int) -> None:
    assert export(conv, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", opset=opset).opset == opset
    assert read(tmp_path / "net.onnx").opset == opset


@pytest.mark.parametrize(("opset", "error"), [(9, UnsupportedModelError), (3, ConfigError), (99, ConfigError)])
def test_an_opset_that_cannot_be_written_is_refused(
    tmp_path: Path, conv: nn.Module, opset: int, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"opset={opset}|opset {opset} was asked for"):
        export(conv, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_what_onnxruntime_runs_is_asked_of_onnxruntime() -> None:
    assert 20 <= newest_opset() <= onnx.defs.onnx_opset_version()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True) -> dict[str, Any]:
        hidden = self.embed(input_ids) * attention_mask[..., None]
        return {"logits": self.head(hidden), "pooled": [hidden.mean(1)], "cache": hidden if use_cache else None}


def test_named_inputs_in_any_order_and_several_outputs(tmp_path: Path) -> None:
    net = Named().eval()
    ids, mask = torch.randint(0, 50, (2, 5)), torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    example = {"attention_mask": mask, "input_ids": ids, "use_cache": False}
    result = export(net, example, tmp_path / "net.onnx")
    assert {port.name: port.shape for port in result.inputs} == {
        "attention_mask": ("batch", 5),
        "input_ids": ("batch", 5),
    }
    assert [port.name for port in result.outputs] == ["logits", "pooled_0"]
    got = open_session(tmp_path / "net.onnx").run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(got["logits"], net(**example)["logits"].detach(), atol=1e-5)


class Two(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left @ right, left.argmax(1)


def test_positional_inputs_and_integer_outputs(tmp_path: Path) -> None:
    left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    result = export(Two(), (left, right), tmp_path / "net.onnx")
    assert [port.shape for port in result.inputs] == [("batch", 3, 4), ("batch", 4, 5)]
    assert [port.dtype for port in result.outputs] == ["float32", "int64"]


class OnlyPairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 2:
            raise ValueError("two samples, please")
        return x.reshape(2, 8).softmax(1)


def test_a_fixed_batch_is_recorded_as_such(tmp_path: Path) -> None:
    result = export(OnlyPairs(), torch.randn(2, 8), tmp_path / "net.onnx")
    assert (result.rung, result.batch) == ("static", 2)
    assert [refusal.rung for refusal in result.refused] == ["named axes", "automatic axes"]
    assert result.metadata["metaprune.rung"] == "static"
    x = torch.randn(5, 8)  # an odd number of samples is filled up to full batches and cut again
    torch.testing.assert_close(open_session(tmp_path / "net.onnx").predict(x), x.softmax(1), rtol=0, atol=1e-6)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Liar(nn.Module):
    """Another network under export: what an exporter's bug looks like from outside."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.001 if torch.compiler.is_exporting() else x


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class Wordy(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "four"


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (
            Branch(),
            r"By named axes and by automatic axes and by static: the exporter failed: GuardOnDataDependentSymNode",
        ),
        (Liar(), r"at batch 3 the file differs from the network: error"),
        (Random(), r"the same every time"),
        (Broken(), r"must be finite"),
        (Wordy(), r"must return tensors, but output is a str"),
    ],
)
def test_what_is_not_the_network_is_not_handed_out(tmp_path: Path, model: nn.Module, rule: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rule) as caught:
        export(model, torch.randn(3, 4), tmp_path / "new" / "net.onnx")
    assert "\x1b" not in str(caught.value)
    assert str(Path.cwd()) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_do_not_fit_are_named(tmp_path: Path, conv: nn.Module) -> None:
    with pytest.raises(InputError, match="must run on the example inputs"):
        export(conv, torch.randn(2, 5, 16, 16), tmp_path / "net.onnx")
    with pytest.raises(InputError, match="must be a tensor, a tuple of tensors or a dict"):
        export(conv, "an image", tmp_path / "net.onnx")


def test_files_are_not_lost(tmp_path: Path, conv: nn.Module) -> None:
    target = tmp_path / "net.onnx"
    target.write_text("precious")
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(InputError, match="exists"):
        export(conv, x, target)
    with pytest.raises(UnsupportedModelError):
        export(Branch(), torch.randn(2, 4), target, overwrite=True)
    assert target.read_text() == "precious"
    export(conv, x, target, overwrite=True)
    assert read(target).opset == 20
    with pytest.raises(InputError, match="is a folder"):
        export(conv, x, tmp_path)
    with pytest.raises(InputError, match="must be a folder to write in"):
        export(conv, x, target / "below" / "net.onnx")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path, conv: nn.Module) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="must be a folder to write in"):
        export(conv, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx")


def test_the_same_network_gives_the_same_bytes(tmp_path: Path, conv: nn.Module) -> None:
    one = export(conv, torch.randn(2, 3, 16, 16), tmp_path / "one.onnx")
    two = export(conv, torch.randn(2, 3, 16, 16), tmp_path / "two.onnx")
    assert one.sha256 == two.sha256


def test_operators_of_the_exporter_are_read_once() -> None:
    """Without a trace: another one who exports in this process gets a table of his own."""
    before = vars(ONNXRegistry)["from_torchlib"]
    tables = []
    for _ in range(2):
        with to_onnx._operators_read_once():
            tables.append(ONNXRegistry().from_torchlib(opset_version=20))
    assert tables[0] is tables[1]
    assert vars(ONNXRegistry)["from_torchlib"] is before
    with pytest.raises(UnsupportedModelError), to_onnx._operators_read_once():
        raise UnsupportedModelError("it cannot be exported.")
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_large_weights_lie_beside_the_file(tmp_path: Path, conv: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "_SINGLE_FILE_BYTES", 100)
    result = export(conv, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx")
    assert result.files == (str(tmp_path / "net.onnx"), str(tmp_path / "net.onnx.data"))
    assert result.size_bytes == sum(Path(name).stat().st_size for name in result.files)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(open_session(tmp_path / "net.onnx").predict(x), conv(x), rtol=0, atol=1e-5)
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(InputError, match=r"'net.onnx.data', which is missing"):
        open_session(tmp_path / "net.onnx")


def test_the_exporter_is_silent(
    tmp_path: Path, conv: nn.Module, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    handlers = logging.getLogger("torch.onnx").handlers[:]
    export(conv, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx")
    with pytest.raises(UnsupportedModelError):
        export(Branch(), torch.randn(2, 4), tmp_path / "branch.onnx")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    assert logging.getLogger("torch.onnx").handlers == handlers


class Attend(nn.Module):
    """Attention in `shape` (before length and width), with a mask of `mask` dimensions."""

    def __init__(self, shape: tuple[int, ...], mask: int) -> None:
        super().__init__()
        self.shape, self.qkv = shape, nn.Linear(8, 24)
        self.mask = None if not mask else torch.randn((*shape, 6, 6)[-mask:])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), *self.shape, 6, 24).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v, self.mask)


@pytest.mark.parametrize(("shape", "mask"), [((), 0), ((), 2), ((2,), 3), ((3, 2), 0), ((3, 2), 3), ((3, 2), 4)])
def test_attention_in_any_number_of_dimensions(tmp_path: Path, shape: tuple[int, ...], mask: int) -> None:
    torch.manual_seed(0)
    result = export(Attend(shape, mask), torch.randn(2, *shape, 6, 8), tmp_path / "net.onnx")
    assert result.rung == "named axes"


def test_zeros_padded_before_a_maximum_stay_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2))
    nn.init.constant_(net[0].bias, -9.0)  # all numbers are negative, so that zeros win
    result = export(net, torch.rand(2, 3, 8, 8), tmp_path / "net.onnx")
    assert result.max_error < 1e-6
