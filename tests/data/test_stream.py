"""Streams: the example at a position, whatever the format, and the state of one integer."""

from dataclasses import replace
from pathlib import Path

import pytest

from vlmoe_core.data.config import DataConfig, SplitConfig
from vlmoe_core.data.example import Example
from vlmoe_core.data.stream import Stream, WholeStream, open_streams
from vlmoe_core.errors import DataError


class Numbers:
    """A source whose examples tell their number."""

    def __init__(self, name: str, *blocks: int) -> None:
        self.name, self.blocks = name, blocks

    def __len__(self) -> int:
        return sum(self.blocks)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Example(f"{self.name}{index}", text=f"{self.name} {index}")

    def texts(self):  # type: ignore[no-untyped-def]
        return (self[i].text for i in range(len(self)))


def stream(*sources: Numbers, weights: tuple[float, ...] = (), seed: int = 0, order: str = "random") -> Stream:
    entries = [{"source": "scenes", "weight": w, "order": order, "window": 3} for w in weights or (1.0,) * len(sources)]
    configs = SplitConfig.model_validate({"text": entries}).text
    return Stream("text", configs, sources, seed)


def names(one: Stream, first: int, last: int) -> list[str]:
    return [one[position].name for position in range(first, last)]


@pytest.mark.parametrize("order", ["random", "blocks"])
def test_the_state_is_one_integer(order: str) -> None:
    sources = (Numbers("a", 7, 5), Numbers("b", 30))
    straight = names(stream(*sources, weights=(0.3, 0.7), order=order), 0, 200)
    for start in (0, 1, 37, 140):
        fresh = stream(*sources, weights=(0.3, 0.7), order=order)
        assert names(fresh, start, 200) == straight[start:]
    assert stream(*sources, weights=(0.3, 0.7), order=order)[199].name == straight[199]


def test_the_seed_and_the_stream_choose_the_order() -> None:
    source = Numbers("a", 50)
    orders = [names(stream(source, seed=seed), 0, 50) for seed in (0, 1)]
    configs = SplitConfig.model_validate({"pair": [{"source": "scenes"}]}).pair
    orders.append(names(Stream("pair", configs, (source,), 0), 0, 50))
    assert all(sorted(o) == sorted(orders[0]) for o in orders)
    assert len({tuple(o) for o in orders}) == 3


def test_equal_sources_of_a_stream_have_orders_of_their_own() -> None:
    one = stream(Numbers("a", 40), Numbers("b", 40))
    drawn = names(one, 0, 80)
    a, b = ([n[1:] for n in drawn if n[0] == letter] for letter in "ab")
    assert len(a) == len(b) == 40 and a != b


def test_weights_give_the_shares() -> None:
    drawn = names(stream(Numbers("a", 1000), Numbers("b", 10), weights=(3, 1)), 0, 400)
    assert sum(n[0] == "a" for n in drawn) == 300
    assert len({n for n in drawn if n[0] == "a"}) == 300
    assert len({n for n in drawn if n[0] == "b"}) == 10


def test_an_epoch_of_one_source_is_its_length() -> None:
    one = stream(Numbers("a", 13, 4))
    assert one.epoch == 17
    assert len(set(names(one, 0, 17))) == 17


def test_an_epoch_of_a_mixture_ends_with_the_first_source_that_ends() -> None:
    one = stream(Numbers("a", 100), Numbers("b", 6), weights=(3, 1))
    assert len(set(names(one, 0, one.epoch))) == one.epoch
    assert names(one, 0, one.epoch + 1)[-1] in names(one, 0, one.epoch)
    assert 24 <= one.epoch < 28


@pytest.mark.parametrize(
    ("weights", "sizes"), [((5437, 9821, 333), (543, 982, 33)), ((0.123, 0.877), (30, 300)), ((1, 1, 1), (5, 9, 7))]
)
def test_nothing_is_repeated_before_the_epoch_ends_whatever_the_weights(
    weights: tuple[float, ...], sizes: tuple[int, ...]
) -> None:
    one = stream(*(Numbers(letter, size) for letter, size in zip("abc", sizes, strict=False)), weights=weights)
    drawn = names(one, 0, one.epoch)
    assert len(set(drawn)) == len(drawn)
    assert names(one, 0, one.epoch + 1)[-1] in drawn


def test_generators_depend_on_seed_stream_and_position_alone() -> None:
    source = Numbers("a", 5)
    draws = {(seed, p): stream(source, seed=seed).random(p).random() for seed in (0, 1) for p in range(20)}
    assert len(set(draws.values())) == 40
    assert stream(source).random(3).random() == draws[0, 3]
    pairs = SplitConfig.model_validate({"pair": [{"source": "scenes"}]}).pair
    assert Stream("pair", pairs, (source,), 0).random(3).random() != draws[0, 3]
    assert stream(Numbers("b", 9)).random(3).random() == draws[0, 3]


def test_a_stream_without_sources_is_not_opened(tmp_path: Path) -> None:
    data = DataConfig.model_validate({"root": str(tmp_path), "train": {"image": [{"source": "scenes", "size": 3}]}})
    streams = open_streams(data, data.train, 0)
    assert list(streams) == ["image"]
    assert streams["image"].epoch == 3


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    data = DataConfig.model_validate(
        {"root": str(tmp_path), "train": {"image": [{"source": "image-folder", "path": "photos"}]}}
    )
    with pytest.raises(DataError, match="photos"):
        open_streams(data, data.train, 0)


class Pictured(Numbers):
    """The same, with pictures: two texts each."""

    def __getitem__(self, index: int) -> Example:
        return replace(super().__getitem__(index), image_id=index // 2)


def test_a_whole_stream_is_every_example_of_every_source_once() -> None:
    whole = WholeStream("text", (Numbers("a", 3, 2), Numbers("b", 4), Numbers("c", 1)))
    assert whole.epoch == 10
    assert [whole[n].name for n in range(10)] == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2", "b3", "c0"]
    with pytest.raises(IndexError, match="position 10 behind the last of 10"):
        whole[10]
    assert whole.random(3).random() == whole.random(3).random() != whole.random(4).random()


def test_pictures_of_two_sources_never_share_a_number() -> None:
    """Contrast takes texts of one number for captions of one picture."""
    sources = (Pictured("a", 8), Pictured("b", 8), Pictured("c", 8))
    whole, mixed = WholeStream("pair", sources), stream(*sources)
    for examples in ([whole[n] for n in range(24)], [mixed[n] for n in range(24)]):
        numbers: dict[int, set[str]] = {}
        for example in examples:
            numbers.setdefault(example.image_id, set()).add(f"{example.name[0]}{int(example.name[1:]) // 2}")
        assert len(numbers) == 12 and all(len(pictures) == 1 for pictures in numbers.values())
    assert [whole[n].image_id for n in (0, 1, 2)] == [0, 0, 1]
    assert {one.name: one.image_id for one in (mixed[n] for n in range(24))} == {
        one.name: one.image_id for one in (whole[n] for n in range(24))
    }


def test_examples_without_a_picture_keep_having_none() -> None:
    whole = WholeStream("text", (Numbers("a", 1), Numbers("b", 1)))
    assert [whole[n].image_id for n in range(2)] == [-1, -1]
