"""A network as an ONNX file that has been proved to be the network, or no file at all.

What an exporter claims is not trusted: a requested operator set may not be the one that is written, a free axis may be
frozen or silently wrong at other sizes, and files carry the paths of the machine they were made on. So a ladder of ways
is tried, the most flexible first: free axes by name; free axes that the exporter finds and we name; the batch alone;
none. After each the file is stripped, checked, loaded, and run against the network at three sizes or more of every axis
that it claims. The first that passes is kept, and the record says which one it was and why the others were not.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError, MetapruneError, UnsupportedModelError
from metaprune.export.attention import FourDimensionalAttention
from metaprune.export.example import BATCH, Example, as_example
from metaprune.export.numeric import Deviation, Judge, Truth
from metaprune.export.session import Session, first_line, newest_opset, open_session
from metaprune.export.structure import Port, paths_in
from metaprune.graph.twin import named_tensors
from metaprune.measure.profile import node_name

DEFAULT_OPSET = 20
_OLDEST_OPSET = 7  # onnxruntime promises nothing below
_SINGLE_FILE_BYTES = 2 * 10**9  # the format itself ends at 2 GiB
_BATCHES = (1, 5, 3)  # to probe beside that of the example, until there are enough
_PROBED = 3  # sizes of an axis that are looked at before the file may claim any
_OWN = ("schema", "version", "torch", "rung", "opset", "axes", "network")  # metadata that are always written
_CHATTY = ("torch", "onnxscript", "onnx_ir")
_NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"  # what the exporter says where it knows no module
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")

_log = logging.getLogger("metaprune.export")


@dataclass(frozen=True)
class Rung:
    """One way to export.

    Args:
        name: What records call it.
        axes: Dimensions that stay free, with their names; none for fixed sizes.
        automatic: The exporter finds out what may be free in them; otherwise it is told, and refuses what it doubts.
    """

    name: str
    axes: Mapping[int, str]
    automatic: bool = False

    def shapes(self, example: Example) -> Any:
        """What ``torch.onnx.export`` takes for ``dynamic_shapes``."""
        if not self.axes:
            return None
        told = replace(example, axes=self.axes)

        def free(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return None
            return {dim: torch.export.Dim.AUTO if self.automatic else name for dim, name in told.free(value).items()}

        return {name: free(value) for name, value in example.kwargs.items()} or tuple(map(free, example.args))


def ladder(example: Example) -> list[Rung]:
    """The ways to try, in order."""
    batch = {dim: name for dim, name in example.axes.items() if name == BATCH}
    rungs = [Rung("named axes", example.axes), Rung("automatic axes", example.axes, automatic=True)]
    if len(example.axes) > len(batch):
        rungs += [Rung("named batch", batch), Rung("automatic batch", batch, automatic=True)]
    return [*rungs, Rung("static", {})]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The file against the network at one size of every free axis.

    Args:
        sizes: By name of the axis.
        deviation: How far the file is off.
    """

    sizes: Mapping[str, int]
    deviation: Deviation


