"""Recurrent networks cut and healed by least squares: accuracy on the digits, read row by row.

    python benchmarks/recurrent.py

A classifier with two layers of LSTM or GRU is trained, loses half or three quarters of its parameters by `taylor` and
`global`, and is healed by `reconstruct`: not at all, its linear layers alone, and its recurrent layers too. One JSON
line a network, seed and share; then a table with means and standard deviations over the seeds.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import metaprune as mp
from metaprune import data, zoo
from metaprune.measure import accuracy
from metaprune.recovery import Context, Reconstruct, reconstruct

ARMS = ("dense", "cut", "linear layers healed", "recurrent layers too")


class ByRow(nn.Module):
    """A classifier of sequences that reads images (n, 1, 8, 8) row by row."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = zoo.build(name, in_features=8)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10)."""
        logits: Tensor = self.inner(x[:, 0])
        return logits


def trained(name: str, images: data.Dataset, seed: int, epochs: int) -> nn.Module:
    """A network after some epochs."""
    torch.manual_seed(seed)
    model = ByRow(name)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for x, y in images.train.batches(64, shuffle=order):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def arms(network: mp.Network, images: data.Dataset, share: float, seed: int) -> dict[str, float]:
    """Accuracy on test images by arm."""

    def batches() -> Iterator[Any]:
        return images.train.batches(64, shuffle=torch.Generator().manual_seed(seed))

    plan = mp.plan(network, f"params={share}", "taylor", "global", data=batches, seed=seed)
    slim = network.apply(plan).eval()
    context = Context(calibration=batches, dense=network.model, network=network, plan=plan, seed=seed)
    with patch.object(reconstruct, "recurrent_fits", lambda *given: iter(())):
        linear = Reconstruct().recover(slim, context).model
    whole = Reconstruct().recover(slim, context).model
    models = dict(zip(ARMS, (network.model, slim, linear, whole), strict=True))
    return {arm: round(accuracy(model.eval(), images.test).top1, 2) for arm, model in models.items()}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    options = parser.parse_args()
    images, found = data.load("digits"), dict[tuple[str, float], list[dict[str, float]]]()
    for name in ("lstm_classifier", "gru_classifier"):
        for seed in range(options.seeds):
            model = trained(name, images, seed, options.epochs)
            network = mp.trace(model, next(images.train.batches(2))[0])
            for share in (0.5, 0.25):
                line = arms(network, images, share, seed)
                found.setdefault((name, share), []).append(line)
                print(json.dumps({"model": name, "params": share, "seed": seed, **line}), flush=True)
    table = Table("network", "parameters left", *ARMS)
    for (name, share), lines in found.items():
        cells = [[line[arm] for line in lines] for arm in ARMS]
        table.add_row(name, f"{share:.0%}", *(f"{statistics.mean(c):.1f} ± {statistics.pstdev(c):.1f}" for c in cells))
    Console(stderr=True, width=110).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
