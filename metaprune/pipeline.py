"""The whole way: trace, score, allocate, cut, verify, heal, measure."""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from metaprune.allocate import ALLOCATORS, FLOOR, Allocator, Shares
from metaprune.budget import NONZEROS, Budget, entry_budget, parse_budget
from metaprune.criteria import Criterion
from metaprune.data import Dataset, Split
from metaprune.errors import ConfigError, InputError, VerificationError
from metaprune.files import read_json, write_atomically
from metaprune.graph import Network, Verification, trace
from metaprune.graph.select import Selection
from metaprune.graph.trace import ExampleInputs
from metaprune.graph.twin import named_tensors
from metaprune.measure.accuracy import Accuracy, Paired, accuracy, compare
from metaprune.planning import CALIBRATION, Data, RoundTo, calibration_batches, context_of, plan, with_times
from metaprune.plans import Plan
from metaprune.recovery import (
    Context,
    NoProgress,
    Progress,
    Recovered,
    Recovery,
    no_metrics,
    on_device,
    resolve,
    torch_device,
)
from metaprune.shards import Shards
from metaprune.sparsity import sparsify
from metaprune.task import Task

SCHEMA = 1
TOLERANCE = 1e-5  # largest error at which a cut network counts as the masked one


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a network is worth and what it costs.

    Args:
        metrics: By name, e.g. ``accuracy`` in percent on the test split; empty where nothing was measured.
        macs: Multiply-accumulates for one sample.
        params: Parameters.
        bytes: Size of parameters and buffers in memory.
        latency_ms: Median time of one sample in milliseconds, where it was measured.
    """

    metrics: Mapping[str, float]
    macs: int
    params: int
    bytes: int
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A smaller network and how it came about.

    Args:
        model: The cut and healed network, in evaluation mode, on the CPU.
        network: The traced dense network.
        plan: What was cut.
        verification: The cut network against the masked one, before healing.
        before: The dense network.
        after: The smaller one.
        accuracy: Accuracies on the test split before, directly after the cut, and at the end; empty without a dataset.
        difference: Paired difference of the last to the first of these, in points, or None.
        recovered: What each way of healing did.
        surgery: How the network was cut: its `way` (``attributes``: still of its own class; ``graph``: a
            ``torch.fx.GraphModule``), for a graph the `reason` why not by attributes, and whether its calls were
            `checked` one by one against those of the dense network.
        seconds: Time of each step.
    """

    model: nn.Module
    network: Network
    plan: Plan
    verification: Verification
    before: Figures
    after: Figures
    accuracy: Mapping[str, Accuracy] = field(default_factory=dict)
    difference: Paired | None = None
    recovered: tuple[Recovered, ...] = ()
    surgery: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write plan, weights and example input, all that :func:`load` needs, without pickle.

        Returns:
            The folder, with ``plan.json``, ``model.safetensors``, ``example.safetensors`` and ``result.json``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.plan.save(folder / "plan.json")
        write_atomically(folder / "model.safetensors", save(stored_tensors(self.model)))
        kind, tensors = flatten_example(self.network.example_inputs)
        write_atomically(folder / "example.safetensors", save(tensors, {"kind": kind}))
        content = {"schema": SCHEMA, "network": self.network.fingerprint, **self.to_json()}
        write_atomically(folder / "result.json", json.dumps(content, indent=1).encode())
        return folder

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {
            "before": asdict(self.before),
            "after": asdict(self.after),
            "error_max": self.verification.max_error,
            "accuracy": {name: accuracy.to_json() for name, accuracy in self.accuracy.items()},
            "difference": None if self.difference is None else self.difference.to_json(),
            "surgery": dict(self.surgery),
            "recovery": [{"seconds": done.seconds, "notes": list(done.notes)} for done in self.recovered],
            "seconds": dict(self.seconds),
        }


