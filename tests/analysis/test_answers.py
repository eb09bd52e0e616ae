"""Answers to own examples are those of the same examples in a split."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.train.tasks_support import finetuned, scored
from vlmoe_core.analysis.answers import answer, batch_of, match, pictures, read_examples
from vlmoe_core.data.example import Example
from vlmoe_core.errors import DataError, UsageError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import whole_dataset
from vlmoe_core.train.trained import Trained, load_trained

CHOOSING = ("vqa", "nlvr2", "classification", "nli")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("models")
    return {task: load_trained(finetuned(folder, task, "train.steps=2")) for task in (*CHOOSING, "retrieval")}


def examples_of(trained: Trained) -> list[Example]:
    """The examples of data.test."""
    dataset = whole_dataset(trained.recipe, trained.recipe.data.test, trained.tokenizers, None)
    assert trained.recipe.task is not None
    stream = dataset.streams[open_task(trained.recipe.task).stream]
    return [stream[place] for place in range(stream.epoch)]


@pytest.mark.parametrize("task", CHOOSING)
def test_own_examples_get_the_answers_that_evaluation_gives(models: dict[str, Trained], task: str) -> None:
    trained = models[task]
    found = answer(trained, examples_of(trained))
    expected = scored(trained).answers
    assert [one.labels for one in found] == [one.labels for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


@pytest.mark.parametrize("task", CHOOSING)
def test_answers_depend_on_no_other_example_and_on_no_truth(models: dict[str, Trained], task: str) -> None:
    trained = models[task]
    examples = examples_of(trained)[:3] * 15  # more than a batch of 32
    found = answer(trained, examples)
    blind = answer(trained, [replace(examples[1], facts={}, image_id=-1)])
    for place in (1, 4, 43):
        assert found[place].labels == blind[0].labels
        assert found[place].probabilities == pytest.approx(blind[0].probabilities, abs=1e-6)
    assert len(found) == 45 and answer(trained, []) == []


def test_every_picture_is_matched_with_every_text(models: dict[str, Trained]) -> None:
    trained = models["retrieval"]
    images = [replace(example, text=None) for example in examples_of(trained)[:10:2]]
    texts = [f"a {colour} circle" for colour in ("red", "blue", "green", "grey", "pink", "white", "black")]
    found = match(trained, images, texts)  # 35 pairs: two batches
    assert sorted((one.image, one.text) for one in found) == sorted((i.name, t) for i in images for t in texts)
    assert [one.similarity for one in found] == sorted((one.similarity for one in found), reverse=True)
    by_name = {image.name: image for image in images}
    for place in (0, 17, 34):
        batch = batch_of(trained, [replace(by_name[found[place].image], text=found[place].text)])
        with torch.no_grad():
            image_XD, text_XD = trained.objective({"pair": batch}).outputs.chunk(2, dim=-1)
            logits_S2 = trained.objective.match_logits(batch)  # type: ignore[operator]
        assert found[place].similarity == pytest.approx(float((image_XD * text_XD).sum()), abs=1e-6)
        assert found[place].match == pytest.approx(float(logits_S2.softmax(-1)[0, 1]), abs=1e-6)


def test_pictures_and_texts_are_encoded_once_and_the_best_pairs_together(models: dict[str, Trained]) -> None:
    trained = models["retrieval"]
    images = [replace(example, text=None) for example in examples_of(trained)[:10:2]]
    texts = [f"a {colour} circle" for colour in ("red", "blue", "green")]
    seen: list[tuple[int, int, bool]] = []
    encoder = trained.objective.encoder
    assert isinstance(encoder, Encoder)
    handle = encoder.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].num_images, inputs[0].num_sequences, inputs[0].fused))
    )
    best = match(trained, images, texts, 4)
    handle.remove()
    assert seen == [(5, 5, False), (0, 3, False), (4, 4, True)]
    whole = match(trained, images, texts)
    assert [(one.image, one.text) for one in best] == [(one.image, one.text) for one in whole[:4]]
    assert [one.match for one in best] == pytest.approx([one.match for one in whole[:4]], abs=1e-6)
    assert match(trained, [], texts) == match(trained, images, []) == []


def test_a_dual_encoder_alone_tells_no_match(tmp_path: Path) -> None:
    trained = load_trained(finetuned(tmp_path, "retrieval", "task.itm_weight=0", "train.steps=2"))
    (found,) = match(trained, examples_of(trained)[:1], ["a red circle"])
    assert found.match is None and -1 <= found.similarity <= 1


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "classification"])
def test_another_number_of_pictures_is_refused_by_name(models: dict[str, Trained], task: str) -> None:
    wanted = 2 if task == "nlvr2" else 1
    example = examples_of(models[task])[0]
    more = replace(example, name="own:7", more_images=(example.image,) * wanted)  # type: ignore[arg-type]
    for wrong, found in ((more, wanted + 1), (replace(more, image=None, more_images=()), 0)):
        with pytest.raises(DataError, match=rf"^own:7: has {found} pictures, the model takes {wanted}$"):
            answer(models[task], [example, wrong])


def test_a_lone_sentence_is_refused_by_name(models: dict[str, Trained]) -> None:
    with pytest.raises(DataError, match=r"^own:1: has no hypothesis; the task judges pairs of sentences$"):
        answer(models["nli"], [Example("own:1", text="all shapes are red")])


def test_lines_of_a_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"image": "a.png", "question": "what?"}\n\n'
        '{"images": ["a.png", "b.png"], "statement": "both"}\n'
        '{"premise": "one", "hypothesis": "two"}\n'
        '{"image": "b.png", "text": "any"}\n'
    )
    found = list(read_examples(path))
    assert [example.name for example in found] == ["own.jsonl:1", "own.jsonl:3", "own.jsonl:4", "own.jsonl:5"]
    assert [example.text for example in found] == ["what?", "both", "one", "any"]
    assert [example.second_text for example in found] == [None, None, "two", None]
    assert [1 + len(example.more_images) if example.image else 0 for example in found] == [1, 2, 0, 1]
    assert found[1].more_images == ((tmp_path / "b.png").read_bytes(),)
    with pytest.raises(UsageError, match="there is no such file; give a JSON lines file"):
        list(read_examples(tmp_path / "none.jsonl"))


def test_pictures_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("b.png", "a.JPG", "inner/c.webp"):
        (tmp_path / name).write_bytes(b"bytes")
    (tmp_path / "notes.txt").write_text("none")
    found = [Path(one.name).name for one in pictures([tmp_path / "inner" / "c.webp", tmp_path])]
    assert found == ["c.webp", "a.JPG", "b.png"]
    with pytest.raises(DataError, match="there is no file"):
        pictures([tmp_path / "none.png"])
