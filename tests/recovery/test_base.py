import pytest
import torch

from metaprune.errors import ConfigError
from metaprune.recovery import RECOVERIES, Finetune, Perp, RecalibrateNorm, resolve
from metaprune.recovery._base import on_device


class TestResolve:
    def test_in_the_order_of_the_text(self):
        assert resolve("finetune, recalibrate_norm") == [Finetune(), RecalibrateNorm()]

    def test_options_go_where_they_are_known(self):
        assert resolve("recalibrate_norm,finetune", passes=3, lr=0.1, epochs=None) == [
            RecalibrateNorm(passes=3),
            Finetune(lr=0.1),
        ]

    def test_an_option_for_one_goes_over_that_for_all(self):
        assert resolve("finetune,perp", **{"lr": 0.1, "perp.lr": 0.2}) == [Finetune(lr=0.1), Perp(lr=0.2)]

    @pytest.mark.parametrize("nothing", [None, "none", "", []])
    def test_nothing(self, nothing):
        assert resolve(nothing) == []

    def test_recoveries_pass_through(self):
        own = Finetune(epochs=7)
        assert resolve(own) == [own]
        assert resolve([own, RecalibrateNorm()]) == [own, RecalibrateNorm()]

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("fintune", {}, "no recovery is named 'fintune'. Did you mean 'finetune'"),
            ("finetune", {"epoch": 3}, "no option 'epoch'. Did you mean 'epochs'"),
            ("recalibrate_norm", {"epochs": 3}, "no option 'epochs'. Known: passes"),
            ("none", {"epochs": 3}, "no option 'epochs'. Known: none"),
            ("finetune,finetune", {}, "named once"),
            ("finetune", {"epochs": "three"}, "`epochs` must be a whole number, but it is 'three'"),
            (RecalibrateNorm(), {"passes": 3}, "options are for recoveries that are named, but passes came with"),
            ("finetune", {"lr": True}, "`lr` must be a number, but it is True"),
            ("finetune", {"epochs": 0}, "`epochs >= 1` must hold, but epochs=0"),
        ],
    )
    def test_refusals(self, text, options, message):
        with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
            resolve(text, **options)

    def test_names_are_file_names(self):
        for name in RECOVERIES:
            assert RECOVERIES[name].__module__ == f"metaprune.recovery.{name}"


def test_batches_keep_their_form():
    batch = (torch.ones(2), [torch.zeros(1), {"mask": torch.ones(3)}], "name")
    moved = on_device(batch, torch.device("meta"))
    assert isinstance(moved, tuple)
    assert moved[0].is_meta
    assert moved[1][0].is_meta
    assert moved[1][1]["mask"].is_meta
    assert moved[2] == "name"
