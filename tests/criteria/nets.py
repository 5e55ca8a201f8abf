"""Small networks whose scores can be computed by hand, and data for them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metaprune.criteria import CRITERIA, Calibration
from metaprune.graph import Network, trace
from metaprune.task import Classification, CustomLoss

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 4


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Three batches of unequal size."""
    yield from zip(X.split((10, 10, 4)), LABELS.split((10, 10, 4)))


def calibration() -> Calibration:
    return Calibration(batches, Classification())


def squared() -> Calibration:
    """The loss is half the sum of squared outputs, the mean over samples."""
    return Calibration(batches, CustomLoss(lambda out, _: out.square().sum(1).mean() / 2))


def two_layers(activation: nn.Module | None = None, units: int = 7) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, units), activation or nn.ReLU(), nn.Linear(units, 4)).eval()


def scored(name: str, model: nn.Sequential, given: Calibration | None = None, **options: object) -> Tensor:
    """Scores of the hidden units."""
    return CRITERIA[name](**options).score(of(model), given or calibration())["0"]


def of(model: nn.Module) -> Network:
    return trace(model, torch.randn(2, 5))


def hidden(model: nn.Sequential) -> Tensor:
    """What the last layer reads, float64."""
    with torch.no_grad():
        return model[:2](X).double()
