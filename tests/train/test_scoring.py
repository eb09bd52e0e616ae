"""Scoring a whole split: every example once, the same numbers on any number of processes and for any batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.train.support import on_ranks
from tests.train.tasks_support import TASKS, Notes, finetuned, names, percents, recipe_text, scored, tuned
from vlmoe_core.data.config import DataConfig
from vlmoe_core.errors import DataError, RecipeError, UsageError
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import whole_dataset
from vlmoe_core.train.scoring import (
    Evaluated,
    answer_all,
    ask,
    baselines,
    choose_split,
    comparison,
    report,
)
from vlmoe_core.train.trained import Trained, load_trained

SIZES = {"vqa": 28, "nlvr2": 28, "retrieval": 28, "classification": 14, "nli": 14}
"""Examples of data.test: two questions or captions a picture, four statements a pair of pairs."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finetuned run of each task."""
    folder = tmp_path_factory.mktemp("runs")
    return {task: finetuned(folder, task, "train.steps=2") for task in TASKS}


@pytest.fixture(scope="module")
def vqa(runs: dict[str, Path]) -> Trained:
    return load_trained(runs["vqa"])


def task_of(trained: Trained) -> Any:
    assert trained.recipe.task is not None
    return open_task(trained.recipe.task)


@pytest.mark.parametrize("task", TASKS)
def test_every_example_is_scored_once_in_stored_order(runs: dict[str, Path], task: str) -> None:
    trained = load_trained(runs[task])
    evaluated = scored(trained, micro=5)  # the last batch is not full
    dataset = whole_dataset(trained.recipe, trained.recipe.data.test, trained.tokenizers, None)
    source = dataset.streams[task_of(trained).stream].sources[0]
    stored = [record.name for record in source.records()]  # type: ignore[attr-defined]
    assert names(evaluated) == stored and len(stored) == SIZES[task]
    assert [record.position for record in evaluated.records] == list(range(len(stored)))
    assert evaluated.broken == 0


@pytest.mark.parametrize("task", TASKS)
def test_the_size_of_a_batch_changes_no_answer(runs: dict[str, Path], task: str) -> None:
    """Evaluation is dropless: what else is in a batch takes nobody's place."""
    first, second = scored(runs[task], micro=3), scored(runs[task], micro=28)
    assert percents(first) == percents(second)
    if task != "retrieval":  # whose loss compares the pairs of a batch
        assert first.losses["loss/total"] == pytest.approx(second.losses["loss/total"], rel=1e-5)
        for one, other in zip(first.answers, second.answers, strict=True):
            assert one.labels == other.labels
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def scored_here(run: Path, micro: int, limit: int | None) -> tuple[list[str], dict[str, float], dict[str, float], int]:
    """For a child: what it finds; records and metrics on the first process alone."""
    trained = load_trained(run)
    evaluated = scored_on_all(trained, micro, limit)
    told = percents(evaluated) if evaluated.scores else {}
    return names(evaluated), told, dict(evaluated.losses), evaluated.broken


def scored_on_all(trained: Trained, micro: int, limit: int | None) -> Evaluated:
    """As `scored`, but in the processes that there are."""
    stream = task_of(trained).stream
    counts = trained.recipe.batch.micro.model_copy(update={stream: micro})
    batch = trained.recipe.batch.model_copy(update={"micro": counts})
    changed = replace(trained, recipe=trained.recipe.model_copy(update={"batch": batch}))
    return answer_all(changed, ask(changed, None, None, limit, None), Accelerator(cpu=True), Notes())


@pytest.mark.parametrize(
    ("task", "micro", "limit"),
    [("nlvr2", 6, None), ("retrieval", 6, None), ("vqa", 64, None), ("nli", 4, 9)],
    ids=["uneven", "retrieval", "one batch for two", "limit"],
)
def test_two_processes_find_what_one_finds(runs: dict[str, Path], task: str, micro: int, limit: int | None) -> None:
    (expected,) = on_ranks(1, scored_here, runs[task], micro, limit)
    first, second = on_ranks(2, scored_here, runs[task], micro, limit)
    assert first[:2] == expected[:2] and second[:2] == ([], {})
    for found in (first, second):
        assert found[2] == pytest.approx(expected[2], rel=1e-6)
        assert found[3] == 0
    assert len(expected[0]) == len(set(expected[0])) == (limit or SIZES[task])


def test_limit_takes_so_many_in_an_order_that_never_changes(vqa: Trained) -> None:
    some = [scored(vqa, ask(vqa, None, None, limit, None), micro) for limit, micro in ((9, 8), (9, 4), (20, 8))]
    assert len(set(names(some[0]))) == 9
    assert names(some[0]) == names(some[1]) == names(some[2])[:9]
    assert set(names(some[2])) < set(names(scored(vqa)))


