"""Every recipe under recipes/ says what a user has to know, loads, builds and does a step; the paper's are marked."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.support import train
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.recipe.catalogue import Catalogue, head_comment
from vlmoe_core.recipe.load import dump_recipe, load_recipe
from vlmoe_core.recipe.tree import KeyPath, Node, descendants, dotted
from vlmoe_core.recipe.yaml12 import parse
from vlmoe_core.train import trial
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.init import Planned, load_planned_recipe, load_run_recipe
from vlmoe_core.train.rehearsal import MOST_PARAMETERS
from vlmoe_core.train.stand_ins import stand_in_labels
from vlmoe_core.train.validate import Check, validate

CATALOGUE = Catalogue(Path(__file__).parents[1] / "recipes")
HEAD = ("Command:", "Hardware:", "Time:", "Expected:")
MARK = "# not stated in the paper: "
WORDS = 30522
"""BERT's uncased vocabulary."""
STATED: dict[str, dict[str, int]] = {
    "paper/base-32e": {
        "model.moe.vision.num_experts": 32,
        "model.moe.text.num_experts": 32,
        "train.steps": 200_000,
        "parallel.expert": 32,
    },
    "paper/vqa": {"model.image_size": 480, "batch.size.pair": 128},
    "paper/nlvr2": {"model.image_size": 384},
    "paper/coco-retrieval": {"model.image_size": 384},
    "paper/flickr30k-retrieval": {"model.image_size": 384},
}
"""The numbers of our recipes that sources of the paper state (docs/PAPER.md)."""
SMALLER = (
    "data.train.{stream}.0.size=40",
    "data.eval.{stream}.0.size=8",
    "data.test.{stream}.0.size=8",
)
every_recipe = pytest.mark.parametrize("name", CATALOGUE.names())
every_paper_recipe = pytest.mark.parametrize("name", [n for n in CATALOGUE.names() if n.startswith("paper/")])


@pytest.fixture(autouse=True)
def nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run lies where the recipes look for it; and as little as can be is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "MOST_DRAWN", 2)


def file_of(name: str) -> Path:
    path = CATALOGUE.path(name)
    assert path is not None
    return path


def load(name: str) -> Planned:
    return load_planned_recipe(str(file_of(name)))


def test_those_of_the_issue_are_among_them() -> None:
    paper = {"base", "base-32e", "small", "small-8e", "small-16e", "vqa", "nlvr2", "imagenet", "mnli"}
    assert {"quickstart/pretrain", "tokenizer/vqkd-base", *(f"paper/{n}" for n in paper)} <= set(CATALOGUE.names())


@every_recipe
def test_head_comment(name: str) -> None:
    head = head_comment(file_of(name).read_text("utf-8"))
    missing = [word for word in HEAD if not any(line.startswith(f"# {word}") for line in head.splitlines())]
    assert not missing, f"the head comment of {name} lacks {missing}"
    command = next(line for line in head.splitlines() if line.startswith("# Command:"))
    assert name in command, f"the command of {name} names another recipe"


@every_recipe
def test_it_loads_and_its_dump_is_equal(name: str, tmp_path: Path) -> None:
    loaded = load(name).loaded
    assert loaded.name == name
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(loaded.recipe), "utf-8")
    assert load_recipe(str(copy)).recipe == loaded.recipe


@every_recipe
def test_it_builds_on_the_meta_device(name: str) -> None:
    recipe = load(name).loaded.recipe
    with torch.device("meta"):
        objective = build_objective(recipe, None, stand_in_labels(recipe))
    parameters = list(objective.parameters())
    assert parameters
    assert all(parameter.is_meta for parameter in parameters)
    if recipe.hides:
        assert sum(parameter.numel() for parameter in parameters) == recipe.num_params()


def passed(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks if check.done}


