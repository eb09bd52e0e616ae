"""The dense feed-forward network.

Shapes: T tokens, D width.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class DenseFFN(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        out: Tensor = self.down(F.gelu(self.up(x_TD)))
        return out
