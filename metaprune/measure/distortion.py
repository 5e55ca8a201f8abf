"""How far the outputs of one network are from those of another."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def distortion(dense: Tensor, cut: Tensor) -> float:
    """KL(dense || cut) of class scores (N, classes), in nats; of other outputs the relative mean squared difference."""
    if dense.ndim == 2 and dense.shape[1] > 1:
        return float(
            F.kl_div(cut.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True).clamp_min(0)
        )
    return float(F.mse_loss(cut, dense) / dense.square().mean().clamp_min(1e-12))


def output_error(dense: Sequence[Tensor], cut: Sequence[Tensor]) -> float:
    """Squared error over the square, batch by batch; class scores (N, classes) up to a number that all classes share.

    It is smoother than :func:`distortion`, which saturates and hangs on few samples.
    """
    lost = sum(float(centred(after - before).square().sum()) for before, after in zip(dense, cut, strict=True))
    return lost / max(sum(float(centred(before).square().sum()) for before in dense), 1e-300)


def centred(output: Tensor) -> Tensor:
    """Scores of classes from their mean, which means nothing; other outputs as they are."""
    return output - output.mean(1, keepdim=True) if output.ndim == 2 and output.shape[1] > 1 else output
