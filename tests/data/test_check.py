"""Reading the examples of a source: counts, broken ones, lengths, sizes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.data.files_support import WordEncoder, jpeg
from vlmoe_core.data.check import ImageSizes, TextLengths, describe_source, spread, survey_source
from vlmoe_core.data.config import DataConfig
from vlmoe_core.data.prepare import Preparer, build_preparer
from vlmoe_core.data.stream import Stream, open_streams
from vlmoe_core.objectives.config import MaskConfig
from vlmoe_core.objectives.masking import Masking


def opened(root: Path, **split: object) -> tuple[Stream, Preparer]:
    data = DataConfig.model_validate({"root": str(root), "train": split, "max_text": {"text": 10, "pair": 6}})
    encoder = WordEncoder()
    preparer = build_preparer(data, 16, encoder, Masking.of(MaskConfig(), 4, encoder), training=True)
    (stream,) = open_streams(data, data.train, 0, encoder).values()
    return stream, preparer


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Six lines: sizes 10x8, 20x8, 40x8, 80x8, a cut picture, an empty caption; captions of 1, 2, 3, 10 words."""
    lines = []
    for number, words in enumerate([1, 2, 3, 10, 4]):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(size=(10 * 2**number, 8)))
        lines.append({"image": f"{number}.jpg", "caption": " ".join(["dog"] * words)})
    (tmp_path / "4.jpg").write_bytes(jpeg(size=(64, 64))[:300])
    lines.append({"image": "0.jpg", "caption": " "})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_pairs(captions: Path) -> None:
    survey = survey_source(*_numbered(opened(captions, pair=[{"source": "jsonl", "path": "captions.jsonl"}])), None)
    assert (survey.examples, survey.read) == (6, 6)
    assert [message.split(": ")[0] for message in survey.broken] == ["captions.jsonl:5", "captions.jsonl:6"]
    # [CLS] and [SEP] included; the limit is 6, so one of four is cut.
    assert survey.text == TextLengths(minimum=3, median=4, percentile_95=12, maximum=12, limit=6, cut=0.25)
    assert survey.image == ImageSizes(smallest=(10, 8), median=(40, 8), largest=(80, 8))


def test_images_have_no_lengths_and_texts_no_sizes(captions: Path) -> None:
    source = {"source": "jsonl", "path": "captions.jsonl"}
    images = survey_source(*_numbered(opened(captions, image=[source])), None)
    assert images.examples == 5 and len(images.broken) == 1 and images.text is None and images.image is not None
    texts = survey_source(*_numbered(opened(captions, text=[source])), None)
    assert texts.examples == 6 and len(texts.broken) == 1 and texts.image is None
    assert texts.text is not None and texts.text.limit == 10 and texts.text.cut == 0.2


def test_a_limit_reads_fewer_spread_over_the_source(captions: Path) -> None:
    stream, preparer = opened(captions, pair=[{"source": "jsonl", "path": "captions.jsonl"}])
    survey = survey_source(stream, 0, preparer, 2)
    assert (survey.examples, survey.read, survey.broken) == (6, 2, ())
    assert survey.image is not None and survey.image.largest == (80, 8)


@pytest.mark.parametrize(("count", "limit"), [(10, 3), (3, 10), (7, 7), (100, 99), (5, None), (0, 4)])
def test_spread(count: int, limit: int | None) -> None:
    numbers = list(spread(count, limit))
    assert len(numbers) == min(count, limit or count)
    assert numbers == sorted(set(numbers)) and all(0 <= n < count for n in numbers)
    assert not numbers or numbers[0] == 0


def test_drawn_pictures_have_a_size_too() -> None:
    stream, preparer = opened(Path(), image=[{"source": "scenes", "size": 3, "image_size": 24}])
    survey = survey_source(stream, 0, preparer, None)
    assert isinstance(stream[0].image, Image.Image)
    assert survey.image == ImageSizes((24, 24), (24, 24), (24, 24)) and not survey.broken


def test_a_source_is_described_on_one_line() -> None:
    pair = [
        {"source": "scenes", "split": "eval", "weight": 2},
        {"source": "jsonl", "path": "a.jsonl", "text_field": "text"},
        {"source": "tar", "path": ["a.tar", "b.tar", "c.tar"]},
        {"source": "arrow", "hub": "org/name"},
    ]
    data = DataConfig.model_validate({"train": {"pair": pair}})
    assert [describe_source(config) for config in data.train.pair] == [
        "scenes split=eval",
        "jsonl a.jsonl text_field=text",
        "tar a.tar and 2 more",
        "arrow org/name",
    ]


def _numbered(pair: tuple[Stream, Preparer]) -> tuple[Stream, int, Preparer]:
    return pair[0], 0, pair[1]
