"""Classifiers of sequences with an LSTM or a GRU, which torch runs as one op each.

Source: Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 1997; Cho et al., Learning Phrase
Representations using RNN Encoder-Decoder, EMNLP 2014, arXiv:1406.1078.
"""

from torch import Tensor, nn

from metaprune.zoo._base import MODELS, ZooModel, random_values


class RecurrentClassifier(nn.Module):
    """A recurrent network, the mean of its states over time, one linear layer.

    Args:
        rnn: ``batch_first=True``; both directions are read if it has two.
        num_classes: Number of logits.
    """

    def __init__(self, rnn: nn.LSTM | nn.GRU, num_classes: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.linear = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (n, t, in_features) to logits (n, num_classes)."""
        states, _ = self.rnn(x)
        logits: Tensor = self.linear(states.mean(dim=1))
        return logits


def lstm_classifier(
    *, in_features: int = 16, hidden: int = 32, layers: int = 2, bidirectional: bool = False, num_classes: int = 10
) -> RecurrentClassifier:
    """A classifier with an LSTM.

    Args:
        in_features: Values at each time step.
        hidden: Hidden units of each layer and direction.
        layers: Stacked layers.
        bidirectional: Whether each layer also runs backwards in time.
        num_classes: Number of logits.
    """
    rnn = nn.LSTM(in_features, hidden, layers, batch_first=True, bidirectional=bidirectional)
    return RecurrentClassifier(rnn, num_classes)


def gru_classifier(
    *, in_features: int = 16, hidden: int = 32, layers: int = 2, bidirectional: bool = False, num_classes: int = 10
) -> RecurrentClassifier:
    """A classifier with a GRU; the options are those of :func:`lstm_classifier`."""
    rnn = nn.GRU(in_features, hidden, layers, batch_first=True, bidirectional=bidirectional)
    return RecurrentClassifier(rnn, num_classes)


MODELS.register("lstm_classifier")(ZooModel(build=lstm_classifier, example_inputs=random_values(2, 28, 16)))
MODELS.register("gru_classifier")(ZooModel(build=gru_classifier, example_inputs=random_values(2, 28, 16)))
