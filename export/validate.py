"""Five checks that a file is the network: from its form to its accuracy on a whole split.

1. structure: the rules of ONNX, nothing from training, no path of the machine it was made on;
2. numeric: onnxruntime against a float64 copy of the network, relative to torch's own error;
3. third opinion: the evaluator that comes with ONNX, and onnxruntime without its own rewriting; the vote names the
   culprit: exporter, runtime or rewriting;
4. agreement: the same answer for every sample;
5. accuracy: of the file, on the whole split, and paired with the dense network.

A check that cannot be made says why and counts neither way. Where numbers are wrong, the node to look at is named.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metaprune.errors import ConfigError, GateError, InputError, ResourceError
from metaprune.export.culprit import Culprit, find_culprit
from metaprune.export.example import Example, as_arrays, as_example
from metaprune.export.numeric import Judge, Truth
from metaprune.export.session import Session, first_line, open_session
from metaprune.measure.accuracy import Accuracy, Split, compare, of_hits
from metaprune.measure.fresh import in_fresh_process

_REFERENCE = Path(__file__).with_name("_reference_job.py")
_ALONE = 1e-5  # without a network: largest difference of two ways to run the file, as a share of the scale
_LISTED = 20  # differing samples that are named
_NO_ANSWERS = "not made: it needs the network, and scores of several answers per sample."


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """What a file in some kind of numbers may differ from the network in.

    Args:
        numbers: What it is called.
        share: Largest error as a share of the largest output; None for what rounding in float32 explains.
        ratio: Least ratio of signal to noise in dB, where that is looked at.
        agree: Share of samples whose answer must be the same, ties apart.
        points: Accuracy that may be lost, in points.
    """

    numbers: str
    share: float | None
    ratio: float | None
    agree: float
    points: float


_EXACT = _Gate(numbers="float32", share=None, ratio=None, agree=0.999, points=0.1)
_GATES = {
    "fp16": _Gate(numbers="fp16", share=5e-3, ratio=None, agree=0.995, points=0.2),
    "int8": _Gate(numbers="int8", share=0.25, ratio=20.0, agree=0.98, points=0.5),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Args:
        name: Which one.
        passed: Its outcome; None if it could not be made.
        detail: What was found, or why it was not made, in one sentence.
        values: The numbers behind it, as plain data.
    """

    name: str
    passed: bool | None
    detail: str
    values: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {"name": self.name, "passed": self.passed, "detail": self.detail, "values": self.values}


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The checks of one file.

    Args:
        path: The file.
        checks: The checks, in order.
        accuracy: Accuracy of the file on the split, where one was given.
        culprit: The node that is wrong, where numbers are and one can be named.
    """

    path: str
    checks: tuple[Check, ...]
    accuracy: Accuracy | None = None
    culprit: Culprit | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def require(self) -> "Validation":
        """Itself, if no check failed.

        Raises:
            GateError: One did; each is named with what was found.
        """
        failed = [f"{check.name}: {check.detail}" for check in self.checks if check.passed is False]
        if failed:
            named = "" if self.culprit is None else f" Look at {self.culprit}."
            raise GateError(
                f"{Path(self.path).name!r} fails {len(failed)} of {len(self.checks)} checks. {' '.join(failed)}{named}"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "path": self.path,
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "accuracy": None if self.accuracy is None else self.accuracy.to_json(),
            "culprit": None if self.culprit is None else self.culprit.to_json(),
        }


def validate(
    path: str | Path,
    model: nn.Module | None = None,
    data: Any = None,
    *,
    dense: Accuracy | None = None,
    max_drop: float | None = None,
    samples: int = 64,
    batch_size: int = 500,
    threads: int | None = None,
    reference_limit_s: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Check a file, as far as what is given allows.

    Args:
        path: An ONNX file.
        model: The network that it should be; None checks the file alone: its structure, and that three ways to run it
            agree. The model stays as it is.
        data: A split (all checks), or inputs as for an export (no accuracy); None draws inputs from noise.
        dense: Accuracy of the dense network on the same split, to compare with.
        max_drop: Points of accuracy that may be lost against `dense`: the check fails where the paired 95 % interval
            does not exclude a larger loss. None reports the difference and passes.
        samples: Samples for the numeric check, from the front of a split.
        batch_size: Samples per call on a split.
        threads: Threads of onnxruntime; None for one per core.
        reference_limit_s: Time that the slow evaluator may take in seconds; 0 leaves it out.
        progress: Called with the samples done and the samples in all.

    Raises:
        ConfigError: `max_drop` is given without `dense`, or a number is out of range.
        InputError: The file cannot be used, or the data do not fit it or the network.
        UnsupportedModelError: The network cannot be copied, gives something else than tensors, or something else
            every time.
    """
    if samples < 1 or batch_size < 1 or (max_drop is not None and max_drop < 0):
        raise ConfigError(
            f"`samples >= 1`, `batch_size >= 1` and `max_drop >= 0` must hold, but samples={samples}, "
            f"batch_size={batch_size}, max_drop={max_drop}."
        )
    if max_drop is not None and dense is None:
        raise ConfigError("`max_drop` is a loss against the dense network, but its accuracy is not given as `dense`.")
    session = open_session(path, threads=threads)
    split: Split | None = data if hasattr(data, "batches") else None
    judge = None if model is None else Judge(model)
    example = _inputs(session, split, data, samples)
    truth = None if judge is None else _truth(judge, example)
    outputs = session.run_batched(session.feeds(example))
    gate = _GATES.get(session.metadata.get("metaprune.precision", "").partition("-")[0], _EXACT)
    checks = [
        _structure(session),
        _numeric(truth, outputs, gate),
        _third_opinion(session, example, truth, outputs, gate, threads, reference_limit_s),
    ]
    noise = 0.0 if truth is None else 2 * truth.deviation(outputs).tolerance
    wrong = checks[1].passed is False and gate is _EXACT  # smaller numbers are off in every node
    culprit = find_culprit(session, judge, example) if judge is not None and wrong else None
    if split is None:
        answers = _answers_on(truth, outputs, noise)
        return Validation(
            path=str(path),
            checks=(
                *checks,
                _agreement(answers, gate) if answers else Check(name="agreement", passed=None, detail=_NO_ANSWERS),
                Check(name="accuracy", passed=None, detail="not made: it needs a split with labels."),
            ),
            culprit=culprit,
        )
    answers = _answers(session, judge, split, batch_size, noise, progress)
    return Validation(
        path=str(path),
        checks=(*checks, _agreement(answers, gate), _accuracy(answers, split.name, gate, dense, max_drop)),
        accuracy=answers.of_file(split.name),
        culprit=culprit,
    )


