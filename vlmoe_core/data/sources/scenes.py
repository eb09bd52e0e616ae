"""The built-in world: pictures of coloured shapes, captions that are true of them, and short texts. Needs no file.

The scene of number `index` depends on (split, seed, index), `combinations` and `max_objects` alone; `image`, `pair` and
the questions and statements of tasks show the same scenes. Documents, pictures with a class and pairs of sentences have
numberings of their own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Literal

from pydantic import Field, model_validator

from vlmoe_core.data.config import SourceConfig, StreamName
from vlmoe_core.data.example import Example, SourceContext, TextEncoder
from vlmoe_core.data.scenes import drafts
from vlmoe_core.data.scenes.dice import Dice
from vlmoe_core.data.scenes.documents import make_document
from vlmoe_core.data.scenes.drafts import Drafter, Task, World
from vlmoe_core.data.scenes.draw import draw
from vlmoe_core.data.scenes.world import MAX_OBJECTS, Combinations, Split
from vlmoe_core.errors import DataError


class Config(SourceConfig):
    """Which scenes, how many, and how large."""

    source: Literal["scenes"] = "scenes"
    """Always `scenes`."""
    task: Task | None = None
    """vqa: questions with answers (stream pair); nlvr2: two pictures and a statement (pair); classification: pictures
    with a class (image); nli: premises and hypotheses (text); null: pictures, captions and documents."""
    size: int = Field(20_000, ge=1)
    """Number of scenes (image, pair), of documents or pairs of sentences (text), of pairs of pictures (nlvr2)."""
    seed: int = Field(0, ge=0)
    """Another seed gives another world of as many scenes."""
    split: Split = "train"
    """train, eval or test: no scene of one is drawn from the random numbers of another."""
    combinations: Combinations = "seen"
    """seen: no held-out pair of colour and shape; heldout: at least one a picture; all: either. train: seen only."""
    max_objects: int = Field(MAX_OBJECTS, ge=1, le=MAX_OBJECTS)
    """Most objects of a scene; of task classification and nli no matter."""
    captions_per_image: int = Field(1, ge=1)
    """Captions of each picture: so many examples of the pair stream, one of the image stream."""
    questions_per_image: int = Field(2, ge=1)
    """Questions about each picture, when `task: vqa`."""
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

    @model_validator(mode="after")
    def _pairs_of_pictures_come_in_twos(self) -> "Config":
        if self.task == "nlvr2" and self.size % drafts.PAIRS_A_SET:
            raise ValueError(f"size: {self.size} is odd; the pairs of pictures of nlvr2 come in twos: use an even size")
        return self


class SceneSource:
    """Examples that are made on demand: `each` of every numbered thing, side by side."""

    def __init__(self, config: Config, drafter: Drafter, things: int, each: int) -> None:
        self._world = World(config.split, config.seed, config.combinations, config.max_objects)
        self._image_size = config.image_size
        self._drafter = drafter
        self._things = things
        self._each = each
        self.blocks = (len(self),)

    def __len__(self) -> int:
        return self._things * self._each

    def __getitem__(self, index: int) -> Example:
        """The example of that number, with its pictures; IndexError outside of 0..length-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number, which = divmod(index, self._each)
        draft = next(islice(self._drafter(self._world, number, self._each), which, None))
        if not draft.scenes:
            return draft.example
        first, *others = (draw(scene, self._image_size) for scene in draft.scenes)
        return replace(draft.example, image=first, more_images=tuple(others))

    def records(self) -> Iterator[Example]:
        """Every example once, in order; draws no picture."""
        for number in range(self._things):
            for draft in self._drafter(self._world, number, self._each):
                yield draft.example

    def texts(self) -> Iterator[str]:
        """All captions, questions and sentences; draws no picture."""
        for record in self.records():
            yield from (text for text in (record.text, record.second_text) if text is not None)


class DocumentSource:
    """One example a document, less the sentences at its end that do not fit."""

    def __init__(self, config: Config, max_text: int, text_encoder: TextEncoder | None) -> None:
        self._world = World(config.split, config.seed, config.combinations)
        self._max_text = max_text
        self._text_encoder = text_encoder
        self.blocks = (config.size,)

    def __len__(self) -> int:
        return self.blocks[0]

    def __getitem__(self, index: int) -> Example:
        """The document of that number; IndexError outside of 0..length-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        sentences = self._sentences(index)
        while len(sentences) > 1 and not self._fits(" ".join(sentences)):
            sentences.pop()
        return Example(f"{self._world.name(index)}.txt", text=" ".join(sentences))

    def _fits(self, text: str) -> bool:
        """True if the text and [CLS] and [SEP] stay within the longest text."""
        return self._text_encoder is None or len(self._text_encoder.encode(text)) + 2 <= self._max_text

    def _sentences(self, number: int) -> list[str]:
        return make_document(Dice(f"{self._world.name(number)}/text"))

    def records(self) -> Iterator[Example]:
        """Every example once, in order."""
        return (self[index] for index in range(len(self)))

    def texts(self) -> Iterator[str]:
        """All documents, uncut."""
        return (" ".join(self._sentences(index)) for index in range(len(self)))


def open_source(config: Config, context: SourceContext) -> SceneSource | DocumentSource:
    """The source for the stream that is asked for; DataError if the task has its examples in another stream."""
    wanted = _STREAM_OF[config.task] if config.task else context.stream
    if context.stream != wanted:
        raise DataError(
            f"scenes: task: {config.task} has its examples in the stream '{wanted}', not '{context.stream}': "
            f"list this source under '{wanted}'"
        )
    if config.task is None and context.stream == "text":
        return DocumentSource(config, context.max_text, context.text_encoder)
    return SceneSource(config, *_examples(config, context.stream))


def _examples(config: Config, stream: StreamName) -> tuple[Drafter, int, int]:
    """What makes the examples, of how many things, and how many of each."""
    size = config.size
    match config.task:
        case "vqa":
            return drafts.questions, size, config.questions_per_image
        case "nlvr2":
            return drafts.statements, size // drafts.PAIRS_A_SET, drafts.PAIRS_A_SET**2
        case "classification":
            return drafts.classes, size, 1
        case "nli":
            return drafts.entailments, size, 1
    return (drafts.images, size, 1) if stream == "image" else (drafts.captions, size, config.captions_per_image)


_STREAM_OF: Mapping[Task, StreamName] = {"vqa": "pair", "nlvr2": "pair", "classification": "image", "nli": "text"}
