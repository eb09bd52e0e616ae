"""A run that trains a visual tokenizer: its codes are learned alike on any number of ranks, and the run can be cut."""

import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.support import (
    Blow,
    Child,
    Scaled,
    assert_same_run,
    fresh_process,
    metrics,
    on_ranks,
    pretrain_child,
    tiny,
    train,
)
from vlmoe_core.checkpoint.layout import latest_checkpoint
from vlmoe_core.checkpoint.read import Checkpoint, read_checkpoint
from vlmoe_core.data.stream import open_streams
from vlmoe_core.errors import RecipeError, TokenizerError
from vlmoe_core.model.block import Block
from vlmoe_core.objectives.kinds.vqkd import VQKDTraining
from vlmoe_core.recipe.load import LoadedRecipe, load_recipe
from vlmoe_core.tasks.labels import NO_LABELS
from vlmoe_core.tokenizers.visual import load_visual_tokenizer
from vlmoe_core.tokenizers.vqkd import VQKD
from vlmoe_core.train.build import build_dataset, build_objective, compile_blocks, recipe_preparer
from vlmoe_core.train.fitting import obtain_tokenizers
from vlmoe_core.train.mesh import open_mesh
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.parallel import build_accelerator
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import open_stepper
from vlmoe_core.train.session import RunOptions, open_session
from vlmoe_core.train.stand_ins import NumberEncoder
from vlmoe_core.train.step import Stepper
from vlmoe_core.train.tokenize import tokenize_images
from vlmoe_core.train.visual import find_visual_tokenizer
from vlmoe_core.train.wrapping import wrap

RECIPE = """
seed: 3
model:
  modality: vision
  layers: 2
  dim: 16
  heads: 2
  hidden: 32
  vl_layers: 0
  patch_size: 4
  image_size: 16
  drop_path: 0.3
tokenizers: {visual: {codebook_size: 8}}
data:
  workers: 0
  augment: {image: {crop_scale: [0.3, 1.0], horizontal_flip: 0.5}}
  train: {image: [{source: scenes, size: 50, image_size: 16}]}
  eval: {image: [{source: scenes, size: 10, image_size: 16, split: eval}]}
objective: {name: vqkd, code_dim: 4, decoder_layers: 1, decay: 0.8, revive_below: 0.3}
batch: {size: {image: 8}, micro: {image: 2}}
optim: {lr: 1.0e-2, warmup_steps: 2}
train: {steps: 6, log_every: 1, eval_every: 3, eval_examples: 6, save_every: 2}
"""
STEPS = 4


def newest_checkpoint(run: Path) -> Checkpoint:
    newest = latest_checkpoint(run)
    assert newest is not None
    return read_checkpoint(newest)


def tokenizer_recipe(folder: Path, *overrides: str) -> LoadedRecipe:
    path = folder / "vqkd.yaml"
    path.write_text(RECIPE)
    return load_recipe(str(path), overrides)


def float64_steps(loaded: LoadedRecipe, folder: Path) -> dict[str, Any]:
    """For a child: some steps in float64; losses, gradients and codes after each."""
    recipe = loaded.recipe
    accelerator = build_accelerator(recipe.train)
    tokenizers = obtain_tokenizers(recipe, folder, Reporter())
    objective = build_objective(recipe, tokenizers.visual).double()
    objective.codes.quantiser.shares_K.fill_(1 / 8)  # type: ignore[union-attr, operator]
    mesh = open_mesh(recipe.parallel, accelerator.device.type)
    model = wrap(accelerator, objective, mesh, recipe.train.precision)
    optimizer = accelerator.prepare(build_optimizer(objective, recipe.optim, recipe.model.layers))
    stepper = Stepper(accelerator, model, mesh, optimizer, recipe.optim, recipe.train.steps, recipe.seed)
    data = build_dataset(recipe, recipe.data.train, tokenizers, training=True)
    ranks, rank, per_step = accelerator.num_processes, accelerator.process_index, recipe.batch.num_micro
    found: dict[str, Any] = {"losses": [], "gradients": [], "codes": [], "shares": []}
    for step in range(STEPS):
        result = stepper(step, [data[n] for n in range(step * per_step + rank, (step + 1) * per_step, ranks)])
        found["losses"].append(dict(result.losses) | {"norm": result.grad_norm})
        trained = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
        found["gradients"].append({n: g.numpy().copy() for n, g in trained.items()})
        found["codes"].append(objective.codes.quantiser.codes_KF.numpy().copy())  # type: ignore[union-attr]
        found["shares"].append(objective.codes.quantiser.shares_K.numpy().copy())  # type: ignore[union-attr]
    return found


