"""The one place that opens an onnxruntime session: the file is read without trust first, and runs on the processor."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from metaprune.errors import ConfigError, InputError
from metaprune.export.example import Example, as_arrays
from metaprune.export.structure import Port, Structure, read


class Session:
    """A file that runs.

    Args:
        structure: What the file holds.
        runtime: The session of onnxruntime.
    """

    def __init__(self, structure: Structure, runtime: Any) -> None:
        self.structure = structure
        self._runtime = runtime

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Inputs of the file."""
        return self.structure.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Outputs of the file."""
        return self.structure.outputs

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself."""
        return dict(self._runtime.get_modelmeta().custom_metadata_map)

    @property
    def batch(self) -> int | None:
        """Number of samples that the file is fixed to, or None where any number goes."""
        first = self.inputs[0].shape[:1]
        return first[0] if first and isinstance(first[0], int) else None

    def feeds(self, example: Example) -> dict[str, NDArray[Any]]:
        """Arguments of a network as inputs by name: named ones by their names, positional ones in order.

        Raises:
            InputError: The file has other inputs than the example.
        """
        named = {name: value for name, value in example.kwargs.items() if isinstance(value, Tensor)}
        free = [port.name for port in self.inputs if port.name not in named]
        if len(self.inputs) != len(example.tensors) or len(free) != len(example.args):
            ports = ", ".join(port.name for port in self.inputs)
            raise InputError(
                f"{Path(self.structure.path).name!r} takes {ports}, but the example has {len(example.tensors)} tensors."
            )
        return as_arrays({**dict(zip(free, example.args)), **named})

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name, for inputs by name.

        Raises:
            InputError: An input is missing, has another type or shape, or the file fails on them.
        """
        try:
            values = self._runtime.run(None, dict(feeds))
        except Exception as error:
            wanted = ", ".join(f"{port.name} {port.dtype}{list(port.shape)}" for port in self.inputs)
            given = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())
            raise InputError(
                f"{Path(self.structure.path).name!r} takes {wanted}, and was given {given}: {first_line(error)}"
            ) from error
        return {port.name: value for port, value in zip(self.outputs, values)}

    def run_batched(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The same for any number of samples: a file with a fixed batch gets pieces of it, the last one filled up.

        Raises:
            InputError: As for `run`.
        """
        fixed, total = self.batch, len(feeds[self.inputs[0].name])
        if fixed is None or fixed == total:
            return self.run(feeds)
        shared = {name for name, value in feeds.items() if value.ndim == 0 or len(value) != total}
        pieces = []
        for begin in range(0, total, fixed):
            rows = np.minimum(np.arange(begin, begin + fixed), total - 1)
            pieces.append(self.run({name: v if name in shared else v[rows] for name, v in feeds.items()}))
        return {name: np.concatenate([piece[name] for piece in pieces])[:total] for name in pieces[0]}

    def predict(self, x: Tensor) -> Tensor:
        """First output for a batch on the only input; fits wherever a network is expected as a function.

        Raises:
            InputError: The file has several inputs, or fails on this one.
        """
        if len(self.inputs) != 1:
            names = ", ".join(port.name for port in self.inputs)
            raise InputError(
                f"one tensor feeds one input, but {Path(self.structure.path).name!r} has {names}. Use `run`."
            )
        outputs = self.run_batched({self.inputs[0].name: x.detach().cpu().numpy()})
        return torch.from_numpy(np.ascontiguousarray(outputs[self.outputs[0].name]))


def open_session(path: str | Path, *, threads: int | None = None, optimise: bool = True) -> Session:
    """Open a file.

    Args:
        path: An ONNX file.
        threads: Threads of a call; None for one per core.
        optimise: False runs the graph as it was written, without onnxruntime's own rewriting.

    Raises:
        ConfigError: `threads` is below 1.
        InputError: The file cannot be used; the message says why.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"`threads` must be at least 1, but it is {threads}.")
    structure = read(path)
    newest = newest_opset()
    if structure.opset > newest:
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} runs opsets up to {newest}, but {Path(path).name!r} has opset "
            f"{structure.opset}. Export it with a lower one."
        )
    options = _options(threads, optimise)
    try:
        runtime = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a family of classes with no common base of their own
        raise InputError(f"onnxruntime must load {Path(path).name!r}, but says: {first_line(error)}") from error
    return Session(structure, runtime)


@functools.cache
def newest_opset() -> int:
    """Newest operator set that the installed onnxruntime runs; as it does not tell, it is asked with tiny graphs."""
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        port = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", port[:1], port[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), _options(1, True), providers=["CPUExecutionProvider"]
            )
        except Exception:
            continue
        return opset
    raise AssertionError("onnxruntime runs no operator set at all")


def first_line(error: BaseException) -> str:
    """First line of what an error says, without the source position that onnxruntime puts in front."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.partition("Status Message: ")[2] or text


def _options(threads: int | None, optimise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what matters comes as an exception
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    return options