def default_criterion(learnt: bool, seen: bool, allocator: str | Allocator) -> str:
    """What judges units where nothing else is said, with or without a metanetwork and data."""
    divide = ALLOCATORS[allocator] if isinstance(allocator, str) else allocator
    if divide.whole:  # branches leave whole, whatever their units are worth
        return "l2"
    return "metanet" if learnt else "taylor" if seen else "l2"


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    budget: str | Budget | None = None,
    *,
    pattern: str | None = None,
    data: Data | None = None,
    criterion: str | Criterion | None = None,
    allocator: str | Allocator = "global",
    recovery: str | Recovery | Sequence[Recovery] | None = "recalibrate_norm",
    recovery_options: Mapping[str, Any] | None = None,
    metanet: str | None = None,
    loss: str | Task | Callable[..., Tensor] | None = None,
    round_to: RoundTo | None = None,
    floor: Shares = FLOOR,
    ceiling: Shares = 1.0,
    rounds: int = 1,
    seed: int = 0,
    calibration: int = CALIBRATION,
    freeze: Selection | None = None,
    only: Selection | None = None,
    accelerator: str = "auto",
    folder: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    metrics: Callable[[Mapping[str, float], int], None] = no_metrics,
    step: Callable[[str], None] = lambda description: None,
) -> Result:
    """Make a network smaller: the whole way in one call.

    Args:
        model: The trained network; it is left as it is.
        example_inputs: A tensor, a sequence of positional arguments, or a mapping of keyword arguments.
        budget: What the result may cost, e.g. ``"macs=0.5"``. With ``"nonzeros=0.5"`` no unit leaves, but entries of
            weights become zero, and stay zero in every recovery.
        pattern: Where entries may stay, e.g. ``"2:4"``, as for :func:`metaprune.sparsify`; then the budget may be None.
        data: As for :func:`plan`. A dataset also gives accuracies: they are measured on its test split and decide
            nothing.
        criterion: What a unit is worth: a registered name, or an instance with options of its own, such as
            ``Obs(samples=256)``; None means ``metanet`` with a metanetwork, else ``taylor`` with data and ``l2``
            without, or with an allocator that drops whole branches.
        allocator: How much each axis may lose: a registered name, or an instance.
        recovery: Names separated by commas, instances, or None for none. Without data nothing is recovered.
        recovery_options: Options of the named recoveries, e.g. ``{"epochs": 3}``, or of one of them,
            ``{"perp.rank": 8}``.
        metanet: As for :func:`plan`.
        loss: As for :func:`plan`.
        round_to: As for :func:`plan`.
        floor: As for :func:`plan`.
        ceiling: As for :func:`plan`.
        rounds: As for :func:`plan`; the recoveries that do not train heal between them.
        seed: Decides every random number.
        calibration: Samples that criteria and the re-estimation of norms look at.
        freeze: Modules that must stay, as for :func:`metaprune.trace`.
        only: Modules that alone may be cut, likewise.
        accelerator: ``auto``, ``cpu`` or ``cuda``: where scores, training and accuracies are computed.
        folder: Where the plan and checkpoints of training go; None writes nothing.
        resume: Go on with what an earlier, killed call with the same arguments left in `folder`.
        progress: Is told about long work.
        metrics: Gets numbers of training by name and epoch.
        step: Is told what begins.

    Raises:
        ConfigError: An argument does not fit; nothing was done.
        BudgetError: The budget cannot be reached.
        InputError: Data or weights cannot be used.
        UnsupportedModelError: The network cannot be traced or cut.
        VerificationError: The cut network differs from the masked one; it is not handed out.
    """
    device = torch_device(accelerator)
    sparse = entry_budget(budget, pattern)
    budget = sparse or parse_budget(budget or "")
    if sparse:
        _only_for_units(metanet=metanet, round_to=round_to, rounds=None if rounds == 1 else rounds)
    seconds: dict[str, float] = {}
    judge = criterion or default_criterion(metanet is not None, data is not None, allocator)
    recoveries = resolve(recovery if data is not None else None, **dict(recovery_options or {}))
    dense = model if _is_on(model, device) else copy.deepcopy(model).to(device)
    with timed(seconds, "trace", step, "Tracing the network"):
        network = with_times(trace(dense, on_device(example_inputs, device), freeze=freeze, only=only), budget)
    context = replace(
        context_of(network, data, loss, seed, calibration, device),
        folder=None if folder is None else Path(folder) / "checkpoints",
        resume=resume,
        progress=progress or NoProgress(),
        metrics=metrics,
    )
    for way in recoveries:
        way.check(dense, context)
    plan_file = None if folder is None else Path(folder) / "plan.json"
    with timed(seconds, "plan", step, "Choosing what to cut"):
        if resume and plan_file is not None and plan_file.exists():
            decided = Plan.load(plan_file)
        elif sparse:
            decided = sparsify(
                network, sparse, judge, allocator, _on_device(data, device), loss, seed,
                pattern=pattern, floor=floor, ceiling=ceiling, calibration=calibration,
            )  # fmt: skip
        else:
            decided = plan(
                network, budget, judge, allocator, metanet, round_to, _on_device(data, device), loss, seed,
                floor=floor, ceiling=ceiling, calibration=calibration, rounds=rounds,
                between=[way for way in recoveries if "train" not in way.needs(dense)],
            )  # fmt: skip
        if plan_file is not None:
            decided.save(plan_file)
    with timed(seconds, "cut", step, "Cutting"):
        network.check_weights()
        made = network.cut(decided)
        slim = made.module
    with timed(seconds, "verify", step, "Verifying"):
        verification = network.verify(decided, _real_inputs(network, context), slim=slim)
        if not verification.passed(TOLERANCE):
            raise VerificationError(
                f"the cut network must equal the masked one to {TOLERANCE:g} of the largest output, but differs by "
                f"{verification.max_error:.3g}. Nothing is handed out; please report the model."
            )
    accuracies: dict[str, Accuracy] = {}
    test = data.test if isinstance(data, Dataset) and isinstance(context.task, Task) else None
    with timed(seconds, "accuracy", step, "Measuring accuracy"):
        _measure(accuracies, "dense", dense, test, device, context.progress)
        _measure(accuracies, "cut", slim, test, device, context.progress)
    context = replace(context, masks=network.masks(decided), plan=decided)
    done: list[Recovered] = []
    for way in recoveries:
        with timed(seconds, way.name, step, f"Recovering: {way.name}"):
            done.append(way.recover(slim, context))
            slim = done[-1].model
    if done:
        _measure(accuracies, "recovered", slim, test, device, context.progress)
    final = list(accuracies.values())
    return Result(
        model=slim.cpu().eval(),
        network=network,
        plan=decided,
        verification=verification,
        before=figures(network, None, final[:1]),
        after=figures(network, decided, final[-1:]),
        accuracy=accuracies,
        difference=compare(final[0], final[-1]) if final else None,
        recovered=tuple(done),
        surgery=made.to_json(),
        seconds=seconds,
    )


