"""From what a user writes to a network: model specs of several origins.

===========================  ==========================================================================================
``zoo:NAME`` or ``NAME``     a network of :data:`metaprune.zoo.MODELS`
``timm:NAME``                ``timm.create_model(NAME)``, without its pretrained weights
``torchvision:NAME``         ``torchvision.models.get_model(NAME)``, likewise
``hf:FOLDER``                a network of transformers from a local folder with ``config.json``, and its weights if the
                             folder holds any as safetensors; nothing is downloaded
``hf:CLASS``                 a model class (``LlamaForCausalLM``) or configuration class (``BertConfig``) of
                             transformers; options are fields of the configuration
``package.module:factory``   any importable function, also from the current folder, that returns a module, or a module
                             and an example input
===========================  ==========================================================================================
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError, MetapruneError, MissingExtraError, did_you_mean
from metaprune.factory import FORM, import_factory, looks_importable
from metaprune.zoo._base import MODELS, build
from metaprune.zoo.from_config import example_inputs_of, holds_weights, is_language_model, model_from_config

ExampleInputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A network and what is needed to run it.

    Args:
        spec: What names it, in full (``zoo:cifar_resnet20`` even if the prefix was left out).
        module: Fresh, in training mode as its factory made it; weights are loaded by :func:`load_weights`.
        example_inputs: Positional arguments of one call: a tensor, a tuple, or a dict of keyword arguments.
        task: ``"classification"`` or ``"language"``; a module of the user's may say so in an attribute ``task``.
        name: A short name for folders and reports.
        trained: It came with weights.
    """

    spec: str
    module: nn.Module
    example_inputs: ExampleInputs
    task: str
    name: str
    trained: bool = False


def resolve_model(
    spec: str, *, input_shape: tuple[int, ...] | None = None, options: Mapping[str, Any] | None = None
) -> SourceModel:
    """The network that `spec` names, with random weights.

    Args:
        spec: One of the forms in the table above.
        input_shape: Shape of the example input with its batch dimension, e.g. ``(1, 3, 224, 224)``. Needed for a
            factory that gives no example input; elsewhere it replaces the usual one.
        options: Keyword arguments for the factory.

    Raises:
        ConfigError: The spec, an option or the shape does not fit; the nearest name is given.
        InputError: The network rejects an input of that shape.
        MissingExtraError: The library behind the prefix is not installed.

    >>> resolve_model("zoo:mlp").example_inputs.shape
    torch.Size([2, 1, 8, 8])
    """
    options = dict(options or {})
    if input_shape is not None and (not input_shape or min(input_shape) < 1):
        raise ConfigError(f"every size in the input shape must be at least 1, but it is {_shape(input_shape)}.")
    prefix, colon, name = spec.partition(":")
    if not colon:
        prefix, name, spec = "zoo", spec, f"zoo:{spec}"
    if prefix in SOURCES:
        found = SOURCES[prefix](name, options)
    elif looks_importable(spec):
        found = _from_factory(spec, options)
    else:
        raise ConfigError(_no_source(prefix))
    example = found.example_inputs
    if input_shape is not None:
        example = _example_of_shape(input_shape, found)
    if example is None:
        raise ConfigError(
            f"{spec!r} gives no example input. Give its shape (--input-shape 1,3,224,224), let the factory return "
            "(module, example_inputs), or give the module an attribute `example_inputs`."
        )
    holds_weights = not any(parameter.is_meta for parameter in found.module.parameters())
    if holds_weights and (input_shape is not None or options):
        _check_runs(spec, found.module, example)
    name = Path(name).name if prefix == "hf" else name
    return SourceModel(
        spec=spec, module=found.module, example_inputs=example, task=found.task, name=name, trained=found.trained
    )


@dataclass(frozen=True)
class _Found:
    module: nn.Module
    example_inputs: ExampleInputs | None
    task: str = "classification"
    trained: bool = False


def _from_zoo(name: str, options: dict[str, Any]) -> _Found:
    entry = MODELS[name]
    return _Found(build(name, **options), entry.example_inputs(), entry.task)


