"""Taylor scores of groups of samples."""

import torch
import torch.nn.functional as F

from tests.criteria.nets import LABELS, hidden, scored, two_layers


def test_a_last_group_of_fewer_samples_counts_for_as_many() -> None:
    """Batches of 10, 10 and 4 in groups of 4: four and four and two."""
    model = two_layers()
    x, expected = hidden(model).float(), torch.zeros(7, dtype=torch.float64)
    for rows in torch.arange(24).split([4, 4, 2, 4, 4, 2, 4]):
        gate = torch.ones(7, requires_grad=True)
        loss = F.cross_entropy(model[2](x[rows] * gate), LABELS[rows])
        expected += len(rows) * torch.autograd.grad(loss, gate)[0].double().abs() / 24
    torch.testing.assert_close(scored("taylor", model, group=4), expected, rtol=1e-5, atol=1e-10)
