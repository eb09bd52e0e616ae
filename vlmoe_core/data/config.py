"""What a recipe says of data: where examples come from, how they are mixed, cut and corrupted."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlmoe_core.config import Config, Plugin, plugin_field

StreamName = Literal["image", "text", "pair"]
STREAMS: tuple[StreamName, ...] = ("image", "text", "pair")
SPLITS = ("train", "eval", "test")


class SourceConfig(Config):
    """What every source has; each file in data/sources adds its own fields in a class `Config`."""

    source: str
    """Kind of source: a file name in vlmoe_core/data/sources; docs/DATA.md has all of them."""
    weight: float = Field(1.0, gt=0)
    """Share of this source among the sources of its stream, relative to their weights."""
    order: Literal["random", "blocks"] = "random"
    """random: a keyed permutation of all examples per epoch; blocks: of the shards, then within a window."""
    window: int = Field(1024, ge=1)
    """Examples that are shuffled among each other when `order: blocks`."""


Source = Annotated[SourceConfig, *plugin_field(Plugin("vlmoe_core.data.sources", "source"))]


class SplitConfig(Config):
    """The sources of each stream. A stream without sources is not trained on."""

    image: tuple[Source, ...] = ()
    """Sources of single images (masked image modelling)."""
    text: tuple[Source, ...] = ()
    """Sources of single texts (masked language modelling)."""
    pair: tuple[Source, ...] = ()
    """Sources of image-text pairs (masked vision-language modelling)."""


OpName = Literal[
    "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
    "Rotate", "Posterize", "Solarize", "Color", "Contrast",
]  # fmt: skip
Severity = Literal["vlmo", "increasing"]
MAX_MAGNITUDE = 10.0


class RandAugmentConfig(Config):
    """Random changes of colours and geometry (Cubuk et al., arXiv 1909.13719); none mirrors. Defaults: VLMo, BEiT-3."""

    num_ops: int = Field(2, ge=1)
    """Ops drawn for a picture, with replacement."""
    magnitude: float = Field(7.0, ge=0, le=MAX_MAGNITUDE)
    """How far an op goes, of 10. VLMo, BEiT-3: 7; BEiT-3 on ImageNet: 9."""
    magnitude_std: float = Field(0.0, ge=0)
    """Standard deviation of each op's magnitude, which is cut to 0..10. BEiT-3 on ImageNet: 0.5."""
    probability: float = Field(0.5, ge=0, le=1)
    """With which a drawn op is applied."""
    severity: Severity = "vlmo"
    """What magnitude m means. Both: Rotate 3m degrees, Shear 0.03m, Posterize keeps 4 - floor(0.4m) bits (at least 1),
    Solarize from 256 - floor(25.6m). vlmo: Brightness, Sharpness, Color and Contrast times 0.1 + 0.18m (5 changes
    nothing), Translate m pixels. increasing (timm's inc1, BEiT-3 on ImageNet): times 1 +- 0.09m, and 0.045m of the
    side."""
    ops: tuple[OpName, ...] = Field(
        (
            "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX",
            "TranslateY", "Rotate",
        ),
        min_length=1,
    )  # fmt: skip
    """What is drawn from, all alike. Posterize, Solarize, Color and Contrast are known too; the first three change
    colours, so that a caption that names one can become false."""


class AugmentConfig(Config):
    """Random changes of a training image. Evaluation always takes the whole image, resized."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Range of the cropped share of the area (random resized crop); (1, 1) takes the whole image. BEiT: (0.2, 1)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height."""
    horizontal_flip: float = Field(0.0, ge=0, le=1)
    """Probability of mirroring. A caption that says left or right becomes false by it."""
    color_jitter: float = Field(0.0, ge=0, lt=1)
    """Brightness, contrast and saturation each change by a factor from (1 - x, 1 + x). BEiT: 0.4."""
    rand_augment: RandAugmentConfig | None = None
    """RandAugment, after the flip and before colour jitter; null: none. VLMo, BEiT-3: {}."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a box of 2 to 33 % of the picture becomes random pixels, at last. BEiT-3, ImageNet: 0.25."""

    @model_validator(mode="after")
    def _ranges(self) -> "AugmentConfig":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be two numbers 0 < low <= high <= 1, not ({low}, {high})")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio must be two numbers 0 < low <= high, not ({low}, {high})")
        return self


class AugmentsConfig(Config):
    """Augmentation of each stream that has images."""

    image: AugmentConfig = AugmentConfig()
    """Of the image stream."""
    pair: AugmentConfig = AugmentConfig()
    """Of the pair stream."""


class TextLengthConfig(Config):
    """Longest text of each stream in tokens, [CLS] and [SEP] included; what is longer is cut at the end."""

    text: int = Field(128, ge=3)
    """Of the text stream: documents are packed by whole sentences up to this length."""
    pair: int = Field(64, ge=3)
    """Of a caption."""


class DataConfig(Config):
    """Where examples come from and how they are prepared."""

    root: str = "."
    """Folder from which relative source paths start; itself relative to the working folder."""
    train: SplitConfig
    """What training reads."""
    eval: SplitConfig = SplitConfig()
    """Held-out data read while training; chooses the best checkpoint."""
    test: SplitConfig = SplitConfig()
    """Data that training never reads."""
    max_text: TextLengthConfig = TextLengthConfig()
    """Longest texts."""
    pad_text_to: int | None = Field(None, ge=3)
    """Append [PAD] tokens up to this length, as tokens of their own kind, to imitate padded runs; null: no padding."""
    augment: AugmentsConfig = AugmentsConfig()
    """Random changes of training images."""
    max_pixels: int = Field(178_956_970, ge=1, le=178_956_970)
    """A picture whose header declares more pixels is refused as broken, before it is decoded."""
    on_error: Literal["raise", "skip"] = "raise"
    """A broken example stops the run with its name (raise), or leaves its place empty and is counted (skip)."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Loader processes of each rank; 0: the training process loads; auto: one a core beyond the first, at most 4."""
    prefetch: int = Field(4, ge=1)
    """Micro-batches that each loader process prepares ahead."""
