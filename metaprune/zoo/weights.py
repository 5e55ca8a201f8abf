"""Weights from a file into a network, all of it checked before anything changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from metaprune.errors import InputError, did_you_mean

SUFFIXES = (".safetensors", ".pt", ".pth")


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Puts the weights of a file into `module`; everything is checked before anything changes.

    Reads ``.safetensors``, and ``.pt`` or ``.pth`` with ``weights_only=True``: nothing is unpickled but tensors and
    plain containers. A state dict may lie under ``state_dict`` or ``model``, and every key may start with ``module.``.
    Counters of BatchNorm (``num_batches_tracked``) and the second name of a tied weight may be left out.

    Args:
        module: Takes the weights; they are cast to its dtypes and copied to its devices.
        path: The file.

    Raises:
        InputError: The file is missing or unreadable, its keys or shapes do not fit (the first three that differ are
            named), or a weight is not finite. `module` is as it was.
    """
    path = Path(path)
    state = _plain_state(path, _read_file(path))
    own = module.state_dict(keep_vars=True)
    _complete(state, own)
    differences = _differences(state, own)
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(
            f"the weights in {path} do not fit {type(module).__name__}: {'; '.join(differences[:3])}{more}. "
            "Give the weights of this model, or the model (and options) that they were trained with."
        )
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            finite = value.to(own[key].dtype).isfinite()  # in the dtype that it will have
            if not finite.all():
                raise InputError(
                    f"weights must be finite, but {key!r} in {path} has {int((~finite).sum())} of {value.numel()} "
                    "values that are NaN or infinite. The training that wrote them diverged, or the file is damaged."
                )
    module.load_state_dict(state, strict=True)


def _read_file(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise InputError(f"weights are read from {', '.join(SUFFIXES)}, but the file is {path}.")
    if not path.is_file():
        siblings = [str(sibling) for sibling in path.parent.glob("*") if sibling.suffix in SUFFIXES]
        raise InputError(f"there is no file of weights {path}.{did_you_mean(str(path), siblings)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise whatever their parsers meet
        reason = (str(error).splitlines()[0] if str(error) else type(error).__name__).rstrip(".")
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights: {reason}. It may be truncated, or hold "
            "more than tensors; save `module.state_dict()` with safetensors.torch.save_file."
        ) from error


def _plain_state(path: Path, loaded: Any) -> dict[str, Any]:
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(key, str) for key in loaded):
        raise InputError(f"{path} must hold a state dict (names to tensors), but it holds a {type(loaded).__name__}.")
    if loaded and all(key.startswith("module.") for key in loaded):
        return {key.removeprefix("module."): value for key, value in loaded.items()}
    return dict(loaded)


def _complete(state: dict[str, Any], own: Mapping[str, Any]) -> None:
    given = {id(own[key]): value for key, value in state.items() if key in own}
    for key, value in own.items():
        if key not in state and (id(value) in given or key.endswith("num_batches_tracked")):
            state[key] = given.get(id(value), value)


def _differences(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    found = []
    for key, value in own.items():
        given = state.get(key)
        if key not in state:
            found.append(f"{key!r} {_describe(value)} is missing")
        elif isinstance(value, Tensor) and not _fits(given, value):
            found.append(f"{key!r} is {_describe(value)} in the model but {_describe(given)} in the file")
    first_names: dict[int, str] = {}
    for key, value in own.items():
        first = first_names.setdefault(id(value), key)
        if first != key and not found and isinstance(value, Tensor) and not torch.equal(state[first], state[key]):
            found.append(f"{first!r} and {key!r} are one weight in the model but differ in the file")
    return found + [f"{key!r} {_describe(value)} is unknown" for key, value in state.items() if key not in own]


def _fits(given: Any, value: Tensor) -> bool:
    if not isinstance(given, Tensor):
        return False
    return given.shape == value.shape and given.is_floating_point() == value.is_floating_point()


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
    return f"({', '.join(map(str, value.shape))}){kind}"
