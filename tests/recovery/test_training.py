"""What all recoveries by training share: they go on bit for bit after a kill, and keep what is masked at zero."""

import copy
from dataclasses import replace

import pytest
import torch

from metaprune import zoo
from metaprune.graph import trace
from metaprune.planning import plan as make_plan
from metaprune.recovery import RECOVERIES, NoProgress
from metaprune.recovery._training import Trained

TRAINED = [name for name in RECOVERIES if issubclass(RECOVERIES[name], Trained)]


class StopAt(NoProgress):
    """Interrupts after a number of steps, counted over all that starts."""

    def __init__(self, step: int) -> None:
        self.step, self.counts = step, False

    def start(self, total: int, unit: str, description: str, done: int = 0) -> None:
        self.counts, self.at = unit == "batches", done

    def advance(self, amount: int = 1, status: str = "") -> None:
        self.at += amount
        if self.counts and self.at == self.step:
            self.step = -1
            raise KeyboardInterrupt


@pytest.fixture
def cut(trained, context):
    network = trace(copy.deepcopy(trained), zoo.example_inputs("digits_cnn"))
    plan = make_plan(network, "macs=0.5", criterion="l2", allocator="uniform")
    return network.apply(plan), replace(context, dense=network.model, network=network, plan=plan)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("step", [3, 8, 13])
def test_after_a_kill_it_goes_on_bit_for_bit(name, step, cut, tmp_path):
    slim, context = cut
    recipe = RECOVERIES[name](epochs=2, batch_size=64)  # 16 steps
    whole = recipe.recover(slim, context)
    (tmp_path / f"{name}-5.safetensors").write_text("of other work")
    context = replace(context, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        recipe.recover(slim, replace(context, progress=StopAt(step)))
    resumed = recipe.recover(slim, replace(context, resume=True))
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key
    assert [entry["train/loss"] for entry in whole.history] == [entry["train/loss"] for entry in resumed.history]
    again = recipe.recover(slim, replace(context, resume=True))  # a finished run is only read
    assert all(torch.equal(tensor, again.model.state_dict()[key]) for key, tensor in whole.model.state_dict().items())


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_masked_stays_zero(name, cut):
    slim, context = cut
    masks = {"conv2.weight": torch.rand(slim.conv2.weight.shape) > 0.5}
    with torch.no_grad():
        slim.conv2.weight.mul_(masks["conv2.weight"])
    context = replace(context, masks=masks, network=None, plan=None)
    recovered = RECOVERIES[name](epochs=1, batch_size=64).recover(slim, context)
    assert not recovered.model.conv2.weight[~masks["conv2.weight"]].any()
    assert (recovered.model.conv2.weight != slim.conv2.weight).any()
