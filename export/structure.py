"""An ONNX file as data: read without trust, and described.

Whatever cannot be used at all (no ONNX, truncated, too new, custom operators, data outside of its folder) is refused
with the reason; what can be used but should not be shipped (a leaked path, a node in training mode) is a finding.
"""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from metaprune.errors import InputError

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # what the plain onnxruntime package has kernels for
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_HALF_BYTES = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
_LARGEST = 64 * 2**30  # bytes of one result
_FIRST_BYTE = b"\x08"  # every ONNX file starts with the field `ir_version`
# Names of values may look like paths ("/layer1/conv/Conv_output_0"), so a path is known by where it starts.
_ROOTS = "home|root|Users|usr|opt|var|tmp|mnt|media|srv|private|Volumes"
_PATH = re.compile(rf"""(?:^|[\s"'(=:,])((?:/(?:{_ROOTS})/|[A-Za-z]:[\\/]|~/)[^\s"',;)]+)""")


@dataclass(frozen=True)
class Port:
    """One input or output of a file.

    Args:
        name: Its name.
        dtype: Its type, e.g. ``"float32"``.
        shape: Its dimensions: sizes, or names of free ones (an empty name where the file gives none).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What an ONNX file holds.

    Args:
        path: The file, as it was given.
        ir_version: Version of the file format.
        opset: Version of the operator set.
        producer: The program that wrote it.
        inputs: Its inputs, without weights.
        outputs: Its outputs.
        nodes: Number of nodes, those of functions and of branches included.
        operators: Kinds of operators, sorted.
        parameters: Floating-point numbers in its weights, constants included.
        size_bytes: Bytes on disk, external data included.
        external: Files of external data, relative to the folder of the file.
        metadata: What the producer wrote into it.
        findings: Why it should not be shipped, one sentence each; empty if nothing.
    """

    path: str
    ir_version: int
    opset: int
    producer: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: int
    operators: tuple[str, ...]
    parameters: int
    size_bytes: int
    external: tuple[str, ...]
    metadata: dict[str, str]
    findings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def read(path: str | Path) -> Structure:
    """Read, check and describe a file; nothing of it is run.

    Raises:
        InputError: It is missing, no ONNX, truncated, breaks the rules of ONNX, has operators that onnxruntime does not
            bring along, external data that is missing or outside of its folder, or tensors that are larger than what
            the file holds or than any memory.
    """
    file = Path(path)
    model = _parse(file)
    nodes = list(_nodes(model))
    _refuse_custom_operators(file, model, nodes)
    external = _external_files(file, model)
    _refuse_giants(file, model)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise InputError(f"opset {newest} is the newest known, but {file.name!r} has opset {opset}. Export it lower.")
    weights = {tensor.name for tensor in model.graph.initializer}
    return Structure(
        path=str(path),
        ir_version=model.ir_version,
        opset=opset,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(_port(value) for value in model.graph.input if value.name not in weights),
        outputs=tuple(_port(value) for value in model.graph.output),
        nodes=len(nodes),
        operators=tuple(sorted({f"{node.domain}.{node.op_type}".strip(".") for node in nodes})),
        parameters=sum(_count(tensor) for tensor in model.graph.initializer if tensor.data_type in _FLOATS),
        size_bytes=file.stat().st_size + sum((file.parent / name).stat().st_size for name in external),
        external=external,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        findings=(*_checker(file), *_training(nodes), *(f"it names the path {leak!r}" for leak in leaks(model))),
    )


def leaks(model: ModelProto) -> tuple[str, ...]:
    """Absolute paths in the texts of a file: names, documentation, metadata, attributes; each once, sorted."""
    return tuple(sorted({path for text in _texts(model) for path in paths_in(text)}))


def paths_in(text: str) -> list[str]:
    """Absolute paths in a text.

    >>> paths_in('File "/home/me/net.py", line 3')
    ['/home/me/net.py']
    >>> paths_in("/layer1/conv/Conv_output_0 and 3/4")
    []
    """
    here = [str(folder) for folder in (Path.cwd(), Path.home(), Path(sys.prefix)) if len(folder.parts) > 1]
    return _PATH.findall(text) + [folder for folder in here if folder in text and not _PATH.search(text)]


def _parse(file: Path) -> ModelProto:
    if not file.is_file():
        raise InputError(
            f"an ONNX file is needed, but {str(file)!r} is {'a folder' if file.is_dir() else 'not there'}."
        )
    if file.stat().st_size == 0:
        raise InputError(f"an ONNX file is needed, but {str(file)!r} is empty.")
    try:
        model = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise InputError(f"{str(file)!r} must be readable, but: {error.strerror}.") from error
    except Exception as error:  # protobuf's DecodeError, which has no stable home
        with file.open("rb") as stream:
            onnx_like = stream.read(1) == _FIRST_BYTE
        if onnx_like:
            raise InputError(
                f"{str(file)!r} is truncated or damaged: it starts like ONNX but cannot be read to its end. "
                "Copy or export it again."
            ) from error
        raise InputError(f"an ONNX file is needed, but {str(file)!r} is none.") from error
    if not model.ir_version or not model.HasField("graph"):
        raise InputError(f"an ONNX file is needed, but {str(file)!r} holds no graph: it is none, or it is truncated.")
    if not model.opset_import:
        raise InputError(f"{str(file)!r} is truncated: it names no operator set. Copy or export it again.")
    return model


