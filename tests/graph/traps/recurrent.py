"""Recurrent networks."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.traps._base import Head, case, conv, image, sequence


class Recurrent(nn.Module):
    def __init__(self, kind, hidden=6, out=None, **options):
        super().__init__()
        self.inside, self.rnn = nn.Linear(8, 7), kind(7, hidden, batch_first=True, **options)
        self.out = nn.Linear(out or hidden, 3)

    def forward(self, x):
        return self.out(self.rnn(F.relu(self.inside(x)))[0][:, -1])


RECURRENT = "inside.weight:0 rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.weight_hh_l0:1 rnn.bias_ih_l0:0 out.weight:1"
case(sequence(), name="lstm", free=RECURRENT)(lambda: Recurrent(nn.LSTM))
case(sequence(), name="gru", free=RECURRENT)(lambda: Recurrent(nn.GRU))
case(sequence(), name="rnn_tanh", free=RECURRENT)(lambda: Recurrent(nn.RNN))
case(sequence(), name="lstm_deep_both_ways", free=RECURRENT)(
    lambda: Recurrent(nn.LSTM, out=12, num_layers=2, bidirectional=True)
)
case(sequence(), name="gru_deep_both_ways", free=RECURRENT)(
    lambda: Recurrent(nn.GRU, out=12, num_layers=2, bidirectional=True, dropout=0.1)
)
case(sequence(), name="lstm_projected", free="rnn.weight_hr_l0:0 rnn.weight_hr_l0:1 rnn.weight_ih_l0:0")(
    lambda: Recurrent(nn.LSTM, hidden=8, out=5, num_layers=2, proj_size=5)
)
case(sequence(), name="lstm_no_bias", free="rnn.weight_hh_l0:0")(lambda: Recurrent(nn.LSTM, bias=False))


@case(sequence(), free="start:2 rnn.weight_hh_l0:0")
class gru_learnt_start(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.start, self.out = nn.GRU(8, 6, batch_first=True), nn.Parameter(torch.zeros(1, 1, 6)), None
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        start = self.start.expand(-1, x.shape[0], -1).contiguous()
        return self.out(self.rnn(x, start)[0])


@case(sequence(), free="rnn.weight_hh_l0:0 out.weight:1")
class lstm_last_state(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(24, 3)

    def forward(self, x):
        _, (h, c) = self.rnn(x)
        return self.out(torch.cat([h[-2], h[-1], c[-2], c[-1]], -1))


@case(sequence(), free="rnn.weight_hh_l0:0")
class lstm_state_transposed(nn.Module):
    """h (layers, batch, hidden) to (batch, layers * hidden)."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 6, num_layers=2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        h = self.rnn(x)[1][0]
        return self.out(h.transpose(0, 1).reshape(x.shape[0], -1))


@case(sequence(), free="cell.weight_hh:1 out.weight:1")
class lstm_cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0])


@case(sequence(), free="cell.weight_hh:1 out.weight:1")
class gru_cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out, self.width = nn.GRUCell(8, 6), nn.Linear(6, 3), 6

    def forward(self, x):
        state = x.new_zeros(x.shape[0], self.width)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state)


@case(image(), free="gates.weight:0 head.out.weight:1")
class conv_gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gates, self.new, self.head = conv(3, 5), conv(10, 10), conv(10, 5), Head(5)

    def forward(self, x):
        x = self.stem(x)
        h = torch.zeros_like(x)
        for _ in range(2):
            z, r = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
            h = (1 - z) * h + z * torch.tanh(self.new(torch.cat([x, r * h], 1)))
        return self.head(h)


@case(lambda: (torch.randn(2, 5, 8), torch.tensor([5, 3])), free="rnn.weight_hh_l0:1")
class packed_lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.out(self.rnn(packed)[1][0][-1])
