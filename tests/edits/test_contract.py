"""Every registered edit: a check that changes nothing, a refusal with a reason, and a way through JSON and back."""

import copy

import pytest
import torch
from torch import nn

from metaprune.edits import DropBlock, Keep, Mask, Merge, SetWeight
from metaprune.errors import ConfigError
from metaprune.graph import trace
from metaprune.plans import EDITS, Draft, Plan
from tests.graph import oracle
from tests.graph.cases import CASES

EXAMPLES = {
    "drop_block": (DropBlock("body"), DropBlock("a")),
    "keep": (Keep("a", 8, (0, 3)), Keep("a", 8, ())),
    "mask": (Mask("b.weight", torch.rand(6, 8, 3, 3) > 0.5), Mask("b.bias", torch.ones(5) > 0)),
    "merge": (Merge("b.weight", torch.rand(8)), Merge("b.bias", torch.rand(6))),
    "set_weight": (SetWeight("b.bias", torch.arange(6.0)), SetWeight("b.bias", torch.arange(5.0))),
}
every_edit = pytest.mark.parametrize("kind", list(EDITS))


class Beside(nn.Module):
    """The plain network with a residual branch before it."""

    def __init__(self, plain, width):
        super().__init__()
        self.body = nn.Conv2d(width, width, 1)
        self.a, self.bn, self.b, self.head = plain.a, plain.bn, plain.b, plain.head

    def forward(self, x):
        return type(CASES["plain"].make()).forward(self, x + self.body(x))


@pytest.fixture(scope="module")
def net():
    plain, x = oracle.build(CASES["plain"])
    return trace(Beside(plain, 3).eval(), x)


def test_every_edit_has_an_example():
    assert set(EDITS) == set(EXAMPLES)


@every_edit
def test_json_goes_round(kind):
    edit, _ = EXAMPLES[kind]
    assert edit.kind == kind
    assert type(edit).from_json(edit.to_json(), edit.tensors()) == edit


@every_edit
def test_edits_are_frozen(kind):
    edit, _ = EXAMPLES[kind]
    with pytest.raises(AttributeError):
        edit.extra = 1
    assert hash(edit) == hash(copy.copy(edit))


@every_edit
def test_a_check_leaves_the_network_as_it_was(kind, net):
    good, bad = EXAMPLES[kind]
    before = oracle.footprint(net.model)
    assert good.check(net) is None
    assert bad.check(net)
    oracle.same_footprint(before, oracle.footprint(net.model))


@every_edit
def test_a_refusal_says_what_and_why(kind, net):
    refusal = EXAMPLES[kind][1].check(net)
    assert "'a'" in refusal or "'b.bias'" in refusal
    assert refusal.endswith(".")
    with pytest.raises(ConfigError, match=refusal[:20].replace("(", r"\(")):
        net.apply(Plan((EXAMPLES[kind][1],)))


@every_edit
def test_applying_fills_the_draft_alone(kind):
    edit, _ = EXAMPLES[kind]
    draft = Draft()
    edit.apply(draft)
    assert draft != Draft()