def _only_for_units(**given: Any) -> None:
    """Arguments that have no meaning where single entries leave were not given."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"`{name}` is for units that leave whole, not for {NONZEROS}, but it is {value!r}. Omit it."
            )


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a saved result on a fresh instance of the model class.

    Args:
        folder: What ``Result.save`` wrote.
        model: An instance as it was before pruning; its weights play no part, and it is left as it is.

    Returns:
        The smaller network, bit for bit the saved one, in evaluation mode.

    Raises:
        InputError: The folder holds no result, or a damaged one.
        ConfigError: It was made from another architecture.
    """
    folder = Path(folder)
    content = read_json(folder / "result.json", "a saved result")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(
            f"{folder} must hold a result of schema {SCHEMA}, but does not. Give what `Result.save` wrote."
        )
    saved = Plan.load(folder / "plan.json")
    network = trace(model, load_example(folder), **{name: saved.made_by.get(name) for name in ("freeze", "only")})
    stored = Shards(folder)
    if content.get("network") != network.fingerprint:
        raise ConfigError(
            f"the saved result must come from this architecture (fingerprint {network.fingerprint}), but comes from "
            f"{content.get('network')}. Build the model with the arguments that it had{_own_rules(saved)}."
        )
    slim = network.apply(saved)
    own = named_tensors(slim)
    misfits = sorted(
        name for name, entry in stored.entries.items() if name not in own or own[name].shape != entry.shape
    )
    if misfits:
        raise InputError(
            f"the weights in {folder} must fit its plan, but {misfits[0]!r} does not. The folder is damaged."
        )
    return fill(slim, dict(stored.items())).eval()


