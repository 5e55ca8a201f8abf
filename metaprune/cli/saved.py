"""A result folder of `prune` or `demo`, opened again: the network, what it was made from, and its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from metaprune.cli.summary import DENSE_WEIGHTS, OUTCOME
from metaprune.config import PruneOptions
from metaprune.errors import InputError
from metaprune.files import read_json
from metaprune.pipeline import load, load_example
from metaprune.run import read
from metaprune.subject import Subject, read_subject


@dataclass(frozen=True, eq=False)
class Saved:
    """What a folder holds.

    Args:
        folder: The folder.
        options: What was asked for.
        subject: The dense network and the data.
        slim: The smaller network.
        example: The input that it was traced with.
        outcome: The answer of the command that made it.
    """

    folder: Path
    options: PruneOptions
    subject: Subject
    slim: nn.Module
    example: Any
    outcome: dict[str, Any]


def open_saved(folder: str | Path, *, data: str | None = None, with_data: bool = True) -> Saved:
    """Rebuild the networks of a result folder from what its run was asked to do.

    Args:
        folder: The folder.
        data: Spec of other data than those of the run.
        with_data: Whether to read data at all.

    Raises:
        InputError: It holds no finished result, or a damaged one.
        ConfigError: Its model or data cannot be found any more.
    """
    folder = Path(folder)
    record = read(folder)
    outcome = folder / OUTCOME
    if record["command"] not in ("prune", "demo") or not outcome.is_file():
        raise InputError(
            f"{folder} must hold a result, but its `{record['command']}` is {record['status']} and left no {OUTCOME}. "
            "Let it finish (--resume)."
        )
    options = PruneOptions(**record["options"])
    weights = folder / DENSE_WEIGHTS
    subject = read_subject(
        options.model,
        weights=str(weights) if weights.is_file() else options.weights,
        data=(data or options.data) if with_data else None,
        input_shape=options.input_shape,
        model_args=options.model_args,
        rules=options.rules,
        classifies=False,  # it was checked when the run began
        seed=options.seed,
    )
    return Saved(
        folder,
        options,
        subject,
        load(folder, subject.module),
        load_example(folder),
        dict(read_json(outcome, "the result of a run")),
    )
