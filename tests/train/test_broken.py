"""Broken examples in a run: refused by name, or skipped, counted, and nothing else moves."""

from pathlib import Path

import pytest
from PIL import Image

from tests.train.support import metrics, on_ranks, pretrain_child, tiny, train
from vlmoe_core.data.stream import open_streams
from vlmoe_core.errors import DataError
from vlmoe_core.recipe.load import LoadedRecipe

PICTURES = 24


def pictures(folder: Path, broken: tuple[int, ...] = ()) -> Path:
    """A folder of small noisy pictures, some of them cut short."""
    folder.mkdir()
    for number in range(PICTURES):
        path = folder / f"{number:02d}.png"
        Image.effect_noise((20, 20), 60).convert("RGB").save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def recipe(folder: Path, *overrides: str) -> LoadedRecipe:
    """The tiny recipe whose images lie in two folders of tmp_path."""
    image = "image: [{source: image-folder, path: train}]"
    held = "image: [{source: image-folder, path: held}]"
    texts = "text: [{source: scenes, size: 50}]"
    return tiny(
        folder,
        f"data.root={folder}",
        f"data.train={{{image}, {texts}}}",
        f"data.eval={{{held}, {texts}}}",
        "batch={size: {image: 8, text: 4}, micro: {image: 4, text: 2}}",
        "train.steps=3",
        *overrides,
    )


def picture_at(loaded: LoadedRecipe, position: int) -> int:
    """Which picture stands at a position of the image stream."""
    data = loaded.recipe.data
    name = open_streams(data, data.train, loaded.recipe.seed)["image"][position].name
    return int(Path(name).stem)


def cut_short(folder: Path, number: int) -> str:
    path = folder / "train" / f"{number:02d}.png"
    path.write_bytes(path.read_bytes()[:200])
    return f"train/{path.name}"


NOTHING_ELSE_READS = ("data.eval={}", "tokenizers.visual.fit_images=2")


def test_raise_names_file_reason_and_position(tmp_path: Path) -> None:
    pictures(tmp_path / "held"), pictures(tmp_path / "train")
    loaded = recipe(tmp_path, *NOTHING_ELSE_READS)
    name = cut_short(tmp_path, picture_at(loaded, 14))
    with pytest.raises(DataError) as caught:
        train(loaded, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "\n" not in message
    assert message.endswith(
        "(position 14 of the image stream); mend it, or set data.on_error=skip to leave its place empty"
    )
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]


def held_out_broken(tmp_path: Path, *overrides: str) -> LoadedRecipe:
    pictures(tmp_path / "held", broken=(3,))
    pictures(tmp_path / "train")
    return recipe(tmp_path, "train.eval_examples=24", *overrides)


def test_raise_refuses_broken_held_out_examples(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"held/03\.png: .*\(position \d+ of the image stream\); mend it, or set data\.on_err"
    ):
        train(held_out_broken(tmp_path), tmp_path / "run")


def test_skip_goes_on_without_them(tmp_path: Path) -> None:
    assert train(held_out_broken(tmp_path, "data.on_error=skip"), tmp_path / "run").finished


def test_skip_counts_them_and_the_run_ends_well(tmp_path: Path) -> None:
    """24 positions of the image stream are one epoch: each broken picture is met once."""
    pictures(tmp_path / "held"), pictures(tmp_path / "train", broken=(2, 3, 5, 7, 11))
    outcome = train(recipe(tmp_path, "data.on_error=skip"), tmp_path / "run")
    assert outcome.finished and outcome.broken == 5
    assert all(line["loss/mim"] > 0 for line in metrics(tmp_path / "run"))


def test_ranks_count_all_of_them_and_agree(tmp_path: Path) -> None:
    pictures(tmp_path / "held"), pictures(tmp_path / "train", broken=(2, 3, 5, 7, 11))
    loaded = recipe(tmp_path, "data.on_error=skip")
    one = train(loaded, tmp_path / "one")
    two = on_ranks(2, pretrain_child, loaded, tmp_path / "two")
    assert [o.broken for o in two] == [one.broken] * 2 == [5, 5], two
    for line, straight in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert line["loss/total"] == pytest.approx(straight["loss/total"], abs=1e-4)


def test_a_micro_batch_of_nothing_but_broken_pictures(tmp_path: Path) -> None:
    """Whole micro-batches of a stream are empty, on one rank or the other: the run goes on."""
    pictures(tmp_path / "held"), pictures(tmp_path / "train", broken=tuple(range(1, 24)))
    loaded = recipe(
        tmp_path, "data.on_error=skip", "tokenizers.visual.codebook_size=4", "tokenizers.visual.fit_images=24"
    )
    answers = on_ranks(2, pretrain_child, loaded, tmp_path / "run")
    assert [(o.finished, o.broken) for o in answers] == [(True, 23)] * 2, answers


@pytest.mark.parametrize("position", [9, 13])
def test_ranks_refuse_together(tmp_path: Path, position: int) -> None:
    """The broken example is one rank's, first or second; both end with its message and none hangs."""
    pictures(tmp_path / "held"), pictures(tmp_path / "train")
    loaded = recipe(tmp_path, *NOTHING_ELSE_READS)
    name = cut_short(tmp_path, picture_at(loaded, position))
    errors = on_ranks(2, pretrain_child, loaded, tmp_path / "run")
    assert [(type(error), error.of_all) for error in errors] == [(DataError, True)] * 2
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith(f"{name}: ") and f"(position {position} of the image stream)" in str(errors[0])


def test_ranks_refuse_together_what_the_tokenizers_are_fitted_on(tmp_path: Path) -> None:
    pictures(tmp_path / "held"), pictures(tmp_path / "train")
    loaded = recipe(tmp_path)
    name = cut_short(tmp_path, picture_at(loaded, 1))
    errors = on_ranks(2, pretrain_child, loaded, tmp_path / "run")
    assert [str(error).startswith(f"{name}: ") for error in errors] == [True, True], errors
