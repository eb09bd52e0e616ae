"""What a recipe says of the model: size, modality experts, and the closed set of architecture switches."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from vlmoe_core.config import Config
from vlmoe_core.data.config import StreamName
from vlmoe_core.moe.config import MoEConfig, SharedMoEConfig

_ROWS = ("layers", "dim", "heads", "hidden", "vl_layers", "patch_size", "image_size")

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(_ROWS, (4, 128, 4, 512, 1, 8, 64), strict=True)),
    "small": dict(zip(_ROWS, (8, 384, 6, 1536, 1, 16, 224), strict=True)),
    "base": dict(zip(_ROWS, (12, 768, 12, 3072, 2, 16, 224), strict=True)),
    "large": dict(zip(_ROWS, (24, 1024, 16, 4096, 3, 16, 224), strict=True)),
}

CONV_PATCHES = (2, 4, 8, 16, 32, 64)
"""Patch sizes of the convolutional stem: each convolution halves the sides."""


class SparseConfig(Config):
    """Which modalities have sparse layers; absent: dense."""

    vision: MoEConfig | None = None
    """V-MoE layers, over the image tokens."""
    text: MoEConfig | None = None
    """T-MoE layers, over the text tokens."""
    shared: SharedMoEConfig | None = None
    """Layers over the tokens of both (LIMoE); with `expert_pool: shared` alone."""


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
    """Stochastic depth: probability that a sequence skips the last block's branches; it rises linearly from 0 at the
    first block."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the truncated normal initialisation (BEiT)."""
    attention: Literal["shared", "per_modality"] = "shared"
    """Whether the modalities share the attention weights, or each has its own and all tokens still attend to each other
    (BEiT-3, arXiv 2208.10442)."""
    norm: Literal["shared", "per_modality"] = "shared"
    """per_modality: each feed-forward network has its own LayerNorm before it (VLMo); with `attention: per_modality`
    each modality also has its own before attention and at the end (BEiT-3)."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the variance in each LayerNorm of the blocks and in the final one (BEiT, VLMo: 1e-6; BEiT-3: 1e-5)."""
    text_embed_norm: bool = False
    """LayerNorm over the sum of word and position, before the kind is added (BERT, VLMo)."""
    sub_norm: bool = False
    """LayerNorm before each output projection (Magneto, arXiv 2210.06423; BEiT-3). Experts need `experts: loop`."""
    positions: Literal["absolute", "relative", "relative_shared"] = "absolute"
    """Learned absolute positions; or beside them a relative bias on the attention logits, with a table in each block
    (BEiT, VLMo) or one for all blocks (BEiT in pretraining)."""
    qkv_bias: Literal["all", "qv", "none"] = "all"
    """Which of query, key and value have a bias."""
    layer_scale: float | None = Field(None, gt=0)
    """Initial value of a learned factor on each branch; null: none (BEiT: 0.1)."""
    patch_embed: Literal["linear", "conv"] = "linear"
    """One linear map of each patch, or a stem of strided convolutions with GroupNorm that learns faster at toy size."""
    expert_pool: Literal["per_modality", "shared"] = "per_modality"
    """Whether the modalities have their own experts (VL-MoE: moe.vision, moe.text) or share one pool (LIMoE:
    moe.shared)."""
    modality: Literal["both", "vision", "text"] = "both"
    """What inputs there is a path for. A model that was exported for images or texts alone has no other: neither the
    other's embeddings and weights nor VL-FFNs."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("preset"), str):
            return {**PRESETS.get(values["preset"], {}), **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dim % self.heads:
            divisors = ", ".join(str(h) for h in range(1, 65) if self.dim % h == 0)
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim}); these do: {divisors}")
        if self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}), such as {near}"
            )
        if self.patch_embed == "conv" and self.patch_size not in CONV_PATCHES:
            fits = ", ".join(map(str, CONV_PATCHES))
            raise ValueError(f"patch_embed: conv needs a patch_size of {fits}, not {self.patch_size}")
        if self.vl_layers > self.layers:
            raise ValueError(f"vl_layers ({self.vl_layers}) is more than layers ({self.layers})")
        self._check_modality()
        self._check_pools()
        self._check_sub_norm()
        return self

    def _check_modality(self) -> None:
        absent = {"both": None, "vision": "text", "text": "vision"}[self.modality]
        if absent is not None and getattr(self.moe, absent) is not None:
            raise ValueError(f"modality: {self.modality} has no path for {absent} tokens; leave out moe.{absent}")
        if absent is not None and self.vl_layers:
            raise ValueError(f"modality: {self.modality} takes no pairs; set vl_layers to 0, not {self.vl_layers}")

    def _check_pools(self) -> None:
        own, shared = self.moe.vision or self.moe.text, self.moe.shared
        if self.expert_pool == "shared" and own is not None:
            raise ValueError(
                "expert_pool: shared has its experts in moe.shared alone; leave out moe.vision and moe.text"
            )
        if self.expert_pool == "shared" and shared is None:
            raise ValueError(
                "expert_pool: shared needs moe.shared, the pool of experts; add it, or leave out expert_pool"
            )
        if self.expert_pool == "per_modality" and shared is not None:
            raise ValueError("moe.shared is one pool for all modalities: set expert_pool: shared, or leave it out")
        for pool, moe in self.pools.items():
            sparse = self.sparse_layers(pool)
            if dense := sorted(set(moe.kept_experts or ()) - set(sparse)):
                raise ValueError(f"moe.{pool}.kept_experts names block {dense[0]}; sparse are {list(sparse)}")

    def _check_sub_norm(self) -> None:
        for pool, moe in self.pools.items():
            if self.sub_norm and moe.experts != "loop":
                raise ValueError(
                    f"sub_norm is not built into experts '{moe.experts}': set moe.{pool}.experts to loop, or sub_norm "
                    "to false"
                )

    @property
    def grid(self) -> int:
        """Patches along an image's side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, patches of an image."""
        return self.grid**2

    @property
    def image_distances(self) -> int:
        """Rows of a relative table for two tokens of one image: patches by their distance, and three with [CLS]."""
        return (2 * self.grid - 1) ** 2 + 3

    @property
    def relative_rows(self) -> int:
        """R, rows of a relative table: two tokens of an image, one of each, two tokens of a text (VLMo)."""
        return self.image_distances + 2 + 2 * self.max_text_length

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Channels before, between and behind the convolutions of the stem (`patch_embed: conv`)."""
        halvings = self.patch_size.bit_length() - 1
        return (3, *(max(8, self.dim // 2 ** (halvings - 1 - i)) for i in range(halvings)))

    @property
    def modalities(self) -> tuple[str, ...]:
        """Vision and text, or the one that there is a path for."""
        return ("vision", "text") if self.modality == "both" else (self.modality,)

    @property
    def pools(self) -> dict[str, MoEConfig]:
        """The pools of experts by name: vision and text, or shared; those that there are."""
        pools = {"vision": self.moe.vision, "text": self.moe.text, "shared": self.moe.shared}
        return {name: moe for name, moe in pools.items() if moe is not None}

    def ffns(self, layer: int) -> tuple[str, ...]:
        """The feed-forward networks of a 0-based block: of each modality, or shared; in the top blocks also vl."""
        own = ("shared",) if layer in self.sparse_layers("shared") else self.modalities
        return (*own, "vl") if layer >= self.layers - self.vl_layers else own

    def sparse_layers(self, pool: str) -> tuple[int, ...]:
        """The 0-based blocks whose feed-forward network of that name is sparse."""
        moe = self.pools.get(pool)
        if moe is None:
            return ()
        if isinstance(moe.layers, dict):
            every = moe.layers["every"]
            if not 1 <= every <= self.layers:
                raise ValueError(
                    f"moe.{pool}.layers: every {every} does not fit {self.layers} layers; give 1 to {self.layers}"
                )
            return tuple(range(every - 1, self.layers, every))
        outside = [i for i in moe.layers if not 0 <= i < self.layers]
        if outside or len(set(moe.layers)) < len(moe.layers):
            raise ValueError(
                f"moe.{pool}.layers {list(moe.layers)} must be distinct blocks from 0 to {self.layers - 1}"
            )
        return tuple(sorted(moe.layers))

    def sparse(self, ffn: str, layer: int) -> MoEConfig | None:
        """The sparse layer of that name in a 0-based block; None: dense. VL-FFNs are always dense (section 3)."""
        return self.pools[ffn] if layer in self.sparse_layers(ffn) else None

    def passed(self, layer: int, modalities: Sequence[str]) -> tuple[str, ...]:
        """The feed-forward networks of a 0-based block that an input of these modalities passes (VL-MoE, figure 1)."""
        ffns = self.ffns(layer)
        if "vl" in ffns and len(modalities) > 1:
            return ("vl",)
        return ("shared",) if "shared" in ffns else tuple(modalities)

    def num_params(self, vocab_size: int) -> int:
        """Parameters of the encoder, those of all experts counted that are there; `vocab_size` rows of words."""
        ffns = [(name, layer) for layer in range(self.layers) for name in self.ffns(layer)]
        return self._params(self.modalities, ffns, vocab_size)

    def num_active_params(self, vocab_size: int) -> int:
        """Parameters of the encoder that a token of each modality uses: of E experts only `top_k`, in all layers.

        So the paper counts its 180M of 1.9B; routers are counted whole.
        """
        ffns = [(name, layer) for name in self.pools for layer in self.sparse_layers(name)]
        return self.num_params(vocab_size) - self._idle_params(ffns)

    def num_router_params(self) -> int:
        """Parameters of all routers."""
        return sum(
            moe.router.num_params(self.dim, moe.num_experts) * len(self.sparse_layers(name))
            for name, moe in self.pools.items()
        )

    def num_path_params(self, stream: StreamName, vocab_size: int) -> int:
        """Parameters of the encoder that an example of a stream passes: of E experts only `top_k`, routers whole.

        Args:
            stream: image, text or pair.
            vocab_size: rows of the word embedding.
        """
        modalities = {"image": ("vision",), "text": ("text",), "pair": ("vision", "text")}[stream]
        ffns = [(name, i) for i in range(self.layers) for name in self.passed(i, modalities)]
        return self._params(modalities, ffns, vocab_size) - self._idle_params(ffns)

    def flops(self, image_tokens: int, text_tokens: int) -> int:
        """Floating-point operations of the encoder's forward pass over one sequence; heads are not counted.

        Two a multiply-add, of linear maps, convolutions and attention. In sparse layers each token counts `top_k`
        experts, as if none were dropped.

        Args:
            image_tokens: [CLS] and patches; 0 for a text alone.
            text_tokens: [CLS] and [SEP] included; 0 for an image alone.
        """
        tokens = image_tokens + text_tokens
        attention = 2 * tokens * 4 * self.dim**2 + 4 * tokens**2 * self.dim
        stem = self.patch_flops * (image_tokens - 1) if image_tokens else 0
        return stem + sum(attention + self._ffn_flops(i, image_tokens, text_tokens) for i in range(self.layers))

    @property
    def patch_flops(self) -> int:
        """Operations of the patch embedding's forward pass, of one patch."""
        if self.patch_embed == "linear":
            return 2 * 3 * self.patch_size**2 * self.dim
        sides = [self.patch_size >> i for i in range(1, len(self.stem_widths))]
        widths = pairwise(self.stem_widths)
        convs = sum(2 * 9 * a * b * side**2 for (a, b), side in zip(widths, sides, strict=True))
        return convs + 2 * self.stem_widths[-1] * self.dim

    @property
    def pixel_flops(self) -> int:
        """The part of `patch_flops` that reads pixels: its backward pass computes no gradient of its input."""
        if self.patch_embed == "linear":
            return self.patch_flops
        return 2 * 9 * self.stem_widths[0] * self.stem_widths[1] * (self.patch_size // 2) ** 2

    @property
    def _expert_params(self) -> int:
        """Of one feed-forward network, and of one expert."""
        return _linear(self.dim, self.hidden) + _linear(self.hidden, self.dim) + 2 * self.hidden * self.sub_norm

    def _params(self, modalities: Sequence[str], ffns: Sequence[tuple[str, int]], vocab_size: int) -> int:
        """Of the encoder, as far as these modalities and feed-forward networks (name, block) have to do with it."""
        scales = 0 if self.layer_scale is None else 2 * self.layers
        return (
            self._embedding_params(vocab_size, modalities)
            + self.layers * self._attention_params(len(modalities))
            + sum(self._ffn_params(name, layer) for name, layer in ffns)
            + (2 * self._norms(modalities, len(ffns)) + scales) * self.dim
            + self._relative_params()
        )

    def _idle_params(self, ffns: Sequence[tuple[str, int]]) -> int:
        """Of the experts of these feed-forward networks that a token does not go to."""
        sparse = [(moe, layer) for name, layer in ffns if (moe := self.sparse(name, layer)) is not None]
        return sum(moe.num_kept(layer) - moe.top_k for moe, layer in sparse) * self._expert_params

    def _ffn_params(self, ffn: str, layer: int) -> int:
        moe = self.sparse(ffn, layer)
        if moe is None:
            return self._expert_params
        experts = moe.num_kept(layer) + moe.shared_expert
        return experts * self._expert_params + moe.router.num_params(self.dim, moe.num_experts)

    def _attention_params(self, modalities: int) -> int:
        biases = {"all": 3, "qv": 2, "none": 0}[self.qkv_bias]
        own = (3 * self.dim + biases) * self.dim + _linear(self.dim, self.dim) + 2 * self.dim * self.sub_norm
        return own * (modalities if self.attention == "per_modality" else 1)

    def _norms(self, modalities: Sequence[str], ffns: int) -> int:
        """LayerNorms over the states: before attention and the feed-forward networks, at the end, of the words."""
        own = self.norm == "per_modality"
        ends = len(modalities) if own and self.attention == "per_modality" else 1
        before_ffns = ffns if own else self.layers
        return ends * self.layers + before_ffns + ends + (self.text_embed_norm and "text" in modalities)

    def _relative_params(self) -> int:
        tables = {"absolute": 0, "relative": self.layers, "relative_shared": 1}[self.positions]
        return tables * self.relative_rows * self.heads

    def _embedding_params(self, vocab_size: int, modalities: Sequence[str]) -> int:
        """Kinds of token; words and their positions; [CLS], mask embedding, patches and positions."""
        kinds, words = 2 * self.dim, (vocab_size + self.max_text_length) * self.dim
        image = self._stem_params() + (3 + self.num_patches) * self.dim
        return kinds + words * ("text" in modalities) + image * ("vision" in modalities)

    def _stem_params(self) -> int:
        if self.patch_embed == "linear":
            return _linear(3 * self.patch_size**2, self.dim)
        convs = sum(_linear(9 * before, after) + 2 * after for before, after in pairwise(self.stem_widths))
        return convs + _linear(self.stem_widths[-1], self.dim)

    def _ffn_flops(self, layer: int, image_tokens: int, text_tokens: int) -> int:
        tokens = {"vision": image_tokens, "text": text_tokens}
        passed = self.passed(layer, [modality for modality, number in tokens.items() if number])
        every = image_tokens + text_tokens
        return sum(self._token_flops(name, layer) * tokens.get(name, every) for name in passed)

    def _token_flops(self, ffn: str, layer: int) -> int:
        dense, moe = 4 * self.dim * self.hidden, self.sparse(ffn, layer)
        if moe is None:
            return dense
        return (moe.top_k + moe.shared_expert) * dense + moe.router.flops(self.dim, moe.num_experts)


def _linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear map with bias."""
    return (inputs + 1) * outputs