def _from_timm(name: str, options: dict[str, Any]) -> _Found:
    timm = _import_extra("timm")
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models())}")
    module = _call(f"timm:{name}", timm.create_model, {"model_name": name, "pretrained": False, **options})
    shape = getattr(module, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return _Found(module, _random(2, *shape))


def _from_torchvision(name: str, options: dict[str, Any]) -> _Found:
    models = _import_extra("torchvision").models
    if name not in models.list_models():
        raise ConfigError(f"torchvision has no model {name!r}.{did_you_mean(name, models.list_models())}")
    builder = models.get_model_builder(name)
    parts = [part for part in ("weights", "weights_backbone") if part in inspect.signature(builder).parameters]
    module = _call(f"torchvision:{name}", builder, {**dict.fromkeys(parts), **options})  # downloads unless told None
    return _Found(module, _random(2, 3, 224, 224))


def _from_transformers(name: str, options: dict[str, Any]) -> _Found:
    library = _import_extra("transformers", ", or metaprune with its extra: pip install 'metaprune[transformers]'")
    module = model_from_config(library, name, options)
    task = "language" if is_language_model(module) else "classification"
    return _Found(module, example_inputs_of(module), task, holds_weights(name))


SOURCES: dict[str, Callable[[str, dict[str, Any]], _Found]] = {
    "zoo": _from_zoo,
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "hf": _from_transformers,
}


_PREFIXES = {"transformers": "hf"}


def _import_extra(library: str, otherwise: str = "") -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingExtraError(
            f"`{_PREFIXES.get(library, library)}:` models need the library {library}, which cannot be imported "
            f"({error}). Install it with: pip install {library}{otherwise}"
        ) from error


def _from_factory(spec: str, options: dict[str, Any]) -> _Found:
    made = import_factory(spec, _no_source(spec.partition(":")[0]))
    if not isinstance(made, nn.Module):
        made = _call(spec, made, options)
    elif options:
        raise ConfigError(f"{spec!r} is a module already, so that it takes no options, but {options} were given.")
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{spec!r} must return a torch.nn.Module or (module, example_inputs), but it returned a "
            f"{type(module).__name__}."
        )
    if example is None:
        example = getattr(module, "example_inputs", None)
        example = example() if callable(example) else example
    task = getattr(module, "task", "classification")
    return _Found(module, _checked_example(spec, example), task if isinstance(task, str) else "classification")


def _checked_example(spec: str, example: Any) -> ExampleInputs | None:
    parts = example.values() if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    if example is not None and not all(isinstance(part, Tensor) for part in parts):
        raise ConfigError(
            f"the example input of {spec!r} must be a tensor, a tuple of tensors or a dict of tensors, but it is a "
            f"{type(example).__name__}."
        )
    return example


def _no_source(prefix: str) -> str:
    return (
        f"{prefix!r} is neither a source of models nor a module that can be imported.{did_you_mean(prefix, SOURCES)} "
        f"Known: {', '.join(f'{source}:NAME' for source in SOURCES)}, {FORM}."
    )


def _call(spec: str, factory: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        return factory(**options)
    except MetapruneError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{spec!r} could not be built with options {options}: {type(error).__name__}: {error}."
        ) from error


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _example_of_shape(shape: tuple[int, ...], found: _Found) -> ExampleInputs:
    if isinstance(found.example_inputs, dict):  # the shape is that of the main input; others follow its batch
        (main, first), *others = found.example_inputs.items()
        rest = {name: tensor[:1].repeat(shape[0], *[1] * (tensor.ndim - 1)) for name, tensor in others}
        return {main: _like(first, shape), **rest}
    return _like(found.example_inputs if isinstance(found.example_inputs, Tensor) else torch.zeros(0), shape)


def _like(example: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not example.is_floating_point():
        ids = int(example.max()) + 1  # the largest range that is known to be legal
        return torch.randint(ids, shape, generator=torch.Generator().manual_seed(0))
    return _random(*shape)


def _check_runs(spec: str, module: nn.Module, example: ExampleInputs) -> None:
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            if isinstance(example, dict):
                module(**example)
            else:
                module(*(example if isinstance(example, tuple) else (example,)))
    except Exception as error:
        given = _shape(example.shape) if isinstance(example, Tensor) else "its example input"
        raise InputError(
            f"{spec!r} rejects an input of shape {given}: {type(error).__name__}: {error}. Give the shape that it "
            "takes, with the batch dimension first (--input-shape)."
        ) from error
    finally:
        module.train(training)


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
