"""Kinds of networks that exporters get wrong at other sizes: what a file claims is true, what fails is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.errors import ConfigError, InputError
from metaprune.export.example import as_example
from metaprune.export.session import open_session
from metaprune.export.to_onnx import export
from tests.export.conftest import conv_net, depthwise_net

LENGTH = {1: "length"}
SIDES = {2: "height", 3: "width"}


class Last(nn.Module):
    """A recurrent layer; its last state is the answer."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class Mean(Last):
    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0].mean(1)


class Spread(Last):
    """What a known bug of the exporter freezes the length of."""

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(x)[0]
        return states + states[:, -1:].expand_as(states)


class BothWays(nn.Module):
    """Two directions by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.GRU(8, 6, batch_first=True), nn.GRU(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.there(x)[0], self.back(x.flip(1))[0].flip(1)], -1).mean(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1)


class Frozen(nn.Module):
    """Python reads a size as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]), -1).softmax(1)


def hf(kind: str) -> tuple[nn.Module, dict[str, object], dict[int, str]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {"input_ids": torch.randint(0, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    ids["attention_mask"][1, 6:] = 0
    image = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=50, num_labels=5, **small)
        return transformers.BertForSequenceClassification(config).eval(), ids, LENGTH
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=50, **small)
        return transformers.LlamaForCausalLM(config).eval(), {**ids, "use_cache": False}, LENGTH
    if kind == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **small)
        return transformers.ViTForImageClassification(config).eval(), image, {}
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    return transformers.ResNetForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}, SIDES


SEQUENCES = (2, 11, 8)
CASES: dict[str, Callable[[], tuple[nn.Module, object, dict[int, str]]]] = {
    "convolutions": lambda: (conv_net(), torch.randn(2, 3, 16, 16), SIDES),
    "depthwise": lambda: (depthwise_net(), torch.randn(2, 3, 16, 16), SIDES),
    "lstm": lambda: (Last(nn.LSTM(8, 12, 2, batch_first=True)), torch.randn(SEQUENCES), LENGTH),
    "gru": lambda: (Mean(nn.GRU(8, 12, batch_first=True, bidirectional=True)), torch.randn(SEQUENCES), LENGTH),
    "spread": lambda: (Spread(nn.LSTM(8, 12, batch_first=True)), torch.randn(SEQUENCES), LENGTH),
    "both ways": lambda: (BothWays(), torch.randn(SEQUENCES), LENGTH),
    "rnn": lambda: (Last(nn.RNN(8, 12, batch_first=True)), torch.randn(SEQUENCES), LENGTH),
    "attention": lambda: (Attention(), torch.randn(2, 7, 16), LENGTH),
    "frozen": lambda: (Frozen(), torch.randn(2, 3, 4), LENGTH),
    **{name: lambda name=name: hf(name) for name in ("bert", "llama", "vit", "resnet")},
}
# What is free at least; the others are free in all they were asked to be. The exporter freezes the length of `spread`
# (pytorch issue 191855) and unrolls `rnn`, and both files claim otherwise.
FREE = {"frozen": set(), "rnn": {"batch"}, "spread": {"batch"}, "vit": {"batch"}}


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_right_at_every_size_it_claims(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, inputs, axes = CASES[name]()
    net.eval()
    made = export(net, inputs, tmp_path / "net.onnx", axes=axes)
    assert set(made.axes) >= FREE.get(name, {"batch", *axes.values()}), made.refused
    session, example = open_session(tmp_path / "net.onnx"), as_example(inputs, axes)
    for axis in made.axes:
        for size in (1, 4, 13) if axis in ("batch", "length") else (16, 18, 41):
            asked = example.resized(**{axis: size})
            expected = next(iter(asked.call(net).values()))
            got = torch.from_numpy(next(iter(session.run(session.feeds(asked)).values())))
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    claimed = json.loads(made.metadata["metaprune.axes"])
    assert {size for sizes in claimed.values() for size in sizes if not size.isdecimal()} == set(made.axes)
    assert made.metadata["metaprune.opset"] == "20"
    assert len(made.metadata["metaprune.network"]) == 64


def test_axes_that_cannot_be_are_refused_before_work(tmp_path: Path) -> None:
    net, x = conv_net().eval(), torch.randn(2, 3, 16, 16)
    for axes, rule in [
        ({0: "rows"}, "0 is the batch anyway"),
        ({1: "a b"}, "a name each"),
        ({2: "s", 3: "s"}, "a name each"),
    ]:
        with pytest.raises(ConfigError, match=rule):
            export(net, x, tmp_path / "net.onnx", axes=axes)
    with pytest.raises(InputError, match=r"none has dimension 4 \('depth'\)"):
        export(net, x, tmp_path / "net.onnx", axes={4: "depth"})
    assert list(tmp_path.iterdir()) == []


_CODE = """if True:
    import sys, torch
    from metaprune import zoo
    from metaprune.export import export
    torch.manual_seed(0)
    print(export(zoo.build("digits_cnn").eval(), torch.randn(2, 1, 8, 8), sys.argv[1]).sha256)
"""


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    run = [sys.executable, "-c", _CODE, str(tmp_path / "there.onnx")]
    there = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    torch.manual_seed(0)
    assert export(zoo.build("digits_cnn").eval(), torch.randn(2, 1, 8, 8), tmp_path / "here.onnx").sha256 == there