def test_a_limit_above_the_number_is_the_whole_split_and_no_empty_batches(vqa: Trained) -> None:
    dataset = whole_dataset(vqa.recipe, vqa.recipe.data.test, vqa.tokenizers, 10**9)
    assert dataset.limit == 28
    whole = scored(vqa)
    found = scored(vqa, ask(vqa, None, None, 1000, None))
    assert names(found) == names(whole) and percents(found) == percents(whole)


def test_several_sources_are_scored_whole(vqa: Trained) -> None:
    """Whatever their weights and sizes; pictures of two sources are never the same picture."""
    sources = {
        "pair": [
            {"source": "scenes", "task": "vqa", "size": 5, "image_size": 16, "split": "test", "weight": 3},
            {"source": "scenes", "task": "vqa", "size": 11, "image_size": 16, "split": "eval"},
        ]
    }
    data = DataConfig.model_validate({"train": {}, "test": sources, "workers": 0})
    found = scored(vqa, replace(ask(vqa, None, None, None, None), data=data))
    assert len(set(names(found))) == len(found.records) == 32
    assert len({record.image_id for record in found.records}) == 16


def test_the_split_is_test_then_eval_or_the_one_that_is_asked_for(vqa: Trained) -> None:
    data, streams = vqa.recipe.data, (task_of(vqa).stream,)
    assert choose_split(data, streams, None) == "test"
    assert choose_split(data.model_copy(update={"test": DataConfig(train=data.test).test}), streams, None) == "eval"
    assert choose_split(data, streams, "train") == "train"
    with pytest.raises(UsageError, match=r"^--split dev: data\.dev\.pair has no source; these have: test, eval, train"):
        choose_split(data, streams, "dev")
    with pytest.raises(UsageError, match=r"no data\.test\.pair and no data\.eval\.pair; give --data"):
        choose_split(DataConfig(train=data.train), streams, None)


def test_a_split_without_the_tasks_stream_is_none(vqa: Trained, runs: dict[str, Path]) -> None:
    nli = task_of(load_trained(runs["nli"]))
    with pytest.raises(UsageError, match=r"data\.test\.text"):
        choose_split(vqa.recipe.data, (nli.stream,), None)


def test_another_recipes_data(vqa: Trained, tmp_path: Path) -> None:
    """Its sources; texts are cut as the model is used to, whose position table is short."""
    path = tmp_path / "other.yaml"
    text = recipe_text("vqa").replace("size: 14", "size: 3").replace("{text: 24, pair: 20}", "{pair: 24}")
    path.write_text(text.replace("max_text_length: 24", "max_text_length: 64").replace("pair: 24", "pair: 64"))
    asked = ask(vqa, str(path), None, None, None)
    assert asked.data.max_text.pair == 64
    found = scored(vqa, asked)
    assert names(found) == names(scored(vqa))[:6]
    (tmp_path / "empty.yaml").write_text("model: {preset: tiny}\n")
    with pytest.raises(RecipeError, match=r"empty\.yaml has no 'data'"):
        ask(vqa, str(tmp_path / "empty.yaml"), None, None, None)
    with pytest.raises(UsageError, match="--on-error stop: give raise or skip"):
        ask(vqa, None, None, None, "stop")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    """Six pictures in two class folders, one of them torn."""
    for number in range(6):
        place = tmp_path / ("circle" if number < 3 else "star")
        place.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(noise).save(place / f"{number}.png")
    (tmp_path / "star" / "4.png").write_bytes(b"torn")
    return {"root": str(tmp_path), "train": {}, "workers": 0, "eval": {"image": [CLASS_FOLDERS]}}


CLASS_FOLDERS = {"source": "image-folder", "path": "."}


def test_a_broken_picture_is_named_or_counted(runs: dict[str, Path], folders: dict[str, Any]) -> None:
    trained = load_trained(runs["classification"])
    data = DataConfig.model_validate(folders)
    asked = replace(ask(trained, None, None, None, None), data=data, split="eval")
    with pytest.raises(DataError, match=r"star/4\.png: .*\(position 4 of the image stream\); mend it, or set"):
        scored(trained, asked, micro=2)
    found = scored(trained, replace(asked, data=data.model_copy(update={"on_error": "skip"})), micro=2)
    assert found.broken == 1 and len(found.records) == 5
    assert not [name for name in names(found) if "4.png" in name]
    assert [len(found.answers), report(task_of(trained), trained, asked, found, [])["broken"]] == [5, 1]


def test_nothing_that_can_be_read_is_an_error(runs: dict[str, Path], folders: dict[str, Any]) -> None:
    trained = load_trained(runs["classification"])
    for picture in Path(folders["root"]).rglob("*.png"):
        picture.write_bytes(b"torn")
    data = DataConfig.model_validate(folders | {"on_error": "skip"})
    with pytest.raises(DataError, match=r"data\.eval has no readable example"):
        scored(trained, replace(ask(trained, None, None, None, None), data=data, split="eval"))