@dataclass(frozen=True)
class Refusal:
    """A way to export that was not taken.

    Args:
        rung: Its name.
        reason: Why, in one sentence.
    """

    rung: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was proved.

    Args:
        path: The file.
        files: All files that belong to it; more than one only above 2 GB.
        size_bytes: Their bytes.
        sha256: Hash of the file itself.
        opset: Operator set that is written in it.
        rung: The way that passed, e.g. ``"named axes"`` or ``"static"``.
        batch: Batch size that it is fixed to, or None where any goes.
        axes: Names of the axes whose sizes are free.
        inputs: Its inputs.
        outputs: Its outputs.
        metadata: What is written in it.
        probes: The comparisons with the network.
        refused: The ways that were tried before.
        seconds: Time that it took.
    """

    path: str
    files: tuple[str, ...]
    size_bytes: int
    sha256: str
    opset: int
    rung: str
    batch: int | None
    axes: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    metadata: dict[str, str]
    probes: tuple[Probe, ...]
    refused: tuple[Refusal, ...]
    seconds: float

    @property
    def max_error(self) -> float:
        """Largest error over the probes, as a share of the largest output."""
        return max(probe.deviation.relative for probe in self.probes)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        fields = asdict(self)
        fields["probes"] = [{"sizes": dict(probe.sizes), **probe.deviation.to_json()} for probe in self.probes]
        return {**fields, "max_error": self.max_error}


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    opset: int | None = None,
    axes: Mapping[int, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write `model` as ONNX, in eval mode, and prove the file. The model itself stays as it is.

    Args:
        model: The network.
        example_inputs: A tensor, a tuple or a dict of tensors; the leading axis of the first one is the batch.
        path: The file to write.
        opset: Operator set; None for the default, 20.
        axes: Dimensions beside the batch whose sizes should be free, with names, e.g. ``{1: "length"}``. Where no file
            is right at other sizes they are fixed, and the record says so.
        metadata: Texts to write into the file, e.g. the hash of a plan; read back by `Session.metadata`.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        ConfigError: The operator set is out of range, or the metadata hold an absolute path or a reserved name.
        InputError: The example inputs are of no accepted shape, the file exists, or its folder cannot be written to.
        UnsupportedModelError: No way of exporting gave a right file; each is named with its reason. Nothing is written.
    """
    start = time.perf_counter()
    target = _check_target(Path(path), overwrite)
    wanted = _check_opset(opset)
    texts = _check_metadata(metadata or {})
    example = as_example(example_inputs, axes).cpu()
    judge = Judge(model)
    texts["metaprune.network"] = weights_hash(judge.single)
    truths = _truths(judge, example)
    refused: list[Refusal] = []
    with _folder_of(target):
        for rung in ladder(example):
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".metaprune-") as folder:
                try:
                    file = Path(folder) / target.name  # its final name, as a file refers to its weights by name
                    save(_attempt(rung, judge.single, example, wanted, texts), file)
                    session = open_session(file, threads=1)
                    probes = _prove(session, rung, truths, wanted)
                except MetapruneError as refusal:
                    refused.append(Refusal(rung.name, str(refusal)))
                    _log.debug("export by %s refused: %s", rung.name, refusal)
                else:
                    return _deliver(session, target, rung, probes, refused, start)
        rungs: dict[str, list[str]] = {}
        for way in refused:
            rungs.setdefault(way.reason, []).append(way.rung)
        reasons = " ".join(f"By {' and by '.join(names)}: {reason}" for reason, names in rungs.items())
        raise UnsupportedModelError(f"{type(model).__name__} cannot be exported, and nothing was written. {reasons}")


def _check_target(path: Path, overwrite: bool) -> Path:
    if path.is_dir():
        raise InputError(f"an ONNX file is to be written, but {str(path)!r} is a folder. Name a file in it.")
    if path.exists() and not overwrite:
        raise InputError(f"{str(path)!r} exists. Name another file, or allow to overwrite it.")
    return path


@contextlib.contextmanager
def _folder_of(target: Path) -> Iterator[None]:
    """Make the folder if need be, and take it away again if nothing comes of it."""
    made = not target.parent.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"{str(target.parent)!r} must be a folder to write in, but: {error.strerror}.") from error
    finally:
        if made:
            with contextlib.suppress(OSError):
                target.parent.rmdir()  # does nothing to a folder that holds something


def _check_opset(opset: int | None) -> int:
    wanted, newest = DEFAULT_OPSET if opset is None else opset, newest_opset()
    if not _OLDEST_OPSET <= wanted <= newest:
        raise ConfigError(
            f"`{_OLDEST_OPSET} <= opset <= {newest}` must hold for the installed onnxruntime, but opset={wanted}."
        )
    return wanted