def fill(slim: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a network the tensors that :func:`stored_tensors` took from one like it; it is changed, and returned."""
    own = named_tensors(slim)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return slim


def _own_rules(plan: Plan) -> str:
    rules = plan.made_by.get("rules")
    return f", and import the rules that it was traced with ({', '.join(rules)})" if rules else ""


def load_example(folder: str | Path) -> ExampleInputs:
    """The example input of a saved result.

    Args:
        folder: What ``Result.save`` wrote.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        with safe_open(Path(folder) / "example.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            return _unflatten_example(file.metadata()["kind"], tensors)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{folder} must hold a whole result, but part of it cannot be read: {error}.") from error


@contextmanager
def timed(seconds: dict[str, float], name: str, step: Callable[[str], None], description: str) -> Iterator[None]:
    """Tell what begins, and note how long it took."""
    step(description)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)


def _is_on(model: nn.Module, device: torch.device) -> bool:
    return all(tensor.device.type in (device.type, "meta") for tensor in named_tensors(model).values())


def _on_device(data: Data | None, device: torch.device) -> Data | None:
    """The same data, with calibration batches on a device."""
    if data is None or device.type == "cpu":
        return data
    fresh = calibration_batches(data, CALIBRATION, 0)
    return lambda: (on_device(batch, device) for batch in fresh())


def _real_inputs(network: Network, context: Context) -> ExampleInputs | None:
    """A calibration batch to verify on, where the network takes one tensor; else the example inputs serve."""
    if context.calibration is None or not isinstance(network.example_inputs, Tensor):
        return None
    batch = next(context.calibration(), None)
    return None if batch is None else on_device(batch[0], context.device)


def _measure(
    into: dict[str, Accuracy], name: str, model: nn.Module, test: Split | None, device: torch.device, progress: Progress
) -> None:
    if test is None:
        return
    flags = {module: module.training for module in model.modules()}
    model.eval()
    progress.start(len(test), "images", f"accuracy of the {name} network")
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        progress.advance(done - seen)
        seen = done

    try:
        into[name] = accuracy(lambda x: model(x.to(device)), test, progress=advance)
    finally:
        progress.close()
        for module, training in flags.items():
            module.training = training


def figures(network: Network, plan: Plan | None, measured: Sequence[Accuracy]) -> Figures:
    """What the network costs once a plan is applied, and the first of the accuracies that were measured."""
    cost = network.cost() if plan is None else network.cost_of(plan)
    metrics = {"accuracy": measured[0].top1} if measured else {}
    return Figures(metrics=metrics, macs=cost.macs, params=cost.params, bytes=cost.bytes)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its first name, as memory of its own."""
    first: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        first.setdefault(id(tensor), name)
    tensors = named_tensors(model)
    return {name: tensors[name].detach().cpu().contiguous().clone() for name in first.values()}


def flatten_example(example: ExampleInputs) -> tuple[str, dict[str, Tensor]]:
    """Example inputs as named tensors, and what they were: ``tensor``, ``sequence`` or ``mapping``."""
    if isinstance(example, Tensor):
        return "tensor", {"0": example.detach().cpu().contiguous()}
    items = example.items() if isinstance(example, Mapping) else ((str(k), item) for k, item in enumerate(example))
    kind = "mapping" if isinstance(example, Mapping) else "sequence"
    tensors = dict(items)
    other = [name for name, item in tensors.items() if not isinstance(item, Tensor)]
    if other:
        raise InputError(f"only example inputs made of tensors can be saved, but {other[0]!r} is none.")
    return kind, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _unflatten_example(kind: str, tensors: Mapping[str, Tensor]) -> ExampleInputs:
    if kind == "tensor":
        return tensors["0"]
    return dict(tensors) if kind == "mapping" else tuple(tensors[str(k)] for k in range(len(tensors)))
