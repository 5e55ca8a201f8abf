"""The whole way on real digits, its promises and its refusals."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import metaprune as mp
from metaprune import data, zoo
from metaprune.allocate import GlobalMinimumThreshold
from metaprune.criteria import MetanetScore, Taylor
from metaprune.edits import DropBlock, Mask, SetWeight
from metaprune.errors import BudgetError, ConfigError, InputError, VerificationError
from metaprune.metanet import Metanet, Shape, save_checkpoint
from metaprune.pipeline import Result
from metaprune.planning import calibration_batches
from metaprune.recovery import Context, RecalibrateNorm, resolve

DIGITS = data.load("digits")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network that has learnt digits."""
    torch.manual_seed(0)
    finetune = resolve("finetune", epochs=15, lr=0.1, batch_size=64, recalibrate=False)[0]
    return finetune.recover(zoo.build("digits_cnn"), Context(train=DIGITS.train)).model.eval()


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return next(DIGITS.train.batches(2))[0]


@pytest.fixture(scope="module")
def result(trained: nn.Module, example: torch.Tensor) -> Result:
    return mp.prune(trained, example, "macs=0.5", data=DIGITS, recovery="recalibrate_norm")


def test_half_the_macs_are_gone_and_the_network_still_reads(result: Result) -> None:
    assert 0.4 * result.before.macs < result.after.macs <= 0.5 * result.before.macs
    assert result.after.params < result.before.params
    assert result.verification.max_error < 1e-5
    accuracy = {name: entry.top1 for name, entry in result.accuracy.items()}
    assert accuracy["dense"] > 95
    assert accuracy["recovered"] > accuracy["cut"]
    assert result.after.metrics["accuracy"] == accuracy["recovered"]
    assert result.difference is not None
    assert result.difference.difference == pytest.approx(accuracy["recovered"] - accuracy["dense"])


def test_the_given_network_is_left_alone(trained: nn.Module, example: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    mp.prune(trained.train(), example, "macs=0.7", data=DIGITS)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert all(module.training for module in trained.modules())
    trained.eval()


def test_the_same_call_gives_the_same_network(trained: nn.Module, example: torch.Tensor, result: Result) -> None:
    again = mp.prune(trained, example, "macs=0.5", data=DIGITS, recovery="recalibrate_norm")
    assert again.plan == result.plan
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


def test_a_saved_result_is_rebuilt_bit_for_bit_in_a_fresh_process(result: Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "result")
    x = DIGITS.test.images()
    save_file({"x": x}, tmp_path / "x.safetensors")
    code = f"""
import torch, metaprune as mp
from metaprune import zoo
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
model = mp.load({str(folder)!r}, zoo.build("digits_cnn"))
with torch.no_grad():
    save_file({{"y": model(load_file({str(tmp_path / "x.safetensors")!r})["x"])}}, {str(tmp_path / "y.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    from safetensors.torch import load_file

    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], result.model(x))


def test_a_damaged_or_foreign_result_is_refused(result: Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "result")
    with pytest.raises(ConfigError, match="must come from this architecture"):
        mp.load(folder, zoo.build("digits_cnn", num_classes=7))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        mp.load(folder, zoo.build("digits_cnn"))
    with pytest.raises(InputError, match="does not exist"):
        mp.load(tmp_path / "nothing", zoo.build("digits_cnn"))


def test_without_data_weights_decide_and_nothing_is_recovered(trained: nn.Module, example: torch.Tensor) -> None:
    result = mp.prune(trained, example, "params=0.5")
    assert result.plan.made_by["criterion"] == "l2"
    assert result.accuracy == {}
    assert result.recovered == ()


def test_where_branches_leave_whole_no_unit_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of all calibration images for scores that play no part would be time lost."""
    monkeypatch.setattr(Taylor, "_score", lambda *_: pytest.fail("units were judged"))
    model = zoo.build("vit_tiny").eval()
    images = [(torch.randn(8, 3, 32, 32), torch.arange(8))]
    result = mp.prune(model, images[0][0][:2], "macs=0.8", data=images, allocator="laptop")
    assert result.plan.made_by["criterion"] == "l2"
    assert any(isinstance(edit, DropBlock) for edit in result.plan.edits)


def test_methods_may_be_instances_with_options_of_their_own(trained: nn.Module, example: torch.Tensor) -> None:
    way: dict[str, Any] = {"criterion": Taylor(group=8), "allocator": GlobalMinimumThreshold(minimum=0.01)}
    result = mp.prune(trained, example, "macs=0.6", data=DIGITS, calibration=64, recovery=RecalibrateNorm(), **way)
    made_by = result.plan.made_by
    assert (made_by["criterion"], made_by["allocator"]) == ("taylor(group=8)", "global_mt(minimum=0.01)")
    assert len(result.recovered) == 1
    batches = list(DIGITS.train.subset(64, 0).batches(32))
    plan = mp.plan(mp.trace(trained, example), "macs=0.6", **way, data=batches)
    assert plan.made_by["criterion"] == "taylor(group=8)"


def test_a_loss_of_the_users_own(trained: nn.Module, example: torch.Tensor) -> None:
    network = mp.trace(trained, example)
    batches = list(DIGITS.train.subset(64, 0).batches(32))
    plan = mp.plan(network, "macs=0.6", "taylor", data=batches, loss=lambda y, t: nn.functional.cross_entropy(y, t))
    same = mp.plan(network, "macs=0.6", "taylor", data=lambda: iter(batches), loss="classification")
    assert plan.edits == same.edits


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "gblm"])
def test_inputs_alone_are_enough_to_judge_by(trained: nn.Module, example: torch.Tensor, criterion: str) -> None:
    """Feature matching finds units that the output does not hang on, though its gradient is zero."""
    model = copy.deepcopy(trained)
    axis = next(axis for axis in mp.trace(model, example).axes if axis.prunable)
    with torch.no_grad():  # the last half of the units feeds nothing
        for name, dim in axis.consumers:
            parameter = model.get_parameter(name)
            width = parameter.shape[dim] // axis.size
            parameter.narrow(dim, axis.size // 2 * width, axis.size // 2 * width).zero_()
    network = mp.trace(model, example)
    inputs = [x for x, _ in DIGITS.train.subset(64, 0).batches(32)]
    for given in (inputs, lambda: iter(inputs)):
        plan = mp.plan(network, "macs=0.9", criterion, data=given, loss="feature_matching")
        first = next(edit for edit in plan.edits if edit.axis == axis.name)
        assert set(range(axis.size // 2)) <= set(first.kept)
    with pytest.raises(InputError, match=r"needs labels.*feature_matching"):
        mp.plan(network, "macs=0.9", criterion, data=inputs)


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2)}, (), ("text",)])
def test_batches_that_do_not_begin_with_a_tensor_are_refused(
    trained: nn.Module, example: torch.Tensor, batch: Any
) -> None:
    network = mp.trace(trained, example)
    for given in ([batch], lambda: iter([batch])):
        with pytest.raises(InputError, match="whose first entry is a tensor, but the first entry of one is"):
            mp.plan(network, "macs=0.6", "wanda", data=given)


