"""Measure a whole population: over processes, each network once, whatever is asked for again."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from metaprune.criteria import Calibration, unit_scores
from metaprune.data import Dataset, Split, load
from metaprune.errors import InputError, MetapruneError
from metaprune.graph import Network, trace
from metaprune.metanet import read_blocks
from metaprune.metatrain._processes import over_processes
from metaprune.metatrain.distortion import Distortions, Survey, key_of, measure_distortions
from metaprune.metatrain.objectives import Subject
from metaprune.metatrain.population import Member, Population
from metaprune.recovery import NoProgress, Progress
from metaprune.task import Classification

FOLDER = "distortions"
CALIBRATION = 1024  # images that criteria look at
BATCH = 64


def survey_population(
    folder: str | Path,
    members: Sequence[Member],
    data: Dataset,
    survey: Survey,
    reads: Sequence[str],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[Subject], list[tuple[str, str]]]:
    """What pruning does to each network, measured where it is not known yet.

    Args:
        folder: Of the population; what is measured is kept beside it.
        members: Some of its networks.
        data: What they were trained on.
        survey: Which configurations.
        reads: Criteria whose scores are wanted; the first draws the configurations.
        workers: Processes; None takes as many as there are cores.
        progress: Is told about networks.

    Returns:
        The networks, and those that could not be measured, with the reason.
    """
    folder, progress = Path(folder), progress or NoProgress()
    workers = workers or len(os.sched_getaffinity(0))
    progress.start(len(members), "networks", "measuring what pruning does")
    known: dict[str, Subject] = {}
    failed: list[tuple[str, str]] = []
    unknown: dict[str, tuple[Member, Network, Path]] = {}
    try:
        for member in members:
            try:
                network = trace(member.model, member.example_inputs)
            except MetapruneError as error:
                failed.append((member.name, str(error)))
                progress.advance(1, f"{member.name}: {error}")
                continue
            path, _ = _place(folder, network, data, survey, tuple(reads))
            try:
                known[member.name] = _subject(member.name, network, path, reads)
                progress.advance(1, f"{member.name}: ready")
            except InputError:  # not measured yet, not by every criterion, or damaged
                unknown[member.name] = member, network, path
        for name, why in _outcomes(folder, [one[0] for one in unknown.values()], data, survey, tuple(reads), workers):
            if why is None:
                known[name] = _subject(name, *unknown[name][1:], reads)
            else:
                failed.append((name, why))
            progress.advance(1, f"{name}: {why or 'ready'}")
    finally:
        progress.close()
    return [known[member.name] for member in members if member.name in known], failed


def calibration_images(split: Split, count: int, seed: int = 0) -> Callable[[], Iterator[Any]]:
    """A function that gives a fresh pass over the same augmented training images."""
    chosen = split.subset(min(count, len(split)), seed)
    return lambda: chosen.batches(BATCH, shuffle=torch.Generator().manual_seed(seed), augment=True)


def _outcomes(
    folder: Path, members: Sequence[Member], data: Dataset, survey: Survey, reads: tuple[str, ...], workers: int
) -> Iterator[tuple[str, str | None]]:
    if workers == 1 or len(members) < 2:
        for member in members:
            yield member.name, _measured(folder, member, data, survey, reads)
        return
    tasks = {member.name: (folder, member.name, data.spec, survey, reads) for member in members}
    yield from over_processes(_in_worker, tasks, workers, patient=False)  # files are written whole or not at all


def _in_worker(folder: Path, name: str, spec: str, survey: Survey, reads: tuple[str, ...]) -> str | None:
    torch.set_num_threads(1)
    member = next(member for member in _population(folder).members if member.name == name)
    return _measured(folder, member, _data(spec), survey, reads)


def _measured(folder: Path, member: Member, data: Dataset, survey: Survey, reads: tuple[str, ...]) -> str | None:
    """Measure one network, or add criteria to what is measured of it; why that failed, if it did."""
    try:
        network = trace(member.model, member.example_inputs)
        path, images = _place(folder, network, data, survey, reads)
        calibration = Calibration(calibration_images(data.train, CALIBRATION), Classification(), survey.seed)
        try:
            measured = Distortions.load(path)
        except InputError:
            found = unit_scores(network, calibration, reads)
            measured = measure_distortions(network, images, found, survey)
        else:
            found = unit_scores(network, calibration, [name for name in reads if name not in measured.reads])
        silent = torch.full(measured.removed_CU.shape[1:], torch.nan, dtype=torch.float64)
        every = dict(measured.reads) | {name: found.get(name, silent) for name in reads if name not in measured.reads}
        replace(measured, reads=every | found).save(path)
    except MetapruneError as error:
        return str(error)
    return None


def _subject(name: str, network: Network, path: Path, reads: Sequence[str]) -> Subject:
    """A network and what is known of it; criteria that cannot judge it are left out.

    Raises:
        InputError: It is not measured, or not by all criteria.
    """
    measured = Distortions.load(path)
    missing = [criterion for criterion in reads if criterion not in measured.reads]
    if missing:
        raise InputError(f"{path} must hold the scores of {', '.join(missing)}, but does not.")
    found = {criterion: measured.reads[criterion] for criterion in reads}
    found = {criterion: score_U for criterion, score_U in found.items() if bool(score_U.isfinite().any())}
    return Subject(name, network, read_blocks(network.to_graph()), replace(measured, reads=found))


def _place(
    folder: Path, network: Network, data: Dataset, survey: Survey, reads: tuple[str, ...]
) -> tuple[Path, torch.Tensor]:
    images = data.train.subset(min(survey.images, len(data.train)), survey.seed + 1).images()
    key = key_of(network.weights, network, survey, images, reads[0])
    return folder / FOLDER / f"{key}.safetensors", images


@cache
def _population(folder: Path) -> Population:
    return Population.load(folder)


@cache
def _data(spec: str) -> Dataset:
    return load(spec)
