"""The dense feed-forward network.

Shapes: T tokens, D width, H hidden width.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class DenseFFN(nn.Module):
    """Two linear maps with GELU between.

    Args:
        dim: D.
        hidden: width between the maps.
        sub_norm_eps: a LayerNorm of this epsilon stands before the second map (Magneto, arXiv 2210.06423); null: none.
    """

    def __init__(self, dim: int, hidden: int, sub_norm_eps: float | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.norm = None if sub_norm_eps is None else nn.LayerNorm(hidden, eps=sub_norm_eps)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        hidden_TH = F.gelu(self.up(x_TD))
        out: Tensor = self.down(hidden_TH if self.norm is None else self.norm(hidden_TH))
        return out
