"""easy-VQA: 48,248 simple questions about drawings of one shape, 64 x 64 pixels, in the package `easy-vqa` (extra).

13 answers; see the package's page for how it was made (V. Zhou).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vlmoe_core.data.config import SourceConfig
from vlmoe_core.data.example import Example, SourceContext
from vlmoe_core.data.files import checked_text, read_file, require_stream, sound_examples
from vlmoe_core.data.part import WHOLE, Part, part_of
from vlmoe_core.errors import DataError

ANSWERS_PER_QUESTION = 10
"""The one answer is repeated, so that the VQA accuracy of an answer is 0 or 1."""


class Config(SourceConfig):
    """Which questions of easy-VQA."""

    split: Literal["train", "test"] = "train"
    """train: 38,575 questions about 4,000 pictures; test: 9,673 about 1,000."""
    part: Part = WHOLE
    """Share of the split's pictures in order, from and to: (0, 0.9) and (0.9, 1) cut held-out pictures off train."""


class EasyVqaSource:
    """One example a question."""

    def __init__(self, config: Config, context: SourceContext) -> None:
        require_stream("easy-vqa", context.stream, "pair")
        self._split = config.split
        package = _package()
        texts, answers, images = getattr(package, f"get_{config.split}_questions")()
        paths: dict[int, str] = getattr(package, f"get_{config.split}_image_paths")()
        pictures = sorted(set(images))
        kept = set(pictures[part_of(len(pictures), config.part)])
        self._rows = [
            (number, text, answer, image)
            for number, (text, answer, image) in enumerate(zip(texts, answers, images, strict=True))
            if image in kept
        ]
        if not self._rows:
            raise DataError(f"part {config.part} of easy-vqa's {len(pictures)} {config.split} pictures holds none")
        if missing := kept - paths.keys():
            raise DataError(
                f"the easy-vqa package lacks the {config.split} picture {min(missing)} ({len(missing)} in all); "
                "install it again: pip install --force-reinstall easy-vqa"
            )
        self._paths = {image: paths[image] for image in kept}
        self.blocks = [len(self._rows)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """The question of that number; DataError, with its number in the package, if it is broken."""
        example = self._described(index)
        return replace(example, image=read_file(Path(self._paths[example.image_id]), example.name))

    def texts(self) -> Iterator[str]:
        """Every question, in stored order."""
        return (example.text for example in self.records() if example.text)

    def records(self) -> Iterator[Example]:
        """Every question once, without its picture."""
        return sound_examples(self._described, len(self))

    def _described(self, index: int) -> Example:
        """The example of that number, less its picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number, text, answer, image = self._rows[index]
        where = f"easy-vqa/{self._split}:question {number}"
        facts = {
            "id": number,
            "answers": (answer,) * ANSWERS_PER_QUESTION,
            "answer": answer,
            "answer_type": "yes/no" if answer in ("yes", "no") else "other",
            "question_type": " ".join(text.split()[:2]),
        }
        return Example(where, text=checked_text(text, "question", where), image_id=image, facts=facts)


def _package() -> Any:
    """The installed package; DataError, with the command that installs it, where there is none."""
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError("an easy-vqa source needs the easy-vqa package: pip install 'vlmoe[easy-vqa]'") from error
    return easy_vqa


def open_source(config: Config, context: SourceContext) -> EasyVqaSource:
    """The questions that `config` names."""
    return EasyVqaSource(config, context)
