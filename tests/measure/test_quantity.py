"""No number without unit, sample size, spread and label."""

import json

import pytest

from metaprune.measure.quantity import Quantity


def test_plain_data() -> None:
    record = json.loads(json.dumps(Quantity(value=1.5, unit="ms", n=3, label="projected").to_json()))
    assert record == {
        "value": 1.5,
        "unit": "ms",
        "n": 3,
        "low": None,
        "high": None,
        "spread": "none",
        "label": "projected",
    }


def test_labels_are_three() -> None:
    with pytest.raises(AssertionError):
        Quantity(value=1.0, unit="ms", n=1, label="guessed")  # type: ignore[arg-type]
