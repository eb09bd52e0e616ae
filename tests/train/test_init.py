"""What finetuning starts from: every tensor copied, converted with a line, or refused by name."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.train.support import RECIPE, on_ranks, tiny, train
from tests.train.tasks_support import PRETRAINING, TASKS, Notes, finetuned, same, tuned
from vlmoe_core.checkpoint.layout import latest_checkpoint
from vlmoe_core.checkpoint.read import Checkpoint
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_model
from vlmoe_core.errors import CheckpointError, RecipeError, UsageError
from vlmoe_core.model.embeddings import resize_positions
from vlmoe_core.model.relative import resize_relative
from vlmoe_core.moe.exchange import Exchange
from vlmoe_core.moe.experts import Experts
from vlmoe_core.moe.share import Share
from vlmoe_core.recipe.config import ModelRecipe
from vlmoe_core.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tokenizers.visual import load_visual_tokenizer
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.fitting import Tokenizers, obtain_tokenizers
from vlmoe_core.train.init import (
    IMAGE_POSITIONS,
    TEXT_POSITIONS,
    Start,
    load_run_recipe,
    open_start,
    start_from,
)
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.session import RunOptions, Session, open_session
from vlmoe_core.train.trained import load_trained

POSITIONS = {IMAGE_POSITIONS, TEXT_POSITIONS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run."""
    folder = tmp_path_factory.mktemp("base")
    return train(tiny(folder, *PRETRAINING), folder / "run").folder