def _check_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    own = {
        "metaprune.schema": "1",
        "metaprune.version": importlib.metadata.version("metaprune"),
        "metaprune.torch": torch.__version__,
    }
    for name, text in metadata.items():
        if name in [f"metaprune.{reserved}" for reserved in _OWN]:
            raise ConfigError(f"metadata may have any name but those written anyway, and {name!r} is one of them.")
        if found := paths_in(f"{name} {text}"):
            raise ConfigError(f"a file must not name paths of this machine, but metadata {name!r} hold {found[0]!r}.")
    return {**own, **metadata}


def _truths(judge: Judge, example: Example) -> list[tuple[Example, Truth]]:
    """Inputs to compare at, with the network's own outputs: the example, other numbers, other batch sizes."""
    try:
        truth = judge.truth(example)
    except MetapruneError:
        raise
    except Exception as error:
        raise InputError(f"the network must run on the example inputs, but says: {first_line(error)}") from error
    if not truth.finite:
        raise UnsupportedModelError("outputs must be finite, but on the example inputs they are not.")
    judge.check_repeats(truth, example)
    truths = [(example, truth)]
    generator = torch.Generator().manual_seed(0)

    def probe(sizes: Mapping[str, int]) -> bool:
        """A network that does not run at a size cannot be asked there; then the file may not claim it either."""
        sized = example.resized(**sizes)
        drawn = sized.redrawn(generator)
        with contextlib.suppress(Exception):
            truth = judge.truth(drawn)
            truths.append((drawn, truth) if truth.finite else (sized, judge.truth(sized)))
            return True
        return False

    probe({})
    others = {}
    for name, size in example.sizes.items():
        wanted = _PROBED - 1
        for other in _BATCHES if name == BATCH else _other_sizes(size):
            if wanted and other != size and probe({name: other}):
                wanted, others[name] = wanted - 1, other
    if len(others) > 1:
        probe(others)
    return truths


