"""What a recipe says of a sparse feed-forward layer."""

from math import log
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from vlmoe_core.config import Config, Plugin, plugin_field

Weights = Literal["gate", "renormalised", "unit"]
Priority = Literal["gate", "position", "random"]
Implementation = Literal["grouped", "loop", "tutel"]
BalanceScope = Literal["micro", "ranks"]
Removed = Literal["next", "drop"]


def _every_second() -> dict[Literal["every"], int]:
    return {"every": 2}


class RouterConfig(Config):
    """A router; each file in vlmoe_core/moe/routers has a subclass with the options of its own."""

    learns: ClassVar[bool] = True
    """Whether the router has weights; noise and balance losses have a meaning only then."""
    default_vloss: ClassVar[float] = 0.01
    """The weight of vloss where the recipe gives none."""

    name: str
    """The router's name."""

    def num_params(self, dim: int, num_experts: int) -> int:
        """Parameters of one router for tokens of width `dim`."""
        return dim * num_experts

    def flops(self, dim: int, num_experts: int) -> int:
        """Floating-point operations for one token, two a multiply-add."""
        return 2 * dim * num_experts


class BaselineConfig(RouterConfig):
    """A router that learns nothing."""

    learns = False
    default_vloss = 0.0

    def num_params(self, dim: int, num_experts: int) -> int:
        """None."""
        return 0

    def flops(self, dim: int, num_experts: int) -> int:
        """None."""
        return 0


ROUTERS = Plugin("vlmoe_core.moe.routers", "name", word=True)
Router = Annotated[RouterConfig, *plugin_field(ROUTERS)]


class BalanceConfig(Config):
    """Weights of the balance losses of one modality; 0: not computed. Formulas: vlmoe_core/moe/losses.py."""

    vloss: float = Field(0.0, ge=0)
    """Mean of importance and load loss (V-MoE, arXiv 2106.05974, App. A)."""
    importance: float = Field(0.0, ge=0)
    """Squared coefficient of variation of the experts' summed gates (V-MoE, App. A)."""
    load: float = Field(0.0, ge=0)
    """Squared coefficient of variation of the experts' expected loads (V-MoE, App. A); needs noise."""
    switch: float = Field(0.0, ge=0)
    """E times the sum over experts of token share x mean gate (Switch, arXiv 2101.03961, 2.2; GShard, 2006.16668)."""
    z: float = Field(0.0, ge=0)
    """Mean squared log of the sum of the exponentiated logits (ST-MoE, arXiv 2202.08906, section 3.3)."""
    local_entropy: float = Field(0.0, ge=0)
    """Mean entropy of the tokens' gates, made small (LIMoE, arXiv 2206.02770, section 2.2)."""
    global_entropy: float = Field(0.0, ge=0)
    """Entropy of the mean gates, made large (LIMoE, section 2.2)."""
    local_entropy_threshold: float | None = Field(None, ge=0)
    """Nats; the local entropy counts only where it is above. null: always."""
    global_entropy_threshold: float | None = Field(None, ge=0)
    """Nats; the global entropy counts only where it is below; log(S) asks for S experts or more. null: always."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss, vloss dealt to importance and load; those of weight 0 are left out."""
        weights = {
            "importance": self.importance + self.vloss / 2,
            "load": self.load + self.vloss / 2,
            "switch": self.switch,
            "z": self.z,
            "local_entropy": self.local_entropy,
            "global_entropy": self.global_entropy,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}