@pytest.fixture(scope="module")
def asked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run finetuned on questions."""
    return finetuned(tmp_path_factory.mktemp("asked"), "vqa", "train.steps=2", init=str(base))


def opened(loaded: LoadedRecipe, out: Path) -> tuple[Session, list[str]]:
    """The session of a new run, and what it told."""
    notes = Notes()
    return open_session(loaded, RunOptions(out), notes), notes.told


def weights(run: Path) -> dict[str, Tensor]:
    start = open_start(str(run))
    assert start is not None
    return {name: start.checkpoint.model[name] for name in start.checkpoint.model}


def encoder_of(tensors: dict[str, Tensor]) -> list[str]:
    return sorted(name for name in tensors if name.startswith("encoder."))


@pytest.mark.parametrize("task", TASKS)
def test_every_tensor_of_the_encoder_is_the_checkpoints(base: Path, tmp_path: Path, task: str) -> None:
    session, told = opened(tuned(tmp_path, task, init=str(base)), tmp_path / "run")
    started, found = session.objective.state_dict(), weights(base)
    assert encoder_of(started) == encoder_of(found)
    assert same(started, found, encoder_of(found)) == encoder_of(found)
    heads = "contrast, match" if task == "retrieval" else "head"
    assert told[-2:] == [
        f"new, not from {base}/checkpoints/step-00000002: {heads}",
        f"left out of {base}/checkpoints/step-00000002: heads.image, heads.text",
    ]
    assert session.tokenizers.text.fingerprint == (open_start(str(base)) or pytest.fail()).text_tokenizer.fingerprint


@pytest.mark.parametrize(("size", "grid"), [(24, 6), (8, 2)])
def test_another_resolution_interpolates_the_image_positions(base: Path, tmp_path: Path, size: int, grid: int) -> None:
    loaded = tuned(tmp_path, "vqa", f"model.image_size={size}", init=str(base))
    session, told = opened(loaded, tmp_path / "run")
    started, found = session.objective.state_dict(), weights(base)
    expected = resize_positions(found[IMAGE_POSITIONS], grid)
    assert started[IMAGE_POSITIONS].shape == (1 + grid**2, 16) and started[IMAGE_POSITIONS].equal(expected)
    rest = [name for name in encoder_of(found) if name != IMAGE_POSITIONS]
    assert same(started, found, rest) == rest
    assert f"image positions interpolated from 4 x 4 to {grid} x {grid} patches" in told


def test_shorter_texts_cut_the_text_positions(base: Path, tmp_path: Path) -> None:
    loaded = tuned(tmp_path, "vqa", "model.max_text_length=20", init=str(base))
    session, told = opened(loaded, tmp_path / "run")
    started, found = session.objective.state_dict(), weights(base)
    assert started[TEXT_POSITIONS].equal(found[TEXT_POSITIONS][:20])
    rest = [name for name in encoder_of(found) if name != TEXT_POSITIONS]
    assert same(started, found, rest) == rest
    assert "text positions cut from 24 to 20" in told


def test_longer_texts_extend_them_with_fresh_rows(base: Path, tmp_path: Path) -> None:
    loaded = tuned(tmp_path, "vqa", "model.max_text_length=30", init=str(base))
    session, told = opened(loaded, tmp_path / "run")
    position, found = session.objective.state_dict()[TEXT_POSITIONS], weights(base)[TEXT_POSITIONS]
    fresh = build_objective(loaded.recipe, None, session.tokenizers.labels).state_dict()[TEXT_POSITIONS]
    assert position[:24].equal(found) and position[24:].equal(fresh[24:])
    assert bool(position[24:].any(1).all())
    assert "text positions extended from 24 to 30: the new ones are random" in told


def test_a_model_of_the_same_shape_tells_of_no_conversion(base: Path, tmp_path: Path) -> None:
    _, told = opened(tuned(tmp_path, "vqa", init=str(base)), tmp_path / "run")
    assert not [line for line in told if "positions" in line]


def test_the_head_of_the_same_task_and_labels_is_taken(asked: Path, tmp_path: Path) -> None:
    session, told = opened(tuned(tmp_path, "vqa", init=str(asked)), tmp_path / "run")
    started, found = session.objective.state_dict(), weights(asked)
    assert started.keys() == found.keys()
    assert same(started, found, list(found)) == list(found)
    assert not [line for line in told if line.startswith(("new,", "left out"))]


@pytest.mark.parametrize("changed", ["task.min_count=2", "task.pool=image"])
def test_other_labels_or_another_shape_make_a_new_head(asked: Path, tmp_path: Path, changed: str) -> None:
    loaded = tuned(tmp_path, "vqa", changed, init=str(asked))
    session, told = opened(loaded, tmp_path / "run")
    started, found = session.objective.state_dict(), weights(asked)
    fresh = build_objective(loaded.recipe, None, session.tokenizers.labels).state_dict()
    heads = [name for name in started if name.startswith("head.")]
    assert heads and same(started, fresh, heads) == heads
    assert same(started, found, encoder_of(found)) == encoder_of(found)
    step = f"{asked}/checkpoints/step-00000002"
    assert told[-2:] == [f"new, not from {step}: head", f"left out of {step}: head"]


def test_labels_of_the_same_number_but_other_names_make_a_new_head(asked: Path, tmp_path: Path) -> None:
    """Answer 3 of one list is not answer 3 of another."""
    start = open_start(str(asked))
    assert start is not None
    recipe = tuned(tmp_path, "vqa", init=str(asked)).recipe
    labels = Labels(tuple(reversed(start.labels.names)))
    objective = build_objective(recipe, None, labels)
    fresh = {name: value.clone() for name, value in objective.state_dict().items()}
    told = start_from(objective, start, recipe, labels)
    heads = [name for name in fresh if name.startswith("head.")]
    assert same(objective.state_dict(), fresh, heads) == heads
    assert told[0].endswith(": head")


def test_the_head_of_another_task_is_left_out(asked: Path, tmp_path: Path) -> None:
    """VQA's and NLVR2's heads are both called head and share some shapes."""
    session, told = opened(tuned(tmp_path, "nlvr2", "task.pool=image", init=str(asked)), tmp_path / "run")
    step = f"{asked}/checkpoints/step-00000002"
    assert told[-2:] == [f"new, not from {step}: head", f"left out of {step}: head"]
    found = weights(asked)
    shared = [n for n in session.objective.state_dict() if n.startswith("head.") and n in found]
    learned = [n for n in shared if n.endswith("weight") and found[n].dim() == 2]
    assert same(session.objective.state_dict(), found, learned) == []


def test_retrieval_goes_on_with_the_heads_of_retrieval(base: Path, tmp_path: Path) -> None:
    """COCO -> Flickr30k."""
    first = finetuned(tmp_path, "retrieval", "train.steps=2", init=str(base))
    session, told = opened(tuned(tmp_path, "retrieval", init=str(first)), tmp_path / "run")
    started, found = session.objective.state_dict(), weights(first)
    assert started.keys() == found.keys() and same(started, found, list(found)) == list(found)
    assert not [line for line in told if line.startswith(("new,", "left out"))]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("model: {\n  dim: 32}", r"vqa\.yaml:\d+: model\.dim is 32, but 16 in "),
        ("model: {\n  layers: 3}", r"vqa\.yaml:\d+: model\.layers is 3, but 2 in "),
        ("model: {\n  patch_size: 8}", r"vqa\.yaml:\d+: model\.patch_size is 8, but 4 in "),
        ("model: {\n  vl_layers: 0}", r"vqa\.yaml:\d+: model\.vl_layers is 0, but 1 in "),
        (
            "model: {\n  moe: {vision: {num_experts: 8}}}",
            r"vqa\.yaml:\d+: model\.moe\.vision\.num_experts is 8, but 4 in ",
        ),
        ("model: {\n  moe: {text: {layers: [1]}}}", r"vqa\.yaml:\d+: model\.moe\.text\.layers is \[1\], but \[0\] in "),
        ("model: {\n  moe: {text: {layers: {every: 1}}}}", r"vqa\.yaml:\d+: model\.moe\.text\.layers is .* but \[0\]"),
        ("model: {\n  moe: {text: null}}", r"vqa\.yaml:\d+: model\.moe\.text is None, but .* in "),
        ("model: {\n  moe: {text: {shared_expert: true}}}", r"model\.moe\.text\.shared_expert is True, but False in "),
    ],
)
def test_a_size_that_differs_is_refused_with_file_and_line(
    base: Path, tmp_path: Path, lines: str, message: str
) -> None:
    tuned(tmp_path, "vqa", init=str(base))
    path = tmp_path / "vqa.yaml"
    path.write_text(path.read_text() + lines)
    line = path.read_text().count("\n") + 1
    with pytest.raises(RecipeError, match=message) as caught:
        load_run_recipe(str(path))
    assert f"vqa.yaml:{line}: " in str(caught.value) and str(base) in str(caught.value)
    assert "take the line out. Finetuning may change image_size, max_text_length, drop_path" in str(caught.value)


def test_a_size_that_is_set_by_hand_is_refused_with_the_option(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--set model\.dim=32: model\.dim is 32, but 16 in "):
        tuned(tmp_path, "vqa", "model.dim=32", init=str(base))


def test_equal_sizes_and_settings_of_routers_may_stand_in_the_recipe(base: Path, tmp_path: Path) -> None:
    loaded = tuned(
        tmp_path,
        "vqa",
        "model={dim: 16, layers: 2, drop_path: 0.3, moe: {vision: {num_experts: 4, layers: [0], "
        "capacity_factor: 2.0, eval_capacity_factor: 2.0, noise: 0.5, expert_dropout: 0.1}}}",
        init=str(base),
    )
    vision = loaded.recipe.model.moe.vision
    assert vision is not None and (vision.num_experts, vision.eval_capacity_factor) == (4, 2.0)
    assert loaded.recipe.model.drop_path == 0.3 and loaded.recipe.model.hidden == 32
    session, _ = opened(loaded, tmp_path / "run")
    found = weights(base)
    assert same(session.objective.state_dict(), found, encoder_of(found)) == encoder_of(found)


def test_tokenizers_are_those_of_the_start(base: Path, tmp_path: Path) -> None:
    equal = "tokenizers={text: {vocab_size: 200}}"
    assert tuned(tmp_path, "vqa", equal, init=str(base)).recipe.tokenizers.text.vocab_size == 200
    with pytest.raises(RecipeError, match=r"tokenizers: text: comes with the model that the run starts from \(.*take"):
        tuned(tmp_path, "vqa", "tokenizers={text: {vocab_size: 300}}", init=str(base))


def test_a_start_that_is_missing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^init: no checkpoint at runs/none: .*pretrain it first.*--set init=RUN.*scratch"
    ):
        tuned(tmp_path, "vqa", init="runs/none")


def test_the_model_of_the_command_line_beats_the_recipes(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        tuned(tmp_path, "vqa", init="runs/none")
    loaded = load_run_recipe(str(tmp_path / "vqa.yaml"), (), base)
    assert loaded.recipe.init == str(base) and loaded.recipe.model.dim == 16


def test_without_its_weights_only_sizes_and_tokenizers_are_taken(base: Path, tmp_path: Path) -> None:
    loaded = tuned(tmp_path, "vqa", "init_weights=false", "seed=5", init=str(base))
    session, told = opened(loaded, tmp_path / "run")
    started, found = session.objective.state_dict(), weights(base)
    fresh = build_objective(loaded.recipe, None, session.tokenizers.labels).state_dict()
    assert started.keys() == fresh.keys() and same(started, fresh, list(fresh)) == list(fresh)
    matrices = [n for n in encoder_of(found) if found[n].dim() == 2 and n.endswith("weight")]
    assert len(matrices) > 8 and same(started, found, matrices) == []
    start = open_start(str(base))
    assert start is not None
    assert session.tokenizers.text.fingerprint == start.text_tokenizer.fingerprint
    assert not [line for line in told if "step-00000002" in line]


def repretrained(folder: Path, model: Path, *overrides: str) -> LoadedRecipe:
    """The tiny pretraining recipe, without its model and tokenizers, from a model."""
    tree = {key: value for key, value in yaml.safe_load(RECIPE).items() if key not in ("model", "tokenizers")}
    (folder / "again.yaml").write_text(yaml.safe_dump(tree))
    return load_run_recipe(str(folder / "again.yaml"), overrides, model)


def test_pretraining_starts_from_a_model_with_its_heads(base: Path, tmp_path: Path) -> None:
    session, told = opened(repretrained(tmp_path, base), tmp_path / "run")
    started, found = session.objective.state_dict(), weights(base)
    assert started.keys() == found.keys() and same(started, found, list(found)) == list(found)
    assert not [line for line in told if line.startswith(("new,", "left out"))]
    assert session.tokenizers.visual is not None and session.recipe.init == str(base)
    before = load_visual_tokenizer(base / "tokenizers" / "visual")
    assert session.tokenizers.visual.fingerprint == before.fingerprint


def test_pretraining_with_other_visual_codes_has_a_new_head_for_them(base: Path, tmp_path: Path) -> None:
    own = "tokenizers={visual: {iterations: 5}}"
    session, told = opened(repretrained(tmp_path, base, own), tmp_path / "run")
    started, found = session.objective.state_dict(), weights(base)
    codes = [name for name in found if name.startswith("heads.image") and name.endswith("weight")]
    rest = [name for name in found if not name.startswith("heads.image")]
    assert codes and same(started, found, codes) == [] and same(started, found, rest) == rest
    assert [line for line in told if line.startswith("new, not from") and line.endswith("heads.image")]


@pytest.mark.parametrize("with_heads", [False, True])
def test_pretraining_starts_from_an_imported_encoder(base: Path, tmp_path: Path, with_heads: bool) -> None:
    recipe = load_recipe(str(base / "recipe.yaml")).recipe
    found = {name: value for name, value in weights(base).items() if name.startswith("encoder.")}
    text = dump_recipe(ModelRecipe(model=recipe.model, tokenizers=recipe.tokenizers))
    step = latest_checkpoint(base)
    assert step is not None
    shutil.copytree(step / "tokenizers" / "text", tmp_path / "tokenizers" / "text")
    tensors = weights(base) if with_heads else found
    imported = write_model(tmp_path / "model", tensors, RunState(0, {}), text, tmp_path / "tokenizers")
    session, told = opened(repretrained(tmp_path, imported), tmp_path / "run")
    started = session.objective.state_dict()
    assert same(started, found, list(found)) == list(found)
    assert f"new, not from {imported}: heads.image, heads.text" in told
    # Nobody says what these heads mean, though they would fit.
    assert (f"left out of {imported}: heads.image, heads.text" in told) is with_heads
    assert session.tokenizers.visual is not None, "fitted on the run's own images"
    with pytest.raises(UsageError, match="holds an encoder alone"):
        load_trained(imported)


def test_sizes_without_weights_need_a_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="say which model"):
        tiny(tmp_path, "init_weights=false")


def changed(start: Start, model: dict[str, Tensor]) -> Start:
    """The same start with other weights."""
    checkpoint: Checkpoint = replace(start.checkpoint, model=model)
    return replace(start, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing: encoder\.norm\.weight$"),
        ("foreign", r"not in the recipe's model: encoder\.blocks\.9\.new$"),
        ("shape", r"encoder\.norm\.weight is \(8,\), the recipe's model wants \(16,\)$"),
        ("positions", r"missing: encoder\.embeddings\.image\.position$"),
        ("width", r"encoder\.embeddings\.text\.position is \(24, 8\), the recipe's model wants \(24, 16\)$"),
    ],
)
def test_an_encoder_of_other_tensors_is_refused_by_name(base: Path, tmp_path: Path, change: str, message: str) -> None:
    start = open_start(str(base))
    assert start is not None
    model = weights(base)
    if change == "missing":
        del model["encoder.norm.weight"]
    elif change == "foreign":
        model["encoder.blocks.9.new"] = torch.zeros(2)
    elif change == "shape":
        model["encoder.norm.weight"] = torch.ones(8)
    elif change == "positions":
        del model[IMAGE_POSITIONS]
    else:
        model[TEXT_POSITIONS] = torch.ones(24, 8)
    recipe = tuned(tmp_path, "nli", init=str(base)).recipe
    tokenizers: Tokenizers = obtain_tokenizers(recipe, tmp_path / "tokenizers", Reporter(), start.tokenizers(recipe))
    objective = build_objective(recipe, None, tokenizers.labels)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"can't start this recipe; " + message):
        start_from(objective, changed(start, model), recipe, tokenizers.labels)
    assert same(objective.state_dict(), before, list(before)) == list(before)


def test_a_checkpoint_folder_of_an_earlier_step_may_be_named(base: Path, tmp_path: Path) -> None:
    step = tmp_path / "step-00000002"
    shutil.copytree(base / "checkpoints" / step.name, step)
    session, _ = opened(tuned(tmp_path, "nli", init=str(step)), tmp_path / "run")
    found = weights(base)
    assert same(session.objective.state_dict(), found, encoder_of(found)) == encoder_of(found)


def test_retrieval_takes_the_contrast_that_it_was_pretrained_with(tmp_path: Path) -> None:
    whole = "batch={size: {image: 4, text: 4, pair: 4}, micro: {image: 4, text: 4, pair: 4}}"
    first = train(tiny(tmp_path, *PRETRAINING, "objective.weights.itc=1", whole), tmp_path / "first").folder
    session, told = opened(tuned(tmp_path, "retrieval", init=str(first)), tmp_path / "run")
    found = weights(first)
    heads = [name for name in found if name.startswith("contrast.")]
    assert len(heads) == 3 and same(session.objective.state_dict(), found, heads) == heads
    step = f"{first}/checkpoints/step-00000002"
    assert told[-2:] == [f"new, not from {step}: match", f"left out of {step}: heads.image, heads.text"]


def test_a_head_that_fits_in_part_is_not_taken_in_part(tmp_path: Path) -> None:
    """Another pooling changes the first layer of the matching head alone; contrast goes on."""
    first = finetuned(tmp_path, "retrieval", "train.steps=2")
    path = tmp_path / "again"
    path.mkdir()
    session, told = opened(tuned(path, "retrieval", "task.pool=both", init=str(first)), tmp_path / "run")
    started, found = session.objective.state_dict(), weights(first)
    fresh = build_objective(session.recipe, None, session.tokenizers.labels).state_dict()
    match = [name for name in started if name.startswith("match.")]
    rest = sorted(set(found) - set(match) - {name for name in found if name.startswith("match.")})
    assert same(started, fresh, match) == match and same(started, found, rest) == rest
    step = f"{first}/checkpoints/step-00000002"
    assert told[-2:] == [f"new, not from {step}: match", f"left out of {step}: match"]


@pytest.mark.parametrize("positions", ["relative", "relative_shared"])
def test_relative_tables_are_converted_with_the_positions(tmp_path: Path, positions: str) -> None:
    switches = ("attention=per_modality", "norm=per_modality", "text_embed_norm=true", f"positions={positions}")
    first = train(tiny(tmp_path, *PRETRAINING, *(f"model.{switch}" for switch in switches)), tmp_path / "first").folder
    found = weights(first)
    tables = [name for name in encoder_of(found) if name.endswith(".relative.table")]
    assert len(tables) == (2 if positions == "relative" else 1) and all(found[name].any() for name in tables)
    changes = ("model.image_size=24", "model.max_text_length=20")
    session, told = opened(tuned(tmp_path, "vqa", *changes, init=str(first)), tmp_path / "run")
    started = session.objective.state_dict()
    for name in tables:
        assert started[name].equal(resize_relative(found[name], 4, 6, 24, 20)), name
    rest = [name for name in encoder_of(found) if name not in POSITIONS.union(tables)]
    assert same(started, found, rest) == rest
    assert "relative positions interpolated from 4 x 4 to 6 x 6 patches" in told
    assert "relative text positions cut from 24 to 20" in told
    _, told = opened(tuned(tmp_path, "vqa", "model.max_text_length=30", init=str(first)), tmp_path / "longer")
    assert "relative text positions extended from 24 to 30: the new ones are as the furthest" in told
    _, told = opened(tuned(tmp_path, "vqa", init=str(first)), tmp_path / "equal")
    assert not [line for line in told if "positions" in line]


@pytest.mark.parametrize(
    "change", [(), ("model.image_size=24", "model.max_text_length=30"), ("model.max_text_length=20",)]
)
def test_a_process_takes_what_it_holds(base: Path, tmp_path: Path, change: tuple[str, ...]) -> None:
    """On four processes, two of which share the experts, with all weights cut: put together they are a single one's."""
    loaded = tuned(tmp_path, "vqa", *change, init=str(base))
    session, told = opened(loaded, tmp_path / "run")
    wanted = {name: tensor.numpy() for name, tensor in session.objective.state_dict().items()}
    for rank, (notes, found) in enumerate(on_ranks(4, started_in_parts, loaded, tmp_path / "run" / "tokenizers")):
        assert notes == told[-len(notes) :] and found.keys() == wanted.keys()
        experts = slice(2 * (rank % 2), 2 * (rank % 2) + 2)
        for name, tensor in wanted.items():
            assert np.array_equal(found[name], tensor[experts] if ".experts." in name else tensor), name


def started_in_parts(loaded: LoadedRecipe, tokenizers: Path) -> tuple[list[str], dict[str, NDArray[np.generic]]]:
    """For a child: what is told, and its experts with all else put together again."""
    dist.init_process_group("gloo")
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    start = open_start(loaded.recipe.init)
    assert start is not None
    labels = obtain_tokenizers(loaded.recipe, tokenizers, Reporter(), start.tokenizers(loaded.recipe)).labels
    objective = build_objective(loaded.recipe, None, labels)
    for experts in [module for module in objective.modules() if isinstance(module, Experts)]:
        experts.keep(Share(2 * grid.get_local_rank("expert"), 2, 4), Exchange(grid.get_group("expert")))
        fully_shard(experts, mesh=grid["data"])
    fully_shard(objective, mesh=init_device_mesh("cpu", (4,)))
    told = start_from(objective, start, loaded.recipe, labels)
    whole = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy()
        for name, tensor in objective.state_dict().items()
    }
    dist.barrier()
    dist.destroy_process_group()
    return told, whole