def _inputs(session: Session, split: Split | None, data: Any, samples: int) -> Example:
    if split is not None:
        x, _ = next(split.batches(samples))
        return as_example(x[:samples])
    if data is not None:
        example = as_example(data).cpu()
        return example.head(samples)
    noise = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}
    for port in session.inputs:
        free = [str(size) for size in port.shape[1:] if not isinstance(size, int)]
        if free:
            raise InputError(f"input {port.name!r} has free sizes ({', '.join(free)}): give inputs to run the file on.")
        shape = [size if isinstance(size, int) else 4 for size in port.shape]
        value = torch.randn(shape, generator=noise)
        drawn[port.name] = value if port.dtype == "float32" else torch.ones(shape, dtype=getattr(torch, port.dtype))
    return Example((), drawn)


def _truth(judge: Judge, example: Example) -> Truth:
    try:
        truth = judge.truth(example)
    except RuntimeError as error:
        raise InputError(f"the network must run on the data, but says: {first_line(error)}") from error
    judge.check_repeats(truth, example)
    return truth


def _structure(session: Session) -> Check:
    found = session.structure
    detail = (
        f"opset {found.opset}, {found.nodes} nodes, {found.parameters} parameters, {found.size_bytes} bytes."
        if not found.findings
        else f"{len(found.findings)} findings: {'; '.join(found.findings[:3])}."
    )
    return Check(name="structure", passed=not found.findings, detail=detail, values=found.to_json())


def _numeric(truth: Truth | None, outputs: Mapping[str, NDArray[Any]], gate: _Gate) -> Check:
    if truth is None:
        return Check(name="numeric", passed=None, detail="not made: it needs the network.")
    deviation = truth.deviation(outputs)
    values = {**deviation.to_json(), "n": len(next(iter(truth.single.values()))), "label": "measured"}
    if gate.share is None:
        return Check(name="numeric", passed=deviation.passed, detail=f"{deviation}.", values=values)
    passed = deviation.relative <= gate.share
    detail = f"in {gate.numbers}, error {deviation.relative:.1e} of the largest output, {gate.share:g} may be"
    if gate.ratio is not None and np.isfinite(deviation.relative):
        ratio = _signal_to_noise(truth, outputs)
        passed, values["sqnr_db"] = passed and ratio >= gate.ratio, ratio
        detail += f"; signal to noise {ratio:.1f} dB, at least {gate.ratio:g} must be"
    return Check(name="numeric", passed=passed, detail=f"{detail}.", values=values)


