"""Weights times norms of what they read."""

import torch
from torch import nn

from metaprune import zoo
from metaprune.criteria import CRITERIA, Calibration
from metaprune.graph import trace
from tests.criteria.nets import X, hidden, scored, two_layers


def test_it_is_the_sum_of_weight_times_norm() -> None:
    model = two_layers()
    expected = model[2].weight.detach().double().abs().sum(0) * hidden(model).norm(dim=0)
    torch.testing.assert_close(scored("wanda", model), expected / expected.mean())


def test_equal_norms_leave_the_magnitude() -> None:
    model = two_layers()
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    expected = model[2].weight.detach().double().abs().sum(0)
    torch.testing.assert_close(scored("wanda", model), expected / expected.mean())


def test_the_scale_of_what_is_read_is_a_factor() -> None:
    model = two_layers()
    before = scored("wanda", model)
    with torch.no_grad():
        model[0].weight[3] *= 5
        model[0].bias[3] *= 5
    after = scored("wanda", model)
    torch.testing.assert_close(after[3] / after[0], 5 * before[3] / before[0])


def test_batches_and_their_order_play_no_part() -> None:
    model = two_layers()
    shuffled = Calibration(lambda: iter([(X.flip(0),)]))
    torch.testing.assert_close(scored("wanda", model, shuffled), scored("wanda", model))


def test_channels_of_groups_see_their_own_inputs() -> None:
    """A grouped convolution is a dense one with zeros."""
    torch.manual_seed(0)
    first, grouped = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 4, 3, groups=2)
    dense = nn.Conv2d(6, 4, 3)
    with torch.no_grad():
        dense.weight.zero_()
        for group in range(2):
            rows = slice(2 * group, 2 * group + 2)
            dense.weight[rows, 3 * group : 3 * group + 3] = grouped.weight[rows]
    x = torch.randn(4, 1, 6, 6)
    given = Calibration(lambda: iter([(x,)]))
    scores = [
        CRITERIA["wanda"]().score(trace(nn.Sequential(first, nn.ReLU(), layer), x), given) for layer in (grouped, dense)
    ]
    per_channel = scores[1]["0"]
    expected = per_channel.view(2, 3).sum(0)  # units of the grouped one: a channel of every group
    torch.testing.assert_close(scores[0]["0"], expected / expected.mean())


def test_heads_and_recurrent_states_are_read_too() -> None:
    for name in ("vit_tiny", "llama_tiny", "gru_classifier", "lstm_classifier"):
        net = trace(zoo.build(name), zoo.example_inputs(name))
        given = Calibration(lambda name=name: iter([(zoo.example_inputs(name),)]))
        scores = CRITERIA["wanda"]().score(net, given)
        kinds = {net.axis(axis).kind for axis in scores}
        assert kinds & {"head", "hidden"}, name
        assert all(net.axis(axis).consumers for axis in scores)
        assert all(bool((score_U > 0).all()) for score_U in scores.values())