@every_recipe
def test_validate_passes_without_data(name: str, tmp_path: Path) -> None:
    planned = load(name)
    done = passed(list(validate(planned.loaded, read_data=False, start=planned.start)))
    assert ("start" in done) == (planned.loaded.recipe.init not in (None, "scratch"))
    assert done["step"].figures["shrunken"] == (done["model"].figures["parameters"] > MOST_PARAMETERS)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What quickstart/pretrain would make, after one step."""
    folder = tmp_path_factory.mktemp("start")
    small = ("train.steps=1", "train.eval_examples=2", "optim.warmup_steps=1", "data.workers=0")
    fits = ("tokenizers.text.fit_texts=300", "tokenizers.visual.fit_images=20", "tokenizers.visual.iterations=1")
    batch = "batch={size: {image: 2, text: 2, pair: 2}, micro: {image: 2, text: 2, pair: 2}}"
    return train(load_recipe(str(file_of("quickstart/pretrain")), (*small, *fits, batch)), folder / "run").folder


@pytest.mark.parametrize("name", [n for n in CATALOGUE.names() if n.startswith("quickstart/")])
def test_validate_passes_with_the_data_of_the_quick_start(name: str, start: Path) -> None:
    recipe = load(name).loaded.recipe
    if recipe.task is None:
        loaded = load_run_recipe(str(file_of(name)))
    else:
        stream = next(stream for stream, size in recipe.batch.size if size)
        loaded = load_run_recipe(str(file_of(name)), [line.format(stream=stream) for line in SMALLER], start)
    assert "step" in passed(list(validate(loaded)))


def test_validate_passes_with_the_data_of_easy_vqa() -> None:
    if find_spec("easy_vqa") is None:
        pytest.skip("the easy-vqa package is absent")
    assert "step" in passed(list(validate(load_run_recipe(str(file_of("finetune/easy-vqa"))))))


@pytest.mark.parametrize(
    ("name", "total", "applied"),
    [
        ("base-32e", 1_932_493_824, 175_749_120),
        ("base", 175_454_208, 175_454_208),
        ("small-16e", 178_809_984, 37_021_824),
        ("small-8e", 103_165_056, 36_997_248),
        ("small", 36_972_672, 36_972_672),
    ],
)
def test_parameters_of_the_papers_encoders(name: str, total: int, applied: int) -> None:
    """PAPER.md 2.2 derives 1.93 B, of which about 180 M are applied to a token; 179 M for the small one; 37 M dense."""
    model = load(f"paper/{name}").loaded.recipe.model
    with torch.device("meta"):
        encoder = Encoder(model, WORDS)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == model.num_params(WORDS) == total
    experts = sum(parameter.numel() for key, parameter in encoder.named_parameters() if ".experts." in key)
    idle = {pool: moe.num_experts for pool, moe in model.pools.items()}
    share = (1 - 1 / idle["vision"]) if idle else 0.0
    assert total - experts * share == model.num_active_params(WORDS) == applied


def test_the_paper_model_is_as_its_sources_say() -> None:
    recipe = load("paper/base-32e").loaded.recipe
    vision, text = recipe.model.moe.vision, recipe.model.moe.text
    assert vision is not None and text is not None
    assert recipe.model.sparse_layers("vision") == recipe.model.sparse_layers("text") == (1, 3, 5, 7, 9, 11)
    assert vision.balance.weights == {"importance": 0.005, "load": 0.005} and text.balance.weights == {"load": 0.01}
    assert vision.priority == text.priority == "gate" and vision.top_k == text.top_k == 1
    assert recipe.batch.size.model_dump() == {"image": 2048, "text": 2048, "pair": 2048}
    assert recipe.tokenizers.visual.kind == "vqkd" and recipe.mask.image_count == 75
    assert recipe.train.steps == 200_000 and recipe.model.image_size == 224


@pytest.mark.parametrize(("dense", "sparse"), [("base", "base-32e"), ("small", "small-16e")])
def test_a_dense_control_differs_by_its_experts_alone(dense: str, sparse: str) -> None:
    control, model = load(f"paper/{dense}").loaded.recipe, load(f"paper/{sparse}").loaded.recipe
    assert not control.model.pools and model.model.pools
    without = model.model.model_copy(update={"moe": control.model.moe})
    assert model.model_copy(update={"model": without}) == control


def numbers(node: Node) -> list[tuple[KeyPath, Node]]:
    return [(key, leaf) for key, leaf in descendants(node) if type(leaf.value) in (int, float)]


@every_paper_recipe
def test_each_number_is_stated_in_the_paper_or_marked(name: str) -> None:
    text = file_of(name).read_text("utf-8")
    lines, found = text.splitlines(), numbers(parse(text, "here"))
    unmarked: dict[str, Any] = {}
    for key, node in found:
        line = lines[int(node.place.rpartition(":")[2]) - 1]
        if len(line.partition(MARK)[2]) < len("VLMo"):
            unmarked[dotted(key)] = node.value
    assert unmarked == STATED.get(name, {})


def test_the_search_for_numbers_finds_them_everywhere() -> None:
    text = "a: 1\nb: {c: [2, {d: 3.5}]}\ne: [{f: yes, g: 2014}]\nh: v2_train2014\n"
    assert sorted(node.value for _, node in numbers(parse(text, "here"))) == [1, 2, 3.5, 2014]
