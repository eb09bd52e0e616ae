"""What each token is equals what its sample says, token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.analysis.routing import support
from tests.analysis.routing.support import CLS, PAD, SEP, SPECIAL, batch_of, make_samples, tokens_of
from tests.model.support import config_of
from vlmoe_core.analysis.routing.tokens import KINDS, SpecialIds, TokenFacts, facts_of, stream_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.model.layout import build_layout

CONFIG = config_of()


def facts(batch: Batch, special: SpecialIds | None = SPECIAL) -> dict[str, TokenFacts]:
    return facts_of(batch, build_layout(batch, 1 + CONFIG.num_patches), special)


def text_of(ids: list[int], targets: list[int]) -> Batch:
    """One text alone."""
    sample = Sample("own", 0, text_ids=np.array(ids), text_targets=np.array(targets))
    return batch_of("text", [sample], CONFIG)


def test_the_kinds_have_the_names_that_the_tests_count_by() -> None:
    assert {modality: list(names) for modality, names in KINDS.items()} == support.KINDS


@pytest.mark.parametrize(("stream", "pictures"), [("image", 1), ("text", 1), ("pair", 1), ("pair", 2)])
def test_facts_are_those_of_the_samples(stream: StreamName, pictures: int) -> None:
    samples = make_samples(stream, [7, 12, 4, 9], CONFIG, pictures=pictures)
    found, tokens = facts(batch_of(stream, samples, CONFIG)), tokens_of(samples)
    assert set(found) == {token.modality for token in tokens}
    assert {token.kind for token in tokens if token.modality == "vision"} in (set(), set(KINDS["vision"]))
    assert {token.kind for token in tokens if token.modality == "text"} in (set(), set(KINDS["text"]))
    for modality, one in found.items():
        mine = [token for token in tokens if token.modality == modality]
        assert [KINDS[modality][kind] for kind in one.kind_T.tolist()] == [token.kind for token in mine]
        assert one.place_T.tolist() == [token.place for token in mine]
        assert one.sequence_T.tolist() == [token.sequence for token in mine]
        assert one.word_T.tolist() == [token.word for token in mine]
        assert one.class_T.tolist() == [token.label for token in mine]
        assert one.num_sequences == len(samples) * pictures


def test_without_special_ids_they_are_words() -> None:
    batch = text_of([CLS, 7, SEP, PAD], [-1, -1, -1, -1])
    for special, words in ((SPECIAL, [-1, 7, -1, -1]), (None, [-1, 7, SEP, PAD])):
        assert facts(batch, special)["text"].word_T.tolist() == words


def test_a_word_to_predict_is_masked_whatever_stands_in_its_place() -> None:
    batch = text_of([CLS, 3, 7, 8, SEP, SEP], [-1, 9, 7, 5, -1, 6])
    kinds = [KINDS["text"][kind] for kind in facts(batch)["text"].kind_T.tolist()]
    assert kinds == ["[CLS]", "masked word", "masked word", "masked word", "[SEP]", "masked word"]
    assert facts(batch)["text"].word_T.tolist() == [-1] * 6


@pytest.mark.parametrize("targets", [None, torch.rand(2), torch.zeros(2, 5, dtype=torch.int64)])
def test_targets_that_are_no_classes_give_none(targets: torch.Tensor | None) -> None:
    batch = batch_of("pair", make_samples("pair", [5, 6], CONFIG), CONFIG)
    assert all((one.class_T == -1).all() for one in facts(replace(batch, targets=targets)).values())


@pytest.mark.parametrize("stream", STREAMS)
def test_the_stream_of_a_batch(stream: StreamName) -> None:
    assert stream_of(batch_of(stream, make_samples(stream, [5, 6], CONFIG), CONFIG)) == stream


@pytest.mark.parametrize("stream", STREAMS)
def test_an_empty_batch_has_no_tokens(stream: StreamName) -> None:
    assert facts(batch_of(stream, [], CONFIG)) == {}
