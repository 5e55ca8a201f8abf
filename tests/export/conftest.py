"""Small networks of four kinds, with the example inputs that they are exported with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metaprune.export.to_onnx import Exported, export


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 17, 3, padding=1),
        nn.BatchNorm2d(17),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(17, 12, 3, padding=1, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def depthwise_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 13, 1),
        nn.Conv2d(13, 13, 3, padding=1, groups=13),
        nn.BatchNorm2d(13),
        nn.Hardswish(),
        nn.Conv2d(13, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, 2, batch_first=True)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer(x).mean(1))


SHAPES = {"conv": (3, 16, 16), "depthwise": (3, 16, 16), "lstm": (7, 8), "attention": (7, 16)}
BUILDERS = {"conv": conv_net, "depthwise": depthwise_net, "lstm": Recurrent, "attention": Attention}


@dataclass
class Labelled:
    """A split whose labels are the answers of a network."""

    x: Tensor
    y: Tensor
    name: str = "validation"

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.x.split(batch_size), self.y.split(batch_size))


def make(kind: str) -> nn.Module:
    """A network whose BatchNorm statistics are not the trivial ones."""
    torch.manual_seed(1)
    net = BUILDERS[kind]()
    with torch.no_grad():
        net(torch.randn(64, *SHAPES[kind]) + 0.3)
    return net.eval()


@pytest.fixture(params=sorted(SHAPES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def net(kind: str) -> nn.Module:
    return make(kind)


@pytest.fixture
def images(kind: str) -> Tensor:
    return torch.randn(203, *SHAPES[kind])


@pytest.fixture
def split(net: nn.Module, images: Tensor) -> Labelled:
    """Nine of ten answers of the network are right."""
    with torch.no_grad():
        label_N = net(images).argmax(1)
    label_N[::10] = (label_N[::10] + 1) % 10
    return Labelled(images, label_N)


@pytest.fixture(scope="session")
def _exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("exported")
    return {kind: export(make(kind), torch.randn(2, *SHAPES[kind]), folder / f"{kind}.onnx") for kind in SHAPES}


@pytest.fixture
def file(kind: str, _exported: dict[str, Exported]) -> Path:
    """The network as a good file; copy it before changing it."""
    return Path(_exported[kind].path)


@pytest.fixture
def conv_file(_exported: dict[str, Exported]) -> Path:
    return Path(_exported["conv"].path)


@pytest.fixture
def conv() -> nn.Module:
    return make("conv")
