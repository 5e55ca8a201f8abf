from metaprune.cli.list import KINDS
from metaprune.criteria import CRITERIA
from metaprune.metanet import shipped
from tests.cli.commands import command


def test_everything_has_a_name_and_a_plain_line() -> None:
    told = command("list", "--json").json
    assert list(told["items"]) == list(KINDS)
    for kind, items in told["items"].items():
        assert items or (kind == "metanets" and not shipped())
        for item in items:
            assert item["about"]
            assert "`" not in item["about"].replace("`metaprune demo`", "")
            assert "no description" not in item["about"]
            assert "partial(" not in item["about"]


def test_one_kind_is_what_its_registry_holds() -> None:
    told = command("list", "criteria", "--json").json
    assert [item["name"] for item in told["items"]["criteria"]] == list(CRITERIA)


def test_tables_fit_into_80_columns() -> None:
    done = command("list")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    assert "taylor" in done.out


def test_an_unknown_kind_names_the_nearest() -> None:
    done = command("list", "model")
    assert done.code == 3
    assert "Did you mean 'models'?" in done.said