def _signal_to_noise(truth: Truth, outputs: Mapping[str, NDArray[Any]]) -> float:
    """Power of the network's outputs over that of their errors in dB, the worst of all outputs."""
    ratios = []
    for wanted, got in zip(truth.single.values(), outputs.values()):
        if wanted.dtype.kind == "f":
            noise = float(np.mean((wanted.astype(np.float64) - got) ** 2))
            ratios.append(
                10 * np.log10(max(float(np.mean(wanted.astype(np.float64) ** 2)), 1e-300) / max(noise, 1e-300))
            )
    return float(min(ratios, default=np.inf))


def _third_opinion(
    session: Session,
    example: Example,
    truth: Truth | None,
    outputs: dict[str, NDArray[Any]],
    gate: _Gate,
    threads: int | None,
    limit_s: float,
) -> Check:
    inputs = session.feeds(example)
    plain = open_session(session.structure.path, threads=threads, optimise=False).run_batched(inputs)
    base = truth or Truth(single=plain, source="file as it is written")
    errors = {"optimised": base.deviation(outputs), "as written": base.deviation(plain)}
    rows = session.batch or 2
    few = {
        name: value[:rows] if value.ndim and len(value) == example.batch else value for name, value in inputs.items()
    }
    missing = ""
    if limit_s <= 0:
        missing = "left out"
    elif session.batch is not None and example.batch is not None and example.batch < session.batch:
        missing = f"left out, as the file takes {session.batch} samples at once and {example.batch} were given"
    else:
        try:
            answer = _reference(session, few, limit_s)
            errors["reference"] = base.deviation(answer, None if example.batch is None else rows)
        except ResourceError:
            missing = f"not done after {limit_s:g} s"
        except InputError as error:
            missing = f"unable to run the file ({error})"
    bad = {way for way, error in errors.items() if not error.passed and not error.relative <= (gate.share or 0.0)}
    verdict = _verdict(bad, truth is not None)
    found = ", ".join(f"{way} {deviation.relative:.1e}" for way, deviation in errors.items())
    return Check(
        name="third opinion",
        # Where the network agrees with onnxruntime, an evaluator that stands alone is the one that is wrong.
        passed=not bad or (truth is not None and bad == {"reference"}),
        detail=f"errors as a share of the output: {found}{missing and f'; reference evaluator {missing}'}.{verdict}",
        values={"ways": {way: deviation.to_json() for way, deviation in errors.items()}, "missing": missing},
    )


def _verdict(bad: set[str], with_network: bool) -> str:
    """Who is to blame, from who is out of line."""
    if not bad:
        return ""
    if bad == {"optimised"}:
        return " The rewriting of onnxruntime changes the result."
    if bad == {"reference"}:
        return " The reference evaluator stands alone." if with_network else " onnxruntime and the reference differ."
    if "reference" in bad:
        return " All ways to run the file agree on another result than the network: the file is another network."
    return " onnxruntime differs, whether it rewrites the file or not." if with_network else ""


def _reference(session: Session, inputs: Mapping[str, NDArray[Any]], limit_s: float) -> dict[str, NDArray[Any]]:
    with tempfile.TemporaryDirectory(prefix="metaprune-") as folder:
        given, answers = Path(folder) / "feeds.npz", Path(folder) / "outputs.npz"
        np.savez(given, *inputs.values())  # names of ports may be no names of files
        job = {
            "path": str(session.structure.path),
            "names": list(inputs),
            "feeds": str(given),
            "outputs": str(answers),
        }
        in_fresh_process(_REFERENCE, job, limit_s=limit_s)
        with np.load(answers) as archive:
            return {port.name: archive[f"arr_{index}"] for index, port in enumerate(session.outputs)}


@dataclass(frozen=True, eq=False, kw_only=True)
class _Answers:
    """Top-1 answers on a whole split: of the file, and of the network where there is one.

    N samples; `margin_N` is the network's distance from its first to its second answer, in units of the output, and
    `noise` the difference of outputs that rounding alone makes.
    """

    label_N: NDArray[np.int64]
    file_N: NDArray[np.int64]
    network_N: NDArray[np.int64] | None
    margin_N: NDArray[np.float64] | None
    noise: float

    def of_file(self, split: str) -> Accuracy:
        return of_hits(self.file_N == self.label_N, split)

    def of_network(self, split: str) -> Accuracy | None:
        return None if self.network_N is None else of_hits(self.network_N == self.label_N, split)


