"""Criteria of criteria."""

import pytest
import torch

from metaprune.criteria import CRITERIA, Calibration
from metaprune.errors import ConfigError
from tests.criteria.nets import scored, two_layers


def test_the_rank_of_one_is_its_order() -> None:
    l2 = scored("l2", two_layers())
    ranks = scored("rank_average", two_layers(), of=("l2",))
    assert torch.equal(ranks.argsort(), l2.argsort())
    torch.testing.assert_close(ranks.sort().values, torch.arange(1, 8).double() / 7)


def test_ranks_are_averaged_and_products_are_products() -> None:
    of = ("l2", "taylor", "fpgm")
    parts = [scored("rank_average", two_layers(), of=(name,)) for name in of]
    torch.testing.assert_close(scored("rank_average", two_layers(), of=of), torch.stack(parts).mean(0))
    alone = [scored(name, two_layers()) for name in of]
    expected = torch.stack([part / part.mean() for part in alone]).prod(0)
    torch.testing.assert_close(scored("product", two_layers(), of=of), expected)


def test_they_need_what_their_parts_need() -> None:
    criterion = CRITERIA["product"](of=("l2", "fisher"))
    with pytest.raises(ConfigError, match="needs data"):
        criterion.score(None, Calibration())  # type: ignore[arg-type]
    assert not CRITERIA["product"]().needs


@pytest.mark.parametrize("of", [(), "l2", ("product",), ("l3",)])
def test_names_that_cannot_be_combined_are_refused(of: object) -> None:
    with pytest.raises(ConfigError):
        CRITERIA["product"](of=of)


def test_an_axis_that_all_judge_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs BatchNorm"):
        scored("product", two_layers(), of=("l2", "bn_scale"))
