"""What `validate` checks, what it says it did not check, and what it refuses."""

import json
from pathlib import Path

import pytest

from tests.data.files_support import SHARED, jpeg, needs_shared, write_tar
from tests.train.support import tiny
from tests.train.tasks_support import TASKS, tuned
from vlmoe_core.errors import DataError, RecipeError, TokenizerError
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train import validate as validation
from vlmoe_core.train.validate import Check, validate

LARGE = (
    "model={preset: base, max_text_length: 196, moe: {vision: {num_experts: 32}, text: {num_experts: 32}}}",
    "tokenizers={text: {vocab_size: 64010}}",
    "data.max_text.text=196",
    "batch={size: {image: 2048, text: 2048, pair: 2048}, micro: {image: 64, text: 64, pair: 64}}",
    "train.precision=bf16",
)

VQKD = (
    "model={preset: tiny, modality: vision, vl_layers: 0, layers: 1, patch_size: 4, image_size: 16}",
    "data={workers: 0, train: {image: [{source: scenes, size: 50, image_size: 16}]}}",
    "batch={size: {image: 4}, micro: {image: 2}}",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def checks(loaded: LoadedRecipe, read_data: bool = True) -> tuple[list[Check], dict[str, str]]:
    """The checks that were made, and those that were not, by name."""
    found = list(validate(loaded, read_data))
    split = next(i for i, check in enumerate([*found, Check("", "", done=False)]) if not check.done)
    assert not any(check.done for check in found[split:])
    return found[:split], {check.name: check.detail for check in found[split:]}


def figures(made: list[Check], name: str) -> dict[str, object]:
    return dict(next(check for check in made if check.name == name).figures)


def test_everything_of_a_run_is_tried(tmp_path: Path) -> None:
    loaded = tiny(tmp_path)
    made, open_questions = checks(loaded)
    names = {check.name for check in made}
    places = {f"data.{split}.{stream}" for split in ("train", "eval") for stream in ("image", "text", "pair")}
    assert names == {"recipe", "text tokenizer", "visual tokenizer", "model", "step", *places}
    for place in places:
        of_place = [dict(check.figures) for check in made if check.name == place]
        assert any(row.get("examples") for row in of_place) and any(row.get("drawn") for row in of_place)
    assert figures(made, "model")["parameters"] == loaded.recipe.num_params()
    step = figures(made, "step")
    assert step["shrunken"] is False and isinstance(step["loss"], float) and step["loss"] > 0
    assert {"later data", "tokenizers", "batch", "devices", "run"} <= open_questions.keys()
    assert "text and visual" in open_questions["tokenizers"]


def test_it_says_what_else_it_leaves_out(tmp_path: Path) -> None:
    loaded = tiny(tmp_path, "train.compile=true", "train.precision=fp16", "train.trackers=[wandb]")
    _, open_questions = checks(loaded, read_data=False)
    assert open_questions["trackers"] == "wandb" and "GPU" in open_questions["precision"]
    assert {"compile", "data and tokenizers"} <= open_questions.keys() and "later data" not in open_questions


def test_checks_come_before_what_they_need(tmp_path: Path) -> None:
    stream = validate(tiny(tmp_path, "data.train.pair.0={source: jsonl, path: absent.jsonl}"))
    assert next(stream).name == "recipe"
    with pytest.raises(DataError, match=r"nothing matches 'absent.jsonl'"):
        list(stream)


@pytest.mark.parametrize("split", ["eval", "test"])
def test_a_missing_source_of_any_split_is_an_error(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match=r"nothing matches 'absent-\*.tar'"):
        list(validate(tiny(tmp_path, f"data.{split}={{pair: [{{source: tar, path: absent-*.tar}}]}}")))


@pytest.mark.parametrize(("kind", "message"), [("text", "is not there"), ("visual", "holds no visual tokenizer")])
def test_a_missing_tokenizer_is_an_error(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        list(validate(tiny(tmp_path, f"tokenizers.{kind}.load={tmp_path}/absent.json")))


def test_without_data_nothing_is_opened(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "open_streams", lambda *_: pytest.fail("opened"))
    loaded = tiny(
        tmp_path,
        "data.train.pair.0={source: tar, path: absent.tar}",
        "data.train.text.0={source: arrow, hub: no/where}",
        "tokenizers.text.load=no/where",
        "tokenizers.visual.load=absent",
    )
    made, _ = checks(loaded, read_data=False)
    assert [check.name for check in made] == ["recipe", "inputs", "model", "step"]
    assert "random" in made[1].detail and not cache.exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_step_of_a_task_without_its_data(tmp_path: Path, cache: Path, task: str) -> None:
    loaded = tuned(tmp_path, task, *(["task.answers=absent.json"] if task == "vqa" else []))
    made, open_questions = checks(loaded, read_data=False)
    assert [check.name for check in made] == ["recipe", "inputs", "model", "step"]
    assert ("1,000 made-up labels" in made[1].detail) == (task in ("vqa", "classification"))
    loss = figures(made, "step")["loss"]
    assert isinstance(loss, float) and loss > 0
    assert "step" not in open_questions and not cache.exists()


def test_a_task_whose_data_are_of_another_stream_is_refused_without_data(tmp_path: Path) -> None:
    text = "data.train={text: [{source: scenes, task: nli}]}"
    with pytest.raises(RecipeError, match=r"task vqa reads data.train.pair, but data.train has sources of: text"):
        list(validate(tuned(tmp_path, "vqa", text, "batch={size: {text: 2}, micro: {text: 2}}"), read_data=False))


def test_what_stands_in_for_a_start_is_said(tmp_path: Path) -> None:
    found = list(validate(tuned(tmp_path, "nli"), read_data=False, start="runs/a is not there"))
    assert (found[1].name, found[1].detail) == ("start", "runs/a is not there")


def test_a_visual_tokenizer_in_training(tmp_path: Path) -> None:
    """It needs neither words nor another visual tokenizer; a teacher on the disk is read with the data alone."""
    loaded = tiny(tmp_path, *VQKD, "objective={name: vqkd, code_dim: 4, teacher: {model: ./absent, dim: 24}}")
    made, _ = checks(loaded, read_data=False)
    assert "random features, 24 wide" in made[1].detail and made[-1].name == "step"
    with pytest.raises(TokenizerError, match=r"\./absent"):
        list(validate(loaded))
    pixels = tiny(tmp_path, *VQKD, "objective={name: vqkd, code_dim: 4}")
    made, open_questions = checks(pixels)
    assert not {"text tokenizer", "visual tokenizer"} & {check.name for check in made}
    assert "tokenizers" not in open_questions


def test_streams_that_are_not_trained_stay_empty(tmp_path: Path) -> None:
    loaded = tiny(
        tmp_path,
        "data={max_text: {text: 24, pair: 16}, train: {text: [{source: scenes}]}}",
        "batch={size: {text: 2}, micro: {text: 2}}",
    )
    made, _ = checks(loaded, read_data=False)
    assert "on 2 text examples" in made[-1].detail


def test_a_recipe_of_the_papers_size(tmp_path: Path) -> None:
    made, open_questions = checks(tiny(tmp_path, *LARGE), read_data=False)
    model = figures(made, "model")
    assert 1.9e9 < float(str(model["parameters"])) < 2.1e9 and float(str(model["active_parameters"])) < 0.3e9
    assert figures(made, "step")["shrunken"] is True and "dim 32" in made[-1].detail
    assert "model size" in open_questions


def test_broken_examples_stop_or_are_counted(tmp_path: Path) -> None:
    words = json.dumps({"caption": "a dog"}).encode()
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(size=(20, 20)), "0.json": words, "3.json": words})
    entry = f"data.eval={{pair: [{{source: tar, path: {tmp_path}/a.tar}}]}}"
    with pytest.raises(DataError, match=r"a.tar:3: has no picture.*set data.on_error=skip"):
        list(validate(tiny(tmp_path, entry, "data.on_error=raise")))
    made, _ = checks(tiny(tmp_path, entry, "data.on_error=skip"))
    assert any("broken examples skipped: 1" in check.detail for check in made if check.name == "data.eval")
    write_tar(tmp_path / "a.tar", {"3.json": words})
    with pytest.raises(DataError, match=r"data.eval.pair: no example drawn can be read: .*a.tar:3"):
        list(validate(tiny(tmp_path, entry, "data.on_error=skip")))


