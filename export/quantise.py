"""Files in smaller numbers, offered only where they were measured to be faster and to lose no more than is allowed.

Three ways: ``int8`` quantises weights and activations where calibration data say how far activations reach (QDQ, one
scale a channel); ``int8-weights`` stores the weights of linear layers in eight bits and nothing else; ``fp16`` halves
everything. Dynamic quantisation is one more for networks without convolutions: there onnxruntime has no fast kernels
for it (six to eleven times slower was measured), so that it is refused.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from metaprune.errors import ConfigError, InputError, MetapruneError, UnsupportedModelError
from metaprune.export.devices import Device
from metaprune.export.session import open_session
from metaprune.measure.accuracy import Paired, Split, accuracy, compare
from metaprune.measure.fresh import in_fresh_process
from metaprune.measure.latency import Comparison, latency

Method = Literal["int8", "int8-weights", "int8-dynamic", "fp16"]
METHODS: tuple[Method, ...] = get_args(Method)
SAMPLES = 256  # to calibrate with
GAIN = 0.05  # share of the time that must be gained, or the file is not worth its risk
_LINEAR = ("MatMul", "Gemm")
_JOB = Path(__file__).with_name("_quantise_job.py")
_LIMIT_S = 1800.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """Inputs that say how far activations reach.

    Args:
        about: What they are, written into the file, e.g. ``"256 of digits/train, seed 0"``.
        feeds: Inputs by name, one mapping a batch.
    """

    about: str
    feeds: Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One file in smaller numbers, and whether it is worth having.

    Args:
        method: How it was made.
        path: The file; empty where none could be made.
        offered: It is faster, and loses no more than is allowed.
        reason: Why, or why not, in one sentence.
        size_bytes: Its size on disk.
        latency: Its time against that of the file it was made from.
        difference: Its accuracy against that of this file, paired, on the split that decides.
        calibration: What it was calibrated with; empty where nothing is needed.
        notes: What else was found.
    """

    method: str
    path: str
    offered: bool
    reason: str
    size_bytes: int = 0
    latency: Comparison | None = None
    difference: Paired | None = None
    calibration: str = ""
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "method": self.method,
            "path": self.path,
            "offered": self.offered,
            "reason": self.reason,
            "size_bytes": self.size_bytes,
            "latency": None if self.latency is None else self.latency.to_json(),
            "difference": None if self.difference is None else self.difference.to_json(),
            "calibration": self.calibration,
        }


def calibration_of(path: str | Path, split: Any, samples: int = SAMPLES, seed: int = 0) -> Calibration:
    """Calibration inputs from a training split.

    Args:
        path: The file that they are for.
        split: Where they are drawn from; never the one that accuracy is judged on.
        samples: How many, or all there are.
        seed: Draws them.

    Raises:
        InputError: They do not fit the file.
    """
    session = open_session(path, threads=1)
    if len(session.inputs) != 1:
        raise InputError(f"a split feeds one input, but {Path(path).name!r} has {len(session.inputs)}. Give feeds.")
    chosen = split.subset(min(samples, len(split)), seed)
    name, size = session.inputs[0].name, session.batch or 32
    feeds = [{name: x.cpu().numpy()} for x, _ in chosen.batches(size) if len(x) == size or session.batch is None]
    return Calibration(f"{len(chosen)} samples of {split.name}, seed {seed}", feeds)


def quantise(
    path: str | Path, target: str | Path, method: Method, *, device: Device, calibration: Calibration | None = None
) -> Path:
    """Write a file in smaller numbers.

    Args:
        path: A file in float32.
        target: The file to write.
        method: How.
        device: What it is for: types of activations and the range of weights hang on it.
        calibration: For ``int8``.

    Raises:
        ConfigError: The method is unknown, or lacks calibration data.
        InputError: The file cannot be used, or the calibration data do not fit it.
        UnsupportedModelError: The method does nothing good for this network; the message says why.
    """
    if method not in METHODS:
        raise ConfigError(f"a method must be one of {', '.join(METHODS)}, but it is {method!r}.")
    session = open_session(path, threads=1)
    operators = set(session.structure.operators)
    if method == "int8-dynamic" and "Conv" in operators:
        raise UnsupportedModelError(
            "dynamic quantisation is for networks without convolutions, but this one has some: onnxruntime runs them "
            "in integers six to eleven times slower. Use int8, which needs calibration data."
        )
    if method in ("int8-weights", "int8-dynamic") and not operators & {*_LINEAR, "LSTM", "GRU"}:
        raise UnsupportedModelError(f"{method} is for linear layers, but the network has none.")
    told: dict[str, str] = {"metaprune.precision": method}
    if method == "int8":
        if calibration is None or not calibration.feeds:
            raise ConfigError("int8 needs calibration data, but none were given. Give training samples.")
        session.run(calibration.feeds[0])  # says what does not fit
        told["metaprune.calibration"] = calibration.about
    with tempfile.TemporaryDirectory(prefix="metaprune-") as folder:
        made = Path(folder) / Path(target).name
        given = [Path(folder) / f"{k}.npz" for k in range(len(calibration.feeds) if calibration is not None else 0)]
        for file, feeds in zip(given, calibration.feeds if calibration is not None else ()):
            np.savez(file, *(feeds[port.name] for port in session.inputs))  # names of ports may be no names of files
        job = {
            "method": method,
            "path": str(path),
            "target": str(made),
            "names": [port.name for port in session.inputs],
            "feeds": list(map(str, given)),
            "activations": device.activations,
            "reduce_range": device.reduce_range,
        }
        try:
            in_fresh_process(_JOB, job, limit_s=_LIMIT_S)
        except InputError as error:
            raise UnsupportedModelError(f"{method} is not possible for this network: {error}") from error
        model = onnx.load(made)
        for name, text in told.items():
            model.metadata_props.add(key=name, value=text)
        _clean(model)
        onnx.save(model, target)
    findings = open_session(target, threads=1).structure.findings
    if findings:
        Path(target).unlink()
        raise UnsupportedModelError(f"{method} is not possible for this network: {findings[0]}.")
    return Path(target)


