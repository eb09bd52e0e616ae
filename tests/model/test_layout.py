import pytest
import torch

from tests.model.support import batch_of, config_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.layout import build_layout

CONFIG = config_of()
LENGTH = 1 + CONFIG.num_patches


def brute_force(batch: Batch) -> tuple[list[tuple[int, int]], int]:
    """(sequence, place in it) of each token, and the most places that a sequence needs."""
    taken: dict[int, int] = {}
    found = []
    for sequence in batch.sequence_of_image.tolist():
        for _ in range(LENGTH):
            found.append((sequence, taken.get(sequence, 0)))
            taken[sequence] = found[-1][1] + 1
    for sequence in batch.sequence_of_text.tolist():
        found.append((sequence, taken.get(sequence, 0)))
        taken[sequence] = found[-1][1] + 1
    return found, max(taken.values(), default=0)


CASES: list[tuple[StreamName, list[int]]] = [
    ("image", [0]),
    ("image", [0, 0, 0]),
    ("text", [5]),
    ("text", [3, 9, 4]),
    ("text", [6, 6]),
    ("pair", [4]),
    ("pair", [2, 11, 5]),
    ("image", []),
    ("text", []),
    ("pair", []),
]


@pytest.mark.parametrize(("stream", "lengths"), CASES)
def test_layout_equals_the_double_loop(stream: StreamName, lengths: list[int]) -> None:
    batch = batch_of(stream, lengths, CONFIG)
    layout = build_layout(batch, LENGTH)
    found, longest = brute_force(batch)
    assert layout.length == longest
    assert layout.num_sequences == len(lengths)
    assert layout.fused == (stream == "pair")
    assert layout.num_image_tokens == batch.num_images * LENGTH
    assert layout.sequence_T.tolist() == [s for s, _ in found]
    assert layout.place_T.tolist() == [s * longest + place for s, place in found]
    occupied = [[(s, place) in set(found) for place in range(longest)] for s in range(len(lengths))]
    assert layout.occupied_SL.tolist() == occupied
    assert layout.full == all(map(all, occupied))


@pytest.mark.parametrize(("stream", "lengths"), CASES)
def test_regrouping_there_and_back(stream: StreamName, lengths: list[int]) -> None:
    batch = batch_of(stream, lengths, CONFIG)
    layout = build_layout(batch, LENGTH)
    found, _ = brute_force(batch)
    x = torch.randn(len(found), 4)
    rows = layout.to_sequences(x)
    assert rows.shape == (len(lengths), layout.length, 4)
    for token, (sequence, place) in enumerate(found):
        assert torch.equal(rows[sequence, place], x[token])
    assert (rows[~layout.occupied_SL] == 0).all()
    assert torch.equal(layout.to_tokens(rows), x)
