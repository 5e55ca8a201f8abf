"""A traced network: its axes, its cost, and what can be done to it."""

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metaprune.errors import ConfigError, InputError, UnsupportedModelError, did_you_mean
from metaprune.graph.axes import Alive, Axis, Dim
from metaprune.graph.blocks import Block, find_blocks, without
from metaprune.graph.branches import Branches
from metaprune.graph.convert import from_graph, to_graph
from metaprune.graph.cost import Cost, CostModel, Kernel
from metaprune.graph.layout import Layout, build_layout
from metaprune.graph.linear_calls import LinearCall, linear_calls
from metaprune.graph.optimizer import sliced_optimizer
from metaprune.graph.places import Places, find_places
from metaprune.graph.reads import Read, find_reads
from metaprune.graph.record import Op, Trace, refs_in, tensors_in
from metaprune.graph.rehearsal import rehearsed
from metaprune.graph.rules import find_rule
from metaprune.graph.select import Selection, as_patterns, freeze_selected
from metaprune.graph.surgery import Cut, bias_beside, cut, entries_left, give_bias, sliced_copy, weight_beside
from metaprune.graph.trace import ExampleInputs, affordable, random_like, trace_model
from metaprune.graph.twin import named_tensors
from metaprune.graph.verify import Verification, compare
from metaprune.graph.why import Why, explain
from metaprune.plans import Draft, Plan

if TYPE_CHECKING:
    from collections import OrderedDict

    from torch_geometric.data import HeteroData

UNCHECKED_TOLERANCE = 1e-4
PIECE = 1 << 22  # entries of a tensor that are worked on at once
COMPARED_INPUTS = 3  # random ones, for networks whose code reads what they have computed


