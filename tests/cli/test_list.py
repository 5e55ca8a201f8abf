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


def test_methods_have_options() -> None:
    told = command("list", "--json").json["items"]
    by_kind = {kind: {item["name"]: item.get("options") for item in items} for kind, items in told.items()}
    assert [option["name"] for option in by_kind["criteria"]["obs"]][:3] == ["samples", "rows", "ridge"]
    assert by_kind["criteria"]["l2"] == []
    assert by_kind["allocators"]["global_mt"][0]["default"] == "0.005"
    assert by_kind["models"]["mlp"] is None


def test_one_method_is_shown_with_its_options() -> None:
    done = command("list", "recoveries", "reconstruct")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    shown = " ".join(done.out.split())
    assert "only_bias Change no weights, only biases. [false]" in shown
    assert "finetune" not in shown
    told = command("list", "recoveries", "reconstruct", "--json").json["items"]
    assert [item["name"] for item in told["recoveries"]] == ["reconstruct"]
    assert "none" in command("list", "criteria", "l2").out


def test_a_name_that_has_no_options_to_show_is_refused() -> None:
    done = command("list", "criteria", "tailor")
    assert done.code == 3
    assert "Did you mean 'taylor'" in done.said
    done = command("list", "models", "mlp")
    assert done.code == 3
    assert "criteria, allocators, recoveries, which have options" in done.said


def test_tables_fit_into_80_columns() -> None:
    done = command("list")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    assert "taylor" in done.out


def test_an_unknown_kind_names_the_nearest() -> None:
    done = command("list", "model")
    assert done.code == 3
    assert "Did you mean 'models'?" in done.said
