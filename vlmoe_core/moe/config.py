"""What a recipe says of a sparse feed-forward layer."""

from typing import Literal

from pydantic import Field, model_validator

from vlmoe_core.config import Config


def _every_second() -> dict[Literal["every"], int]:
    return {"every": 2}


class BalanceConfig(Config):
    """Weights of the balance losses of one modality; 0: not computed. Formulas: vlmoe_core/moe/losses.py."""

    vloss: float = Field(default=0.01, ge=0)
    """Mean of importance and load loss (V-MoE, arXiv 2106.05974, App. A)."""
    importance: float = Field(default=0.0, ge=0)
    """Squared coefficient of variation of the experts' summed gates (V-MoE, App. A)."""
    load: float = Field(default=0.0, ge=0)
    """Squared coefficient of variation of the experts' expected loads (V-MoE, App. A); needs noise."""


class MoEConfig(Config):
    """The sparse layers of one modality."""

    num_experts: int = Field(ge=1)
    """E, experts in each sparse layer."""
    layers: tuple[int, ...] | dict[Literal["every"], int] = Field(default_factory=_every_second)
    """Which blocks are sparse: a list of 0-based blocks, or {every: n} for blocks n-1, 2n-1, ... (V-MoE, section 4)."""
    top_k: int = Field(1, ge=1)
    """Experts that each token goes to."""
    router: Literal["softmax"] = "softmax"
    """softmax: noisy softmax over all experts, then top-k (V-MoE, section 3)."""
    noise: float = Field(1.0, ge=0)
    """Standard deviation of the normal noise on the logits in training, in units of 1/E."""
    weights: Literal["gate", "renormalised", "unit"] = "gate"
    """Combine weights: the gate; gates over their sum over the k; or 1 with the gate's gradient (upcycled models)."""
    priority: Literal["gate", "position"] = "gate"
    """Who takes an expert's places first: the token with the largest gate (batch-priority routing), or the earlier."""
    capacity_factor: float | None = Field(1.25, gt=0)
    """Places of an expert in training, relative to k*T/E; null: dropless."""
    eval_capacity_factor: float | None = Field(None, gt=0)
    """The same in evaluation; null: dropless."""
    balance: BalanceConfig = BalanceConfig()
    """Balance losses."""
    experts: Literal["grouped", "loop"] = "grouped"
    """Implementation: grouped matmuls over sorted tokens, or the plain loop that specifies them."""

    @model_validator(mode="after")
    def _consistent(self) -> "MoEConfig":
        if self.layers == {}:
            raise ValueError("layers is empty: give a list of blocks, or {every: n}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) is more than num_experts ({self.num_experts}); lower top_k or add experts"
            )
        if self.weights == "renormalised" and self.top_k == 1:
            raise ValueError(
                "weights 'renormalised' with top_k 1 is always 1 and gives the router no gradient; use 'gate' or 'unit'"
            )
        if self.noise == 0 and (self.balance.vloss > 0 or self.balance.load > 0):
            raise ValueError(
                "the load loss and vloss are defined with noise only: set noise above 0, or their weights to 0"
            )
        return self
