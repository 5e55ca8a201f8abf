"""What every network of the zoo promises: how it is built, an input that it takes, and its task.

Rule for every ``forward`` here: a size is read from a tensor at run time, is ``-1``, or is a plain integer attribute of
the same module, handed over as it is. Surgery slices parameters and brings such attributes in step; a size that sits in
a literal or in a closure would stay behind. One attribute has one meaning, so that parts may become unequal.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError, did_you_mean
from metaprune.registry import Registry


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """One reference network.

    Args:
        build: Makes a fresh network; every option is a keyword with a default.
        example_inputs: A batch of 2 for the default options, the same at every call.
        task: ``"classification"`` (to logits) or ``"language"`` (int64 tokens to next-token logits).
    """

    build: Callable[..., nn.Module]
    example_inputs: Callable[[], Tensor]
    task: str = "classification"


MODELS: Registry[ZooModel] = Registry("model", "metaprune.models")


def build(name: str, /, **options: Any) -> nn.Module:
    """A fresh network of the zoo, with random weights drawn from torch's global generator.

    Args:
        name: A name in :data:`MODELS`.
        **options: Options of that network's factory, e.g. ``num_classes=100``.

    Raises:
        ConfigError: The name or an option is unknown, or a value does not fit.

    >>> sum(weight.numel() for weight in build("cifar_resnet20").parameters())
    269722
    """
    factory = MODELS[name].build
    _check_options(name, factory, options)
    return factory(**options)


def example_inputs(name: str, /) -> Tensor:
    """A batch of 2 that the network `name` takes when it is built with its default options.

    >>> example_inputs("cifar_resnet20").shape
    torch.Size([2, 3, 32, 32])
    """
    return MODELS[name].example_inputs()


def options_for_images(name: str, /, input_shape: tuple[int, int, int], num_classes: int) -> dict[str, int]:
    """The options of network `name` that follow from its data.

    Args:
        name: A name in :data:`MODELS`.
        input_shape: (C, H, W) of one image.
        num_classes: Number of classes.

    >>> options_for_images("vit_tiny", (1, 8, 8), 10)
    {'in_channels': 1, 'image_size': 8, 'num_classes': 10}
    """
    channels, height, width = input_shape
    followed = {
        "in_channels": channels,
        "image_size": height,
        "in_features": channels * height * width,
        "num_classes": num_classes,
    }
    known = _options(MODELS[name].build)
    return {key: value for key, value in followed.items() if key in known}


def random_values(*shape: int) -> Callable[[], Tensor]:
    """Makes float32 inputs of `shape`, standard normal and the same at every call."""

    def draw() -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    return draw


def random_tokens(vocabulary: int, *shape: int) -> Callable[[], Tensor]:
    """Makes int64 token ids of `shape` in ``[0, vocabulary)``, the same at every call."""

    def draw() -> Tensor:
        return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))

    return draw


def init_convolutions(module: nn.Module) -> None:
    """Draws every convolution's weights anew for ReLU networks; linear layers keep torch's default.

    Source: He et al., Delving Deep into Rectifiers, ICCV 2015, arXiv:1502.01852, equation 10. The fan-in
    form, because it is also right for grouped and depthwise convolutions.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")


def require_multiple(what: str, value: int, of: int) -> None:
    """Raises ConfigError unless `value` is a multiple of `of`; `what` names both, e.g. ``"width, num_heads"``."""
    if value % of:
        first, second = what.split(", ")
        raise ConfigError(f"`{first}` must be a multiple of `{second}`, but {first}={value} and {second}={of}.")


def _options(factory: Callable[..., nn.Module]) -> dict[str, Any]:
    """Every option of a factory, with its default."""
    return {
        key: parameter.default
        for key, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _check_options(name: str, factory: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    known = _options(factory)
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"model {name!r} has no option {key!r}.{did_you_mean(key, known)} Known: {', '.join(sorted(known))}."
            )
        if not _fits(value, known[key]):
            raise ConfigError(
                f"option {key!r} of model {name!r} must be {_describe(known[key])}, like its default {known[key]!r}, "
                f"but it is {value!r}."
            )


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, int):
        return isinstance(value, int) and value >= 1
    if isinstance(default, float):
        return isinstance(value, int | float) and value >= 0
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and len(value) > 0 and all(_fits(part, default[0]) for part in value)
    return True


def _describe(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, tuple):
        return "a list of whole numbers of at least 1"
    return "a whole number of at least 1" if isinstance(default, int) else "a number of at least 0"
