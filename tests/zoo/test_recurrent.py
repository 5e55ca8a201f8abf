import pytest
import torch

from metaprune.zoo import build


@pytest.mark.parametrize("name", ["lstm_classifier", "gru_classifier"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_and_directions(name, bidirectional):
    model = build(name, bidirectional=bidirectional, hidden=12, layers=2).eval()
    assert (model.rnn.num_layers, model.rnn.hidden_size, model.rnn.bidirectional) == (2, 12, bidirectional)
    assert model.linear.in_features == (24 if bidirectional else 12)
    assert model(torch.randn(3, 9, 16)).shape == (3, 10)
