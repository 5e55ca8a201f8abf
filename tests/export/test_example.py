"""Example inputs, and other batches in their likeness."""

import pytest
import torch

from metaprune.errors import InputError, UnsupportedModelError
from metaprune.export.example import as_example, named_outputs


def test_other_batch_sizes_repeat_the_rows() -> None:
    x, table = torch.arange(6.0).view(2, 3), torch.randn(7, 3)
    sized = as_example((x, table)).resized(batch=5)
    assert torch.equal(sized.args[0], x[[0, 1, 0, 1, 0]])
    assert torch.equal(sized.args[1], table)
    assert as_example(torch.tensor(1.0)).batch is None


def test_named_axes_have_other_sizes_wherever_they_are() -> None:
    ids, mask, table = torch.arange(6).view(2, 3), torch.ones(2, 3), torch.randn(3, 5)
    example = as_example({"ids": ids, "mask": mask, "table": table}, {1: "length"})
    assert example.sizes == {"batch": 2, "length": 3}
    sized = example.resized(length=4, batch=1)
    assert sized.kwargs["ids"].tolist() == [[0, 1, 2, 0]]
    assert sized.kwargs["mask"].shape == (1, 4)
    assert torch.equal(sized.kwargs["table"], table)


def test_drawn_numbers_stay_in_range_and_tokens_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, values = torch.randint(0, 9, (4, 6)), torch.rand(4, 6) + 2
    drawn = as_example({"tokens": tokens, "values": values, "mode": "fast"}).redrawn(generator)
    assert torch.equal(drawn.kwargs["tokens"], tokens)
    assert not torch.equal(drawn.kwargs["values"], values)
    assert set(drawn.kwargs["values"].flatten().tolist()) <= set(values.flatten().tolist())
    assert drawn.kwargs["mode"] == "fast"
    assert as_example(torch.zeros(4, 6)).redrawn(generator).args[0].std() > 0


@pytest.mark.parametrize("inputs", [None, "x", [torch.zeros(1), 3], {"x": [1]}, {}, {"n": 3}, torch.zeros(0, 3)])
def test_other_inputs_are_refused(inputs: object) -> None:
    with pytest.raises(InputError, match="example inputs must"):
        as_example(inputs)


def test_outputs_by_name() -> None:
    x = torch.zeros(1)
    assert list(named_outputs(x)) == ["output"]
    assert list(named_outputs({"logits": x, "hidden": (x, x), "loss": None})) == ["logits", "hidden_0", "hidden_1"]
    with pytest.raises(UnsupportedModelError, match="but it returns a tuple"):
        named_outputs((None,))
