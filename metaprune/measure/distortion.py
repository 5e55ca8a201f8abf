"""How far the outputs of one network are from those of another."""

import torch.nn.functional as F
from torch import Tensor


def distortion(dense: Tensor, cut: Tensor) -> float:
    """KL(dense || cut) of class scores (N, classes), in nats; of other outputs the relative mean squared difference."""
    if dense.ndim == 2 and dense.shape[1] > 1:
        return float(
            F.kl_div(cut.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True).clamp_min(0)
        )
    return float(F.mse_loss(cut, dense) / dense.square().mean().clamp_min(1e-12))