def _answers(
    session: Session,
    judge: Judge | None,
    split: Split,
    batch_size: int,
    noise: float,
    progress: Callable[[int, int], None] | None,
) -> _Answers:
    labels, file, network, margins = [], [], [], []
    done = 0
    for x, y in split.batches(batch_size):
        score_NC = session.predict(x).numpy()
        if score_NC.ndim != 2 or len(score_NC) != len(y):
            raise InputError(
                f"accuracy needs scores of shape ({len(y)}, classes), but the file gives {score_NC.shape}."
            )
        labels.append(y.cpu().numpy())
        file.append(score_NC.argmax(1))
        if judge is not None:
            own_NC = next(iter(as_arrays(Example((x.cpu(),), {}).call(judge.single)).values()))
            network.append(own_NC.argmax(1))
            margins.append(_margin(own_NC))
        done += len(y)
        if progress is not None:
            progress(done, len(split))
    return _Answers(
        label_N=np.concatenate(labels),
        file_N=np.concatenate(file),
        network_N=np.concatenate(network) if network else None,
        margin_N=np.concatenate(margins) if margins else None,
        noise=noise,
    )


def _answers_on(truth: Truth | None, outputs: Mapping[str, NDArray[Any]], noise: float) -> _Answers | None:
    """The same for one batch without labels; None where the first output is no choice between answers."""
    got = next(iter(outputs.values()))
    if truth is None:
        return None
    own = next(iter(truth.single.values()))
    if own.ndim < 2 or own.shape[-1] < 2 or own.dtype.kind != "f" or got.shape != own.shape:
        return None
    file, network = got.argmax(-1).ravel(), own.argmax(-1).ravel()
    return _Answers(label_N=network, file_N=file, network_N=network, margin_N=_margin(own).ravel(), noise=noise)


def _margin(score_NC: NDArray[Any]) -> NDArray[np.float64]:
    """Distance from the best to the second-best answer along the last axis; infinite where there is only one."""
    if score_NC.shape[-1] < 2:
        return np.full(score_NC.shape[:-1], np.inf)
    best_NC = np.partition(score_NC.astype(np.float64), -2, axis=-1)
    return np.asarray(best_NC[..., -1] - best_NC[..., -2])


def _agreement(answers: _Answers, gate: _Gate) -> Check:
    """The same top-1 answer; where the network itself is undecided within rounding, either answer will do."""
    if answers.network_N is None or answers.margin_N is None:
        return Check(name="agreement", passed=None, detail="not made: it needs the network.")
    differ_N = answers.file_N != answers.network_N
    ties = int((differ_N & (answers.margin_N <= answers.noise)).sum())
    n, others = differ_N.size, np.flatnonzero(differ_N & (answers.margin_N > answers.noise))
    agree = 1 - len(others) / n
    listed = [{"sample": int(i), "margin": float(answers.margin_N.flat[i])} for i in others[:_LISTED]]
    detail = f"{n - int(differ_N.sum())} of {n} answers are the same" + (f", {ties} are ties" if ties else "") + "."
    return Check(
        name="agreement",
        passed=agree >= gate.agree,
        detail=detail,
        values={"value": 100 * agree, "unit": "%", "n": n, "ties": ties, "differing": listed, "label": "measured"},
    )


def _accuracy(answers: _Answers, split: str, gate: _Gate, dense: Accuracy | None, max_drop: float | None) -> Check:
    accuracy, network = answers.of_file(split), answers.of_network(split)
    values: dict[str, Any] = {"file": accuracy.to_json()}
    details, passed = [f"{accuracy}"], True
    if network is not None:
        values["network"] = network.to_json()
        change = accuracy.top1 - network.top1
        passed = (abs(change) if gate is _EXACT else -change) <= gate.points
        details.append(f"{change:+.2f} points from the network (at most {gate.points} may be)")
    if dense is not None:
        paired = compare(dense, accuracy)
        values["against_dense"] = paired.to_json()
        details.append(f"against the dense network {paired}")
        if max_drop is not None:
            passed = passed and paired.low >= -max_drop
            details.append(f"at most {max_drop} points may be lost")
    return Check(name="accuracy", passed=passed, detail="; ".join(details) + ".", values=values)
