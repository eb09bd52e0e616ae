"""Baseline: what a token is decides, by a fixed hash (Hash Layers, arXiv 2106.04426)."""

from typing import Literal

import torch
from torch import Tensor

from vlmoe_core.moe.config import BaselineConfig
from vlmoe_core.moe.routing import BaselineRouter

GOLDEN = 2_654_435_769
"""2^32 over the golden ratio: its multiples spread over the 32-bit numbers (Knuth, volume 3, section 6.4)."""


class Config(BaselineConfig):
    """Experts by a hash of the word's id, or of the patch's place."""

    name: Literal["hash"] = "hash"
    """The router's name."""


class Router(BaselineRouter):
    """K neighbours, the first of which follows from the token's identity. All layers agree."""

    def assign(self, x_TD: Tensor, identity_T: Tensor | None) -> Tensor:
        """(T, D) and (T,) identities -> (T, K).

        Raises ValueError without identities.
        """
        if identity_T is None:
            raise ValueError("the hash router needs identity_T, the id or place of each token")
        mixed_T = (identity_T * GOLDEN) % 2**32 >> 16
        choice_TK = mixed_T.unsqueeze(1) + torch.arange(self.config.top_k, device=identity_T.device)
        return choice_TK % self.config.num_experts
