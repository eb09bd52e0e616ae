"""Two models on the same tokens: which expert each token goes to in one and in the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmoe_core.analysis.routing.tables import Cell
from vlmoe_core.analysis.routing.trace import Rows


@dataclass
class Crosses:
    """Counts of pairs of first choices."""

    tables: dict[Cell, Tensor] = field(default_factory=dict)
    """(E, E') int64 of each cell that both models have."""

    def add(self, first: Sequence[Rows], second: Sequence[Rows]) -> None:
        """Count the tokens of one batch, as the two models routed it."""
        others = {rows.cell: rows for rows in second}
        for rows in first:
            if (other := others.get(rows.cell)) is not None:
                self._count(rows, other)

    def _count(self, first: Rows, second: Rows) -> None:
        shape = first.plan.num_experts, second.plan.num_experts
        chosen_T = first.plan.expert_TK[:, 0]
        if first.cell not in self.tables:
            self.tables[first.cell] = torch.zeros(shape, dtype=torch.int64, device=chosen_T.device)
        places = chosen_T * shape[1] + second.plan.expert_TK[:, 0]
        self.tables[first.cell].view(-1).index_add_(0, places, torch.ones_like(places))
