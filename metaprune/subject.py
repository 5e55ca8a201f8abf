"""The network, its weights and the data that a user names: read and checked before any work begins."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.data import Dataset
from metaprune.data import load as load_data
from metaprune.errors import ConfigError, InputError
from metaprune.factory import import_rules
from metaprune.run import seed_everything
from metaprune.zoo import SourceModel, load_weights, resolve_model

CLASSIFICATION = "classification"
_EXAMPLES = 2  # samples of an example input that takes its shape from the data
_UNTRAINED = ("zoo:", "timm:", "torchvision:", "hf:")  # sources that build networks with random weights


@dataclass(frozen=True, eq=False)
class Subject:
    """A network in evaluation mode, with what it is to be judged on.

    Args:
        source: The network, an example input and their names.
        dataset: The data, or None.
        spec: What named the data, or None.
        random: The network has the random weights that it was built with.
    """

    source: SourceModel
    dataset: Dataset | None
    spec: str | None
    random: bool

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.source.module


def read_subject(
    model: str,
    *,
    weights: str | None = None,
    data: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    model_args: dict[str, Any] | None = None,
    rules: Sequence[str] = (),
    classifies: bool = True,
    seed: int = 0,
) -> Subject:
    """Build the network and read weights and data.

    Args:
        model: Spec of the network.
        weights: File of its weights; None leaves them as its factory made them.
        data: Spec of the dataset, or None. Its shape is that of the example input unless `input_shape` is given.
        input_shape: Shape of the example input with its batch dimension.
        model_args: Options of the network's factory.
        rules: Modules to import for their rules of the user's ops.
        classifies: The network must give a score for every class of the data.
        seed: Draws weights where the factory does.

    Raises:
        MetapruneError: Something is unknown, missing, damaged, or does not fit together. Nothing was written.
    """
    seed_everything(seed)
    import_rules(rules)
    dataset = None if data is None else load_data(data)
    if dataset is None or input_shape is not None:
        source = resolve_model(model, input_shape=input_shape, options=model_args)
    else:
        source = _source_for(dataset, model, model_args)
    source.module.eval()
    if weights is not None:
        load_weights(source.module, weights)
    subject = Subject(
        source, dataset, data, weights is None and not source.trained and source.spec.startswith(_UNTRAINED)
    )
    if classifies and dataset is not None:
        _check_scores(source, dataset)
    return subject


def model_args(given: Sequence[str] | None) -> dict[str, Any] | None:
    """Options of a factory from ``NAME=VALUE``: values are JSON where they can be, else text.

    Raises:
        ConfigError: There is no ``=``, or no name before it.

    >>> model_args(["num_classes=100", "widths=[8, 16]", "norm=batch"])
    {'num_classes': 100, 'widths': [8, 16], 'norm': 'batch'}
    """
    if not given:
        return None
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"`--model-arg` must read NAME=VALUE, e.g. num_classes=100, but it is {text!r}.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """A shape from ``1,3,224,224``.

    Raises:
        ConfigError: It is none.

    >>> shape_of("1,3,32,32")
    (1, 3, 32, 32)
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"`--input-shape` must be whole numbers separated by commas, e.g. 1,3,224,224, but it is {text!r}."
        ) from None


def _source_for(dataset: Dataset, model: str, model_args: dict[str, Any] | None) -> SourceModel:
    """The network, with an example input of the shape of the data."""
    try:
        return resolve_model(model, input_shape=(_EXAMPLES, *dataset.input_shape), options=model_args)
    except InputError as error:
        reason = error.__cause__ or error
        raise InputError(
            f"{model!r} must take the images of {dataset.spec!r}, {dataset.input_shape} each, but says: "
            f"{type(reason).__name__}: {reason}. Give data of the shape that it takes, or build the network for these "
            "(--model-arg)."
        ) from error


def _check_scores(source: SourceModel, dataset: Dataset) -> None:
    images_NCHW, _ = next(dataset.train.batches(_EXAMPLES))
    with torch.no_grad():
        try:
            scores = source.module(images_NCHW)
        except Exception as error:
            raise InputError(
                f"{source.spec!r} must take the images of {dataset.spec!r}, {tuple(images_NCHW.shape[1:])} each, but "
                f"says: {type(error).__name__}: {error}."
            ) from error
    wanted = f"({len(images_NCHW)}, {len(dataset.classes)})"
    if isinstance(scores, Tensor) and tuple(scores.shape) != (len(images_NCHW), len(dataset.classes)):
        raise InputError(
            f"{source.spec!r} must give scores of shape {wanted} for {len(images_NCHW)} images of {dataset.spec!r}, "
            f"one for each class, but gives {tuple(scores.shape)}. Give other data, or build the network for these "
            f"(--model-arg num_classes={len(dataset.classes)}, where it has that option)."
        )
