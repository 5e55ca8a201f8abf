"""Keep."""

import pytest
import torch

from metaprune.edits import Keep
from metaprune.errors import ConfigError
from metaprune.graph import trace
from metaprune.plans import Draft, Plan
from tests.graph import oracle
from tests.graph.cases import CASES


@pytest.fixture(scope="module")
def net():
    return trace(*oracle.build(CASES["plain"]))


@pytest.mark.parametrize("kept", [(0,), (7,), (0, 7), tuple(range(8))])
def test_kept_units_are_those_that_are_left(kept, net):
    slim = net.apply(Plan((Keep("a", 8, kept),)))
    assert torch.equal(slim.a.weight, net.model.a.weight[list(kept)])
    assert torch.equal(slim.bn.running_var, net.model.bn.running_var[list(kept)])
    assert torch.equal(slim.b.weight, net.model.b.weight[:, list(kept)])
    assert torch.equal(slim.head.out.weight, net.model.head.out.weight)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (Keep("a", 8, ()), "nothing is kept"),
        (Keep("a", 7, (0,)), "has 8 units, but the plan was made for 7"),
        (Keep("a", 8, (3, 3)), "must ascend"),
        (Keep("a", 8, (0, 8)), "must ascend within 0..7"),
        (Keep("head.out", 3, (0, 1)), "the output of the network"),
    ],
)
def test_refusals(edit, reason, net):
    assert reason in edit.check(net)


def test_all_units_of_a_frozen_axis_may_be_kept(net):
    assert Keep("head.out", 3, (0, 1, 2)).check(net) is None


def test_an_unknown_axis_is_named_with_the_nearest(net):
    with pytest.raises(ConfigError, match=r"Did you mean 'head\.out'"):
        Keep("head.outt", 3, (0,)).check(net)


def test_a_second_edit_narrows_the_first():
    draft = Draft()
    Keep("a", 8, (0, 1, 5)).apply(draft)
    Keep("a", 8, (1, 5, 6)).apply(draft)
    assert draft.keep == {"a": (1, 5)}


@pytest.mark.parametrize("kept", [[0, 1], (0.0, 1.0), (True, 2)])
def test_ranks_that_are_no_tuple_of_integers_are_refused_or_brought_in_form(kept, net):
    """Whatever is accepted must be what the same plan says after saving and loading."""
    try:
        edit = Keep("a", 8, kept)
    except (ConfigError, TypeError):
        return
    assert edit.check(net) or Keep.from_json(edit.to_json(), {}) == edit
