"""What the kernels of `vlmoe::expert_ffn` work on.

Shapes: T tokens, D width, H hidden width, E experts, K choices of a token, C = T x K choices in the order of the
tokens, N the same sorted by expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Call:
    """One application of all experts. Tokens, weights and biases share a dtype."""

    x_TD: Tensor
    """The tokens."""
    weight_TK: Tensor
    """Factor of each choice's output."""
    choice_N: Tensor
    """Which choice (token * K + k) stands in each row sorted by expert, the dropped ones last (int64)."""
    offsets_E: Tensor
    """End of each expert's rows (int32); the rows from the last one on are dropped."""
    up_EHD: Tensor
    """Weights of the first map."""
    down_EDH: Tensor
    """Weights of the second map."""
    dropout_CH: Tensor | None
    """Factors of the hidden activation, 0 or 1 / (1 - rate); None: no dropout."""

    @property
    def top_k(self) -> int:
        """K."""
        return self.weight_TK.shape[1]

    @property
    def weight_C1(self) -> Tensor:
        """The factors as a column, in the dtype of the tokens."""
        return self.weight_TK.reshape(-1, 1).to(self.x_TD.dtype)

    def activated(self, before: Tensor, choices: Tensor) -> Tensor:
        """GELU and dropout of the hidden states (M, H) that belong to these choices (M,)."""
        hidden = F.gelu(before)
        return hidden if self.dropout_CH is None else hidden.mul_(self.dropout_CH.index_select(0, choices))

    def unsorted(self, rows_N: Tensor) -> Tensor:
        """Rows sorted by expert, brought into the order of the choices: (N, ...) -> (C, ...)."""
        place_N = torch.arange(rows_N.shape[0], device=rows_N.device)
        return rows_N.index_select(0, torch.empty_like(place_N).index_copy_(0, self.choice_N, place_N))

    def sum_choices(self, of_CD: Tensor) -> Tensor:
        """(C, D) -> (T, D), the sum over each token's choices, without atomics."""
        return of_CD if self.top_k == 1 else of_CD.view(*self.weight_TK.shape, of_CD.shape[1]).sum(dim=1)
