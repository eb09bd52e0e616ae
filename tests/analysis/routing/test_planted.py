"""Routers that choose by word, place or colour are found by the statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.analysis.routing.support import (
    CLASSES,
    FIRST_WORD,
    SPECIAL,
    batch_of,
    make_samples,
    plain_patches,
    planted,
)
from tests.model.support import VOCAB
from vlmoe_core.analysis.routing.api import trace
from vlmoe_core.analysis.routing.measures import entropy, information
from vlmoe_core.analysis.routing.tables import Cell
from vlmoe_core.analysis.routing.trace import Rows, Trace, listening
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS
from vlmoe_core.model.encoder import Encoded, Encoder


def assert_one_hot(table_LE: torch.Tensor, first: int = 0) -> None:
    """All tokens of label l went to expert l mod E, and all labels from the first one on occurred."""
    labels, experts = table_LE.shape
    expert_L = (first + torch.arange(labels)) % experts
    own_L = table_LE.gather(1, expert_L[:, None])[:, 0]
    assert torch.equal(table_LE.sum(1), own_L) and own_L.all()


def assert_tells_all(table_LE: torch.Tensor, own_expert: bool) -> None:
    """The label tells the expert, chance alone little; where each label has its own, the expert tells the label."""
    counts_LE = table_LE.numpy()
    found = information(counts_LE)
    assert found.bits == pytest.approx(found.label_bits if own_expert else entropy(counts_LE.sum(0)))
    assert 0 <= found.control < 0.1 * found.bits and found.low > 0.85 * found.bits


def planted_trace(encoder: Encoder) -> Trace:
    with torch.no_grad(), trace(encoder, special=SPECIAL, num_classes=CLASSES) as found:
        for stream in STREAMS:
            encoder(batch_of(stream, make_samples(stream, [24] * 40, encoder.config), encoder.config))
    return found


def test_a_planted_word_is_found() -> None:
    found = planted_trace(planted("word"))
    for task in ("mlm", "vlm"):
        table_VE = found.tables[Cell(task, 0, "text")].word_VE
        assert_one_hot(table_VE[FIRST_WORD:], FIRST_WORD)
        assert_tells_all(table_VE, own_expert=False)


def test_a_planted_word_tells_no_class() -> None:
    found = information(planted_trace(planted("word")).tables[Cell("mlm", 0, "text")].class_CE.numpy())
    assert found.low <= 0 <= found.high and found.bits < 0.02


def test_a_planted_place_is_found() -> None:
    found = planted_trace(planted("place"))
    for task, modality in (("mlm", "text"), ("mim", "vision"), ("vlm", "text"), ("vlm", "vision")):
        assert_one_hot(found.tables[Cell(task, 0, modality)].place_PE)


def test_places_with_an_expert_each_are_told_whole() -> None:
    encoder = planted("place", experts=17)
    found = planted_trace(encoder).tables[Cell("mim", 0, "vision")]
    assert torch.equal(found.place_PE, 40 * torch.eye(17, dtype=torch.int64))
    assert_tells_all(found.place_PE, own_expert=True)


def test_a_planted_colour_is_found_in_each_patch() -> None:
    encoder = planted("colour")
    colour_XP = np.random.default_rng(0).integers(0, 3, (12, encoder.config.num_patches))
    rows: list[Rows] = []
    reader = Trace(encoder.config, VOCAB)

    def receive(batch: Batch, encoded: Encoded) -> None:
        rows.extend(reader.rows(batch, encoded))

    with listening(encoder, receive):
        encoder(batch_of("image", plain_patches(colour_XP, encoder.config), encoder.config))
    (one,) = rows
    assert one.cell == Cell("mim", 0, "vision") and one.pool == "vision"
    for expert, sequence, place in zip(
        one.plan.expert_TK[:, 0].tolist(), one.facts.sequence_T.tolist(), one.facts.place_T.tolist(), strict=True
    ):
        assert place == 0 or expert == colour_XP[sequence, place - 1]


def test_classes_that_mean_nothing_are_not_found() -> None:
    """All patches of a picture share its class: what tells pictures apart must not pass for the class."""
    encoder = planted("colour")
    rng = np.random.default_rng(1)
    with trace(encoder, num_classes=4) as found:
        for _ in range(4):
            colour_XP = np.repeat(rng.integers(0, 3, (16, 1)), encoder.config.num_patches, axis=1)
            samples = [replace(one, target=rng.integers(4)) for one in plain_patches(colour_XP, encoder.config)]
            encoder(batch_of("image", samples, encoder.config))
    (cell,) = found.summary()
    told = cell.information["class"]
    assert told.bits > 0.03 and told.low < 0 < told.control and abs(told.bits - told.control) < told.bits
    tokenwise = information(found.tables[Cell("mim", 0, "vision")].class_CE.numpy())
    assert tokenwise.low > 0.5 * tokenwise.bits  # what shuffling tokens would have claimed


def test_a_planted_class_is_found() -> None:
    """Whole pictures of one colour, which is their class."""
    encoder = planted("colour")
    colour_XP = np.repeat(np.arange(12)[:, None] % 3, encoder.config.num_patches, axis=1)
    with trace(encoder, num_classes=3) as found:
        encoder(batch_of("image", plain_patches(colour_XP, encoder.config), encoder.config))
    patches, cls = 4 * encoder.config.num_patches, 4
    expected_CE = patches * torch.eye(3, dtype=torch.int64)
    expected_CE[:, 0] += cls  # [CLS] is black: all experts are equal, and the first one is taken
    table_CE = found.tables[Cell("mim", 0, "vision")].class_CE
    assert torch.equal(table_CE, expected_CE)
    told = information(table_CE.numpy())
    assert told.label_bits == pytest.approx(np.log2(3)) and told.low > 0.8 * told.label_bits and told.control < 0.05
    (cell,) = found.summary()
    assert cell.information["class"].bits == told.bits and cell.information["class"].low > 0.5