class Network:
    """A traced network. Made by :func:`trace`.

    Attributes:
        model: The module that was traced; never changed.
        example_inputs: What it was traced with.
        axes: Every axis, in the order in which parameters mention them.
        freeze: Patterns of modules that the user wants to stay, as texts.
        only: Patterns of modules that alone may be cut; empty for all.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        layout: Layout,
        freeze: tuple[str, ...] = (),
        only: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.freeze, self.only = freeze, only
        self._branches = Branches(layout)
        self._layout = _with_branches(layout, self._branches)
        self.axes: tuple[Axis, ...] = self._layout.axes
        self._index = {axis.name: k for k, axis in enumerate(self.axes)}
        self._weights: Mapping[str, Tensor] | None = None
        self._latency: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]] | None = None

    def __repr__(self) -> str:
        free = sum(axis.prunable for axis in self.axes)
        return f"Network({type(self.model).__name__}, {len(self.axes)} axes, {free} prunable, {self.cost()})"

    @property
    def traced_with(self) -> dict[str, list[str]]:
        """What the axes hang on beside model and input, for plans: `freeze`, `only`, and `rules` of users, if any."""
        given = {"freeze": self.freeze, "only": self.only, "rules": self._layout.trace.own_rules}
        return {name: list(entries) for name, entries in given.items() if entries}

    @property
    def layout(self) -> Layout:
        """The recorded calls, and which units each position of what they read and give needs."""
        return self._layout

    def layout_left(self, plan: Plan) -> Layout:
        """The layout without the branches that a plan drops, its calls numbered anew."""
        return self._without(plan.draft())

    def alive(self, plan: Plan) -> Alive:
        """Which units stay under a plan."""
        return self._alive(plan.draft())

    # ---- axes ------------------------------------------------------------------------------------------------------

    def axis(self, name: str) -> Axis:
        """An axis by name.

        Raises:
            ConfigError: There is none of that name; the nearest one is named.
        """
        return self.axes[self.index(name)]

    def index(self, name: str) -> int:
        """The place of an axis in :attr:`axes`, by name."""
        if name not in self._index:
            raise ConfigError(
                f"no axis is named {name!r}.{did_you_mean(name, self._index)} `metaprune inspect` lists them."
            )
        return self._index[name]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer, tied ones under their first name."""
        return {name: tuple(dim.size for dim in value.dims) for name, value in self._layout.trace.parameters.items()}

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name: those of the model, or those that were set, e.g. to be read from files."""
        return named_tensors(self.model) if self._weights is None else self._weights

    @weights.setter
    def weights(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the architecture: the axes and where they live; weights do not count."""
        content = [[axis.name, axis.size, axis.prunable, axis.bindings] for axis in self.axes]
        return hashlib.sha256(json.dumps([content, sorted(self.shapes.items())]).encode()).hexdigest()[:16]

    def sum_over_units(
        self,
        tensors: Mapping[str, Tensor],
        names: Iterable[str] | None = None,
        of: Callable[[Tensor], Tensor] = lambda entries: entries,
    ) -> dict[str, list["UnitSums"]]:
        """Add up entries of parameter-shaped tensors over the slices of every unit.

        Args:
            tensors: By parameter or buffer name, each in that parameter's shape; others are left out. Each is asked for
                once, and not kept.
            names: Which of them; all if None.
            of: What to add up of every entry, e.g. its square. It is computed in pieces, and must not change them.

        Returns:
            For every axis, one entry a binding whose parameter is given.
        """
        sums: dict[str, list[UnitSums]] = {axis.name: [] for axis in self.axes}
        chosen = set(tensors if names is None else names)
        for name, value in self._layout.trace.parameters.items():
            if name in chosen:
                totals = _totals(tensors[name].detach(), of)
                for k, (dim, total_N) in enumerate(zip(value.dims, totals, strict=True)):
                    for axis, entry in self._by_unit((name, k), dim, total_N, prod(self.shapes[name])):
                        sums[axis].append(entry)
        return sums

    @cached_property
    def reads(self) -> dict[str, tuple[Read, ...]]:
        """For every axis, the calls that read its units, and in which tensor."""
        return find_reads(self._layout)

    @cached_property
    def joins(self) -> dict[str, tuple[Op, ...]]:
        """For every droppable axis, the additions at which the branch that it lies in ends."""
        ops = self._layout.trace.ops
        return {
            self.axes[axis].name: tuple(ops[k] for k in sorted(found)) for axis, found in self._branches.joins.items()
        }

    def why(self, name: str) -> tuple[Why, ...]:
        """What is coupled to what by which operation, and for what must stay, the way to the reason.

        Args:
            name: An axis, a dimension of a parameter (``conv1.weight:0``), a parameter, or a module.

        Returns:
            One explanation an axis that runs along it; its ``sentences()`` are for people.

        Raises:
            ConfigError: There is no such name; the nearest one is given.
        """
        return explain(self._layout, name)

    def _by_unit(
        self, binding: tuple[str, int], dim: Dim, total_N: Tensor, entries: int
    ) -> Iterator[tuple[str, "UnitSums"]]:
        rows = self._layout.resolve(dim)
        if rows is None:
            return
        for column in rows.T:
            owner, rank = self._layout.axis_of[column], self._layout.rank_of[column]
            for index in np.unique(owner[owner >= 0]):
                axis, here = self.axes[index], torch.from_numpy(np.flatnonzero(owner == index))
                ranks = torch.from_numpy(rank[owner == index])
                total_U = torch.zeros(axis.size, dtype=torch.float64).index_add_(0, ranks, total_N[here])
                yield axis.name, UnitSums(binding, total_U, entries // max(dim.size, 1) * len(here) / axis.size)

    def ranks_along(self, name: str, dim: int, axis: str) -> Tensor | None:
        """The unit of an axis that each position of a parameter's dimension needs, -1 where none; None for nowhere."""
        value = self._layout.trace.parameters[self.aliases.get(name, name)]
        rank_N = self._layout.units_along(value.dims[dim], self.index(axis))
        return None if rank_N is None else torch.from_numpy(rank_N)

    def module_of(self, block: Block) -> tuple[str, str] | None:
        """The modules that get what a branch reads and give what it adds, by path; None if no module gives it."""
        trace = self._layout.trace
        given = trace.ops[block.join].inputs[block.side]
        gives = [call for call in trace.calls if call.path and refs_in(call.result)[:1] == [given]]
        if not gives:
            return None
        end = max(gives, key=lambda call: call.stop - call.start)
        around = f"{end.path}.".startswith(f"{block.name}.") and any(call.path == block.name for call in trace.calls)
        return (block.name if around else end.path), end.path

    def input_dim(self, name: str) -> int | None:
        """The dimension along which a weight is multiplied and added up; None if there is none, or several."""
        number = self._layout.trace.parameters[self.aliases.get(name, name)].index
        dims = {dim for op in self._layout.trace.ops for value, dim in op.consumed if value == number}
        return dims.pop() if len(dims) == 1 else None

    @cached_property
    def linear_calls(self) -> dict[str, LinearCall]:
        """By the name of its weight, every call ``y = x W + b`` whose weight nothing else reads."""
        return {call.weight: call for call in linear_calls(self._layout)}

    def left(self, draft: Draft, name: str, tensor: Tensor) -> Tensor | None:
        """What a draft leaves of a tensor in the shape of a parameter; None where the parameter leaves."""
        layout = self._without(draft)
        value = layout.trace.parameters.get(self.aliases.get(name, name))
        return None if value is None else entries_left(layout, self._alive(draft), value, tensor)

    def masks(self, plan: Plan) -> dict[str, Tensor]:
        """The masks of a plan in the shapes of the cut network, by first name of the weight."""
        draft = plan.draft()
        left = {name: self.left(draft, name, kept) for name, kept in self._first_names(draft.masks).items()}
        return {name: kept for name, kept in left.items() if kept is not None}

    def spread(self, plan: Plan, slim: nn.Module) -> dict[str, Tensor]:
        """What a cut network holds, in the shapes of the dense one: the dense numbers where units have left.

        Args:
            plan: What was cut.
            slim: The cut network, of any weights.

        Returns:
            Floating-point parameters and buffers by first name; those that left with a branch are missing.
        """
        draft = plan.draft()
        layout, alive, own = self._without(draft), self._alive(draft), named_tensors(slim)
        values, dense = {}, self._new_tensors(draft)
        for name, value in layout.trace.parameters.items():
            tensor = dense.get(name, named_tensors(self.model)[name]).detach().clone()
            if tensor.is_floating_point():
                masks = (layout.kept(dim, alive) for dim in value.dims)
                rows = (np.arange(n) if kept is None else kept.nonzero()[0] for kept, n in zip(masks, tensor.shape))
                grid = tuple(map(torch.from_numpy, np.ix_(*rows)))
                tensor[grid] = own[name].detach().to(tensor.device, tensor.dtype)
                values[name] = tensor
        return values

    # ---- graph -----------------------------------------------------------------------------------------------------

    @cached_property
    def places(self) -> Places:
        """Where every parameter and buffer sits in the graph."""
        return find_places(self._layout)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tied parameters and buffers -> the first name."""
        return self._layout.trace.aliases

    def to_graph(self, dense: bool | None = None) -> "HeteroData":
        """The network as a graph: units and their typed features, weights as edges, axes, coupling and structure.

        Args:
            dense: Keep the weights as blocks that are views of the parameters, without a list of edges; None means
                for networks of at least four million entries. :mod:`metaprune.graph.convert` describes both.

        Returns:
            A :class:`torch_geometric.data.HeteroData`. :meth:`from_graph` is its inverse.
        """
        return to_graph(self, dense)

    def from_graph(self, graph: "HeteroData") -> "OrderedDict[str, Tensor]":
        """The state dict that a graph of this network stands for; bit for bit the one that it was made of.

        Args:
            graph: What :meth:`to_graph` gave, edited, moved or loaded since.

        Raises:
            InputError: It was made of another network, or its tensors are not those of this one.
        """
        return from_graph(self, graph)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Network":
        """The same network with new values in some parameters and buffers; this one stays as it is.

        Args:
            tensors: By name, in the shape of the dense network.
        """
        everything = np.ones(len(self._layout.axis_of), bool)
        model = sliced_copy(self.model, self._layout, everything, self._first_names(tensors))
        changed = Network(model, self.example_inputs, self._layout, self.freeze, self.only)
        return changed if self._latency is None else changed.with_latency(self._latency)

    # ---- cost ------------------------------------------------------------------------------------------------------

    @cached_property
    def _costs(self) -> CostModel:
        return CostModel(self._layout, self._branches)

    def cost(self, sizes: npt.ArrayLike | None = None) -> Cost:
        """Cost of the network, or of one configuration (one size an axis, in their order)."""
        cost = self._costs(sizes)
        if self._latency is None:
            return cost
        shape = self._costs.full_A if sizes is None else np.asarray(sizes)
        return replace(cost, latency_ms=float(self._latency(shape[None])[0]))

    def cost_many(self, sizes: npt.ArrayLike) -> Cost:
        """Cost of many configurations.

        Args:
            sizes: Integer array (n, axes). Size 0 on a droppable axis drops the residual branch it lies in.

        Returns:
            A cost of integer arrays (n,).
        """
        many = np.atleast_2d(np.asarray(sizes))
        cost = self._costs(many)
        return cost if self._latency is None else replace(cost, latency_ms=self._latency(many))

    def with_latency(self, table: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]) -> "Network":
        """The same network whose costs have a latency; this one stays as it is.

        Args:
            table: Sizes (n, axes) to milliseconds (n,).
        """
        timed = copy.copy(self)
        timed._latency = table
        return timed

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every call that multiplies and adds up."""
        return tuple(self._costs.kernels)

    def cost_by_module(self, plan: Plan | None = None) -> dict[str, tuple[float, float]]:
        """Multiply-accumulates and parameters of every module by path, as the network is or once a plan is applied.

        Biases that a plan adds are not counted.
        """
        sizes = np.array([axis.size for axis in self.axes], np.int64) if plan is None else self.sizes(plan)
        return self._costs.by_module(sizes)

    def shares(self) -> dict[str, dict[str, float]]:
        """For every axis, the part of each cost that has the axis as a factor; those of different axes overlap."""
        return dict(zip((axis.name for axis in self.axes), self._costs.shares(), strict=True))

    def soft_cost(self, sizes: Tensor, quantity: str) -> Tensor:
        """One quantity of the cost as a differentiable function of sizes that need not be whole."""
        return self._costs.soft(sizes, quantity)

    def sizes(self, plan: Plan) -> npt.NDArray[np.int64]:
        """Size of every axis once a plan is applied, shape (axes,); 0 for droppable ones that leave with a branch."""
        draft = plan.draft()
        sizes = np.array([axis.size for axis in self.axes], np.int64)
        for name, kept in draft.keep.items():
            sizes[self.index(name)] = len(kept)
        left = self._without(draft).trace.parameters
        for k, axis in enumerate(self.axes):
            if axis.droppable and not any(name in left for name, _ in axis.bindings):
                sizes[k] = 0
        return sizes

    def cost_of(self, plan: Plan) -> Cost:
        """Cost of the network once a plan is applied, dropped branches and all."""
        draft = plan.draft()
        sizes = np.array([axis.size for axis in self.axes], np.int64)
        for name, kept in draft.keep.items():
            sizes[self.index(name)] = len(kept)
        layout = self._without(draft)
        cost = (self._costs if layout is self._layout else CostModel(layout, Branches(layout)))(sizes)
        for name, stays in self._new_biases(draft).items():  # what is added counts
            entries, own = int(stays.sum()), named_tensors(self.model)[weight_beside(name)]
            cost = replace(cost, params=cost.params + entries, bytes=cost.bytes + entries * own.dtype.itemsize)
        if self._latency is not None:
            cost = replace(cost, latency_ms=float(self._latency(self.sizes(plan)[None])[0]))
        return cost

    # ---- residual branches -----------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Residual branches that can leave whole, in the order in which they end."""
        return find_blocks(self._layout.trace)

    def blocks_in(self, name: str) -> tuple[Block, ...]:
        """The residual branch of that name, or else those of all modules inside of the one of that name."""
        exact = tuple(block for block in self.blocks if block.name == name)
        return exact or tuple(block for block in self.blocks if block.name.startswith(f"{name}."))

    def _dropped(self, draft: Draft) -> tuple[Block, ...]:
        wanted = {block for name in draft.drop for block in self.blocks_in(name)}
        return tuple(block for block in self.blocks if block in wanted) if wanted else ()

    def _without(self, draft: Draft) -> Layout:
        """The layout without the branches that a draft drops."""
        dropped = self._dropped(draft)
        return replace(self._layout, trace=without(self._layout.trace, dropped)) if dropped else self._layout

    # ---- surgery ---------------------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> None:
        """Refuse a plan that does not fit, before anything is done.

        Raises:
            ConfigError: The plan was made for another network, or an edit does not fit this one.
        """
        if plan.network and plan.network != self.fingerprint:
            raise ConfigError(
                f"the plan must have been made for this network (fingerprint {self.fingerprint}), but was made for "
                f"{plan.network}. Trace the model and the input shape that it was made with{_traced_with(plan)}."
            )
        for edit in plan.edits:
            refusal = edit.check(self)
            if refusal:
                raise ConfigError(refusal)
        draft = plan.draft()
        emptied = [name for name, kept in draft.keep.items() if not kept]
        if emptied:
            raise ConfigError(f"some unit of every axis must stay, but the edits together keep none of {emptied[0]!r}.")
        self._without(draft)  # refuses what would disconnect the network
        for edit in plan.edits:
            refusal = edit.check_left(self, draft)
            if refusal:
                raise ConfigError(refusal)

    def apply(self, plan: Plan) -> nn.Module:
        """A new module with the plan's edits done; this network's model stays as it is.

        Raises:
            ConfigError: The plan does not fit.
            InputError: The model holds no weights.
            UnsupportedModelError: A size that some code expects could not be brought in step; nothing has changed.
        """
        self.check_weights()
        return self.cut(plan).module

    def check_weights(self) -> None:
        """Refuse a model on the meta device.

        Raises:
            InputError: The model holds no weights.
        """
        empty = [name for name, tensor in named_tensors(self.model).items() if tensor.is_meta]
        if empty:
            raise InputError(
                f"a model must hold its weights to be cut, but {empty[0]!r} is on the meta device. Load the weights "
                "first, or cut them from file to file with `metaprune.prune_files` (`metaprune prune --stream`)."
            )

    def apply_optimizer(self, plan: Plan, slim: nn.Module, optimizer: Optimizer) -> Optimizer:
        """The optimizer of a training in progress, for the network that :meth:`apply` made.

        Moments and other tensors in the shape of a parameter are sliced as the parameter is; counters, groups, their
        options and the order of parameters stay. The given optimizer is left as it is. A scheduler holds its optimizer,
        so make it anew, with ``last_epoch``.

        Args:
            plan: The plan.
            slim: The cut network.
            optimizer: Steps parameters of the traced model.

        Raises:
            ConfigError: It steps another network, or `slim` was made from another plan.
            UnsupportedModelError: It keeps something that cannot be sliced; names it.
        """
        draft = plan.draft()
        return sliced_optimizer(optimizer, self.model, slim, self._without(draft), self._alive(draft))

    def cut(self, plan: Plan) -> Cut:
        """As :meth:`apply`, with the way in which the network was made: by attributes, or as a graph.

        A model on the meta device gives one on the meta device.
        """
        self.check(plan)
        draft = plan.draft()
        alive = self._alive(draft)
        tensors = self._new_tensors(draft)
        made = cut(self.model, self._without(draft), alive, self.example_inputs, tensors)
        for name, kept in self._new_biases(draft).items():
            give_bias(made.module, name, tensors[name][torch.from_numpy(kept).to(tensors[name].device)])
        own_rules = self._layout.trace.own_rules
        # Where its calls are not those of the dense network one by one, or what they do was said by a user, its results
        # must be.
        if own_rules or not made.checked:
            if self._is_meta():
                why = f"has rules of your own ({own_rules[0]})" if own_rules else "was not cut call by call"
                raise UnsupportedModelError(
                    f"a network that {why} is compared with the masked one by numbers, but it is on the meta device. "
                    "Give it real weights and inputs."
                )
            error = self._error(made.module, alive, tensors, self._dropped(draft))
            if not error < UNCHECKED_TOLERANCE:
                read = self._layout.trace.value_dependent
                why = (
                    f" It reads values of its input ({read[0]}) and may take another way through its code."
                    if read
                    else f" A rule that is not of metaprune may be wrong ({own_rules[0]})."
                    if own_rules
                    else ""
                )
                raise UnsupportedModelError(
                    f"the cut network must equal the masked one on the example inputs, but differs by {error:.3g} of "
                    f"the largest output.{why}"
                )
        return made

    def _error(self, slim: nn.Module, alive: Alive, tensors: Mapping[str, Tensor], dropped: tuple[Block, ...]) -> float:
        """The largest error on the example inputs; and on other inputs, where they may take another way."""

        def on(inputs: ExampleInputs, source: str) -> float:
            return compare(self.model, slim, self._layout, alive, inputs, tensors, source, dropped).max_error

        errors = [on(self.example_inputs, "example inputs")]
        trace = self._layout.trace
        for seed in range(affordable(trace, COMPARED_INPUTS) if trace.decides else 0):
            with contextlib.suppress(UnsupportedModelError):  # the masked network makes calls that have no mask
                errors.append(on(random_like(self.example_inputs, seed), "random inputs"))
        return max(errors)

    def verify(self, plan: Plan, inputs: ExampleInputs | None = None, *, slim: nn.Module | None = None) -> Verification:
        """Compare the cut network with the masked one.

        Args:
            plan: The plan.
            inputs: Real inputs like the example ones; the example inputs if None.
            slim: The cut network, if it exists already and holds the plan's weights.
        """
        slim = self.apply(plan) if slim is None else slim
        draft = plan.draft()
        source = "given" if inputs is not None else "example inputs"
        inputs = self.example_inputs if inputs is None else inputs
        if self._is_meta(inputs):
            raise InputError(
                "verification runs the network, but it is on the meta device. Give it real weights and inputs."
            )
        tensors = self._new_tensors(draft)
        alive, dropped = self._alive(draft), self._dropped(draft)
        return compare(self.model, slim, self._layout, alive, inputs, tensors, source, dropped)

    def _is_meta(self, inputs: ExampleInputs | None = None) -> bool:
        given = tensors_in(self.example_inputs if inputs is None else inputs)
        return any(tensor.device.type == "meta" for tensor in [*self.model.parameters(), *given])

    def _first_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        aliases = self._layout.trace.aliases
        return {aliases.get(name, name): tensor for name, tensor in tensors.items()}

    def _new_tensors(self, draft: Draft) -> dict[str, Tensor]:
        """What parameters and buffers become, by first name, in dense shape: values, then masks, then merged means."""
        tensors, own = self._first_names(draft.tensors), named_tensors(self.model)
        for name, kept in self._first_names(draft.masks).items():
            weight = tensors.get(name, own[name]).detach()
            tensors[name] = torch.where(kept.to(weight.device), weight, torch.zeros_like(weight))
        for name, mean in self._first_names(draft.means).items():
            self._merge(tensors, own, name, mean, self._alive(draft))
        return tensors

    def _merge(
        self, tensors: dict[str, Tensor], own: Mapping[str, Tensor], name: str, mean: Tensor, alive: Alive
    ) -> None:
        """Add what the removed inputs of a weight give in the mean to its bias, or take it from its norm's mean."""
        call, dim = self.linear_calls[name], self.input_dim(name)
        assert dim is not None
        kept = self._layout.kept(self._layout.trace.parameters[name].dims[dim], alive)
        if kept is None or kept.all():
            return
        matrix_DO = call.matrix(tensors.get(name, own[name]).detach())[0].cpu().double()
        gone_D = (mean.cpu().double() * torch.from_numpy(~kept)).repeat_interleave(len(matrix_DO) // len(mean))
        given_O = gone_D @ matrix_DO
        if not call.intercept:
            stays = self._layout.kept(self._layout.trace.parameters[name].dims[0], alive)
            given_O = given_O if stays is None else given_O * torch.from_numpy(stays)
            tensors[bias_beside(name)] = given_O.to(own[name].device, own[name].dtype)
            return
        old = tensors.get(call.intercept, own[call.intercept]).detach()
        tensors[call.intercept] = old + (given_O if call.norm is None else -given_O).to(old.device, old.dtype)

    def _new_biases(self, draft: Draft) -> dict[str, Alive]:
        """Biases that layers without one get, by name, and which of their entries stay."""
        layout, alive = self._without(draft), self._alive(draft)
        new = {}
        for name in self._first_names(draft.means):
            value, dim = layout.trace.parameters.get(name), self.input_dim(name)
            if value is None or dim is None or self.linear_calls[name].intercept:
                continue
            read, made = layout.kept(value.dims[dim], alive), layout.kept(value.dims[0], alive)
            if read is not None and not read.all():
                new[bias_beside(name)] = np.ones(value.dims[0].size, bool) if made is None else made
        return new

    def _alive(self, draft: Draft) -> Alive:
        return self._layout.alive({self.index(name): np.array(kept) for name, kept in draft.keep.items()})


def _traced_with(plan: Plan) -> str:
    """What else a plan was made with that the axes hang on."""
    given = {name: plan.made_by[name] for name in ("freeze", "only", "rules") if plan.made_by.get(name)}
    return f" (and {', '.join(f'{name}={value}' for name, value in given.items())})" if given else ""


@dataclass(frozen=True, eq=False)
class UnitSums:
    """What the slices of each unit add up to in one binding.

    Attributes:
        binding: Parameter name and dimension.
        total_U: Sum over each unit's slice, float64, shape (units,).
        entries: Entries in the slice of one unit.
    """

    binding: tuple[str, int]
    total_U: Tensor
    entries: float


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    freeze: Selection | None = None,
    only: Selection | None = None,
) -> Network:
    """Read a network: its axes, what is coupled to what, and what it costs.

    Args:
        model: Any module; it is left as it is.
        example_inputs: A tensor, a sequence of positional arguments, or a mapping of keyword arguments. The first
            dimension of the first tensor is the batch.
        freeze: Modules that must stay as they are: a pattern of their paths with ``* ? [abc]`` (``"layer1.*"``; the
            modules inside of one that matches belong to it), a class of modules or its name, or several of these.
            Every axis that has a binding in such a module, or whose units it makes or uses, is frozen.
        only: Modules that may be cut, named likewise: every axis that has no binding in one of them is frozen. An axis
            that they share with others may be cut, there too.

    Raises:
        ConfigError: A pattern matches no module.
        InputError: No tensor among the inputs, or weights that are not finite.
        UnsupportedModelError: The forward does not run on the inputs, or returns no tensor.
    """
    patterns = as_patterns(freeze, "freeze"), as_patterns(only, "only")
    traced = trace_model(model, example_inputs, find_rule)
    freeze_selected(traced, model, *patterns)
    layout = rehearsed(model, build_layout(traced), example_inputs)
    for name, tensor in named_tensors(model).items():
        if tensor.device.type != "meta" and tensor.is_floating_point():
            require_numbers(name, tensor, infinite=not isinstance(tensor, nn.Parameter))
    return Network(model, example_inputs, layout, *patterns)


def _totals(tensor: Tensor, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Sums over all dimensions but one, for each dimension; float64, on the CPU."""
    if tensor.ndim < 2:
        return [of(tensor).double().cpu()] * tensor.ndim
    rows = max(1, PIECE * len(tensor) // max(tensor.numel(), 1))
    totals = [torch.zeros(size, dtype=torch.float64) for size in tensor.shape]
    for start in range(0, len(tensor), rows):
        piece = of(tensor[start : start + rows])
        for k in range(tensor.ndim):
            others = [other for other in range(tensor.ndim) if other != k]
            here = totals[0][start : start + rows] if k == 0 else totals[k]
            here += piece.sum(others, dtype=torch.float64).cpu()
    return totals


def require_numbers(name: str, tensor: Tensor, *, infinite: bool) -> None:
    """Weights are finite; buffers may hold infinities, as causal masks do."""
    wide = torch.float32 if tensor.dtype.itemsize < 4 else None
    if math.isfinite(tensor.detach().sum(dtype=wide)):  # then all entries are; else it may have overflown
        return
    wrong = tensor.isnan() if infinite else ~tensor.isfinite()
    if bool(wrong.any()):
        what = "NaN" if infinite else "NaN or infinite"
        raise InputError(
            f"weights must be numbers, but {int(wrong.sum())} of {tensor.numel()} entries of {name!r} are {what}. "
            "The training that made them diverged, or the file that they came from is damaged."
        )


def _with_branches(layout: Layout, branches: Branches) -> Layout:
    """Note on each axis whether its branch can drop and which statistics run over it."""
    changes: list[dict[str, None]] = [{} for _ in layout.axes]
    for op in _live(layout.trace):
        for dim in op.statistics:
            rows = layout.resolve(dim)
            if rows is not None:
                for index in np.unique(layout.axis_of[rows]):
                    if index >= 0:
                        changes[index][str(op)] = None
    axes = tuple(
        replace(axis, droppable=k in branches.droppable, changes=tuple(changes[k]))
        for k, axis in enumerate(layout.axes)
    )
    return replace(layout, axes=axes)


def _live(trace: Trace) -> list[Op]:
    """Calls whose results reach an output, through values or through memory that they share."""
    needed, live = {trace.values[number].storage for number in trace.outputs}, []
    for op in reversed(trace.ops):
        if any(trace.values[number].storage in needed for number in op.outputs):
            needed.update(trace.values[number].storage for number in op.inputs)
            live.append(op)
    return live[::-1]
