"""Small untrained and trained networks, and a context to train them in."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from metaprune import zoo
from metaprune.data import Dataset, load
from metaprune.graph import Network, trace
from metaprune.recovery import Context, Finetune

COURSE = Finetune(epochs=2, batch_size=64, lr=0.05, precision="fp32")


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture
def context(digits: Dataset) -> Context:
    part = digits.train.subset(512, seed=0)

    def calibration() -> Iterator[tuple[Tensor, Tensor]]:
        return part.batches(128)

    return Context(train=part, calibration=calibration)


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "digits_cnn":
        return zoo.build(name, widths=(8, 16)).eval(), zoo.example_inputs(name)
    if name == "vit_tiny":
        return zoo.build(name, depth=2, image_size=8, in_channels=1).eval(), torch.randn(2, 1, 8, 8)
    return zoo.build(name, in_channels=1, widths=(4, 6, 8)).eval(), torch.randn(2, 1, 8, 8)


@pytest.fixture(params=["digits_cnn", "cifar_resnet20", "vit_tiny"])
def network(request: pytest.FixtureRequest) -> Network:
    return trace(*build(request.param))
