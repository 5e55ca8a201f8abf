"""The same epochs for everyone: what a cut is worth once the network is trained on.

    python benchmarks/finetune.py --model zoo:cifar_resnet20 --weights FILE --data cifar10:FOLDER --epochs 5 \\
        --out lines.jsonl

Arms: `obs` (block-OBS, knapsack, least squares), `metanet` (the same units and knapsack on the metanetwork's word on
axes, least squares), `taylor` and `l2` (ranked globally, BatchNorm re-estimated), `scratch` (as narrow everywhere,
weights drawn anew, at a learning rate of its own), and `torch_pruning` (global, first-order Taylor, inside blocks,
where it does best) with the extra `bench`. Every arm is at most the same share of the multiply-accumulates, sees the
same images for its choice, which the seed draws, and is trained by the same recipe for the same epochs; the last
epoch counts. Nothing is chosen on the test split.

One JSON line an arm and seed, with what it has before training and after; arms that are in the file already are left
out, so that it goes on after it was stopped. At the end a table of means and standard deviations over the seeds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from metanet_gain import at_scale_of
from peer_pruning import by_torch_pruning
from rich.console import Console
from rich.table import Table
from torch import nn

import metaprune as mp
from metaprune import data, zoo
from metaprune.criteria import CRITERIA, Calibration, Criterion, Scores, Verdict
from metaprune.graph import Network
from metaprune.measure import accuracy
from metaprune.planning import calibration_batches
from metaprune.recovery import Context, Finetune, resolve
from metaprune.run import seed_everything


class ObsByMetanet(Criterion):
    """Units and curves of `obs`; how axes compare, of the metanetwork that ships."""

    needs = CRITERIA["obs"].needs
    additive = True

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return self._judge(network, calibration).scores

    def _judge(self, network: Network, calibration: Calibration) -> Verdict:
        verdict = CRITERIA["obs"]().judge(network, calibration)
        return at_scale_of(verdict, CRITERIA["metanet"]().judge(network, calibration).scores)


class Arms:
    """What makes a network of the asked share, by name."""

    def __init__(self, options: argparse.Namespace, dataset: data.Dataset, seed: int) -> None:
        self.options, self.dataset, self.seed = options, dataset, seed
        self.dense = self._build()
        zoo.load_weights(self.dense, options.weights)
        self.network = self._trace(self.dense)
        self.batches = calibration_batches(dataset, options.calibration, seed)

    def _build(self) -> nn.Module:
        seed_everything(self.seed)
        return zoo.resolve_model(self.options.model).module.eval()

    def _trace(self, model: nn.Module) -> Network:
        return mp.trace(model, next(self.dataset.train.batches(2))[0])

    def _cut(self, network: Network, criterion: str | Criterion, allocator: str, recovery: str) -> nn.Module:
        plan = mp.plan(network, f"macs={self.options.macs}", criterion, allocator, data=self.batches, seed=self.seed)
        slim = network.apply(plan)
        context = Context(calibration=self.batches, dense=network.model, network=network, plan=plan, seed=self.seed)
        for way in resolve(recovery):
            slim = way.recover(slim, context).model
        return slim

    def all(self) -> dict[str, Callable[[], nn.Module]]:
        """The arms."""
        peer = self.dataset.train.subset(self.options.calibration, self.seed)
        return {
            "obs": lambda: self._cut(self.network, "obs", "rd", "reconstruct"),
            "metanet": lambda: self._cut(self.network, ObsByMetanet(), "rd", "reconstruct"),
            "taylor": lambda: self._cut(self.network, "taylor", "global", "recalibrate_norm"),
            "l2": lambda: self._cut(self.network, "l2", "global", "recalibrate_norm"),
            "scratch": lambda: self._cut(self._trace(self._build()), "random", "uniform", "none"),
            "torch_pruning": lambda: by_torch_pruning(self.dense, self.options.macs, peer, inside=True),
        }

    def line(self, arm: str) -> dict[str, Any]:
        """Accuracy of an arm before training and after it."""
        start, slim = time.perf_counter(), self.all()[arm]()
        before, cut_s = accuracy(slim.eval(), self.dataset.test), time.perf_counter() - start
        options, start = self.options, time.perf_counter()
        lr = options.scratch_lr if arm == "scratch" else options.lr
        context = Context(train=self.dataset.train, calibration=self.batches, dense=self.dense, seed=self.seed)
        tuned = Finetune(epochs=options.epochs, lr=lr).recover(slim, context).model
        after = accuracy(tuned.eval(), self.dataset.test)
        return {
            "model": options.model,
            "arm": arm,
            "seed": self.seed,
            "macs": self._trace(tuned).cost().macs / self.network.cost().macs,
            "epochs": options.epochs,
            "lr": lr,
            "before": before.top1,
            "accuracy": after.top1,
            "split": "test",
            "images": after.n,
            "cut_s": round(cut_s, 1),
            "train_s": round(time.perf_counter() - start, 1),
        }


def run(options: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines that are not there yet."""
    dataset = data.load(options.data)
    known = {(line["model"], line["arm"], line["seed"]) for line in done}
    for seed in options.seeds:
        arms = Arms(options, dataset, seed)
        for arm in options.arms or arms.all():
            if (options.model, arm, seed) not in known:
                yield arms.line(arm)


def print_table(lines: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over the seeds, a row an arm."""
    table = Table("model", "arm", "seeds", "before, %", "after, %", "MACs")
    for model, arm in dict.fromkeys((line["model"], line["arm"]) for line in lines):
        rows = [line for line in lines if (line["model"], line["arm"]) == (model, arm)]
        cells = [
            f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"
            for values in ([row[key] for row in rows] for key in ("before", "accuracy"))
        ]
        table.add_row(model, arm, str(len(rows)), *cells, f"{statistics.mean(row['macs'] for row in rows):.3f}")
    Console(stderr=True).print(table)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:cifar_resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--arms", nargs="*", help="all if not given")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the dense multiply-accumulates")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--scratch-lr", type=float, default=0.1)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=1024, help="training images for the choice")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for line in run(options, lines):
        lines.append(line)
        with options.out.open("a") as stream:
            print(json.dumps(line), file=stream)
    print_table(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
