"""What a population is to be: which networks, trained on what and for how long."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from metaprune.config import Recipe as Written
from metaprune.config import load_recipe, options_of
from metaprune.errors import ConfigError

SPLITS = ("train", "validation")
_STRICT = {"extra": "forbid"}  # read by `options_of`: a misspelt key is refused


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """One network of a population.

    Args:
        model: What :func:`metaprune.zoo.resolve_model` takes, e.g. ``zoo:cifar_resnet20``.
        options: Of its factory: widths, depth. What follows from the data (channels and size of the images, number of
            classes) is filled in for networks of the zoo.
        seed: Draws its first weights and the order of its images; at least 0.
        weights: A file of weights that it has been trained to elsewhere; None trains it. Such a network belongs to
            ``train`` where it may have seen the validation images, which its accuracy gives away.
        split: ``train``, or ``validation`` for networks that no metanetwork is fitted to.
        name: What it is called; None makes a name of what is above.
        epochs: Instead of the recipe's.
        lr: Instead of the recipe's.
        optional: Whether it is left out where there is no file `weights`.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    weights: str | None = None
    split: Literal["train", "validation"] = "train"
    name: str | None = None
    epochs: int | None = None
    lr: float | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        _hold(
            self,
            {
                "model": ("model is not empty", bool(self.model)),
                "seed": ("seed >= 0", self.seed >= 0),
                "split": (f"split in ({', '.join(SPLITS)})", self.split in SPLITS),
                "epochs": ("epochs >= 1", self.epochs is None or self.epochs >= 1),
                "lr": ("0 < lr < inf", self.lr is None or 0 < self.lr < math.inf),
                "optional": ("optional only with weights", self.weights is not None or not self.optional),
            },
        )

    @property
    def title(self) -> str:
        """Its name, or one made of the model, its options and its seed or file."""
        if self.name is not None:
            return self.name
        parts = [self.model.removeprefix("zoo:")]
        parts += [f"{key}={_short(value)}" for key, value in sorted(self.options.items())]
        parts.append(f"seed={self.seed}" if self.weights is None else Path(self.weights).stem)
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A population of networks for meta-training.

    Snapshots and partly pruned versions belong to the split of the network that they come from. Networks are trained on
    the training images alone; their accuracy is that on the validation images.

    Args:
        data: What :func:`metaprune.data.load` takes, e.g. ``digits``.
        members: The networks; at least one to fit a metanetwork to and one to validate it on.
        epochs: Passes over the training images, at least 1.
        batch_size: Images of a step, at least 1.
        lr: Highest learning rate, above 0.
        snapshots: Shares of training, in (0, 1), after which a copy is kept; rounded to whole epochs.
        pruned: Shares of the units, in (0, 1), that are taken from every prunable axis at random to make a partly
            pruned version of each trained network; its BatchNorm is re-estimated.
        images: Largest number of training images, at least 1; None takes all.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    data: str
    members: tuple[MemberSpec, ...]
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.05
    snapshots: tuple[float, ...] = ()
    pruned: tuple[float, ...] = ()
    images: int | None = None

    def __post_init__(self) -> None:
        for name in ("members", "snapshots", "pruned"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _hold(
            self,
            {
                "data": ("data is not empty", bool(self.data)),
                "epochs": ("epochs >= 1", self.epochs >= 1),
                "batch_size": ("batch_size >= 1", self.batch_size >= 1),
                "lr": ("0 < lr < inf", 0 < self.lr < math.inf),
                "snapshots": ("snapshots are different shares in (0, 1)", _shares(self.snapshots)),
                "pruned": ("pruned are different shares in (0, 1)", _shares(self.pruned)),
                "images": ("images >= 1", self.images is None or self.images >= 1),
            },
        )
        titles = [spec.title for spec in self.members]
        twice = next((title for number, title in enumerate(titles) if title in titles[:number]), None)
        if twice is not None:
            raise ConfigError(
                f"every member must be there once, but {twice!r} is twice. Give another seed, or a `name`."
            )
        for split in SPLITS:
            if not any(spec.split == split for spec in self.members):
                raise ConfigError(
                    f"at least one member must have `split: {split}`, but none of {len(self.members)} has. A "
                    "metanetwork is fitted to the networks of one split and chosen on those of the other."
                )

    @classmethod
    def read(cls, path: str | Path, **given: Any) -> Self:
        """The recipe in a YAML file, or a shipped one by its name; what is given goes over what is written.

        Raises:
            InputError: There is no such file, or it cannot be read.
            ConfigError: A key or a value does not fit, or a variable is not set; file and line are named.
        """
        return cls.of(load_recipe(path, "metatrain", (*KEYS, *SECTIONS)), **given)

    @classmethod
    def of(cls, written: Written, **given: Any) -> Self:
        """The recipe among what was written, which may have keys for others too.

        Raises:
            InputError: It takes the population of another recipe, which cannot be read.
            ConfigError: A key or a value does not fit; file and line are named.
        """
        own = {key: value for key, value in written.values.items() if key in KEYS}
        source = own.pop(_POPULATION, None)
        if source is None:
            return options_of(cls, given, Written(written.path, own, written.lines))
        if not isinstance(source, str):
            raise ConfigError(f"{written.where(_POPULATION)} must be a recipe, but it is {source!r}.")
        if own:
            raise ConfigError(
                f"{written.where(next(iter(own)))}: what the population is, the recipe {source!r} says. Leave "
                f"`{next(iter(own))}` or `{_POPULATION}` out."
            )
        return cls.read(source, **given)


_POPULATION = "population"  # instead of all other keys, a recipe that has them
KEYS = (*(part.name for part in fields(Recipe)), _POPULATION)
SECTIONS = ("survey", "shape", "training")  # what else a recipe of `metaprune metatrain` says


def _hold(spec: Any, rules: Mapping[str, tuple[str, bool]]) -> None:
    for option, (rule, holds) in rules.items():
        if not holds:
            raise ConfigError(f"`{rule}` must hold, but {option}={getattr(spec, option)!r}.")


def _shares(values: tuple[float, ...]) -> bool:
    return all(0 < value < 1 for value in values) and len(set(values)) == len(values)


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