def test_codes_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    loaded = tokenizer_recipe(tmp_path)
    expected = Child(float64_steps, loaded, tmp_path / "tokenizers").answer()
    assert not np.allclose(expected["codes"][0], expected["codes"][-1]), "else nothing is compared"
    for ranks in (2, 4):
        for found in on_ranks(ranks, float64_steps, loaded, tmp_path / "tokenizers"):
            for step in range(STEPS):
                assert found["losses"][step] == pytest.approx(expected["losses"][step], rel=1e-10)
                for name in ("codes", "shares"):
                    np.testing.assert_allclose(found[name][step], expected[name][step], rtol=1e-10, atol=1e-12)
                for name, gradient in expected["gradients"][step].items():
                    np.testing.assert_allclose(found["gradients"][step][name], gradient, rtol=1e-9, atol=1e-10)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    Child(pretrain_child, tokenizer_recipe(folder), folder / "run").answer()
    return folder / "run"


def test_a_cut_run_goes_on_as_if_it_was_not(straight: Path, tmp_path: Path) -> None:
    loaded, run = tokenizer_recipe(tmp_path), tmp_path / "run"
    stop = Blow("vlmoe_core.train.step:Stepper", "_backward", 9, signal=15)
    assert Child(pretrain_child, loaded, run, None, stop).answer().step == 3
    assert Child(pretrain_child, loaded, run, "auto").answer().step == 6
    assert_same_run(run, straight, 6)


def with_other_codes(loaded: LoadedRecipe, out: Path) -> object:
    """For a child: k-means finds other codes on every rank but the first, as on machines that round differently."""
    start = VQKDTraining.start

    def other(self: VQKDTraining, batches: Any) -> None:
        start(self, batches)
        if os.environ["RANK"] != "0":
            self.codes.quantiser.codes_KF.neg_()

    VQKDTraining.start = other  # type: ignore[method-assign]
    return pretrain_child(loaded, out)


def test_every_rank_starts_from_the_codes_of_the_first(straight: Path, tmp_path: Path) -> None:
    """The fourth rank has none of the three held-out micro-batches."""
    loaded = tokenizer_recipe(tmp_path)
    on_ranks(4, with_other_codes, loaded, tmp_path / "run")
    for line, alone in zip(metrics(tmp_path / "run"), metrics(straight), strict=True):
        assert line["loss/total"] == pytest.approx(alone["loss/total"], abs=1e-4)


def test_the_start_drops_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(VQKDTraining, "start", lambda self, batches: modes.append(self.training))
    train(tokenizer_recipe(tmp_path, "train.steps=2"), tmp_path / "run")
    assert modes == [False]


def test_an_overflow_in_fp16_moves_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmoe_core.train.parallel.Accelerator", Scaled)
    fresh_process()
    session = open_session(tokenizer_recipe(tmp_path), RunOptions(tmp_path / "run"), Reporter())
    stepper = open_stepper(session)
    micros, quantiser = list(islice(session.train_micros(), 4)), session.objective.codes.quantiser  # type: ignore[union-attr]
    hook = session.objective.encoder.norm.weight.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in quantiser.state_dict().items()}
    assert stepper(0, micros).grad_norm is None
    assert all(torch.equal(value, before[name]) for name, value in quantiser.state_dict().items())
    hook.remove()
    learned: list[Any] = []
    monkeypatch.setattr(
        session.objective, "learn", lambda sums, step: learned.append((int(sums["patches"].sum()), step))
    )
    assert stepper(1, micros).grad_norm is not None
    assert learned == [(8 * 16, 1)], "the patches of one step, not of two"


def test_the_lines_of_metrics_tell_of_the_codes(straight: Path) -> None:
    lines = [line for line in metrics(straight) if line["split"] == "eval"]
    assert [line["step"] for line in lines] == [0, 3, 6]
    for line in lines:
        assert {"loss/teacher", "loss/commitment", "codes/used", "codes/perplexity", "codes/pixel_error"} <= line.keys()
        assert 0 < line["codes/used"] <= 1
        assert 1 <= line["codes/perplexity"] <= 8
        assert not any(name.startswith("baseline/") for name in line)
    assert lines[-1]["codes/pixel_error"] < lines[0]["codes/pixel_error"]