@pytest.mark.parametrize(
    ("task", "blind"),
    [("vqa", "question-only"), ("nlvr2", "statement-only"), ("nli", "hypothesis-only"), ("classification", None)],
)
def test_baselines_see_no_picture(runs: dict[str, Path], task: str, blind: str | None) -> None:
    trained = load_trained(runs[task])
    evaluated = scored(trained)
    found = {one.name: one.scores for one in baselines(trained.recipe, evaluated)}
    assert list(found) == ["majority", *([blind] if blind else [])]
    main = next(iter(percents(evaluated)))
    learned = whole_dataset(trained.recipe, trained.recipe.data.train, trained.tokenizers, None)
    train = learned.streams[task_of(trained).stream].sources[0].records()  # type: ignore[attr-defined]
    key = "answer" if task == "vqa" else "label"
    truths = [record.facts[key] for record in train]
    majority = max(sorted(set(truths)), key=truths.count)
    shares = [record.facts[key] == majority for record in evaluated.records]
    assert found["majority"].percents()[main] == pytest.approx(100 * float(np.mean(shares)))


def test_retrieval_is_compared_with_chance(runs: dict[str, Path]) -> None:
    trained = load_trained(runs["retrieval"])
    evaluated = scored(trained)
    assert baselines(trained.recipe, evaluated) == []
    told = report(task_of(trained), trained, ask(trained, None, None, None, None), evaluated, [])
    assert told["baselines"]["chance"]["ir@1"] == pytest.approx(100 / 14)
    assert told["baselines"]["chance"]["tr@1"] == pytest.approx(100 * 2 / 28)


def test_the_report_holds_all_that_it_should(vqa: Trained) -> None:
    evaluated, asked = scored(vqa), ask(vqa, None, None, None, None)
    told = report(task_of(vqa), vqa, asked, evaluated, baselines(vqa.recipe, evaluated))
    assert (told["task"], told["split"], told["n"]) == ("vqa", "test", 28)
    assert told["model"] == str(vqa.path)
    assert told["metrics"].keys() == told["intervals"].keys() >= {"accuracy", "accuracy/yes/no", "question/colour"}
    for name, (low, high) in told["intervals"].items():
        assert 0 <= low <= told["metrics"][name] <= high <= 100, name
    assert told["baselines"].keys() == told["baseline_intervals"].keys() == {"majority", "question-only"}


@pytest.mark.parametrize("task", TASKS)
def test_a_model_beside_itself_differs_by_nothing(runs: dict[str, Path], task: str) -> None:
    trained = load_trained(runs[task])
    evaluated = scored(trained)
    found = comparison(task_of(trained), evaluated, scored(trained), trained)
    assert (found["difference"], found["interval"], found["p_value"]) == (0.0, (0.0, 0.0), 1.0)


def test_two_models_are_compared_example_by_example(vqa: Trained, tmp_path: Path) -> None:
    other = load_trained(finetuned(tmp_path, "vqa", "train.steps=16", "optim.lr=3e-2", "seed=9"))
    first, second = scored(vqa), scored(other)
    found = comparison(task_of(vqa), first, second, other)
    a, b = percents(first)["accuracy"], percents(second)["accuracy"]
    assert a != b
    assert found["difference"] == pytest.approx(a - b) and found["other_percent"] == pytest.approx(b)
    low, high = found["interval"]
    assert low <= a - b <= high and 0 < found["p_value"] <= 1
    assert found["other"] == str(other.path) and found["metric"] == "accuracy"
    fewer = scored(other, ask(other, None, None, 5, None))
    with pytest.raises(UsageError, match="answered different examples"):
        comparison(task_of(vqa), first, fewer, other)


def test_capacity_in_evaluation_does_depend_on_the_batch(tmp_path: Path) -> None:
    """The other half of the promise that dropless evaluation makes."""
    trained = load_trained(finetuned(tmp_path, "nli", "model.moe.text.eval_capacity_factor=0.5", "train.steps=2"))
    with torch.no_grad():
        for name, parameter in trained.objective.named_parameters():
            parameter.mul_(30 if ".experts." in name else 1)
    notes = Notes()
    first, second = scored(trained, micro=1, reporter=notes), scored(trained, micro=14)
    assert "text experts have a capacity in evaluation (factor 0.5)" in notes.told[0]
    assert first.losses["router/text/0/dropped"] > 0.2
    assert first.losses["loss/nli"] != pytest.approx(second.losses["loss/nli"], rel=1e-6)


def test_a_finetune_recipe_can_be_read_twice(tmp_path: Path) -> None:
    """The merged recipe of a run holds its whole model: nothing is looked up again."""
    loaded = tuned(tmp_path, "vqa")
    assert loaded.recipe == tuned(tmp_path, "vqa").recipe
