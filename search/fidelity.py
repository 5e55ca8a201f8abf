"""What a configuration is worth: its cost, its predicted loss, its accuracy after healing, its accuracy after training.

All trials of a rung look at the same images and draw the same random numbers, so that their differences are their own.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from metaprune.allocate import ALLOCATORS, Problem
from metaprune.criteria import CRITERIA
from metaprune.data import Dataset
from metaprune.errors import BudgetError, ConfigError, VerificationError
from metaprune.export import export
from metaprune.export.to_onnx import weights_hash
from metaprune.files import write_atomically
from metaprune.graph import Network, trace
from metaprune.measure import latency
from metaprune.measure.accuracy import Accuracy, accuracy, compare
from metaprune.methods import by_kind, deal
from metaprune.pipeline import TOLERANCE, Result, figures, fill, stored_tensors
from metaprune.planning import Judgement, allot, calibration_batches, judge, reachable_limits, share_left, with_times
from metaprune.plans import Plan
from metaprune.recovery import RECOVERIES, Context, NoProgress, Progress, Recovery, on_device, resolve, torch_device
from metaprune.registry import Registry
from metaprune.run import seed_everything
from metaprune.search.campaign import PREDICTED
from metaprune.search.latency import Table
from metaprune.search.results import Results, digest
from metaprune.search.settings import Rung, Settings
from metaprune.subject import Subject
from metaprune.task import Task, resolve_task

WEIGHTS = "weights.safetensors"
CUT = "cut.json"
_REMEMBERED = 8  # judgements, the latest used: one may hold the curves and scores of a large network
_BATCH = 256
_LATENCY_S = 1.0  # of paired calls


class Laboratory:
    """Evaluates configurations of one network on one dataset; an :class:`~metaprune.search.worker.Evaluator`.

    Args:
        settings: The campaign.
        subject: The dense network and its data.
        folder: Of the campaign; results go to ``results/`` there.
        progress: Is told about training.
    """

    def __init__(self, settings: Settings, subject: Subject, folder: Path, progress: Progress | None = None) -> None:
        if subject.dataset is None:
            raise ConfigError("a campaign needs data to judge networks by. Give `data`.")
        self.settings, self.subject, self.folder = settings, subject, folder
        self.methods = methods_of(settings)
        self.data: Dataset = subject.dataset
        self.results = Results(folder / "results")
        self.progress = progress or NoProgress()
        self.device = torch_device(settings.accelerator)
        self.network: Network = trace(
            subject.module.to(self.device),
            on_device(subject.source.example_inputs, self.device),
            freeze=settings.space.freeze or None,
            only=settings.space.only or None,
        )
        for budget in settings.choices.budgets:  # those of time need a table of this machine, measured once
            self.network = with_times(self.network, budget)
        self.task: Task = resolve_task(settings.task, self.network.model)
        self._judgements: dict[tuple[Any, ...], Judgement] = {}
        self._tested: dict[tuple[str, int], Accuracy] = {}

    @property
    def about(self) -> dict[str, str]:
        """Fingerprints of what is judged and by what."""
        return {"network": weights_hash(self.subject.module)[:20], "data": self.data.fingerprint[:20]}

    def __call__(self, key: str, config: Mapping[str, Any], rung: int) -> dict[str, Any]:
        """What this configuration gives on a rung; from the results where it is known."""
        fidelity = self.settings.fidelity(rung)
        return self.results.once(key, fidelity, config, lambda place: self._find(config, rung, place))

    def _find(self, config: Mapping[str, Any], number: int, place: Path) -> dict[str, Any]:
        began, rung = time.perf_counter(), self.settings.rungs[number]
        seed_everything(self.settings.seed)  # whatever was evaluated here before
        plan, notes = self.plan(config)
        cost = self.network.cost_of(plan)
        sizes = dict(zip((axis.name for axis in self.network.axes), self.network.sizes(plan).tolist()))
        metrics: dict[str, Any] = {name: int(cost[name]) for name in ("macs", "params", "bytes", "activations")}
        if rung.kind == "curves":
            metrics[PREDICTED] = self._predicted(rung, sizes)
        else:
            slim = self.healed(config, rung, plan, place / f"checkpoints-{number}")
            metrics |= self.quality(slim, rung.images)
            if number > 0:
                write_atomically(place / f"{number}-{WEIGHTS}", save(stored_tensors(slim)))
        if self._latency_wanted:
            metrics["latency_ms"] = self.latency_ms(sizes, plan, predicted=rung.kind == "curves")
        limits = reachable_limits(self.network, self.settings.analytic) if self.settings.analytic else {}
        return {
            "metrics": {name: _number(value) for name, value in metrics.items()},
            "limits": limits,
            "sizes": {axis.name: sizes[axis.name] for axis in self.network.axes if axis.prunable},
            "notes": notes,
            "seconds": round(time.perf_counter() - began, 3),
        }

    # ---- what leaves -------------------------------------------------------------------------------------------------

    def plan(self, config: Mapping[str, Any]) -> tuple[Plan, list[str]]:
        """What a configuration cuts, computed once, and what is worth knowing about it.

        Raises:
            BudgetError: No alignment reaches the budget.
        """
        deciding = {name: value for name, value in config.items() if name != "recovery"}
        key = digest([self.settings.identity, "plan", deciding])

        def find(place: Path) -> Mapping[str, Any]:
            plan, notes = self._plan(deciding)
            plan.save(place / CUT)
            return {"notes": notes}

        found = self.results.once(key, "plan", deciding, find)
        return Plan.load(self.results.place(key) / CUT), found["notes"]

    def _plan(self, config: Mapping[str, Any]) -> tuple[Plan, list[str]]:
        budget, grid = self.settings.budget(config["budget"]), self.settings.space.grid
        round_to, notes = config["round_to"], []
        while True:
            try:
                limits = reachable_limits(self.network, budget, floor=config["floor"], round_to=round_to, grid=grid)
                break
            except BudgetError:
                if round_to == 1:
                    raise
                round_to //= 2
        if round_to != config["round_to"]:
            notes.append(f"out of reach in multiples of {config['round_to']}: in multiples of {round_to} instead")
        judgement = self.judgement(config["criterion"], config["metanet"], share_left(self.network, limits))
        plan = allot(
            self.network, judgement, budget, self.methods["allocator"].get(config["allocator"], config["allocator"]),
            round_to=round_to, floor=config["floor"], grid=grid,
        )  # fmt: skip
        return plan, notes

    def judgement(self, criterion: str, metanet: str = "off", share: float = 0.5) -> Judgement:
        """What the units are worth; the latest ones are remembered."""
        learnt = metanet != "off" or criterion == "metanet"
        key = (criterion, metanet, round(share, 6) if learnt else None)
        found = self._judgements.pop(key, None) or judge(
            self.network,
            self.methods["criterion"].get(criterion, criterion),
            "default" if metanet in ("edit", "both") else None,
            self._calibration,
            self.task,
            self.settings.seed,
            calibration=self.settings.calibration,
            share=share,
        )
        self._judgements[key] = found
        while len(self._judgements) > _REMEMBERED:
            del self._judgements[next(iter(self._judgements))]
        return found

    def _predicted(self, rung: Rung, sizes: Mapping[str, int]) -> float:
        """Sum over the axes of what one criterion, the same for all trials, says of their sizes."""
        found = self.judgement(rung.criterion).verdict
        problem = Problem(self.network, found.scores, {}, curves=found.curves)
        return float(sum(problem.curve(axis)[sizes[axis.name]] for axis in problem.axes))

    # ---- what is left ------------------------------------------------------------------------------------------------

    def healed(self, config: Mapping[str, Any], rung: Rung, plan: Plan, checkpoints: Path) -> nn.Module:
        """The network after the cut, its recovery and, on a rung that trains, fine-tuning."""
        context = replace(self._context, plan=plan, masks=self.network.masks(plan), folder=checkpoints, resume=True)
        slim: nn.Module = self.network.apply(plan)
        recoveries = self.recoveries(config["recovery"])
        if rung.kind == "finetune":
            recoveries += resolve(
                "finetune", epochs=rung.epochs, lr=rung.lr, batch_size=rung.batch_size, distil=rung.distil
            )
        for recovery in recoveries:
            slim = recovery.recover(slim, context).model
        return slim.eval()

    def recoveries(self, spec: str) -> list[Recovery]:
        """What a choice of recoveries means, names joined by ``+`` or ``none``."""
        return [self.methods["recovery"].get(way.name, way) for way in resolve(spec.replace("+", ","))]

    @torch.no_grad()
    def quality(self, model: nn.Module, images: int | None = None) -> dict[str, float]:
        """Loss and accuracy (%) on validation images."""
        split = self.data.validation
        if images is not None and images < len(split):
            split = split.subset(images, self.settings.seed)
        loss, right = 0.0, 0
        for batch in split.batches(_BATCH, device=self.device):
            outputs = self.task.outputs(model, batch)
            loss += float(self.task.loss(outputs, batch)) * len(batch[0])
            if isinstance(outputs, Tensor) and outputs.ndim == 2:
                right += int((outputs.argmax(dim=1) == batch[1]).sum())
        return {"loss": loss / len(split), "accuracy": 100.0 * right / len(split)}

    def dense(self) -> dict[str, Any]:
        """The dense network by the same measures, on all validation images."""
        cost = self.network.cost()

        def find(place: Path) -> Mapping[str, Any]:
            metrics = self.quality(self.network.model)
            metrics |= {name: int(cost[name]) for name in ("macs", "params", "bytes", "activations")}
            sizes = {axis.name: axis.size for axis in self.network.axes if axis.prunable}
            return {"metrics": metrics, "sizes": sizes}

        return self.results.once("dense", "quality", {}, find)

    def result(self, key: str, config: Mapping[str, Any], rung: int) -> Result:
        """A network that was evaluated, as :func:`metaprune.prune` hands it out; its accuracy is that on test data.

        Args:
            key: What it is known by.
            config: What was chosen.
            rung: The one that it was trained on.

        Raises:
            VerificationError: The cut network differs from the masked one.
        """
        plan, _ = self.plan(config)
        made = self.network.cut(plan)
        inputs = next(self._calibration())[0] if isinstance(self.network.example_inputs, Tensor) else None
        verification = self.network.verify(plan, inputs, slim=made.module)
        if not verification.passed(TOLERANCE):
            raise VerificationError(
                f"the cut network must equal the masked one to {TOLERANCE:g} of the largest output, but differs by "
                f"{verification.max_error:.3g}. It is not handed out; please report the model."
            )
        weights = self.results.place(key) / f"{rung}-{WEIGHTS}"
        if weights.exists():
            slim = fill(made.module, load_file(weights))
        else:
            slim = self.healed(config, self.settings.rungs[rung], plan, self.results.place(key) / f"checkpoints-{rung}")
        dense, recovered = self._dense_on_test, self._on_test(slim)
        self._tested[key, rung] = recovered
        return Result(
            model=slim.cpu().eval(),
            network=self.network,
            plan=plan,
            verification=verification,
            before=figures(self.network, None, [dense]),
            after=figures(self.network, plan, [recovered]),
            accuracy={"dense": dense, "recovered": recovered},
            difference=compare(dense, recovered),
            surgery=made.to_json(),
        )

    def on_test(self, key: str, config: Mapping[str, Any], rung: int) -> Accuracy:
        """Accuracy on test images of a network that was evaluated, measured once; arguments as for :meth:`result`."""
        if (key, rung) not in self._tested:
            self.result(key, config, rung)
        return self._tested[key, rung]

    @cached_property
    def _dense_on_test(self) -> Accuracy:
        return self._on_test(self.network.model)

    def _on_test(self, model: nn.Module) -> Accuracy:
        return accuracy(lambda x: model(x.to(self.device)), self.data.test)

    # ---- time --------------------------------------------------------------------------------------------------------

    @property
    def _latency_wanted(self) -> bool:
        return "latency_ms" in (*self.settings.objectives, *self.settings.measured)

    def latency_ms(self, sizes: Mapping[str, int], plan: Plan, *, predicted: bool = False) -> float:
        """Median time of one sample in onnxruntime on this machine; sizes are measured once.

        It is the paired ratio to the dense network times that one's time, so that a machine that gets busy in the
        middle of a campaign does not favour what was measured before.

        Args:
            sizes: By axis.
            plan: What is cut.
            predicted: Ask the table of what was measured so far instead.
        """
        table = Table(self.results)
        if predicted:
            return table.predicted(self._features(sizes)) * self._dense_ms

        def find(place: Path) -> Mapping[str, Any]:
            return {"ratio": self._ratio(self.network.apply(plan)), "features": self._features(sizes)}

        return float(table.once(sizes, find)["ratio"]) * self._dense_ms

    def _features(self, sizes: Mapping[str, int]) -> list[float]:
        """Costs as shares of the dense network."""
        full = self.network.cost()
        asked = [sizes.get(axis.name, axis.size) for axis in self.network.axes]
        cost = self.network.cost(asked)
        return [cost[name] / max(1, full[name]) for name in ("macs", "params", "activations")]

    @cached_property
    def _dense_ms(self) -> float:
        def find(place: Path) -> Mapping[str, Any]:
            return {"ms": latency([self._dense_file], seconds=_LATENCY_S, seed=self.settings.seed).arms[0].p50.value}

        return float(self.results.once("dense", "latency", {}, find)["ms"])

    @cached_property
    def _dense_file(self) -> Path:
        def find(place: Path) -> Mapping[str, Any]:
            self._export(self.network.model, place / "dense.onnx")
            return {}

        self.results.once("dense", "onnx", {}, find)
        return self.results.place("dense") / "dense.onnx"

    def _ratio(self, slim: nn.Module) -> float:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "slim.onnx"
            self._export(slim, file)
            found = latency([self._dense_file, file], seconds=_LATENCY_S, seed=self.settings.seed)
        return float(found.comparisons[0].ratio.value)

    def _export(self, model: nn.Module, file: Path) -> None:
        export(
            model.cpu().eval(), on_device(self.subject.source.example_inputs, torch.device("cpu")), file, overwrite=True
        )
        model.to(self.device)

    # ---- shared ------------------------------------------------------------------------------------------------------

    def _calibration(self) -> Iterator[Any]:
        fresh = calibration_batches(self.data, self.settings.calibration, self.settings.seed)
        return (on_device(batch, self.device) for batch in fresh())

    @cached_property
    def _context(self) -> Context:
        return Context(
            train=self.data.train,
            calibration=self._calibration,
            task=self.task,
            dense=self.network.model,
            network=self.network,
            device=self.device,
            seed=self.settings.seed,
            progress=self.progress,
        )


def methods_of(settings: Settings) -> dict[str, dict[str, Any]]:
    """The methods of a campaign that are given options, by kind and name.

    Raises:
        ConfigError: An option goes to nothing that can be chosen, or does not fit.
    """
    choices, found = settings.choices, dict[str, dict[str, Any]]()
    names = {
        "criterion": (*choices.criterion, *(rung.criterion for rung in settings.rungs)),
        "allocator": (*choices.allocator, *settings.baselines),
        "recovery": tuple(name for spec in choices.recovery for name in spec.split("+") if name != "none"),
    }
    registries: dict[str, Registry[Any]] = {"criterion": CRITERIA, "allocator": ALLOCATORS, "recovery": RECOVERIES}
    for kind, given in by_kind(settings.set, "`set.{}`".format).items():
        made, _ = deal(registries[kind], tuple(dict.fromkeys(names[kind])), given, f"`set.{kind}.{{}}`".format)
        found[kind] = {name: method for name, method in made.items() if method != registries[kind][name]()}
    return found


def check_recoveries(laboratory: Laboratory) -> None:
    """Whether every recovery that can be chosen has what it needs.

    Raises:
        ConfigError: One has not.
    """
    for spec in laboratory.settings.choices.recovery:
        for recovery in laboratory.recoveries(spec):
            recovery.check(laboratory.network.model, laboratory._context)


def _number(value: Any) -> Any:
    """None for what JSON has no word for."""
    return value if isinstance(value, int) or torch.tensor(value).isfinite() else None
