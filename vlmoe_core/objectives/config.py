"""What a recipe says of the objective: which tokens are hidden, and how much each loss counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from vlmoe_core.config import Config, Plugin, plugin_field
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.tokenizers.config import TokenizersConfig


class MaskConfig(Config):
    """What masked data modelling hides (BEiT-3, arXiv 2208.10442, section 2.2)."""

    text: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens of a single text."""
    image: float = Field(0.40, gt=0, lt=1)
    """Share of the patches of a single image, hidden block-wise."""
    pair_text: float = Field(0.50, gt=0, lt=1)
    """Share of the tokens of a caption."""
    pair_image: float = Field(0.40, gt=0, lt=1)
    """Share of the patches of a captioned image."""
    image_count: int | None = Field(None, ge=1)
    """Hidden patches of every image; beats both image rates (BEiT hides 75 of 196)."""
    min_block: int | None = Field(None, ge=1)
    """Smallest block in patches; null: 16 at a 14 x 14 grid (BEiT), scaled with the grid's area."""
    min_aspect: float = Field(0.3, gt=0, le=1)
    """Flattest block: height over width lies between this and its inverse."""
    mask_token: float = Field(0.8, ge=0, le=1)
    """Share of the chosen text tokens that become [MASK]."""
    random_token: float = Field(0.1, ge=0, le=1)
    """Share of the chosen text tokens that become a random word; the rest is left as it is."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mask_token + self.random_token > 1:
            raise ValueError(
                f"mask_token ({self.mask_token}) and random_token ({self.random_token}) sum to more than 1"
            )
        return self


@dataclass(frozen=True)
class Hidden:
    """What is hidden of one example."""

    words: int = 0
    """Text tokens that must be predicted."""
    patches: int = 0
    """Patches that must be predicted."""


class ObjectiveConfig(Config):
    """What every objective has; each file in vlmoe_core/objectives/kinds adds its own fields in a class `Config`."""

    name: str
    """The objective: a file name in vlmoe_core/objectives/kinds."""

    @property
    def hides(self) -> bool:
        """Words and patches are hidden, and a visual tokenizer says what the hidden patches were."""
        return True

    @property
    def streams(self) -> tuple[StreamName, ...]:
        """The streams that it reads; sources of others are refused."""
        return STREAMS

    @property
    def starts_at(self) -> int:
        """Before which 0-based step begins what it learns beside gradients (`Learns`)."""
        return 0

    @property
    def needs_whole_batch(self) -> bool:
        """The loss compares the examples of a step with each other, so that accumulation would change it."""
        return False

    def num_head_params(self, model: ModelConfig, tokenizers: TokenizersConfig) -> int:
        """Parameters of everything that stands on the encoder."""
        raise NotImplementedError

    def passes(self, stream: StreamName) -> Mapping[StreamName, int]:
        """How often the encoder runs on each kind of input for one example of a stream."""
        return {stream: 1}

    def head_flops(self, stream: StreamName, model: ModelConfig, tokenizers: TokenizersConfig, hidden: Hidden) -> int:
        """Operations of one forward pass of the heads, for one example of a stream; two a multiply-add."""
        raise NotImplementedError


Objective = Annotated[ObjectiveConfig, *plugin_field(Plugin("vlmoe_core.objectives.kinds", "name"))]
