"""What a metanetwork is worth on a family of networks that it has never seen: each family is left out in turn.

    python benchmarks/metanet_transfer.py --population FOLDER [--recipe default] [--families vit mlp] [--seeds 0 1 2]

For each family a metanetwork is trained as the recipe says, on the networks of all other families; the step is chosen
on the validation networks of these. Then every trained network of the family is cut by it and by plain criteria, with
the same allocator and the same images for the re-estimation of BatchNorm, and measured on the test images. The
population must be there (``metaprune metatrain RECIPE --population FOLDER``). One JSON line a family, network and seed
with the area of each arm under accuracy over the logarithm of the speed-up; a table of means.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from metaprune import data
from metaprune.cli.metacourse import read_recipe
from metaprune.criteria import Scores, metanet_scores
from metaprune.metanet import Metanet, new_metanet
from metaprune.metatrain import Population, Subject, curve_of, meta_train, survey_population
from metaprune.metatrain.survey import calibration_images
from metaprune.run import seed_everything

OURS = "metanet"


def areas(subject: Subject, metanet: Any, dataset: data.Dataset, calibration: int) -> dict[str, float]:
    """Area of the metanetwork and of every plain criterion that it reads, on the test images."""
    reads, network, blocks = subject.distortions.reads, subject.network, subject.blocks
    images = calibration_images(dataset.train, calibration)
    sizes = [axis.size for axis in network.axes]

    def plain(name: str) -> Scores:
        parts = zip(network.axes, reads[name].split(sizes), strict=True)
        return {axis.name: part for axis, part in parts if axis.prunable and bool(part.isfinite().all())}

    found = {name: curve_of(network, lambda share, name=name: plain(name), dataset.test, images) for name in reads}
    found[OURS] = curve_of(
        network, lambda share: metanet_scores(metanet, network, blocks, reads, share), dataset.test, images
    )
    return {name: curve.area for name, curve in found.items()}


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=Path, required=True)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--families", nargs="*", help="all if not given")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of the metanetwork; the recipe's if not given")
    parser.add_argument("--out", type=Path, help="file for the JSON lines; standard output if not given")
    options = parser.parse_args()
    asked = read_recipe(options.recipe, steps=options.steps)
    dataset, population = data.load(asked.population.data), Population.load(options.population)
    members = {member.name: member for member in population.members}
    wanted = [member for member in members.values() if member.split == "train" or member.kind == "trained"]
    subjects, _ = survey_population(options.population, wanted, dataset, asked.survey, asked.shape.reads)
    stream = options.out.open("w") if options.out else sys.stdout
    lines: list[dict[str, Any]] = []
    for family in options.families or sorted({member.family for member in members.values()}):
        others = [subject for subject in subjects if members[subject.name].family != family]
        own = [one for one in subjects if members[one.name].family == family and members[one.name].kind == "trained"]
        for seed in options.seeds:
            seed_everything(seed)
            training = replace(asked.training, seed=seed)
            metanet = new_metanet(asked.shape)
            assert isinstance(metanet, Metanet)
            trained = meta_train(
                metanet,
                [subject for subject in others if members[subject.name].split == "train"],
                [subject for subject in others if members[subject.name].split == "validation"],
                training,
                images=dataset.validation,
                calibration=calibration_images(dataset.train, training.calibration),
                batches=dataset.train,
            )
            for subject in own:
                found = areas(subject, trained.metanet, dataset, training.calibration)
                line = {"family": family, "network": subject.name, "seed": seed, "step": trained.step, "areas": found}
                print(json.dumps({**line, "split": "test", "images": len(dataset.test)}), file=stream, flush=True)
                lines.append(line)
    Console(stderr=True, width=100).print(table_of(lines, [OURS, *asked.shape.reads]))


def table_of(lines: list[dict[str, Any]], arms: list[str]) -> Table:
    """Mean area of every arm on every family; a criterion that cannot judge a network leaves it out."""
    table = Table("family left out", "networks", *arms, "gain over the best criterion")
    for family in dict.fromkeys(line["family"] for line in lines):
        rows = [line["areas"] for line in lines if line["family"] == family]
        cells = [[row[arm] for row in rows if arm in row] for arm in arms]
        means = [f"{statistics.mean(cell):.1f}" if cell else "" for cell in cells]
        others = [arm for arm in arms if arm != OURS and all(arm in row for row in rows)]
        best = max(others, key=lambda arm: statistics.mean(row[arm] for row in rows))
        gains = [row[OURS] - row[best] for row in rows]
        table.add_row(family, str(len(rows)), *means, f"{statistics.mean(gains):+.1f} ± {statistics.pstdev(gains):.1f}")
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
