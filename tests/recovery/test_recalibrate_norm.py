import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError
from metaprune.recovery import Context, RecalibrateNorm


def batches_of(values: Tensor, sizes: Sequence[int]) -> Context:
    return Context(calibration=lambda: ((part,) for part in values.split(list(sizes))))


def in_training_mode(model: nn.Module, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Statistics that torch finds in one big batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    model.train()
    model(values)
    return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]


def statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [(norm.running_mean, norm.running_var) for norm in norms]


def chain(depth: int, channels: int = 4) -> nn.Sequential:
    torch.manual_seed(3)
    blocks = [[nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()] for _ in range(depth)]
    model = nn.Sequential(*itertools.chain(*blocks))
    with torch.no_grad():
        for norm in model[1::3]:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
            norm.running_mean.fill_(7)  # far from the truth
            norm.running_var.fill_(0.01)
    return model.double().eval()


def drifting(n: int, *shape: int) -> Tensor:
    """Samples whose mean moves, so that the means of the batches differ."""
    values = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return values + torch.linspace(-3, 5, n, dtype=torch.float64).view(-1, *[1] * len(shape))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1))
def test_pooled_statistics_are_those_of_one_big_batch(sizes: list[int]) -> None:
    values = drifting(sum(sizes), 4, 3, 3)
    recovered = RecalibrateNorm().recover(chain(1), batches_of(values, sizes))
    torch.testing.assert_close(statistics(recovered.model), in_training_mode(chain(1), values))


def test_the_average_of_variances_is_not_the_pooled_one() -> None:
    """Two batches of one variance with means four apart: the pooled variance has what lies between them, too."""
    part = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Sequential(nn.BatchNorm1d(3).double()).eval()
    found = RecalibrateNorm().recover(model, batches_of(torch.cat([part, part + 4]), [50, 50])).model[0]
    biased = part.var(0, correction=0)
    torch.testing.assert_close(found.running_mean, part.mean(0) + 2)
    torch.testing.assert_close(found.running_var, (biased + 4) * 100 / 99)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d(3), (3,)), (nn.BatchNorm1d(3), (3, 5)), (nn.BatchNorm3d(3), (3, 2, 2, 2))],
)
def test_every_kind_of_batch_norm(norm: nn.Module, shape: tuple[int, ...]) -> None:
    model, values = nn.Sequential(norm.double()), drifting(11, *shape)
    recovered = RecalibrateNorm().recover(model, batches_of(values, [4, 4, 3]))
    torch.testing.assert_close(statistics(recovered.model), in_training_mode(model, values))


def test_as_many_passes_as_layers_give_what_every_layer_gets_in_use() -> None:
    values = drifting(20, 4, 5, 5)
    for passes in (1, 2, 3):
        recovered = RecalibrateNorm(passes=passes).recover(chain(3), batches_of(values, [5] * 4))
        with torch.no_grad():
            for layer in range(3):
                norm, x = recovered.model[3 * layer + 1], recovered.model[: 3 * layer + 1](values)
                exact = torch.allclose(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-6)
                exact = exact and torch.allclose(norm.running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-6)
                assert exact == (layer < passes)


def test_one_batch_is_training_mode() -> None:
    values = drifting(20, 4, 5, 5)
    recovered = RecalibrateNorm().recover(chain(3), batches_of(values, [20]))
    torch.testing.assert_close(statistics(recovered.model), in_training_mode(chain(3), values))


def test_nothing_but_statistics_changes(damaged: nn.Module, context: Context) -> None:
    recovered = RecalibrateNorm().recover(damaged, context)
    before = damaged.state_dict()
    for name, tensor in recovered.model.state_dict().items():
        if "running_" in name:
            assert not torch.equal(tensor, before[name]), name
        elif name.endswith("num_batches_tracked"):
            assert tensor == 6  # batches of 100 from 512
        else:
            assert torch.equal(tensor, before[name]), name


def test_dropout_is_off_and_flags_return() -> None:
    model = nn.Sequential(nn.Dropout(0.9), chain(1)).train()
    values = drifting(8, 4, 3, 3)
    recovered = RecalibrateNorm().recover(model, batches_of(values, [4, 4]))
    torch.testing.assert_close(statistics(recovered.model), in_training_mode(chain(1), values))
    assert all(module.training for module in recovered.model.modules())


def test_a_norm_that_is_called_twice_pools_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x + 1)

    values = drifting(9, 2)
    recovered = RecalibrateNorm().recover(Twice(), batches_of(values, [4, 5]))
    both = torch.cat([values, 3 * values + 1])
    torch.testing.assert_close(recovered.model.norm.running_mean, both.mean(0))
    torch.testing.assert_close(recovered.model.norm.running_var, both.var(0))


def test_nothing_to_do_is_a_note() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    recovered = RecalibrateNorm().recover(model, Context())
    assert recovered.notes == ("there is no BatchNorm with running statistics to re-estimate",)
    assert torch.equal(recovered.model[0].weight, model[0].weight)


def test_a_norm_out_of_reach_is_a_note() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].spare = nn.BatchNorm1d(5)
    recovered = RecalibrateNorm().recover(model, batches_of(torch.randn(8, 3), [8]))
    assert recovered.notes == ("not reached by the calibration batches, so left as they were: 0.spare",)
    assert torch.equal(recovered.model[0].spare.running_var, torch.ones(5))


@pytest.mark.parametrize(
    ("values", "sizes", "message"),
    [
        (torch.tensor([[1.0], [float("nan")]]), [2], "must be finite, but those that reach '0'"),
        (torch.zeros(1, 1), [1], "at least 2 values per channel, but '0' got 1"),
        (torch.zeros(0, 1), [], "at least one batch"),
    ],
)
def test_unusable_data(values: Tensor, sizes: list[int], message: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    context = Context(calibration=lambda: ((part,) for part in (values.split(sizes) if sizes else ())))
    with pytest.raises(InputError, match=message):
        RecalibrateNorm().recover(model, context)
    assert float(model[0].running_var) == 1


def test_passes_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="passes >= 1"):
        RecalibrateNorm(passes=0)