def test_a_network_that_returns_a_container_goes_the_whole_way() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 24, "intermediate_size": 40}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_labels=10)
    model = transformers.ViTForImageClassification(config).eval()
    options = {"data": data.load("digits"), "recovery": "finetune", "calibration": 256}
    done = mp.prune(
        model, torch.randn(2, 1, 8, 8), "macs=0.7", recovery_options={"epochs": 1, "distil": 0.5}, **options
    )
    assert done.after.macs <= 0.7 * done.before.macs
    assert set(done.accuracy) == {"dense", "cut", "recovered"}
    assert done.model(torch.randn(3, 1, 8, 8)).logits.shape == (3, 10)


@pytest.fixture(scope="module")
def metanet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small metanetwork that changes what it reads."""
    torch.manual_seed(0)
    metanet = Metanet(Shape(hidden=8, layers=1, heads=2, rank=2, reads=("taylor", "l2"), trust=1.0))
    with torch.no_grad():
        for parameter in metanet.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return str(save_checkpoint(metanet, tmp_path_factory.mktemp("metanet") / "metanet.safetensors"))


def test_a_metanetwork_edits_first_and_scores_by_name(trained: nn.Module, example: torch.Tensor, metanet: str) -> None:
    network = mp.trace(trained, example)
    plain = mp.plan(network, "macs=0.5", "taylor", data=DIGITS)
    edited = mp.plan(network, "macs=0.5", "taylor", data=DIGITS, metanet=metanet)
    scored = mp.plan(network, "macs=0.5", MetanetScore(checkpoint=metanet), data=DIGITS)
    both = mp.plan(network, "macs=0.5", "metanet", data=DIGITS, metanet=metanet)
    changed = {edit.name for edit in edited.edits if isinstance(edit, SetWeight)}
    assert "conv1.weight" in changed
    assert not any("running" in name for name in changed)
    for plan in (scored, plain):
        assert not any(isinstance(edit, SetWeight) for edit in plan.edits)
    assert scored.draft().keep != plain.draft().keep
    assert both.draft().keep != scored.draft().keep
    assert edited.made_by["metanet"] == metanet
    changed_network = network.with_tensors(edited.draft().tensors)
    assert edited.draft().keep == mp.plan(changed_network, "macs=0.5", "taylor", data=DIGITS).draft().keep
    assert edited.draft().keep != plain.draft().keep
    for plan in (edited, both):  # against the masked *edited* network
        assert network.verify(plan, DIGITS.validation.images()[:8]).max_error < 1e-5
        dense, slim = trained(example), network.apply(plan)(example)
        assert not torch.allclose(dense, slim)


def test_a_result_of_a_metanetwork_is_replayed(
    trained: nn.Module, example: torch.Tensor, metanet: str, tmp_path: Path
) -> None:
    result = mp.prune(trained, example, "macs=0.6", data=DIGITS, metanet=metanet)
    assert result.plan.made_by["criterion"] == "metanet"
    again = mp.load(result.save(tmp_path), zoo.build("digits_cnn"))
    assert torch.equal(again(example), result.model(example))


def test_what_a_plan_masks_stays_zero_while_weights_are_trained(
    trained: nn.Module, example: torch.Tensor, tmp_path: Path
) -> None:
    name, weight = next((n, p) for n, p in trained.named_parameters() if p.ndim == 4 and p.shape[1] > 1)
    kept = torch.arange(weight.numel()).view(weight.shape) % 2 == 0
    mp.Plan((Mask(name, kept),), mp.trace(trained, example).fingerprint).save(tmp_path / "plan.json")
    done = mp.prune(
        trained, example, "macs=0.5", data=DIGITS.train.subset(128, 0), recovery="finetune",
        recovery_options={"epochs": 1}, folder=tmp_path, resume=True,
    )  # fmt: skip
    found = dict(done.model.named_parameters())[name]
    assert not torch.equal(found[kept], weight[kept])
    assert not bool(found[~kept].any())


def test_resume_takes_the_plan_that_was_made(trained: nn.Module, example: torch.Tensor, tmp_path: Path) -> None:
    first = mp.prune(trained, example, "macs=0.5", data=DIGITS, criterion="random", folder=tmp_path, seed=1)
    again = mp.prune(trained, example, "macs=0.5", data=DIGITS, criterion="l2", folder=tmp_path, seed=1, resume=True)
    assert again.plan == first.plan


def test_a_cut_that_is_not_the_masked_network_is_not_handed_out(
    trained: nn.Module, example: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metaprune.graph import Network
    from metaprune.graph.surgery import Cut

    cut = Network.cut

    def broken(self: Network, plan: mp.Plan) -> Cut:
        made = cut(self, plan)
        with torch.no_grad():
            next(made.module.parameters())[0].mul_(1.01)
        return made

    monkeypatch.setattr(Network, "cut", broken)
    with pytest.raises(VerificationError, match="Nothing is handed out"):
        mp.prune(trained, example, "macs=0.5")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "macs=0"}, BudgetError, "above 0"),
        ({"budget": "macs=1.5"}, BudgetError, "cannot go below"),
        ({"budget": "macs=1e12"}, BudgetError, "at most the dense network"),
        ({"budget": "macs=0.001"}, BudgetError, "cannot go below"),
        ({"criterion": "tailor"}, ConfigError, "Did you mean 'taylor'"),
        ({"allocator": "gobal"}, ConfigError, "Did you mean 'global'"),
        ({"recovery": "finetun"}, ConfigError, "Did you mean 'finetune'"),
        ({"metanet": "nothing"}, ConfigError, "'nothing' is neither"),
        ({"accelerator": "tpu"}, ConfigError, "auto, cpu or cuda"),
        ({"calibration": 0}, ConfigError, "calibration >= 1"),
        ({"data": []}, InputError, "gives none"),
    ],
)
def test_what_does_not_fit_is_refused_with_nothing_written(
    trained: nn.Module, example: torch.Tensor, tmp_path: Path, options: dict, error: type, message: str
) -> None:
    arguments = {"budget": "macs=0.5", "data": DIGITS} | options
    with pytest.raises(error, match=message):
        mp.prune(trained, example, folder=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_network_with_nothing_to_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="must have a prunable axis"):
        mp.plan(mp.trace(nn.Linear(3, 2), torch.randn(2, 3)), "macs=0.5")


def test_calibration_batches_are_the_same_every_pass() -> None:
    fresh = calibration_batches(DIGITS, 100, seed=1)
    first, second = (torch.cat([x for x, _ in fresh()]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first) == 100
    other = torch.cat([x for x, _ in calibration_batches(DIGITS, 100, seed=2)()])
    assert not torch.equal(first, other)


def test_batches_of_a_function_are_taken_as_they_come() -> None:
    def endless() -> Iterator[object]:
        while True:
            yield from DIGITS.train.batches(8)

    given = calibration_batches(endless, 5, 0)
    for seen, own in zip(itertools.islice(given(), 200), endless()):
        assert seen is own or torch.equal(seen[0], own[0])


@pytest.mark.long
def test_resnet20_on_real_images_beats_chance_by_far(cifar10: Path, cifar10_weights: Path) -> None:
    """The way of the README's first line: the given weights, Taylor, half the MACs, norms re-estimated."""
    model = zoo.build("cifar_resnet20")
    zoo.load_weights(model, cifar10_weights / "cifar10_resnet20.safetensors")
    images = data.load(f"cifar10:{cifar10}")
    result = mp.prune(model, next(images.train.batches(2))[0], "macs=0.5", data=images)
    assert result.after.metrics["accuracy"] > 60
    assert result.verification.max_error < 1e-5
