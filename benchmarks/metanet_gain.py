"""What a metanetwork gains where nothing is trained: accuracy over speed-up on test images, beside plain criteria.

Every arm allocates globally by score per cost and re-estimates BatchNorm on the same augmented training images; the
seed draws those images. Networks are the validation members of a population, or one that is given; none of them taught
the metanetwork. One JSON line a network, arm and seed; a table of means and standard deviations over both.

    python benchmarks/metanet_gain.py --population FOLDER --data digits
    python benchmarks/metanet_gain.py --model zoo:cifar_resnet56 --weights FILE --data cifar10:FOLDER
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from metaprune import data, zoo
from metaprune.criteria import Calibration, Scores, metanet_scores, unit_scores
from metaprune.graph import Network, trace
from metaprune.metanet import load_checkpoint, read_blocks
from metaprune.metatrain import Population, curve_of
from metaprune.metatrain.evaluate import RATIOS
from metaprune.metatrain.survey import calibration_images
from metaprune.task import Classification

PLAIN = ("random", "l1", "l2", "taylor")
ARMS = (*PLAIN, "metanet", "metanet without data")


def networks(options: argparse.Namespace, dataset: data.Dataset) -> Iterator[tuple[str, Network]]:
    """Networks to prune, by name."""
    if options.population is not None:
        for member in Population.load(options.population).validation:
            if member.kind == "trained":
                yield member.name, trace(member.model, member.example_inputs)
        return
    model = zoo.resolve_model(options.model).module
    zoo.load_weights(model, options.weights)
    yield options.model, trace(model.eval(), next(dataset.train.batches(2))[0])


def arms(network: Network, dataset: data.Dataset, options: argparse.Namespace, seed: int) -> Iterator[tuple[str, Any]]:
    """Scores for the share of multiply-accumulates that is to be left, by the name of the arm."""
    images = calibration_images(dataset.train, options.calibration, seed)
    reads = unit_scores(network, Calibration(images, Classification(), seed), PLAIN)
    sizes = [axis.size for axis in network.axes]
    for name, score_U in reads.items():
        parts = zip(network.axes, score_U.split(sizes), strict=True)
        plain: Scores = {axis.name: part for axis, part in parts if axis.prunable and bool(part.isfinite().all())}
        yield name, lambda share, plain=plain: plain
    metanet, blocks = load_checkpoint(options.metanet).metanet, read_blocks(network.to_graph())
    yield "metanet", lambda share: metanet_scores(metanet, network, blocks, reads, share)
    blind = {name: score_U for name, score_U in reads.items() if name != "taylor"}
    yield "metanet without data", lambda share: metanet_scores(metanet, network, blocks, blind, share)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--population", type=Path, help="folder of a population")
    parser.add_argument("--model", help="instead of a population, with --weights")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--metanet", default="default")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=1024, help="training images")
    parser.add_argument("--out", type=Path, help="file for the JSON lines; standard output if not given")
    options = parser.parse_args()
    dataset = data.load(options.data)
    stream = options.out.open("w") if options.out else sys.stdout
    lines: list[dict[str, Any]] = []
    for name, network in networks(options, dataset):
        for seed in range(options.seeds):
            images = calibration_images(dataset.train, options.calibration, seed)
            for arm, scores_at in arms(network, dataset, options, seed):
                if arm not in options.arms:
                    continue
                curve = curve_of(network, scores_at, dataset.test, images)
                line = {"network": name, "arm": arm, "seed": seed, "area": curve.area}
                line |= {f"{ratio:g}x": accuracy for ratio, accuracy in zip(curve.ratios, curve.accuracies)}
                print(json.dumps({**line, "split": "test", "images": len(dataset.test)}), file=stream, flush=True)
                lines.append(line)
    columns = [*(f"{ratio:g}x" for ratio in RATIOS), "area"]
    table = Table("arm", *columns)
    for arm in dict.fromkeys(line["arm"] for line in lines):
        found = {column: [line[column] for line in lines if line["arm"] == arm] for column in columns}
        spread = {column: statistics.pstdev(values) for column, values in found.items()}
        table.add_row(arm, *(f"{statistics.mean(found[c]):.1f} ± {spread[c]:.1f}" for c in columns))
    Console(stderr=True, width=110).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
