import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaprune.data._cut import content_keys, cut
from metaprune.errors import InputError


@given(st.lists(st.binary(min_size=1, max_size=3), min_size=20, max_size=60, unique=True), st.randoms())
def test_parts_are_a_partition_that_no_order_changes(items, random):
    shares = (0.7, 0.1, 0.2)
    parts = cut(content_keys(items, "test"), shares, "items")
    assert sorted(np.concatenate(parts)) == list(range(len(items)))
    assert all(abs(len(part) - share * len(items)) <= 1 for part, share in zip(parts, shares))
    chosen = [{items[index] for index in part} for part in parts]
    random.shuffle(items)
    again = cut(content_keys(items, "test"), shares, "items")
    assert [{items[index] for index in part} for part in again] == chosen


@given(st.lists(st.sampled_from([bytes([k]) for k in range(30)]), min_size=60, max_size=200))
def test_equal_items_stay_together(items):
    try:
        parts = cut(content_keys(items, "test"), (0.5, 0.5), "items")
    except InputError:
        assert len(set(items)) < 5
        return
    first, second = ({items[index] for index in part} for part in parts)
    assert not first & second


def test_datasets_are_cut_independently():
    items = [bytes([k]) for k in range(100)]
    one, two = (cut(content_keys(items, salt), (0.5, 0.5), "items")[0] for salt in ("one", "two"))
    assert one.tolist() != two.tolist()


def test_keys_are_the_same_on_every_machine():
    assert content_keys([b"abc"], "digits").tolist() == [11284046603369973706]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few(count):
    with pytest.raises(InputError, match=f"{count} images are too few for 3 splits with shares of 70%, 10%, 20%"):
        cut(np.arange(count, dtype=np.uint64), (0.7, 0.1, 0.2), "images")