def _checker(file: Path) -> tuple[str, ...]:
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        return (f"it breaks the rules of ONNX: {str(error).strip().splitlines()[0]}",)
    return ()


def _training(nodes: list[NodeProto]) -> Iterator[str]:
    for node in nodes:
        if node.op_type == "BatchNormalization" and any(a.name == "training_mode" and a.i for a in node.attribute):
            yield f"node {node.name!r} normalises by the batch, as in training"
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            yield f"node {node.name!r} may drop values, as in training"


def _refuse_custom_operators(file: Path, model: ModelProto, nodes: list[NodeProto]) -> None:
    own = {(function.domain, function.name) for function in model.functions}
    strange = sorted(
        {
            f"{node.domain}.{node.op_type}"
            for node in nodes
            if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own
        }
    )
    if strange:
        raise InputError(
            f"a file may use the operators that onnxruntime brings along, but {file.name!r} uses {', '.join(strange)}. "
            "Export the network without custom operators."
        )


def _external_files(file: Path, model: ModelProto) -> tuple[str, ...]:
    """Names of the files that hold weights, after a look at each: inside the folder, a plain file, reachable once."""
    names: set[str] = set()
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        names |= {entry.value for entry in tensor.external_data if entry.key == "location"} or {""}
    folder = file.parent.resolve()
    for name in sorted(names):
        data = file.parent / name
        if not name or Path(name).is_absolute() or not data.resolve().is_relative_to(folder) or data.is_symlink():
            raise InputError(f"external data must lie in the folder of the file, but {file.name!r} refers to {name!r}.")
        if not data.is_file():
            raise InputError(f"{file.name!r} keeps weights in {name!r}, which is missing. Copy it beside the file.")
        if data.stat().st_nlink > 1:  # onnxruntime would read it, and with it whatever file it is a second name of
            raise InputError(f"external data must be a file of its own, but {name!r} of {file.name!r} is a hard link.")
    return tuple(sorted(names))


def _refuse_giants(file: Path, model: ModelProto) -> None:
    """Weights that claim more than there is, and results that no memory holds: a small file may ask for both."""
    for tensor in _tensors(model):
        claimed, held = _bytes(tensor), _held(file, tensor)
        if min(tensor.dims, default=0) < 0 or (held is not None and claimed > held):
            raise InputError(
                f"{file.name!r} is damaged: its tensor {tensor.name!r} claims the shape {list(tensor.dims)}, "
                f"{claimed} bytes, but holds {held}."
            )
    if model.ByteSize() > 2 * 10**9:
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # what breaks the rules is a finding of its own
        return
    for value in inferred.graph.value_info:
        kind = value.type.tensor_type
        count = math.prod(dim.dim_value for dim in kind.shape.dim if dim.HasField("dim_value"))
        if count * 4 > _LARGEST:
            raise InputError(
                f"no result of a file may need more than {_LARGEST:g} bytes, but {value.name!r} in {file.name!r} has "
                f"the shape {[dim.dim_value or dim.dim_param for dim in kind.shape.dim]}."
            )


def _bytes(tensor: TensorProto) -> int:
    """Bytes that the shape of a tensor stands for; texts count as nothing."""
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return 0
    bits = 4 if tensor.data_type in _HALF_BYTES else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (_count(tensor) * bits + 7) // 8


def _held(file: Path, tensor: TensorProto) -> int | None:
    """Bytes that are there for a tensor, or None where they are not kept as bytes (the checker counts these)."""
    if tensor.data_location == TensorProto.EXTERNAL:
        told = {entry.key: entry.value for entry in tensor.external_data}
        offset = told.get("offset") or "0"
        size = (file.parent / told["location"]).stat().st_size
        return size - int(offset) if offset.isdecimal() else -1
    return len(tensor.raw_data) if tensor.HasField("raw_data") else None


def _port(value: ValueInfoProto) -> Port:
    kind = value.type.tensor_type
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except (KeyError, ValueError):
        dtype = value.type.WhichOneof("value") or "unknown"
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim)
    return Port(value.name, dtype, shape)


def _count(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    yield from _walk(list(model.graph.node))
    for function in model.functions:
        yield from _walk(list(function.node))


def _walk(nodes: list[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _walk(list(graph.node))


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    yield model.graph
    for node in _nodes(model):
        yield from _subgraphs(node)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for graph in _graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _texts(model: ModelProto) -> Iterator[str]:
    yield model.doc_string
    yield model.producer_name
    for entry in model.metadata_props:
        yield entry.value
    for graph in _graphs(model):
        yield graph.name
        yield graph.doc_string
        for entry in graph.metadata_props:
            yield entry.value
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
            yield value.doc_string
            for entry in value.metadata_props:
                yield entry.value
    for tensor in _tensors(model):
        yield tensor.name
        yield tensor.doc_string
        for entry in tensor.metadata_props:
            yield entry.value
    for function in model.functions:
        yield function.doc_string
        for entry in function.metadata_props:
            yield entry.value
    for node in _nodes(model):
        yield node.name
        yield node.doc_string
        for entry in node.metadata_props:
            yield entry.value
        for attribute in node.attribute:
            yield attribute.doc_string
            yield attribute.s.decode("utf-8", "replace")