def test_the_run_is_a_tokenizer(straight: Path, tmp_path: Path) -> None:
    tokenizer = find_visual_tokenizer(str(straight))
    assert isinstance(tokenizer, VQKD)
    checkpoint = newest_checkpoint(straight)
    assert torch.equal(tokenizer.codes.quantiser.codes_KF, checkpoint.model["codes.quantiser.codes_KF"])
    tokenizer.save(tmp_path / "visual")
    assert find_visual_tokenizer(str(tmp_path / "visual")).fingerprint == tokenizer.fingerprint
    assert find_visual_tokenizer(str(checkpoint.path)).fingerprint == tokenizer.fingerprint


LATE = "objective.quantise_from=3"


def test_codes_that_start_late(tmp_path: Path) -> None:
    loaded, run = tokenizer_recipe(tmp_path, LATE), tmp_path / "run"
    stop = Blow("vlmoe_core.train.step:Stepper", "_backward", 8, signal=15)
    assert Child(pretrain_child, loaded, run, None, stop).answer().step == 2
    with pytest.raises(TokenizerError, match="no codes yet: they start at step 3"):
        find_visual_tokenizer(str(run))
    assert Child(pretrain_child, loaded, run, "auto").answer().step == 6
    lines = {(line["split"], line["step"]): line for line in metrics(run)}
    assert [lines["train", step]["loss/commitment"] > 0 for step in (1, 2, 3, 4, 5, 6)] == [False] * 3 + [True] * 3
    assert "codes/used" not in lines["eval", 0]
    assert lines["eval", 3]["codes/used"] > 0, "evaluated with the codes that start there"
    checkpoint = newest_checkpoint(run)
    assert checkpoint.state.best_step in (3, 6), "what was best before had no codes"
    Child(pretrain_child, loaded, tmp_path / "straight").answer()
    assert_same_run(run, tmp_path / "straight", 6)


@pytest.mark.parametrize("step", [3, 4])
def test_a_late_start_happens_once(tmp_path: Path, step: int) -> None:
    """Cut right after the start, and a step later: the codes are not set anew."""
    loaded, run = tokenizer_recipe(tmp_path, LATE, "train.save_every=1"), tmp_path / "run"
    stop = Blow("vlmoe_core.train.step:Stepper", "_backward", 4 * step, signal=15)
    assert Child(pretrain_child, loaded, run, None, stop).answer().step == step
    Child(pretrain_child, loaded, run, "auto").answer()
    Child(pretrain_child, loaded, tmp_path / "straight").answer()
    assert_same_run(run, tmp_path / "straight", 6)


WITH_TOKENIZER = (
    "tokenizers.visual.kind=vqkd",
    "tokenizers.visual.codebook_size=8",
    "train.steps=2",
    "train.eval_every=2",
)


def test_a_model_is_pretrained_on_its_tokens(straight: Path, tmp_path: Path) -> None:
    loaded = tiny(tmp_path, *WITH_TOKENIZER, f"tokenizers.visual.load={straight}")
    outcome = train(loaded, tmp_path / "run")
    line = metrics(outcome.folder)[-1]
    assert line["loss/mim"] == pytest.approx(np.log(8), abs=1.5)
    inside = load_visual_tokenizer(tmp_path / "run" / "tokenizers" / "visual")
    assert inside.fingerprint == find_visual_tokenizer(str(straight)).fingerprint
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert not any("visual" in name for name in checkpoint.model), "the tokenizer travels as its own files"
    assert find_visual_tokenizer(str(tmp_path / "run")).fingerprint == inside.fingerprint


def test_its_blocks_are_not_compiled(straight: Path, tmp_path: Path) -> None:
    """The codes would depend on train.compile."""
    objective = build_objective(tiny(tmp_path, *WITH_TOKENIZER).recipe, find_visual_tokenizer(str(straight)))
    compile_blocks(objective)
    compiled = {
        name: m._compiled_call_impl is not None for name, m in objective.named_modules() if isinstance(m, Block)
    }
    assert {name for name, done in compiled.items() if done} == {"encoder.blocks.0", "encoder.blocks.1"}
    assert any(name.startswith("visual.") for name in compiled)


