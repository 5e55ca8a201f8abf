import pytest

from metaprune.budget import parse_budget
from metaprune.errors import BudgetError

DENSE = {"macs": 100e6, "params": 1e6, "bytes": 4e6, "activations": 1e6}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs=0.5", {"macs": 50e6}),
        ("macs=1", {"macs": 100e6}),
        ("macs=40M", {"macs": 40e6}),
        ("macs=4e7", {"macs": 40e6}),
        ("bytes=256KB", {"bytes": 256e3}),
        ("bytes=256KiB", {"bytes": 262144}),
        (" macs = .25 , params=300k", {"macs": 25e6, "params": 300e3}),
        ("macs=0.5,macs=40M", {"macs": 40e6}),
    ],
)
def test_budgets_are_fractions_up_to_one_and_numbers_above(text: str, expected: dict[str, float]) -> None:
    assert parse_budget(text).absolute(DENSE) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "quantity=number"),
        ("0.5", "quantity=number"),
        ("mac=0.5", "Did you mean 'macs'"),
        ("macs=half", "must be a number"),
        ("macs=0", "above 0"),
        ("macs=-0.5", "above 0"),
        ("macs=nan", "must be a number"),
        ("macs=inf", "must be a number"),
        ("macs=1e999", "above 0"),
        ("macs=40Q", "must be a number"),
        ("macs=0.5,", "quantity=number"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budget(text)


def test_more_than_the_dense_network_is_refused() -> None:
    with pytest.raises(BudgetError, match="at most the dense network"):
        parse_budget("macs=200M").absolute(DENSE)


def test_a_budget_prints_as_it_was_given() -> None:
    assert str(parse_budget("macs=0.5,bytes=256KB")) == "macs=0.5,bytes=256000"
