"""A small network that knows the digits, the same one damaged, and a context to heal it in."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune import zoo
from metaprune.data import Dataset, load
from metaprune.recovery import Context


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="session")
def trained(digits: Dataset) -> nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = zoo.build("digits_cnn", widths=(8, 16)).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for images, labels in digits.train.batches(64, shuffle=generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture
def damaged(trained: nn.Module) -> nn.Module:
    model = copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.mul_(1 + 0.6 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def context(digits: Dataset, trained: nn.Module) -> Context:
    part = digits.train.subset(512, seed=0)

    def calibration() -> Iterator[tuple[Tensor, Tensor]]:
        return part.batches(100)

    return Context(train=part, calibration=calibration, dense=trained)