def _other_sizes(size: int) -> tuple[int, ...]:
    """Sizes of an axis to ask a network at: odd ones first, then those that patches, pools and positions allow.

    >>> _other_sizes(16)
    (1, 19, 32, 8, 17, 15, 48)
    """
    candidates = (1, size + 3, 2 * size, size // 2, size + 1, size - 1, 3 * size)
    return tuple(dict.fromkeys(other for other in candidates if other > 0))


def weights_hash(model: nn.Module) -> str:
    """Hash of all parameters and buffers of a network, by name: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        array = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(array.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def draft(model: nn.Module, example: Example, rung: Rung, opset: int) -> onnx_ir.Model:
    """The network as the exporter writes it, cleaned but not proved; each node is named after its module.

    Raises:
        UnsupportedModelError: The exporter fails.
    """
    names = list(example.call(model))
    try:
        with _silence(), _operators_read_once(), FourDimensionalAttention():
            program = torch.onnx.export(
                model,
                example.args,
                kwargs=dict(example.kwargs),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=rung.shapes(example),
                output_names=names,
                verbose=False,
            )
            assert program is not None
            _name_axes(program, replace(example, axes=rung.axes))
    except Exception as error:  # the exporter's errors have no public family that holds them all
        raise UnsupportedModelError(f"the exporter failed: {_cause(error)}") from error
    network = program.model
    _name_by_module(network)
    _keep_padding(network)
    _strip(network)
    return network


def _name_by_module(network: onnx_ir.Model) -> None:
    """Put the path of its module before the name of every node, the last that a runtime forgets of a file."""
    for graph in (network.graph, *(function.graph for function in network.functions.values())):
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            node.name = node_name(_module_of(node), str(node.name))


def _module_of(node: onnx_ir.Node) -> str:
    """Path of the module whose weights a node alone reads, or whose forward made it; empty for the network itself.

    A convolution that the exporter has merged with its norm would else be the norm's.
    """
    owners = [
        str(port.name).rpartition(".")[0]
        for port in node.inputs
        if port is not None and port.is_initializer() and len(port.uses()) == 1
    ]
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    return next(filter(None, [*owners, *(scope for scope in scopes[-2:-1] if scope != _NO_SCOPE)]), "")


def _attempt(rung: Rung, model: nn.Module, example: Example, opset: int, texts: dict[str, str]) -> onnx_ir.Model:
    network = draft(model, example, rung, opset)
    claimed = json.dumps({port.name: [str(size) for size in port.shape or ()] for port in network.graph.inputs})
    told = {"rung": rung.name, "opset": str(network.opset_imports.get("")), "axes": claimed}
    network.metadata_props.update({**texts, **{f"metaprune.{name}": text for name, text in told.items()}})
    return network


def _name_axes(program: Any, example: Example) -> None:
    """Call free axes by their names: found ones, and those of several inputs, have symbols of the exporter's own."""
    for port, tensor in zip(program.model.graph.inputs, _in_order(program.model.graph.inputs, example)):
        for dim, name in example.free(tensor).items():
            if not isinstance(port.shape[dim], int) and str(port.shape[dim]) != name:
                program.rename_axes({str(port.shape[dim]): name})


def _in_order(ports: Sequence[Any], example: Example) -> list[Tensor]:
    """The tensor of each input: named ones by their names, positional ones in order."""
    named = {name: value for name, value in example.kwargs.items() if isinstance(value, Tensor)}
    positional = iter(example.args)
    return [named[port.name] if port.name in named else next(positional) for port in ports]


def _keep_padding(network: onnx_ir.Model) -> None:
    """Name the axes of every padding before a maximum, for else onnxruntime loses its numbers.

    Its ``Pad_Fusion`` makes zeros around a ``MaxPool`` the pooling's own padding, which is minus infinity: wrong where
    all numbers of a window are negative. It leaves a ``Pad`` alone whose axes are given (operator set 18 and later).
    """
    if (network.opset_imports.get("") or 0) < 18:
        return
    for node in network.graph:
        feeds_maximum = any(use.op_type == "MaxPool" for output in node.outputs for use, _ in output.uses())
        padded = node.inputs[0] if node.op_type == "Pad" and feeds_maximum and len(node.inputs) < 4 else None
        if padded is not None and padded.shape is not None:
            name, rank = f"{node.outputs[0].name}_axes", len(padded.shape)
            axes = onnx_ir.Value(
                name=name,
                shape=onnx_ir.Shape([rank]),
                type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
                const_value=onnx_ir.tensor(list(range(rank)), dtype=onnx_ir.DataType.INT64, name=name),
            )
            network.graph.register_initializer(axes)
            node.resize_inputs(4)
            node.replace_input_with(3, axes)


def _strip(network: onnx_ir.Model) -> None:
    """Remove everything that tells where and from what source the file was made."""
    ClearMetadataAndDocStringPass()(network)
    for graph in (network.graph, *(function.graph for function in network.functions.values())):
        graph.metadata_props.clear()  # the pass leaves those of an empty graph
        graph.doc_string = None
        values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            values += node.outputs
        for value in values:
            value.metadata_props.clear()
            value.doc_string = None
    for tensor in network.graph.initializers.values():
        if tensor.const_value is not None:
            tensor.const_value.doc_string = None
    network.doc_string = None
    network.metadata_props.clear()


def save(network: onnx_ir.Model, path: Path) -> None:
    """Write a network as one file, or beyond 2 GB as two."""
    weights = sum(
        value.const_value.nbytes for value in network.graph.initializers.values() if value.const_value is not None
    )
    if weights > _SINGLE_FILE_BYTES:
        onnx_ir.save(network, path, external_data=f"{path.name}.data")
    else:
        onnx_ir.save(network, path)


def _prove(session: Session, rung: Rung, truths: list[tuple[Example, Truth]], opset: int) -> tuple[Probe, ...]:
    if session.structure.opset != opset:
        raise UnsupportedModelError(
            f"opset {opset} was asked for, but {session.structure.opset} was written; ask for that one or a later one."
        )
    if session.structure.findings:
        raise UnsupportedModelError(f"the file must be clean, but {session.structure.findings[0]}.")
    example = truths[0][0]
    _require_claims(session, replace(example, axes=rung.axes))
    probes = []
    for asked, truth in truths:
        if any(asked.sizes[name] != size for name, size in example.sizes.items() if name not in rung.axes.values()):
            continue  # fixed sizes are recorded as such
        outputs = session.run(session.feeds(asked))
        deviation = truth.deviation(outputs)
        if not deviation.passed:
            where = ", ".join(f"{name} {size}" for name, size in asked.sizes.items()) or "the example"
            raise UnsupportedModelError(f"at {where} the file differs from the network: {deviation}.")
        probes.append(Probe(sizes=asked.sizes, deviation=deviation))
    for name in _free_axes(session, rung):
        sizes = sorted({probe.sizes[name] for probe in probes})
        if len(sizes) < _PROBED:
            raise UnsupportedModelError(f"the file claims any {name} size, but the network itself ran at {sizes} only.")
    return tuple(probes)


def _require_claims(session: Session, example: Example) -> None:
    """Every axis that was to be free is free, under its name, in every input that has it."""
    for port, tensor in zip(session.inputs, _in_order(session.inputs, example)):
        for dim, name in example.free(tensor).items():
            if port.shape[dim] != name:
                raise UnsupportedModelError(
                    f"dimension {dim} of input {port.name!r} was to be free as {name!r}, but the exporter wrote "
                    f"{port.shape[dim]!r}."
                )


def _free_axes(session: Session, rung: Rung) -> tuple[str, ...]:
    used = {size for port in session.inputs for size in port.shape}
    return tuple(name for name in rung.axes.values() if name in used)


def _deliver(
    session: Session, target: Path, rung: Rung, probes: tuple[Probe, ...], refused: list[Refusal], start: float
) -> Exported:
    source = Path(session.structure.path)
    files = [target, *(target.with_name(name) for name in session.structure.external)]
    for file in reversed(files):  # the weights first: a file is never there without them
        source.with_name(file.name).replace(file)
    return Exported(
        path=str(target),
        files=tuple(str(file) for file in files),
        size_bytes=session.structure.size_bytes,
        sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
        opset=session.structure.opset,
        rung=rung.name,
        batch=session.batch,
        axes=_free_axes(session, rung),
        inputs=session.inputs,
        outputs=session.outputs,
        metadata=session.metadata,
        probes=probes,
        refused=tuple(refused),
        seconds=time.perf_counter() - start,
    )


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _log.debug("%s: %s", record.name, record.getMessage())


@functools.cache
def _operators(read: Callable[..., Any]) -> Callable[..., Any]:
    """The exporter's table of operators by operator set, read when it is asked for the first time."""
    return functools.cache(read)


@contextlib.contextmanager
def _operators_read_once() -> Iterator[None]:
    """Have the source of the exporter's 500 operators parsed once, not for every file: a third of a small one."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        registry, own = cast(Any, ONNXRegistry), vars(ONNXRegistry)["from_torchlib"]
    except (ImportError, KeyError):  # another version of torch keeps its table elsewhere
        yield
        return
    registry.from_torchlib = staticmethod(_operators(registry.from_torchlib))
    try:
        yield
    finally:
        registry.from_torchlib = own


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Send what the exporter prints, warns and logs to our own log, at the level of details."""
    known = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    loggers = [logger for logger in known if logger.handlers and logger.name.partition(".")[0] in _CHATTY]
    loggers += [logger for name in _CHATTY if (logger := logging.getLogger(name)) not in loggers]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_Forward()], False
    printed = io.StringIO()
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagate
        for warning in caught:
            _log.debug("%s: %s", warning.category.__name__, warning.message)
        if printed.getvalue():
            _log.debug("%s", _ANSI.sub("", printed.getvalue()))


def _cause(error: BaseException) -> str:
    """The innermost reason, on one line, without colours: the exporter wraps it in pages of advice."""
    _log.debug("%s", _ANSI.sub("", str(error)))
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _ANSI.sub("", str(error)).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {' '.join(lines[0].split())[:400]}"