class MoEConfig(Config):
    """The sparse layers of one modality."""

    num_experts: int = Field(ge=1)
    """E, experts in each sparse layer."""
    layers: tuple[int, ...] | dict[Literal["every"], int] = Field(default_factory=_every_second)
    """Which blocks are sparse: a list of 0-based blocks, or {every: n} for blocks n-1, 2n-1, ... (V-MoE, section 4)."""
    top_k: int = Field(1, ge=1)
    """Experts that each token goes to."""
    router: Router
    """A name, or a mapping of `name` and the router's own options. softmax (default): noisy top-k (V-MoE, section 3);
    cosine (X-MoE); bias-balanced: loss-free balancing; hash, random, uniform: baselines that learn nothing."""
    noise: float = Field(1.0, ge=0)
    """Standard deviation of the normal noise on the logits in training, in units of 1/E. Baselines have no logits."""
    weights: Weights = "gate"
    """Combine weights: the gate; gates over their sum over the k; or 1 with the gate's gradient (upcycled models)."""
    priority: Priority = "gate"
    """Who takes an expert's places first: the token with the largest gate (batch-priority routing), the earlier one, or
    any (random)."""
    capacity_factor: float | None = Field(1.25, gt=0)
    """Places of an expert in training, relative to k*T/E; null: dropless."""
    eval_capacity_factor: float | None = Field(None, gt=0)
    """The same in evaluation; null: dropless."""
    balance: BalanceConfig
    """Balance losses. Default: vloss 0.01 with a router that a loss must balance (softmax, cosine), else none."""
    balance_scope: BalanceScope = "micro"
    """micro: each routing group is balanced on its own; ranks: the groups that the ranks compute at the same time are
    balanced together, which makes the loss depend on how many ranks there are."""
    experts: Implementation = "grouped"
    """Implementation: grouped, all experts in one operator; loop, the plain loop that specifies them; or tutel, the
    kernels of that package between our plan and batched products."""
    shared_expert: bool = False
    """A further expert of the same size that every token passes, whatever its router says (arXiv 2401.06066)."""
    expert_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside the experts in training, as for finetuning (Switch, arXiv 2101.03961, section 2.4)."""
    kept_experts: dict[int, tuple[int, ...]] | None = None
    """Of a model that was exported for one task: the experts that are there, for each 0-based block where others were
    removed; null: all. Routers still know all experts: gates, priorities and capacities are the whole model's."""
    removed: Removed = "next"
    """Where a token goes whose expert was removed. next: the best of those that are there, each with its gate
    (renormalised: over the experts it then has). drop: nowhere, the residual carries it (renormalised: over the removed
    ones too)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The default router, and as default weight of vloss the router's own."""
        if not isinstance(values, dict):
            return values
        values = {"router": "softmax", "balance": {}, **values}
        if isinstance(values["balance"], dict):
            values["balance"] = {"vloss": _default_vloss(values["router"]), **values["balance"]}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.layers:
            raise ValueError("layers is empty: give a list of blocks, or {every: n}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) is more than num_experts ({self.num_experts}); lower top_k or add experts"
            )
        if self.weights == "renormalised" and self.top_k == 1:
            raise ValueError(
                "weights 'renormalised' with top_k 1 is always 1 and gives the router no gradient; use 'gate' or 'unit'"
            )
        if self.expert_dropout > 0 and self.experts == "tutel":
            raise ValueError("expert_dropout is not built for experts 'tutel': use 'grouped', or set it to 0")
        for layer, experts in (self.kept_experts or {}).items():
            self._check_kept(layer, experts)
        for key, losses in self.balance_sets.items():
            self._check_losses(key, losses)
        return self

    def _check_kept(self, layer: int, experts: tuple[int, ...]) -> None:
        if list(experts) != sorted(set(experts) & set(range(self.num_experts))):
            raise ValueError(
                f"kept_experts of block {layer} ({list(experts)}) must be distinct experts from 0 to "
                f"{self.num_experts - 1}, the lowest first"
            )
        if len(experts) < self.top_k:
            raise ValueError(f"kept_experts of block {layer} are {len(experts)}, fewer than top_k ({self.top_k})")

    def _check_losses(self, key: str, losses: BalanceConfig) -> None:
        if not self.router.learns and losses.weights:
            raise ValueError(f"router '{self.router.name}' learns nothing: set the weights of {key} to 0")
        if self.noise == 0 and "load" in losses.weights:
            raise ValueError(
                "the load loss and vloss are defined with noise only: "
                f"set noise above 0, or their weights in {key} to 0"
            )
        most = log(self.num_experts)
        for name in ("local_entropy", "global_entropy"):
            threshold = getattr(losses, f"{name}_threshold")
            if threshold is not None and name not in losses.weights:
                raise ValueError(f"{key} has {name}_threshold but no {name}: give it a weight, or leave both out")
            if threshold is not None and threshold > most:
                raise ValueError(
                    f"{name}_threshold in {key} is {threshold} nats, but the entropy of {self.num_experts} experts is "
                    f"at most {most:.2f}; log(S) nats ask for S experts"
                )

    def kept(self, layer: int) -> tuple[int, ...] | None:
        """The experts that are there in a 0-based block; null: all."""
        return None if self.kept_experts is None else self.kept_experts.get(layer)

    def num_kept(self, layer: int) -> int:
        """How many experts are there in a 0-based block."""
        kept = self.kept(layer)
        return self.num_experts if kept is None else len(kept)

    @property
    def balance_sets(self) -> dict[str, BalanceConfig]:
        """The sets of balance losses, by their keys."""
        return {"balance": self.balance}


class SharedMoEConfig(MoEConfig):
    """The sparse layers of one pool that the tokens of all modalities share (LIMoE)."""

    vision_balance: BalanceConfig = BalanceConfig()
    """Further balance losses, over the image tokens alone (LIMoE: global entropy)."""
    text_balance: BalanceConfig = BalanceConfig()
    """Further balance losses, over the text tokens alone (LIMoE: local and global entropy)."""

    @property
    def balance_sets(self) -> dict[str, BalanceConfig]:
        """The sets of balance losses, by their keys."""
        return {"balance": self.balance, "vision_balance": self.vision_balance, "text_balance": self.text_balance}


def _default_vloss(router: Any) -> float:
    if isinstance(router, RouterConfig):
        return router.default_vloss
    try:
        config: type[RouterConfig] = ROUTERS.config_class(router)  # type: ignore[assignment]
    except PydanticCustomError:  # told where the field itself is validated
        return 0.0
    return config.default_vloss