def test_its_stored_tokens_give_the_same_losses(straight: Path, tmp_path: Path) -> None:
    of_run = (*WITH_TOKENIZER, f"tokenizers.visual.load={straight}", "data.augment.image.crop_scale=[0.3,1]")
    online = train(tiny(tmp_path, *of_run), tmp_path / "online").folder
    tokenize_images(tiny(tmp_path, *of_run).recipe, tmp_path / "tokens", Reporter())
    stored = train(tiny(tmp_path, *of_run, f"tokenizers.visual.tokens={tmp_path / 'tokens'}"), tmp_path / "stored")
    assert metrics(stored.folder) == metrics(online)


def test_a_tokenizers_own_run_has_no_tokens_to_store(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="objective vqkd predicts no visual codes"):
        tokenize_images(tokenizer_recipe(tmp_path).recipe, tmp_path / "tokens", Reporter())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.image_size=24",), "a grid of 4 x 4 patches, the model one of 6 x 6; set model.image_size to 16"),
        (("tokenizers.visual.codebook_size=9",), "set tokenizers.visual.codebook_size=8"),
        (("tokenizers.visual.kind=codebook",), "is of the kind vqkd, the recipe says codebook"),
        (("tokenizers.visual.load=nowhere",), "nowhere holds no visual tokenizer"),
        (("tokenizers.visual.load=null",), "is trained by a run of its own"),
    ],
)
def test_what_does_not_fit_is_refused(straight: Path, tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    loaded = tiny(tmp_path, *WITH_TOKENIZER, f"tokenizers.visual.load={straight}", *overrides)
    with pytest.raises(TokenizerError, match=re.escape(said)):
        train(loaded, tmp_path / "run")


def test_a_model_that_is_no_tokenizer_is_none(tmp_path: Path) -> None:
    train(tiny(tmp_path, "batch.size={text: 2}", "batch.micro={text: 2}", "train.steps=2", *NO_IMAGES), tmp_path / "a")
    with pytest.raises(TokenizerError, match="a model that neither holds nor is a visual tokenizer"):
        find_visual_tokenizer(str(tmp_path / "a"))


NO_IMAGES = ("data.train.image=[]", "data.train.pair=[]", "data.eval.image=[]", "data.eval.pair=[]")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.modality=both",), "model.modality: vision, not both"),
        (("model.moe.vision={num_experts: 2}",), "leave out model.moe.vision"),
        (("objective.quantise_from=6",), "objective.quantise_from (6) must be below train.steps (6)"),
        (("model.image_size=18",), "image_size (18) must be a multiple of patch_size (4)"),
        (("objective.teacher.model=nowhere/at-all", "objective.teacher.dim=7"), "nowhere/at-all"),
        (("tokenizers.visual.codebook_size=9000",), "9000 codes can't be started from the 800 patches"),
        (
            ("data.train.pair=[{source: scenes, size: 9, image_size: 16}]", "batch.size.pair=4", "batch.micro.pair=1"),
            "data.train.pair has sources, but objective vqkd reads the image stream alone",
        ),
        (("data.eval.text=[{source: scenes, size: 9}]",), "data.eval.text has sources, but objective vqkd reads"),
        (("mask.image=0.3",), "mask: objective vqkd hides nothing"),
        (("tokenizers.visual.load=runs/other",), "objective vqkd trains a tokenizer of its own"),
    ],
)
def test_recipes_of_tokenizers_that_can_not_be(tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises((TokenizerError, RecipeError, Exception), match=re.escape(said)) as caught:
        train(tokenizer_recipe(tmp_path, *overrides), tmp_path / "run")
    assert "vlmoe_core.errors" in type(caught.value).__module__


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_hidden_from_a_tokenizer(tmp_path: Path, training: bool) -> None:
    recipe = tokenizer_recipe(tmp_path).recipe
    preparer = recipe_preparer(recipe, NumberEncoder(100), NO_LABELS, training)
    stream = open_streams(recipe.data, recipe.data.train, recipe.seed)["image"]
    sample = preparer("image", 0, stream[0], stream.random(0))
    assert sample.patch_mask is not None
    assert not sample.patch_mask.any()
