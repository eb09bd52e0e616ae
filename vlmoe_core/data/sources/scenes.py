"""The built-in world: pictures of coloured shapes, captions that are true of them, and short texts. Needs no file.

The scene of number `index` depends on (split, seed, index) and `combinations` alone, and `image` and `pair` show the
same scenes. Documents have a numbering of their own.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from vlmoe_core.data.config import SourceConfig
from vlmoe_core.data.example import Example, SourceContext, TextEncoder
from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.documents import make_document
from vlmoe_core.data.scenes.draw import draw
from vlmoe_core.data.scenes.facts import Caption, statement_facts
from vlmoe_core.data.scenes.language import make_caption
from vlmoe_core.data.scenes.world import Combinations, Scene, Split, make_scene


class Config(SourceConfig):
    """Which scenes, how many, and how large."""

    source: Literal["scenes"] = "scenes"
    """Always `scenes`."""
    size: int = Field(20_000, ge=1)
    """Number of scenes (image, pair) or of documents (text)."""
    seed: int = Field(0, ge=0)
    """Another seed gives another world of as many scenes."""
    split: Split = "train"
    """train, eval or test: no scene of one is drawn from the random numbers of another."""
    combinations: Combinations = "seen"
    """seen: no held-out pair of colour and shape; heldout: at least one a picture; all: either. train: seen only."""
    captions_per_image: int = Field(1, ge=1)
    """Captions of each picture: so many examples of the pair stream, one of the image stream."""
    image_size: int = Field(64, ge=16)
    """Width and height in pixels; the scene is the same at every size."""

    @model_validator(mode="after")
    def _training_sees_no_held_out_pair(self) -> "Config":
        if self.split == "train" and self.combinations != "seen":
            raise ValueError(
                f"combinations: {self.combinations} would train on held-out pairs; "
                "use split: eval or test, or combinations: seen"
            )
        return self


class ImageScenes:
    """One example a scene: its picture and its facts."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.blocks = (config.size,)

    def __len__(self) -> int:
        return self._config.size

    def __getitem__(self, index: int) -> Example:
        """The picture of that scene."""
        scene = scene_of(self._config, index)
        picture = draw(scene, self._config.image_size)
        return Example(_name(self._config, index), picture, image_id=index, facts={"scene": scene.as_facts()})

    def texts(self) -> Iterator[str]:
        """None."""
        return iter(())


class PairScenes:
    """One example a caption: its scene's picture, the caption, and the facts of both."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.blocks = (len(self),)

    def __len__(self) -> int:
        return self._config.size * self._config.captions_per_image

    def __getitem__(self, index: int) -> Example:
        """The caption of that number; those of one picture stand together."""
        number, which = divmod(index, self._config.captions_per_image)
        scene = scene_of(self._config, number)
        caption = caption_of(self._config, scene, number, which)
        picture = draw(scene, self._config.image_size)
        facts = {"scene": scene.as_facts(), "meaning": statement_facts(caption.meaning)}
        return Example(f"{_name(self._config, number)}#{which}", picture, caption.text, number, facts)

    def texts(self) -> Iterator[str]:
        """All captions; draws no picture."""
        for number in range(self._config.size):
            scene = scene_of(self._config, number)
            for which in range(self._config.captions_per_image):
                yield caption_of(self._config, scene, number, which).text


class TextScenes:
    """One example a document, less the sentences at its end that do not fit."""

    def __init__(self, config: Config, max_text: int, text_encoder: TextEncoder | None) -> None:
        self._config = config
        self._max_text = max_text
        self._text_encoder = text_encoder
        self.blocks = (config.size,)

    def __len__(self) -> int:
        return self._config.size

    def __getitem__(self, index: int) -> Example:
        """The document of that number."""
        sentences = _document_of(self._config, index)
        while len(sentences) > 1 and not self._fits(" ".join(sentences)):
            sentences.pop()
        return Example(f"{_name(self._config, index)}.txt", text=" ".join(sentences))

    def _fits(self, text: str) -> bool:
        """True if the text and [CLS] and [SEP] stay within the longest text."""
        return self._text_encoder is None or len(self._text_encoder.encode(text)) + 2 <= self._max_text

    def texts(self) -> Iterator[str]:
        """All documents, uncut."""
        return (" ".join(_document_of(self._config, index)) for index in range(self._config.size))


def open_source(config: Config, context: SourceContext) -> ImageScenes | PairScenes | TextScenes:
    """The source for the stream that is asked for."""
    if context.stream == "image":
        return ImageScenes(config)
    if context.stream == "pair":
        return PairScenes(config)
    return TextScenes(config, context.max_text, context.text_encoder)


def scene_of(config: Config, number: int) -> Scene:
    """The scene of that number; IndexError outside of 0..size-1."""
    if not 0 <= number < config.size:
        raise IndexError(f"scene {number} of {config.size}")
    return make_scene(config.split, config.seed, number, config.combinations)


def caption_of(config: Config, scene: Scene, number: int, which: int) -> Caption:
    """One of the captions of the scene of that number."""
    return make_caption(scene, Dice(f"scenes/{config.split}/{config.seed}/{number}/caption/{which}"))


def _document_of(config: Config, number: int) -> list[str]:
    if not 0 <= number < config.size:
        raise IndexError(f"document {number} of {config.size}")
    return make_document(Dice(f"scenes/{config.split}/{config.seed}/{number}/text"))


def _name(config: Config, number: int) -> str:
    return f"scenes/{config.split}/{config.seed}/{number}"