def offers(
    path: str | Path,
    folder: str | Path,
    *,
    device: Device,
    methods: Sequence[Method],
    calibration: Calibration | None = None,
    judge: Split | None = None,
    max_drop: float = 0.5,
    seconds: float = 2.0,
    limit_s: float = 60.0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> tuple[Offer, ...]:
    """Make files in smaller numbers, measure them, and say which are worth having.

    Args:
        path: A file in float32.
        folder: Where they go, named after it; those that are not offered are deleted.
        device: What they are for.
        methods: Ways to try.
        calibration: For ``int8``.
        judge: Decides about accuracy, so it must not be the split that is reported; None offers nothing that is not
            needed for the device.
        max_drop: Points of accuracy that may be lost: the paired 95 % interval must exclude more.
        seconds: Time of measuring at least.
        limit_s: Time of measuring at most.
        seed: Of the measurement.
        progress: Is told the share that is done.
    """
    made: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for method in methods:
        target = Path(folder) / f"{Path(path).stem}.{method}.onnx"
        try:
            made[method] = quantise(path, target, method, device=device, calibration=calibration)
        except MetapruneError as error:
            failed[method] = str(error)
    timed = {}
    if made:
        times = latency([path, *made.values()], seconds=seconds, limit_s=limit_s, seed=seed, progress=progress)
        timed = dict(zip(made, times.comparisons))
    own = None if judge is None or not made else accuracy(open_session(path, threads=1).predict, judge)
    found = [Offer(method=way, path="", offered=False, reason=reason) for way, reason in failed.items()]
    for way, file in made.items():
        lost = None if judge is None or own is None else compare(own, accuracy(_predictor(file), judge))
        offered, reason = _verdict(timed[way], lost, device, max_drop)
        found.append(
            Offer(
                method=way,
                path=str(file) if offered else "",
                offered=offered,
                reason=reason,
                size_bytes=file.stat().st_size,
                latency=timed[way],
                difference=lost,
                calibration=calibration.about if calibration is not None and way == "int8" else "",
            )
        )
        if not offered:
            file.unlink()
    order = list(map(str, methods))
    return tuple(sorted(found, key=lambda offer: order.index(offer.method)))


def _predictor(path: Path) -> Any:
    return open_session(path, threads=1).predict


def _verdict(timed: Comparison, lost: Paired | None, device: Device, max_drop: float) -> tuple[bool, str]:
    if lost is None:
        return False, "its accuracy cannot be judged without a split with labels"
    if lost.low < -max_drop:
        return False, f"{max_drop:g} points may be lost, and a loss of {-lost.low:.2f} is not excluded: {lost}"
    if not device.runtime:
        return True, f"{device.name} takes no other numbers; its speed there is not known; {lost}"
    if device.label == "projected":
        return False, f"its speed on {device.name} cannot be measured here ({timed.verdict} on this machine); {lost}"
    if timed.verdict != "faster" or timed.ratio.value > 1 - GAIN:
        return False, f"it must take {GAIN:.0%} less time, but takes x{timed.ratio.value:.3f} ({timed.verdict}); {lost}"
    return True, f"x{timed.ratio.value:.3f} the time; {lost}"


def _clean(model: ModelProto) -> None:
    """Nothing that names the machine, and no weight that nobody reads any more."""
    read = {name for node in model.graph.node for name in node.input} | {port.name for port in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.producer_name, model.producer_version = "metaprune", ""
    for node in model.graph.node:
        node.doc_string = ""
