"""Networks of the transformers library, from a configuration or a folder, and inputs that fit them. Always offline.

``hf:LlamaForCausalLM`` is that class with its default configuration, ``hf:BertConfig`` the plain network of that
configuration, ``hf:FOLDER`` what a folder with ``config.json`` describes, with its weights if it holds any. Without
weights the network is random; a large one (the default Llama has 7 billion parameters) stays without weights, which is
enough to look at it.
"""

import copy
import inspect
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError, did_you_mean

LARGE = 4 * 2**30  # bytes of parameters above which a random network comes without weights, on the meta device
TOKENS = 12  # length of example texts
FRAMES = 24  # length of example sounds, in what the network makes of them
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # options of the network, not of its size
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def model_from_config(library: Any, name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network that `name` stands for.

    Args:
        library: The module ``transformers``.
        name: A folder with ``config.json``, a model class, or a configuration class.
        options: Fields of the configuration.

    Raises:
        ConfigError: There is no such folder or class; an option is no field of the configuration, or does not fit.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(library, folder, options)
    kind: Any = getattr(library, name, None)
    is_config = isinstance(kind, type) and issubclass(kind, library.PreTrainedConfig)
    is_model = isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)
    if not is_config and not is_model:
        known = [item for item in dir(library) if item.endswith(("Config", "Model")) or "For" in item]
        raise ConfigError(
            f"`hf:` takes a folder with config.json, or a model or configuration class of transformers, but {name!r} "
            f"is neither.{did_you_mean(name, known)} Nothing is downloaded: give a folder that is on this machine."
        )
    if is_config:
        return _built(library.AutoModel.from_config, name, kind, options)
    if kind.config_class is None:
        raise ConfigError(f"{name!r} is a base class without a configuration. Give a class such as LlamaForCausalLM.")
    return _built(kind._from_config, name, kind.config_class, options)


def _from_folder(library: Any, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"a folder given as `hf:` must hold config.json, but {folder} does not.")
    try:
        content = json.loads(file.read_text())
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{file} must be a configuration of transformers, but: {error}.") from error
    fields, chosen = _parted(type(config), config, options)
    for field, item in fields.items():
        setattr(config, field, item)
    kind = getattr(library, (content.get("architectures") or [""])[0], library.AutoModel)
    try:
        if holds_weights(str(folder)):
            safe = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
            module: nn.Module = kind.from_pretrained(folder, config=config, **safe, **chosen)
        else:
            module = _random_network(
                kind.from_config if kind is library.AutoModel else kind._from_config, config, chosen
            )
    except Exception as error:
        raise ConfigError(f"no network could be made from {folder}: {type(error).__name__}: {error}.") from error
    return module


def holds_weights(name: str) -> bool:
    """The name is a folder with weights as safetensors."""
    return any((Path(name).expanduser() / weights).is_file() for weights in _WEIGHTS)


def _built(factory: Any, name: str, kind: Any, options: Mapping[str, Any]) -> nn.Module:
    fields, chosen = _parted(kind, kind(), options)
    try:
        module = _random_network(factory, kind(**fields), chosen)
    except Exception as error:
        raise ConfigError(
            f"'hf:{name}' could not be built with {dict(options)}: {type(error).__name__}: {error}."
        ) from error
    return module


def _random_network(factory: Any, config: Any, chosen: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.device("meta"):
            bare: nn.Module = factory(copy.deepcopy(config), **chosen)
    except Exception:  # some read numbers while they are built
        return factory(config, **chosen)
    size = sum(parameter.nbytes for parameter in bare.parameters())
    return bare if size > LARGE else factory(config, **chosen)


def _parted(kind: Any, example: Any, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the configuration, and options of the network beside it.

    Raises:
        ConfigError: An option is neither.
    """
    settable = [
        name for name, item in inspect.getmembers(kind) if isinstance(item, property) and item.fset
    ]  # e.g. num_labels
    known = [*example.to_dict(), *getattr(kind, "attribute_map", {}), *settable, *_IMPLEMENTATIONS]
    for option in options:
        if option not in known:
            raise ConfigError(f"{kind.__name__} has no field {option!r}.{did_you_mean(option, known)}")
    chosen = {name: item for name, item in options.items() if name in _IMPLEMENTATIONS}
    return {name: item for name, item in options.items() if name not in chosen}, chosen


def is_language_model(module: nn.Module) -> bool:
    """The network gives a distribution over the next token."""
    return "CausalLM" in type(module).__name__ or "LMHead" in type(module).__name__


def example_inputs_of(module: Any) -> dict[str, Tensor]:
    """Inputs that a network of transformers takes, by keyword, from its configuration and a fixed seed.

    Token ids (2, 12), pixels (2, C, H, W), samples of sound (2, T), features of sound (2, bins, T), and two of them
    for networks that encode a pair or decode from an encoding.

    Raises:
        ConfigError: The network takes something else.
    """
    random = torch.Generator().manual_seed(0)
    config, main = module.config, module.main_input_name
    make = {
        "input_ids": lambda: _tokens(config, random),
        "pixel_values": lambda: _pixels(config, random),
        "input_values": lambda: _sound(config, random),
        "input_features": lambda: _sound_features(config, random),
    }
    if main not in make:
        raise ConfigError(
            f"no example is known for the input {main!r} of {type(module).__name__}. Give a factory that returns "
            "(module, example_inputs)."
        )
    example = {main: make[main]()}
    if getattr(config, "vision_config", None) is not None and getattr(config, "text_config", None) is not None:
        example = {"input_ids": _tokens(config, random), "pixel_values": _pixels(config, random)}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in _argument_names(module):
        example["decoder_input_ids"] = _tokens(config, random)
    return example


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _tokens(config: Any, random: torch.Generator) -> Tensor:
    """Ordinary token ids: none that means padding, a beginning or an end."""
    config = getattr(config, "text_config", None) or config
    vocabulary = getattr(config, "vocab_size", None) or config.decoder.vocab_size
    special = {
        getattr(config, name, None)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    }
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    ids = ordinary[torch.randint(len(ordinary), (2, _length(config)), generator=random)]
    if isinstance(getattr(config, "eos_token_id", None), int) and config.eos_token_id < vocabulary:
        ids[:, -1] = config.eos_token_id
    return ids


def _length(config: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    return min(TOKENS, longest) if isinstance(longest, int) and longest > 0 else TOKENS


def _pixels(config: Any, random: torch.Generator) -> Tensor:
    config = getattr(config, "vision_config", None) or config
    backbone = getattr(config, "backbone_config", None)
    size = getattr(config, "image_size", None) or getattr(backbone, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or getattr(backbone, "num_channels", None) or 3
    return torch.randn(2, channels, height, width, generator=random)


def _sound(config: Any, random: torch.Generator) -> Tensor:
    strides, kernels = getattr(config, "conv_stride", None), getattr(config, "conv_kernel", None)
    if strides is None or kernels is None:  # a spectrogram, as of the audio spectrogram transformer
        return torch.randn(2, config.max_length, config.num_mel_bins, generator=random)
    return torch.randn(2, prod(strides) * FRAMES + max(kernels), generator=random)


def _sound_features(config: Any, random: torch.Generator) -> Tensor:
    bins = getattr(config, "num_mel_bins", None) or config.feature_size
    length = 2 * config.max_source_positions if hasattr(config, "max_source_positions") else FRAMES
    return torch.randn(2, bins, length, generator=random)