def test_documents_are_not_packed_by_a_trial_tokenizer(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.txt").write_text("A dog runs. A cat sleeps.\nBirds sing in a tree.\n" * 20)
    entry = f"data.train.text=[{{source: text, path: {tmp_path}/text.txt}}]"
    made, _ = checks(tiny(tmp_path, entry))
    assert any("packed once" in check.detail for check in made if check.name == "data.train.text")
    assert not list(cache.rglob("*.npz"))
    (tmp_path / "text.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        list(validate(tiny(tmp_path, entry)))


@needs_shared
def test_named_tokenizer_and_photographs(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.txt").write_text("A dog runs. A cat sleeps.\n" * 20)
    source = "{source: tar, path: flickr8k/flickr8k-dev-*.tar, text_field: captions}"
    loaded = tiny(
        tmp_path,
        f"data.root={SHARED}",
        f"data.train={{image: [{source}], pair: [{source}], text: [{{source: text, path: {tmp_path}/text.txt}}]}}",
        "data.eval={}",
        f"tokenizers.text={{load: {SHARED}/bert-base-uncased, vocab_size: 30522}}",
    )
    made, open_questions = checks(loaded)
    assert {"examples": 5000} in [dict(c.figures) for c in made if c.name == "data.train.pair"]
    assert any("text-1" in str(path) for path in cache.rglob("*.npz"))
    assert "(visual)" in open_questions["tokenizers"]


@needs_shared
def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"30522 ids, more than .*set tokenizers.text.vocab_size=30522"):
        list(validate(tiny(tmp_path, f"tokenizers.text={{load: {SHARED}/bert-base-uncased, vocab_size: 1000}}")))
