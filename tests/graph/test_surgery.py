"""Surgery: attributes, devices, ties, gradients and optimiser-ready results."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaprune.edits import Keep, SetWeight
from metaprune.errors import ConfigError, UnsupportedModelError
from metaprune.graph import trace
from metaprune.plans import Plan
from tests.graph import oracle
from tests.graph.cases import CASES, Attention


def cut(model, inputs, seed=0):
    net = trace(model, inputs)
    return net.apply(oracle.random_plan(net, seed))


STANDARD = {
    "linear": (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), torch.randn(2, 8)),
    "conv": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 2, 1)),
        torch.randn(2, 3, 6, 6),
    ),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.Conv2d(6, 2, 1)), torch.randn(2, 3, 6, 6)),
    "depthwise": (
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)),
        torch.randn(2, 3, 6, 6),
    ),
    "batch_norm_plain": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 2, 1)),
        torch.randn(2, 3, 6, 6),
    ),
    "batch_norm_bare": (
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False, track_running_stats=False), nn.Conv2d(6, 2, 1)
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "instance_norm_plain": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), nn.Conv2d(6, 2, 1)),
        torch.randn(2, 3, 6, 6),
    ),
    "group_norm_plain": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6, affine=False), nn.Conv2d(6, 2, 1)),
        torch.randn(2, 3, 6, 6),
    ),
    "layer_norm_plain": (
        nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3)),
        torch.randn(2, 8),
    ),
    "rms_norm_plain": (
        nn.Sequential(nn.Linear(8, 6), nn.RMSNorm(6, elementwise_affine=False), nn.Linear(6, 3)),
        torch.randn(2, 8),
    ),
    "embedding": (nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3)), torch.randint(0, 9, (2, 4))),
    "cells": (CASES["gru_cell"].make(), torch.randn(2, 5, 8)),
    "lstm": (CASES["lstm_projected"].make(), torch.randn(2, 5, 8)),
}


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_what_a_standard_layer_says_of_itself_is_true(name):
    """Built anew from the sizes that it prints, a layer holds parameters of the same shapes."""
    model, inputs = STANDARD[name]
    slim = cut(model, inputs)
    keys = (
        "in_features out_features in_channels out_channels groups num_features num_channels num_groups "
        "normalized_shape num_embeddings embedding_dim num_parameters input_size hidden_size proj_size num_layers bias"
    ).split()
    widths = []
    for layer in slim.modules():
        if list(layer.children()) or not type(layer).__module__.startswith("torch.nn"):
            continue
        options = {key: vars(layer)[key] for key in keys if key in vars(layer) and key != "bias"}
        widths.append(options)
        shapes = {key: tensor.shape for key, tensor in layer.state_dict().items()}
        if isinstance(layer, nn.modules.conv._ConvNd):
            options |= {"kernel_size": layer.kernel_size, "bias": layer.bias is not None}
        if "affine" in vars(layer):
            options |= {"affine": layer.affine, "track_running_stats": getattr(layer, "track_running_stats", None)}
            options = {key: item for key, item in options.items() if item is not None}
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
            options |= {"elementwise_affine": layer.elementwise_affine}
        if isinstance(layer, nn.modules.conv._ConvNd) and "groups" in options:
            assert options["in_channels"] % options["groups"] == 0
        again = type(layer)(**options)
        assert {key: tensor.shape for key, tensor in again.state_dict().items()} == shapes
    if name != "lstm":  # where 6 is a size that is left
        sizes = [item for options in widths for item in options.values()]
        assert 6 not in sizes
        assert (6,) not in sizes


def test_frozen_parameters_stay_frozen_and_gradients_do_not_travel():
    model, inputs = oracle.build(CASES["plain"])
    model.a.weight.requires_grad_(False)
    model(inputs).sum().backward()
    slim = cut(model, inputs)
    assert not slim.a.weight.requires_grad
    assert slim.b.weight.requires_grad
    assert slim.b.weight.grad is None
    assert model.b.weight.grad is not None


def test_the_result_shares_no_memory_with_the_given_network():
    model, inputs = oracle.build(CASES["residual"])
    net = trace(model, inputs)
    for plan in (Plan(()), oracle.random_plan(net, 0)):
        slim = net.apply(plan)
        with torch.no_grad():
            before = oracle.call(model, inputs)[0].clone()
            for tensor in oracle.named(slim).values():
                tensor.zero_()
            assert torch.equal(oracle.call(model, inputs)[0], before)


def test_new_weights_are_not_shared_with_the_edit():
    model, inputs = oracle.build(CASES["plain"])
    net = trace(model, inputs)
    value = torch.randn(6, 8, 3, 3)
    given = value.clone()
    slim = net.apply(Plan((SetWeight("b.weight", value),)))
    with torch.no_grad():
        slim.b.weight.zero_()
    assert torch.equal(value, given)


def test_a_weight_of_another_type_is_refused():
    """Rounding to another type would be a silent change of the values in the plan."""
    model, inputs = oracle.build(CASES["plain"])
    net = trace(model, inputs)
    with pytest.raises(ConfigError):
        net.apply(Plan((SetWeight("b.weight", torch.randint(0, 9, (6, 8, 3, 3))),)))


def test_a_new_weight_for_a_tied_one_goes_by_any_name():
    model, inputs = oracle.build(CASES["tied_embedding"])
    net = trace(model, inputs)
    value = torch.randn(11, 6)
    for name in ("embedding.weight", "head.weight"):
        slim = net.apply(Plan((SetWeight(name, value),)))
        assert torch.equal(slim.head.weight, value)
        assert slim.head.weight is slim.embedding.weight


def test_numbers_of_the_module_that_have_no_part_in_sizes_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)
            self.seed, self.times, self.version = 6, 6, (6, 6)

        def forward(self, x):
            for _ in range(self.times):
                x = x * 1.01
            return self.b(F.relu(self.a(x)))

    slim = cut(Model(), torch.randn(2, 8))
    assert (slim.seed, slim.times, slim.version) == (6, 6, (6, 6))
    assert all(type(entry) is int for entry in (slim.seed, slim.times, *slim.version))


def test_attributes_of_the_cut_network_are_plain_integers():
    slim = cut(*oracle.build(CASES["attention_unbind"]))
    assert type(slim.heads) is int
    assert type(slim.dim) is int
    assert (slim.heads * slim.dim * 3,) == tuple(slim.qkv.bias.shape)
    assert slim.scale == CASES["attention_unbind"].make().scale  # the scale is that of the dense network


def test_lists_and_tuples_of_sizes_keep_their_type():
    slim = cut(*oracle.build(CASES["split_by_attribute"]))
    assert type(slim.parts) is list
    assert sum(slim.parts) == slim.a.out_channels


def test_sizes_in_a_configuration_object():
    """An attribute of an attribute, as transformers keeps its sizes."""

    class Config:
        heads = 3

    class Model(Attention):
        def __init__(self):
            super().__init__()
            self.config = Config()
            self.config.heads = 3

        def qkv_heads(self, x):
            b, n, _ = x.shape
            return self.qkv(x).reshape(b, n, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    torch.manual_seed(0)
    model = Model()
    net = trace(model, torch.randn(2, 5, 8))
    plan = oracle.random_plan(net, 0)
    try:
        slim = net.apply(plan)
    except UnsupportedModelError as error:
        pytest.fail(f"a size in an attribute's attribute is not brought in step: {error}")
    assert net.verify(plan, slim=slim).max_error < 1e-5
    assert model.config.heads == 3


def test_a_size_that_no_attribute_holds_is_cut_in_the_recorded_calls():
    """The reason names call, place and number; the number stays that of the dense network."""
    model, inputs = oracle.build(CASES["mean_by_count"])
    net = trace(model, inputs)
    made = net.cut(oracle.random_plan(net, 0))
    assert made.way == "graph"
    assert re.search(r"div at .*other=6.*gets 4", made.reason)
    assert isinstance(made.module, torch.fx.GraphModule)


def test_a_rewritten_network_takes_any_batch_and_knows_training_from_evaluation():
    model, inputs = oracle.build(CASES["slice_by_literal"])
    net = trace(model, inputs)
    made = net.cut(oracle.random_plan(net, 0))
    assert made.way == "graph"
    more = torch.cat([inputs, inputs + 1, inputs[:1]])
    slim = made.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(slim(more)[: len(inputs)], slim(inputs))
    assert any(module.training for module in slim.train().modules())


class NormAndActivation(nn.BatchNorm2d):
    def __init__(self, width):
        super().__init__(width)
        self.activation = nn.Hardswish()

    def forward(self, x):
        return self.activation(super().forward(x))


def test_a_batch_norm_of_another_class_still_learns_its_statistics_in_a_rewritten_network():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.out = nn.Conv2d(3, 8, 1), NormAndActivation(8), nn.Linear(8 * 16, 3)

        def forward(self, x):
            return self.out(self.norm(self.a(x)).reshape(-1, 128))

    model, inputs = Model(), torch.randn(2, 3, 4, 4)
    net = trace(model, inputs)
    made = net.cut(oracle.random_plan(net, 0))
    assert made.way == "graph"
    before = made.module.norm.running_mean.clone()
    made.module.train()(inputs)
    assert not torch.equal(before, made.module.norm.running_mean)
    assert made.module.norm.num_batches_tracked == 1
    assert not made.module.eval().norm.activation.training


def test_an_optimiser_can_go_on_with_the_result():
    model, inputs = oracle.build(CASES["residual"])
    slim = cut(model, inputs)
    optimiser = torch.optim.AdamW(slim.parameters(), 1e-2)
    first = None
    for _ in range(5):
        loss = slim(inputs).square().sum()
        first = first if first is not None else loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < first


def test_a_state_dict_goes_round():
    model, inputs = oracle.build(CASES["residual"])
    net = trace(model, inputs)
    plan = oracle.random_plan(net, 0)
    slim, other = net.apply(plan), trace(CASES["residual"].make(), inputs).apply(plan)
    other.load_state_dict(slim.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(inputs), slim.eval()(inputs))


def test_a_hook_is_kept_and_runs_on_the_result():
    model, inputs = oracle.build(CASES["hooked"])
    slim = cut(model, inputs)
    assert len(slim.a._forward_hooks) == len(model.a._forward_hooks)


def test_a_cut_network_can_be_copied_saved_and_loaded(tmp_path):
    model, inputs = oracle.build(CASES["plain"])
    slim = cut(model, inputs)
    torch.save(slim.state_dict(), tmp_path / "slim.pt")
    twin = copy.deepcopy(slim)
    twin.load_state_dict(torch.load(tmp_path / "slim.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(twin(inputs), slim(inputs))


class ChangesACopy(nn.Module):
    """A reshape that copies while both dimensions of a grid are wide, and gives a view where one is not."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        grid = self.first(x).unflatten(1, (2, -1))
        shuffled = grid.transpose(1, 2).reshape(len(x), -1)
        return self.second(F.relu_(shuffled)), self.third(F.gelu(grid.flatten(1)))


def test_memory_that_only_the_cut_network_would_share_is_refused():
    model, x = ChangesACopy(), torch.randn(4, 5)
    net = trace(model, x)
    columns = next(axis for axis in net.axes if axis.prunable and axis.size == 3)
    for kept in ((0, 2), (1,)):
        plan = Plan((Keep(columns.name, columns.size, kept),), net.fingerprint)
        if len(kept) > 1:
            assert net.verify(plan).max_error < 1e-5
        else:
            with pytest.raises(UnsupportedModelError, match=r"relu_ .* must change the same tensors in place"):
                net.apply(plan)
