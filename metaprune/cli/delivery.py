"""From a result to files that can be deployed, each of them proved: ONNX, checks, latency, report."""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from metaprune.budget import parse_budget
from metaprune.cli.screen import Watch
from metaprune.cli.summary import DENSE, DENSE_WEIGHTS, PRUNED, REPORT
from metaprune.config import PruneOptions
from metaprune.errors import InputError, MetapruneError, ResourceError
from metaprune.export import Exported, Validation, export, validate, weights_hash
from metaprune.export.devices import Device, fits, load_device
from metaprune.measure import Latency, latency, profile, shares_by_module
from metaprune.pipeline import TOLERANCE, Result
from metaprune.planning import RoundTo, plan
from metaprune.recovery import Recovery
from metaprune.report import Findings, numbers, write
from metaprune.subject import Subject

BENCH_S = 2.0
ANY_SIZE = "any-size.onnx"
_PROFILE_MS, _PROFILE_CALLS = 1000.0, (5, 50)  # of each file: as many calls as fit into that time, within these bounds
_REFERENCE_S = 30.0  # patience with ONNX's own evaluator, which is slow on large networks

WHAT = {
    PRUNED: "the pruned network for any ONNX runtime",
    DENSE: "the dense one, to compare with",
    "model.safetensors": "weights of the pruned network, for metaprune.load",
    DENSE_WEIGHTS: "weights of the dense network, which was trained here",
    "plan.json": "which units stay on which axis",
    "result.json": "the numbers of this page",
    "run.json": "what was asked, and the versions of all libraries",
}


@dataclass(kw_only=True)
class Delivery:
    """What was made from a result, and what was found out about it.

    Attributes:
        folder: Where the files are.
        exported: The pruned file, or None.
        validation: Its checks, or None.
        latency: Dense and pruned file in pairs, or None.
        times: Milliseconds of the dense and of the pruned file by path of the module, or None.
        checks: Name, outcome and finding of everything that was checked.
        notes: What a user should know.
        device: What the device makes of the network: its profile's name, label and alignment, and projected latencies.
        seconds: Time of each step.
    """

    folder: Path
    exported: Exported | None = None
    validation: Validation | None = None
    latency: Latency | None = None
    times: tuple[dict[str, float], dict[str, float]] | None = None
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    device: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def time_modules(self, watch: Watch) -> None:
        """Where the time of both files goes, where they have been timed."""
        if self.latency is None:
            return
        with _timed(self, "profile", "Timing every module", watch):
            try:
                dense, pruned = (
                    _by_module(self.folder / name, arm.p50.value)
                    for name, arm in zip((DENSE, PRUNED), self.latency.arms, strict=False)
                )
            except (InputError, ResourceError) as error:  # the result is good without it
                self.notes.append(f"The modules could not be timed: {error}")
            else:
                self.times = dense, pruned

    def write_report(
        self,
        result: Result,
        subject: Subject,
        options: PruneOptions,
        recoveries: Sequence[Recovery],
        told: dict[str, Any],
    ) -> None:
        """The page for people."""
        findings = Findings(
            result=result,
            model=subject.source.spec,
            data=options.data,
            budget=told["budget"],
            recoveries=[recovery.name for recovery in recoveries],
            latency=self.latency,
            times=self.times,
            checks=self.checks,
            notes=self.notes,
            commands=[told["reproduce"], *told["next"]],
            files={name: what for name, what in WHAT.items() if (self.folder / name).exists()},
        )
        write(findings, self.folder / REPORT)


def deliver(
    result: Result,
    dense: nn.Module,
    subject: Subject,
    options: PruneOptions,
    folder: Path,
    watch: Watch,
    *,
    alone: bool = False,
) -> Delivery:
    """Export, check and time the pruned network; a failed check is recorded, not raised.

    Args:
        result: What `prune` gave; it has been saved to `folder`.
        dense: The dense network.
        subject: What the user named.
        options: What the user asked for.
        folder: Where the files go.
        watch: Is told about the steps.
        alone: Leave the dense network out, so that nothing is timed.
    """
    delivery = Delivery(folder=folder)
    delivery.checks.append(
        {
            "name": "verification",
            "passed": result.verification.passed(TOLERANCE),
            "detail": f"the cut network equals the masked one to {result.verification.max_error:.2e} of the largest "
            f"output on {result.verification.samples} inputs ({TOLERANCE:g} may be)"
            f"{', in float64' if result.verification.doubled else ''}.",
        }
    )
    if result.surgery.get("way") == "graph":
        delivery.notes.append(
            "The network is now a torch.fx.GraphModule of its calls, because its own code does not fit the smaller "
            f"sizes: {result.surgery['reason']}"
        )
    if not options.export:
        return delivery
    with _timed(delivery, "export", "Exporting to ONNX", watch):
        _export(delivery, result, dense, subject, options, alone)
    if delivery.exported is None:
        return delivery
    with _timed(delivery, "validate", "Checking the ONNX file", watch):
        _validate(delivery, result, subject, watch)
    if options.bench and (folder / DENSE).exists():
        with _timed(delivery, "bench", "Timing dense against pruned", watch):
            _bench(delivery, result, options, watch)
    if options.device is not None:
        _for_device(delivery, load_device(options.device), result, 1 if options.round_to is None else options.round_to)
    return delivery


