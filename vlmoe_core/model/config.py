"""What a recipe says of the model: size, modality experts, and the closed set of architecture switches."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from vlmoe_core.config import Config
from vlmoe_core.moe.config import MoEConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 4, "dim": 128, "heads": 4, "hidden": 512, "vl_layers": 1, "patch_size": 8, "image_size": 64},
    "small": {"layers": 8, "dim": 384, "heads": 6, "hidden": 1536, "vl_layers": 1, "patch_size": 16, "image_size": 224},
    "base": {"layers": 12, "dim": 768, "heads": 12, "hidden": 3072, "vl_layers": 2, "patch_size": 16, "image_size": 224},
    "large": {"layers": 24, "dim": 1024, "heads": 16, "hidden": 4096, "vl_layers": 3, "patch_size": 16, "image_size": 224},
}

NOT_BUILT = {
    "attention": ("per_modality",),
    "sub_norm": (True,),
    "positions": ("relative", "relative_shared"),
    "expert_pool": ("shared",),
}


class SparseConfig(Config):
    """Which modalities have sparse layers; absent: dense."""

    vision: MoEConfig | None = None
    """V-MoE layers, over the image tokens."""
    text: MoEConfig | None = None
    """T-MoE layers, over the text tokens."""


class ModelConfig(Config):
    """The encoder: pre-LN blocks, shared attention, a feed-forward network for each modality (VL-MoE, section 2)."""

    preset: Literal["tiny", "small", "base", "large"] | None = None
    """Fills in the sizes that are not given; it holds no experts."""
    layers: int = Field(ge=1)
    """Blocks."""
    dim: int = Field(ge=8)
    """Width of the token states."""
    heads: int = Field(ge=1)
    """Attention heads; they divide `dim`."""
    hidden: int = Field(ge=1)
    """Width inside a feed-forward network, and inside one expert."""
    vl_layers: int = Field(ge=0)
    """F: in this many top blocks pairs pass through a feed-forward network of their own, always dense (VL-FFN)."""
    patch_size: int = Field(ge=1)
    """Pixels along a patch's side."""
    image_size: int = Field(ge=1)
    """Pixels along an image's side, a multiple of `patch_size`."""
    max_text_length: int = Field(128, ge=3)
    """Rows of the text position table; no stream's `data.max_text` may be more."""
    moe: SparseConfig = SparseConfig()
    """Sparse layers of each modality."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth: probability that a sequence skips the last block's branches, rising linearly from 0 at the first."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the truncated normal initialisation (BEiT)."""
    attention: Literal["shared", "per_modality"] = "shared"
    """Whether the modalities share the attention weights."""
    norm: Literal["shared", "per_modality"] = "shared"
    """per_modality: each feed-forward network has its own LayerNorm before it (VLMo)."""
    sub_norm: bool = False
    """LayerNorm before each output projection (Magneto, BEiT-3)."""
    positions: Literal["absolute", "relative", "relative_shared"] = "absolute"
    """Learned absolute positions, or a relative bias in each block or one for all blocks (BEiT, VLMo)."""
    qkv_bias: Literal["all", "qv", "none"] = "all"
    """Which of query, key and value have a bias."""
    layer_scale: float | None = Field(None, gt=0)
    """Initial value of a learned factor on each branch; null: none (BEiT: 0.1)."""
    patch_embed: Literal["linear", "conv"] = "linear"
    """One linear map of each patch, or a stem of strided convolutions with GroupNorm that learns faster at toy size."""
    expert_pool: Literal["per_modality", "shared"] = "per_modality"
    """Whether the modalities have their own experts (VL-MoE) or share one pool (LIMoE)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("preset"), str):
            return {**PRESETS.get(values["preset"], {}), **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dim % self.heads:
            fits = [h for h in range(1, 65) if self.dim % h == 0]
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim}); these do: {', '.join(map(str, fits))}")
        if self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}), such as {near}")
        if self.vl_layers > self.layers:
            raise ValueError(f"vl_layers ({self.vl_layers}) is more than layers ({self.layers})")
        for switch, missing in NOT_BUILT.items():
            value = getattr(self, switch)
            if value in missing:
                raise ValueError(f"{switch}: {value} is not built yet; leave it at its default")
        for modality in ("vision", "text"):
            self.sparse_layers(modality)
        return self

    @property
    def grid(self) -> int:
        """Patches along an image's side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, patches of an image."""
        return self.grid**2

    def sparse_layers(self, modality: str) -> tuple[int, ...]:
        """The 0-based blocks whose feed-forward network of that modality is sparse."""
        moe: MoEConfig | None = getattr(self.moe, modality)
        if moe is None:
            return ()
        if isinstance(moe.layers, dict):
            every = moe.layers["every"]
            if not 1 <= every <= self.layers:
                raise ValueError(f"moe.{modality}.layers: every {every} does not fit {self.layers} layers; give 1 to {self.layers}")
            return tuple(range(every - 1, self.layers, every))
        outside = [i for i in moe.layers if not 0 <= i < self.layers]
        if outside or len(set(moe.layers)) < len(moe.layers):
            raise ValueError(f"moe.{modality}.layers {list(moe.layers)} must be distinct blocks from 0 to {self.layers - 1}")
        return tuple(sorted(moe.layers))
