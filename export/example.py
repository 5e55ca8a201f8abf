"""Example inputs of a network: one tensor, a tuple, or a dict, and other batches drawn in their likeness."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError, UnsupportedModelError

BATCH = "batch"


@dataclass(frozen=True, eq=False)
class Example:
    """Arguments that a network is called with.

    Args:
        args: Positional ones, all tensors.
        kwargs: Named ones: tensors, or constants (None, bool, int, float, str) that stay out of the file.
        axes: Names of the dimensions that may have other sizes. A tensor has such an axis where its size there is that
            of the first tensor with so many dimensions.
    """

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Any]
    axes: Mapping[int, str] = field(default_factory=lambda: {0: BATCH})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, positional ones first."""
        return (*self.args, *(value for value in self.kwargs.values() if isinstance(value, Tensor)))

    @property
    def batch(self) -> int | None:
        """Size of the leading axis of the first tensor, or None if it has no axis."""
        return self.tensors[0].shape[0] if self.tensors[0].ndim else None

    def batched(self, tensor: Tensor) -> bool:
        """Whether the leading axis of `tensor` counts samples."""
        return tensor.ndim > 0 and tensor.shape[0] == self.batch

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every named axis that a tensor has."""
        return {name: self._size(dim) for dim, name in self.axes.items() if self._size(dim)}

    def free(self, tensor: Tensor) -> dict[int, str]:
        """The named axes of one of the tensors, by dimension."""
        return {
            dim: name for dim, name in self.axes.items() if tensor.ndim > dim and tensor.shape[dim] == self._size(dim)
        }

    def _size(self, dim: int) -> int:
        return next((tensor.shape[dim] for tensor in self.tensors if tensor.ndim > dim), 0)

    def call(self, model: nn.Module) -> dict[str, Tensor]:
        """Outputs of the network by name, detached; several outputs are numbered, those of a mapping keep their keys.

        Raises:
            UnsupportedModelError: The network gives something else than tensors.
        """
        with torch.no_grad():
            return named_outputs(model(*self.args, **self.kwargs))

    def double(self) -> "Example":
        """The same with float64 for every floating-point tensor."""
        return self._map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def cpu(self) -> "Example":
        """The same on the processor, detached."""
        return self._map(lambda tensor: tensor.detach().cpu())

    def head(self, samples: int) -> "Example":
        """The first samples."""
        return self._map(lambda tensor: tensor[:samples] if self.batched(tensor) else tensor)

    def resized(self, **sizes: int) -> "Example":
        """The same with other sizes of named axes: what lies along them, over and over.

        >>> as_example(torch.tensor([1, 2])).resized(batch=3).args[0].tolist()
        [1, 2, 1]
        """

        def along(tensor: Tensor) -> Tensor:
            for dim, name in self.free(tensor).items():
                if name in sizes:
                    tensor = tensor.index_select(dim, torch.arange(sizes[name]) % tensor.shape[dim])
            return tensor.contiguous()

        return self._map(along)

    def redrawn(self, generator: torch.Generator) -> "Example":
        """The same shapes with other numbers: every float is drawn from the tensor's own values, so it stays in range.

        A constant tensor becomes normal noise. Integers and booleans stay: tokens and masks are legal only together.
        """

        def draw(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.numel() == 0:
                return tensor
            flat = tensor.flatten()
            if bool((flat == flat[0]).all()):
                return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            return flat[torch.randint(len(flat), (len(flat),), generator=generator)].view_as(tensor)

        return self._map(draw)

    def _map(self, change: Any) -> "Example":
        return Example(
            tuple(change(tensor) for tensor in self.args),
            {name: change(value) if isinstance(value, Tensor) else value for name, value in self.kwargs.items()},
            self.axes,
        )


def as_example(inputs: Any, axes: Mapping[int, str] | None = None) -> Example:
    """Example inputs in the three shapes that are accepted.

    Args:
        inputs: A tensor, a tuple or list of tensors, or a dict of tensors and constants.
        axes: Dimensions beside the batch that may have other sizes, with their names.

    Raises:
        InputError: They have another shape, hold no tensor, or an empty one, or none has a dimension that is named.
        ConfigError: A name is none, or stands for two dimensions.

    >>> as_example(torch.zeros(2, 3)).batch
    2
    >>> as_example({"x": torch.zeros(4, 3), "use_cache": False}).tensors[0].shape
    torch.Size([4, 3])
    """
    named = _axes(axes or {})
    if isinstance(inputs, Tensor):
        example = Example((inputs,), {}, named)
    elif isinstance(inputs, tuple | list) and all(isinstance(value, Tensor) for value in inputs):
        example = Example(tuple(inputs), {}, named)
    elif isinstance(inputs, Mapping) and all(
        value is None or isinstance(value, Tensor | bool | int | float | str) for value in inputs.values()
    ):
        example = Example((), dict(inputs), named)
    else:
        raise InputError(
            f"example inputs must be a tensor, a tuple of tensors or a dict of tensors, but they are {_kind(inputs)}."
        )
    if not example.tensors:
        raise InputError("example inputs must hold a tensor, but there is none.")
    empty = [tuple(tensor.shape) for tensor in example.tensors if tensor.numel() == 0]
    if empty:
        raise InputError(f"example inputs must hold numbers, but one has the shape {empty[0]}.")
    for dim, name in (axes or {}).items():
        if name not in example.sizes:
            raise InputError(f"a free axis must be a dimension of an input, but none has dimension {dim} ({name!r}).")
    return example


def _axes(axes: Mapping[int, str]) -> dict[int, str]:
    named = {0: BATCH, **axes}
    for dim, name in axes.items():
        if dim < 1 or not name.isidentifier() or list(named.values()).count(name) > 1:
            raise ConfigError(
                "free axes are dimensions from 1 on with a name each (0 is the batch anyway), e.g. {1: 'length'}, but "
                f"{dim} is {name!r}."
            )
    return named


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """What a network returned, as tensors by name.

    Raises:
        UnsupportedModelError: There is no tensor in it, or something else.

    >>> list(named_outputs((torch.zeros(1), [torch.zeros(1)])))
    ['output_0', 'output_1_0']
    """
    named: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            named[name] = value.detach()
        elif isinstance(value, Mapping):
            for key, part in value.items():
                walk(part, str(key) if name == "output" else f"{name}_{key}")
        elif isinstance(value, tuple | list):
            for index, part in enumerate(value):
                walk(part, f"{name}_{index}")
        elif value is not None:
            raise UnsupportedModelError(f"a network must return tensors, but {name} is {_kind(value)}.")

    walk(outputs, "output")
    if not named:
        raise UnsupportedModelError(f"a network must return tensors, but it returns {_kind(outputs)}.")
    return named


def as_arrays(outputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors by name as arrays by name."""
    return {name: value.cpu().numpy() for name, value in outputs.items()}


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of ({', '.join(type(part).__name__ for part in value)})"
    return f"a {type(value).__name__}"
