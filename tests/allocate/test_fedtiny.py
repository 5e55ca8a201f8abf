"""Candidates, of which the best stays."""

import pytest
import torch

from metaprune import data, zoo
from metaprune.allocate import ALLOCATORS, Problem
from metaprune.allocate.fedtiny import loss_of, normalising_by_batch
from metaprune.errors import ConfigError
from metaprune.graph import trace
from metaprune.task import Classification

DIGITS = data.load("digits").train.subset(96, seed=0)


def problem(seed: int = 0) -> Problem:
    torch.manual_seed(0)
    net = trace(zoo.build("digits_cnn").eval(), zoo.example_inputs("digits_cnn"))
    generator = torch.Generator().manual_seed(0)
    scores = {a.name: torch.rand(a.size, generator=generator).double() for a in net.axes if a.prunable}
    limits = {"macs": 0.5 * net.cost().macs}
    return Problem(net, scores, limits, batches=lambda: DIGITS.batches(48), task=Classification(), seed=seed)


def test_the_candidate_of_the_lowest_loss_stays() -> None:
    asked, fedtiny = problem(), ALLOCATORS["fedtiny"](candidates=4)
    candidates = list(fedtiny._drawn(asked))  # type: ignore[attr-defined]
    losses = [loss_of(asked, sizes, 4) for sizes in candidates]
    assert len({sizes.tobytes() for sizes in candidates}) == 4
    assert all(asked.fits(sizes) for sizes in candidates)
    best = candidates[losses.index(min(losses))]
    kept = fedtiny.allocate(asked)
    assert [len(kept[axis.name]) for axis in asked.axes] == [best[asked.network.index(a.name)] for a in asked.axes]


def test_one_candidate_is_the_even_allocation_and_seeds_draw_others() -> None:
    asked = problem()
    alone = ALLOCATORS["fedtiny"](candidates=1).allocate(asked)
    assert alone == ALLOCATORS["uniform"]().allocate(asked)
    drawn = [list(ALLOCATORS["fedtiny"](candidates=3)._drawn(problem(seed))) for seed in (0, 0, 1)]  # type: ignore[attr-defined]
    assert all((a == b).all() for a, b in zip(drawn[0], drawn[1]))
    assert any((a != b).any() for a, b in zip(drawn[0], drawn[2]))


def test_batch_norm_sees_the_statistics_of_the_batch() -> None:
    net = zoo.build("digits_cnn")
    (x, _) = next(DIGITS.batches(96))
    with torch.no_grad():
        wanted = net.train()(x)
        seen = normalising_by_batch(net)(x)
    torch.testing.assert_close(seen, wanted)


@pytest.mark.parametrize("options", [{"candidates": 0}, {"spread": 1.0}, {"batches": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must hold"):
        ALLOCATORS["fedtiny"](**options)
