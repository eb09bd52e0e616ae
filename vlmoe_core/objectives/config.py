"""What a recipe says of the objective: which tokens are hidden, and how much each loss counts."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from vlmoe_core.config import Config, Plugin, plugin_field


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


class ObjectiveConfig(Config):
    """What every objective has; each file in vlmoe_core/objectives/kinds adds its own fields in a class `Config`."""

    name: str
    """The objective: a file name in vlmoe_core/objectives/kinds."""

    @property
    def needs_whole_batch(self) -> bool:
        """The loss compares the examples of a step with each other, so that accumulation would change it."""
        return False


Objective = Annotated[ObjectiveConfig, *plugin_field(Plugin("vlmoe_core.objectives.kinds", "name"))]
