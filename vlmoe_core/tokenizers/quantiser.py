"""The codebook of VQ-KD: unit vectors that follow the features of the patches nearest to them (BEiT v2, 2208.06366).

Axis letters: N patches, F features, K codes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.tokenizers.kmeans import kmeans, nearest_centroid

SPLIT = 0.05
"""How far a revived code lies from the one whose patches it shares, relative to the codes' length of 1."""


class Quantiser(nn.Module):
    """K unit vectors, learned by exponential moving averages instead of gradients.

    State: `codes_KF`, and `shares_K`, the moving average of each code's share of the patches; all 0 until the start.
    """

    codes_KF: Tensor
    shares_K: Tensor

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        codes_KF = F.normalize(torch.randn(codebook_size, code_dim), dim=-1)
        self.register_buffer("codes_KF", codes_KF)
        self.register_buffer("shares_K", torch.zeros(codebook_size))

    @property
    def started(self) -> bool:
        """Whether the codes follow patches already: they were started here, or came with the weights of a model."""
        return bool(self.shares_K.any())

    def nearest(self, features_NF: Tensor) -> Tensor:
        """(N,) ids of the nearest codes of unit vectors; distances are not lowered by autocast."""
        with torch.autocast(features_NF.device.type, enabled=False):
            return nearest_centroid(features_NF, self.codes_KF)[0]

    @torch.no_grad()
    def start(self, features_NF: Tensor, iterations: int, seed: int) -> None:
        """Set the codes to the k-means centroids of unit vectors, at least K of them."""
        points_NF = features_NF.float().cpu()
        centroids_KF = kmeans(points_NF, len(self.codes_KF), iterations, torch.Generator().manual_seed(seed))
        codes_KF = F.normalize(centroids_KF, dim=-1)
        counts_K = torch.bincount(nearest_centroid(points_NF, codes_KF)[0], minlength=len(codes_KF))
        self.codes_KF.copy_(codes_KF)
        self.shares_K.copy_(counts_K / len(points_NF))

    @torch.no_grad()
    def learn(self, sums_KF: Tensor, counts_K: Tensor, decay: float, revive_below: float, seed: int) -> None:
        """Move the codes by the patches of one step, and revive those that hardly any patch chooses.

        A step without a patch leaves codes and shares as they are.

        Args:
            sums_KF: sum of the features of each code's patches.
            counts_K: their number.
            decay: share of the old value that stays.
            revive_below: a code is dead whose share is below this / K.
            seed: of the directions in which revived codes lie.
        """
        codes_KF = moved(self.codes_KF, sums_KF, counts_K, decay)
        patches = counts_K.sum()
        now_K = torch.where(patches > 0, counts_K / patches.clamp_min(1), self.shares_K)
        shares_K = self.shares_K.lerp(now_K, 1 - decay)
        codes_KF, shares_K = revived(codes_KF, shares_K, revive_below, seed)
        self.codes_KF.copy_(codes_KF)
        self.shares_K.copy_(shares_K)


def moved(codes_KF: Tensor, sums_KF: Tensor, counts_K: Tensor, decay: float) -> Tensor:
    """Each code towards the direction of its patches' mean, and back to length 1; one without patches stays.

    code = normalise(decay x code + (1 - decay) x normalise(sum / count)), as the code of BEiT v2 has it.
    """
    means_KF = F.normalize(sums_KF, dim=-1)
    new_KF = F.normalize(codes_KF.lerp(means_KF, 1 - decay), dim=-1)
    return torch.where(counts_K[:, None] > 0, new_KF, codes_KF)


def revived(codes_KF: Tensor, shares_K: Tensor, below: float, seed: int) -> tuple[Tensor, Tensor]:
    """Put each dead code beside a busy one, whose patches both then share: the deadest beside the busiest.

    A code is dead if its share of the patches is less than `below` / K; a busy one has more than 1 / K.

    Returns:
        The codes and their shares; the same on every rank, since nothing but these arguments decides.
    """
    size = len(shares_K)
    order_K = shares_K.argsort(stable=True)
    num = min(int((shares_K < below / size).sum()), int((shares_K > 1 / size).sum()))
    if num == 0:
        return codes_KF, shares_K
    dead, busy = order_K[:num], order_K.flip(0)[:num]
    noise_NF = torch.randn(num, codes_KF.shape[1], generator=torch.Generator().manual_seed(seed))
    aside_NF = SPLIT / math.sqrt(codes_KF.shape[1]) * noise_NF.to(codes_KF)
    codes_KF = codes_KF.index_copy(0, dead, F.normalize(codes_KF[busy] + aside_NF, dim=-1))
    halves_N = shares_K[busy] / 2
    return codes_KF, shares_K.index_copy(0, busy, halves_N).index_copy(0, dead, halves_N)
