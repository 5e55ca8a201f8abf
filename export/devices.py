"""What a device wants of a network: sizes that fit its vector units, weights and activations that fit its memory.

A profile is a file of `configs/devices`, or one of the user's own with the same keys. It decides nothing that can be
measured: latency is measured where the device is this machine, and projected by two ceilings where it is not, with that
word beside the number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import onnx
from onnx import ModelProto
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from metaprune.budget import Budget, Limit, amount, parse_budget
from metaprune.config import load_recipe, options_of, shipped_recipes
from metaprune.errors import BudgetError, ConfigError, InputError, did_you_mean
from metaprune.export.structure import read
from metaprune.graph import Network
from metaprune.measure.host import host
from metaprune.measure.quantity import Label, Quantity

Precision = Literal["fp32", "fp16", "int8"]
WIDTHS: Mapping[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}  # bytes of a weight
_ALIGNMENTS = {"avx512f": 16, "avx2": 8, "asimd": 8}  # channels of a block of onnxruntime's kernels
_ANY_ALIGNMENT = 4  # below it the kernels by blocks are not used at all
_FOLDER = "devices"


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return amount(value)
    except BudgetError:
        raise ValueError("must be a number of bytes, e.g. 256KiB or 1GB") from None


Bytes = Annotated[float, BeforeValidator(_bytes)]


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Device:
    """A kind of machine that networks are made for.

    Args:
        label: Where numbers about it come from.
        name: What it is called; the name of its file.
        isa: Instruction set, for people; empty for that of this machine.
        threads: Threads that a network may use there.
        round_to: Sizes of axes are multiples of this; None for what this machine's vector units want.
        precision: Kinds of numbers that it gains from, the default first.
        activations: Type of quantised activations that its kernels want.
        reduce_range: Quantised weights have seven bits, so that sums of pairs do not saturate.
        memory: Bytes that a process may take; for a microcontroller, that activations may take.
        storage: Bytes that weights may take; None where nothing limits them.
        gflops: Peak of one core, in 10^9 operations a second; a multiply-accumulate is two.
        efficiency: Share of the peak that kernels reach.
        bandwidth: Bytes a second from memory.
        runtime: onnxruntime runs there; without it only budgets are held.
        ort: Kind of ``.ort`` file that suits it: laid out for this machine, or without what hangs on a machine.
        source: Where its numbers come from.
    """

    label: Label = "projected"
    name: str = ""
    isa: str = ""
    threads: int = Field(default=1, ge=1)
    round_to: int | None = Field(default=None, ge=1)
    precision: tuple[Precision, ...] = Field(default=("fp32",), min_length=1)
    activations: Literal["int8", "uint8"] = "uint8"
    reduce_range: bool = False
    memory: Bytes | None = Field(default=None, gt=0)
    storage: Bytes | None = Field(default=None, gt=0)
    gflops: float | None = Field(default=None, gt=0)
    efficiency: float = Field(default=0.5, gt=0, le=1)
    bandwidth: Bytes | None = Field(default=None, gt=0)
    runtime: bool = True
    ort: Literal["portable", "host"] | None = None
    source: str = ""

    @property
    def alignment(self) -> int:
        """What sizes should be multiples of."""
        return self.round_to or next((size for isa, size in _ALIGNMENTS.items() if isa in host().isa), _ANY_ALIGNMENT)

    @property
    def width(self) -> int:
        """Bytes of a weight in the smallest numbers that it takes."""
        return min(WIDTHS[precision] for precision in self.precision)

    def projected_ms(self, macs: float, size_bytes: float) -> Quantity | None:
        """Time of one sample by two ceilings, arithmetic and memory; None where the profile does not give both.

        Args:
            macs: Multiply-accumulates of a sample.
            size_bytes: What is read for it, at least the weights.

        >>> str(Device(label="projected", gflops=10, efficiency=0.5, bandwidth=4e9).projected_ms(5e6, 1e6))
        '2 ms (n=0, projected)'
        """
        if self.gflops is None or self.bandwidth is None:
            return None
        seconds = max(2 * macs / (self.efficiency * self.gflops * 1e9), size_bytes / self.bandwidth)
        return Quantity(value=1e3 * seconds, unit="ms", n=0, spread="no spread, a formula", label="projected")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a device makes of a wish.

    Args:
        budget: What the network may cost.
        round_to: Sizes are multiples of this; or by kind of axis.
        precision: Kinds of numbers to offer.
        notes: What was decided other than asked for, one sentence each.
    """

    budget: str
    round_to: int | Mapping[str, int]
    precision: tuple[Precision, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a file fits a device.

    Args:
        what: ``weights`` or ``activations``.
        needs: What the file takes there.
        limit: What there is, in bytes.
    """

    what: str
    needs: Quantity
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it fits."""
        return self.needs.value <= self.limit

    def __str__(self) -> str:
        return f"{self.what} take {self.needs.value:,.0f} of {self.limit:,.0f} bytes ({self.needs.label})"


def load_device(name: str | Path) -> Device:
    """A profile.

    Args:
        name: One that ships (``metaprune list devices``), or a YAML file with the same keys.

    Raises:
        InputError: There is none of that name, and no such file.
        ConfigError: The file is no profile; the message names its line.
    """
    known = device_names()
    if not Path(name).is_file() and str(name) not in known:
        raise InputError(
            f"a device must be a YAML file or one that ships with metaprune, but {str(name)!r} is neither."
            f"{did_you_mean(str(name), known)} Shipped: {', '.join(known)}."
        )
    keys = [field for field in Device.__dataclass_fields__ if field != "name"]
    recipe = load_recipe(name, _FOLDER, keys)
    return options_of(Device, {"name": recipe.path.stem}, recipe)


def device_names() -> list[str]:
    """The profiles that ship."""
    return [name.removeprefix(f"{_FOLDER}/") for name in shipped_recipes() if name.startswith(f"{_FOLDER}/")]


def settings_for(
    device: Device,
    network: Network,
    budget: str = "",
    round_to: int | Mapping[str, int] | None = None,
    *,
    reach: Callable[[str, int | Mapping[str, int]], object],
) -> Settings:
    """What to ask of a pruning for a device: the user's budget and the device's own, at the device's alignment.

    Where a budget is out of reach at one alignment, half of it is tried, down to 1, and the notes say so.

    Args:
        device: The profile.
        network: The dense network.
        budget: What the user asked for; empty for what the device needs alone.
        round_to: What the user asked for, also by kind of axis; None for the device's alignment.
        reach: Raises a BudgetError where a budget cannot be reached at an alignment.

    Raises:
        BudgetError: The budget cannot be reached at any alignment.
        ConfigError: No budget is given, and the network fits the device as it is.
    """
    wanted, own = list(parse_budget(budget).limits) if budget else [], _own_limits(device, network)
    if not wanted and not own:
        raise ConfigError(
            f"the network fits {device.name} as it is, so that a budget must say how small it is to be. Give "
            "`--budget`, e.g. macs=0.5."
        )
    combined = str(Budget((*wanted, *own)))
    notes = [f"{device.name} asks for {limit} (weights of {device.width} bytes)." for limit in own]
    if round_to is not None:
        reach(combined, round_to)
        return Settings(budget=combined, round_to=round_to, precision=device.precision, notes=tuple(notes))
    alignment = device.alignment
    while True:
        try:
            reach(combined, alignment)
        except BudgetError:
            if alignment == 1:
                raise
            way = " Residual branches that leave whole keep it (--allocator laptop)." if network.blocks else ""
            notes.append(
                f"Sizes in multiples of {alignment}, as {device.name} likes them, cannot reach {combined}.{way}"
            )
            alignment = max(1, alignment // 2)
        else:
            return Settings(budget=combined, round_to=alignment, precision=device.precision, notes=tuple(notes))


def _own_limits(device: Device, network: Network) -> list[Limit]:
    """Limits of the device that the dense network exceeds."""
    room = None if device.storage is None else device.storage // device.width
    return [Limit("params", room)] if room is not None and network.cost().params > room else []


def fits(device: Device, path: str | Path, sizes: Mapping[str, int] | None = None) -> tuple[Fit, ...]:
    """Whether a file fits the limits of a device, as far as it has any.

    Args:
        device: The profile.
        path: An ONNX file.
        sizes: Sizes of free axes by name; those not named are 1.

    Raises:
        InputError: The file cannot be used.
    """
    found = []
    if device.storage is not None:
        weights = read(path).parameters * device.width
        needs = Quantity(value=weights, unit="bytes", n=1, spread="exact", label="projected")
        found.append(Fit(what="weights", needs=needs, limit=device.storage))
    if device.memory is not None and not device.runtime:
        peak = peak_activations(path, sizes) * device.width
        needs = Quantity(value=peak, unit="bytes", n=1, spread="without scratch buffers", label="projected")
        found.append(Fit(what="activations", needs=needs, limit=device.memory))
    return tuple(found)


def peak_activations(path: str | Path, sizes: Mapping[str, int] | None = None) -> int:
    """Most numbers that live at once while a file runs on one sample, by liveness in the order of its nodes.

    A result lives from its node to its last reader; operators write nothing in place and need no room of their own.

    Args:
        path: An ONNX file.
        sizes: Sizes of free axes by name; those not named are 1.

    Raises:
        InputError: The file cannot be used, or the size of a result is not known.
    """
    read(path)
    model = _sized(onnx.load(path, load_external_data=False), sizes or {})
    counts = {value.name: _count(value) for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    weights = {tensor.name for tensor in model.graph.initializer}
    last = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    ends = len(model.graph.node)
    last |= {port.name: ends for port in model.graph.output}
    alive = {port.name for port in model.graph.input} - weights
    most = 0
    for index, node in enumerate(model.graph.node):
        alive |= {name for name in node.output if name}
        unknown = [name for name in alive if counts.get(name) is None]
        if unknown:
            raise InputError(
                f"the size of every result must be known, but that of {unknown[0]!r} is not. Give `sizes`."
            )
        most = max(most, sum(counts[name] or 0 for name in alive))
        alive = {name for name in alive if last.get(name, index) > index}
    return most


def _sized(model: ModelProto, sizes: Mapping[str, int]) -> ModelProto:
    """The same with every free axis at one size, and the shapes of all results."""
    for port in model.graph.input:
        for dim in port.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = sizes.get(dim.dim_param, 1)
    del model.graph.value_info[:]
    for port in model.graph.output:
        port.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _count(value: Any) -> int | None:
    kind, count = value.type.tensor_type, 1
    if not kind.HasField("shape"):
        return None
    for dim in kind.shape.dim:
        if not dim.HasField("dim_value"):
            return None
        count *= dim.dim_value
    return count