def told_in_file(folder: Path, budget: str, accuracies: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What the file of a pruned network says about how it came about.

    Args:
        folder: The result, with its plan.
        budget: What was asked for.
        accuracies: By name, as plain data.
    """
    plan_hash = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    measured = {
        f"metaprune.accuracy.{name}": f"{found['value']:.2f} % of {found['n']} {found['split']} samples"
        for name, found in accuracies.items()
    }
    return {**measured, "metaprune.budget": str(parse_budget(budget)), "metaprune.plan": plan_hash}


def _export(
    delivery: Delivery, result: Result, dense: nn.Module, subject: Subject, options: PruneOptions, alone: bool
) -> None:
    about = {"metaprune.model": subject.source.spec, "metaprune.source": weights_hash(dense)}
    accuracies = {name: found.to_json() for name, found in result.accuracy.items()}
    example = subject.source.example_inputs
    try:
        delivery.exported = export(
            result.model,
            example,
            delivery.folder / PRUNED,
            metadata={**about, **told_in_file(delivery.folder, options.budget, accuracies)},
            overwrite=True,
        )
    except MetapruneError as error:
        delivery.checks.append({"name": "export", "passed": False, "detail": str(error)})
        return
    if alone:
        return
    try:
        export(dense, example, delivery.folder / DENSE, metadata=about, overwrite=True)
    except MetapruneError as error:
        delivery.notes.append(f"The dense network could not be exported, so that nothing is timed: {error}")


def _validate(delivery: Delivery, result: Result, subject: Subject, watch: Watch) -> None:
    test = None if subject.dataset is None or not result.accuracy else subject.dataset.test
    delivery.validation = validate(
        delivery.folder / PRUNED,
        result.model,
        subject.source.example_inputs if test is None else test,
        dense=result.accuracy.get("dense"),
        reference_limit_s=_REFERENCE_S,
        progress=watch.samples("answers of the file"),
    )
    delivery.checks += [
        {"name": check.name, "passed": check.passed, "detail": check.detail} for check in delivery.validation.checks
    ]


def _bench(delivery: Delivery, result: Result, options: PruneOptions, watch: Watch) -> None:
    files = [delivery.folder / DENSE, delivery.folder / PRUNED]
    try:
        with tempfile.TemporaryDirectory(prefix="metaprune-") as folder:
            if options.device is not None and options.round_to not in (None, 1):
                files += _of_any_size(result, options, Path(folder))
            delivery.latency = latency(
                files, seconds=BENCH_S, seed=options.seed, progress=watch.share("calls in random order")
            )
    except (InputError, ResourceError) as error:  # the result is good without it
        delivery.notes.append(f"The files could not be timed: {error}")


def _by_module(file: Path, total_ms: float) -> dict[str, float]:
    """Milliseconds of every module, of a file that takes `total_ms` in all."""
    least, most = _PROFILE_CALLS
    nodes = profile(file, rounds=int(min(most, max(least, _PROFILE_MS / total_ms))))
    return {path: share * total_ms for path, share in shares_by_module(nodes).items()}


def _of_any_size(result: Result, options: PruneOptions, folder: Path) -> list[Path]:
    """What alignment refuses: the network at the same budget with sizes as they come, to be timed beside the others."""
    loose = plan(result.network, options.budget, "l2", round_to=1, floor=options.floor, seed=options.seed)
    try:
        slim = result.network.cut(loose).module
        return [Path(export(slim, result.network.example_inputs, folder / ANY_SIZE).path)]
    except MetapruneError:  # it is shown where it can be, and decides nothing
        return []


def _multiples(round_to: RoundTo) -> str:
    if isinstance(round_to, int):
        return f"multiples of {round_to}"
    return f"multiples of {', '.join(f'{size} ({kind})' for kind, size in round_to.items())}"


def _for_device(delivery: Delivery, device: Device, result: Result, round_to: RoundTo) -> None:
    """Whether the file fits the device, and what two ceilings say of its time there."""
    found = fits(device, delivery.folder / PRUNED)
    if found:
        passed = all(fit.passed for fit in found)
        detail = f"on {device.name}, {'; '.join(map(str, found))}."
        delivery.checks.append({"name": "device", "passed": passed, "detail": detail})
    times = {
        name: device.projected_ms(figures.macs, figures.bytes)
        for name, figures in (("before", result.before), ("after", result.after))
    }
    delivery.device = {
        "name": device.name,
        "label": device.label,
        "round_to": round_to,
        "precision": list(device.precision),
        "projected_ms": {name: None if time is None else time.value for name, time in times.items()},
    }
    if device.label != "measured":
        said = "Its latencies are those of this machine."
        if times["before"] is not None and times["after"] is not None:
            dense, pruned = (numbers.milliseconds(time.value) for time in times.values() if time is not None)
            said += (
                f" On {device.name} two ceilings give {dense} for the dense and {pruned} for the pruned (projected)."
            )
        delivery.notes.append(said)
    if delivery.latency is not None and len(delivery.latency.comparisons) > 1:
        ours, loose = delivery.latency.comparisons
        word = "Refused" if loose.ratio.value > ours.ratio.value else "Not taken"
        delivery.notes.append(
            f"{word}: as few MACs with sizes of any number take {numbers.ratio(loose.ratio.value)} the time of the "
            f"dense network here ({loose.verdict}); in {_multiples(round_to)} it is {numbers.ratio(ours.ratio.value)}."
        )


@contextmanager
def _timed(delivery: Delivery, name: str, description: str, watch: Watch) -> Iterator[None]:
    watch.step(description)
    start = time.perf_counter()
    yield
    delivery.seconds[name] = round(time.perf_counter() - start, 3)
    watch.end()
