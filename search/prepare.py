"""The network and the data of a campaign, read; the network is trained first where the settings say so."""

from pathlib import Path

from safetensors.torch import save

from metaprune.errors import ConfigError
from metaprune.files import write_atomically
from metaprune.recovery import Context, Finetune, Progress
from metaprune.search.results import alone
from metaprune.search.settings import Settings
from metaprune.subject import CLASSIFICATION, Subject, read_subject
from metaprune.zoo import load_weights

DENSE_WEIGHTS = "dense.safetensors"


def read(settings: Settings) -> Subject:
    """Network and data as they are named; nothing is written.

    Raises:
        MetapruneError: Something is unknown, missing, damaged, or does not fit together.
    """
    if settings.train is not None and settings.weights is not None:
        raise ConfigError("a network has `weights` or is trained (`train`), but both are given. Leave one out.")
    return read_subject(
        settings.model,
        weights=settings.weights,
        data=settings.data,
        model_args=dict(settings.model_args) or None,
        rules=settings.rules,
        classifies=settings.task in (None, CLASSIFICATION),
        seed=settings.seed,
    )


def train(settings: Settings, subject: Subject, folder: Path, progress: Progress) -> None:
    """Give the network of `subject` its trained weights, those in the folder if another process was faster.

    Args:
        settings: The campaign; without `train` nothing is done.
        subject: What was read; its network changes.
        folder: Of the campaign, where the weights are kept.
        progress: Is told about the training.
    """
    if settings.train is None or subject.dataset is None:
        return
    file = folder / DENSE_WEIGHTS
    with alone(folder / f".{DENSE_WEIGHTS}.lock"):
        if not file.exists():
            recipe = Finetune(
                epochs=settings.train.epochs,
                lr=settings.train.lr,
                batch_size=settings.train.batch_size,
                recalibrate=False,
            )
            context = Context(
                train=subject.dataset.train,
                seed=settings.seed,
                folder=folder / "checkpoints" / "dense",
                resume=True,
                progress=progress,
            )
            trained = recipe.recover(subject.module, context).model
            write_atomically(file, save({name: part.contiguous() for name, part in trained.state_dict().items()}))
    load_weights(subject.module, str(file))
