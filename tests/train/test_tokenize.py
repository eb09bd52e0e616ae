"""Visual tokens stored once and read by a run: the same losses as when it encodes itself, or one message."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from tests.train.support import assert_same_run, metrics, on_ranks, pretrain_child, tiny, train
from tests.train.tasks_support import tuned
from tests.train.test_broken import pictures
from tests.train.test_broken import recipe as of_pictures
from vlmoe_core.data.codes import StoredCodes, read_manifest, write_shard
from vlmoe_core.data.loader import MicroBatches
from vlmoe_core.errors import DataError, RecipeError, TokenizerError, UsageError
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import LoadedRecipe, load_recipe
from vlmoe_core.tokenizers.codebook import fit_codebook
from vlmoe_core.tokenizers.online import OnlineTokenizer
from vlmoe_core.tokenizers.visual import VisualTokenizer, load_visual_tokenizer
from vlmoe_core.train import tokenize
from vlmoe_core.train.build import build_image_dataset, build_objective
from vlmoe_core.train.codes import check_codes, reads_codes
from vlmoe_core.train.init import Start
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.session import RunOptions, open_session
from vlmoe_core.train.tokenize import tokenize_images
from vlmoe_core.train.trained import load_trained
from vlmoe_core.train.validate import validate

CROPS = (
    "data.augment={image: {crop_scale: [0.3, 1.0], horizontal_flip: 0.5}, pair: {crop_scale: [0.5, 1.0]}}",
    "batch={size: {image: 4, text: 4, pair: 8}, micro: {image: 2, text: 2, pair: 4}}",
    "train.steps=3",
)


class Told(Reporter):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.batches = self.last = 0

    def note(self, message: str) -> None:
        self.notes.append(message)

    def counted(self, batches: int) -> None:
        self.batches = batches

    def advanced(self, step: int) -> None:
        self.last = step


def cropped(folder: Path, *overrides: str) -> LoadedRecipe:
    """The tiny recipe with random crops of both streams with images, which need two micro-batches a step."""
    folder.mkdir(exist_ok=True)
    return tiny(folder, *CROPS, *overrides)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored tokens of `cropped`."""
    folder = tmp_path_factory.mktemp("stored")
    torch.set_num_threads(1)
    tokenize_images(cropped(folder).recipe, folder / "tokens", Reporter())
    return folder / "tokens"


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `cropped` that encodes itself."""
    folder = tmp_path_factory.mktemp("online")
    train(cropped(folder), folder / "run")
    return folder / "run"


def reading(tokens: Path, *overrides: str) -> tuple[str, ...]:
    return f"tokenizers.visual.tokens={tokens}", *overrides


def refused(folder: Path, tokens: Path, *overrides: str) -> str:
    """The message with which a run refuses stored tokens, before its first line of metrics."""
    with pytest.raises(TokenizerError) as caught:
        train(cropped(folder, *reading(tokens, *overrides)), folder / "run")
    assert not (folder / "run" / "metrics.jsonl").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_stored_tokens_give_the_same_run_bit_by_bit(tmp_path: Path, stored: Path, online: Path, workers: int) -> None:
    loaded = cropped(tmp_path, *reading(stored, f"data.workers={workers}"))
    assert train(loaded, tmp_path / "run").finished
    lines = metrics(tmp_path / "run")
    assert lines == metrics(online) and [line["split"] for line in lines].count("train") == 3
    assert {"baseline/mim", "baseline/vlm_image"} <= lines[0].keys()
    assert_same_run(tmp_path / "run", online, 3)


def test_the_run_makes_no_code_itself(tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = cropped(tmp_path, *reading(stored))
    session = open_session(loaded, RunOptions(tmp_path / "run"), Reporter())
    assert session.objective.visual is None and session.tokenizers.visual is not None
    kept = load_visual_tokenizer(tmp_path / "run" / "tokenizers" / "visual")
    assert kept.fingerprint == read_manifest(stored).fingerprint
    monkeypatch.setattr(type(kept), "encode", None)
    targets = session.objective.targets(next(session.train_micros()).batches)  # type: ignore[operator]
    assert targets["mim"].numel() > 0 and targets["vlm_image"].numel() > 0


def test_stored_codes_are_those_of_each_crop_alone(tmp_path: Path, stored: Path) -> None:
    """One image at a time, through the preparer: no micro-batches and no shards."""
    recipe, visual = cropped(tmp_path).recipe, load_visual_tokenizer(stored / "tokenizer")
    manifest = read_manifest(stored)
    data = {
        "train": build_image_dataset(recipe, recipe.data.train, training=True),
        "eval": build_image_dataset(recipe, recipe.data.eval, training=False),
    }
    # Three steps are 6 micro-batches; the baseline reads 4 for each of the 2 held-out ones of texts.
    assert {p.name: p.positions for p in manifest.parts} == {
        "train-image": 16, "train-pair": 32, "eval-image": 3, "eval-pair": 3,
    }  # fmt: skip
    assert set(data["train"].streams) == {"image", "pair"}, "texts are not opened"
    for part in manifest.parts:
        codes, dataset = StoredCodes(stored, part, manifest.patches), data[part.split]
        stream = dataset.streams[part.stream]
        for position in range(part.positions):
            sample = dataset.preparer(part.stream, position, stream[position], stream.random(position))
            assert sample.pixels is not None
            expected = visual.encode(torch.from_numpy(np.ascontiguousarray(sample.pixels))[None])[0]
            assert codes.of(sample).tolist() == expected.tolist()


def test_broken_pictures_are_met_as_without_stored_tokens(tmp_path: Path) -> None:
    pictures(tmp_path / "held", broken=(3,)), pictures(tmp_path / "train", broken=(2, 3, 5, 7, 11))
    skip = ("data.on_error=skip", "train.eval_examples=24")
    loaded = of_pictures(tmp_path, *skip)
    found = tokenize_images(loaded.recipe, tmp_path / "tokens", Reporter())
    outcome = train(loaded, tmp_path / "online")
    again = train(of_pictures(tmp_path, *skip, *reading(tmp_path / "tokens")), tmp_path / "run")
    assert again.broken == outcome.broken == 5 and metrics(tmp_path / "run") == metrics(tmp_path / "online")
    train_part = found.manifest.find("train", "image")
    assert train_part is not None and train_part.positions == 192, (
        "eight epochs, which the baseline of as many texts reads"
    )
    assert found.broken == 8 * 5 + 1
    with pytest.raises(DataError, match=r"not a picture|cut short|truncated|broken.*mend it"):
        tokenize_images(of_pictures(tmp_path).recipe, tmp_path / "other", Reporter())


def test_a_run_that_began_online_goes_on_with_stored_tokens(tmp_path: Path, straight: Path) -> None:
    tokenize_images(tiny(tmp_path).recipe, tmp_path / "tokens", Reporter())

    class Stops(Reporter):
        def advanced(self, step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path), tmp_path / "run", reporter=Stops())
    train(tiny(tmp_path, *reading(tmp_path / "tokens")), tmp_path / "run", resume="auto")
    assert_same_run(tmp_path / "run", straight, 6)


def test_a_model_needs_no_stored_tokens(tmp_path: Path, stored: Path) -> None:
    """Recipe and checkpoint name a folder that is on another machine."""
    gone = shutil.copytree(stored, tmp_path / "gone")
    train(cropped(tmp_path, *reading(gone)), tmp_path / "run")
    shutil.rmtree(gone)
    trained = load_trained(tmp_path / "run")
    assert trained.recipe.tokenizers.visual.tokens == str(gone)
    micro = build_image_dataset(trained.recipe, trained.recipe.data.eval, training=False)[0]
    parts = trained.objective({"image": micro.batches["image"]}).parts
    assert float(parts["mim"].sum.detach()) > 0


def test_the_place_of_codes_makes_no_other_tokenizer(tmp_path: Path, stored: Path, online: Path) -> None:
    """A run that starts from a model whose codes were not stored predicts the same codes."""
    start = Start(None, load_recipe(str(online / "recipe.yaml")).recipe, None)  # type: ignore[arg-type]
    object.__setattr__(start, "checkpoint", type("Found", (), {"tokenizers": online / "tokenizers"})())
    assert start.gives_codes(cropped(tmp_path, *reading(stored)).recipe)
    assert not start.gives_codes(cropped(tmp_path, "tokenizers.visual.iterations=4").recipe)


def test_finetuning_reads_none(tmp_path: Path) -> None:
    """A task takes over the tokenizers of its start, and with them the name of a folder that is gone."""
    task = tuned(tmp_path, "classification").recipe
    visual = task.tokenizers.visual.model_copy(update={"tokens": "gone"})
    tokenizers = task.tokenizers.model_copy(update={"visual": visual})
    assert not reads_codes(task.model_copy(update={"tokenizers": tokenizers}))
    pretraining = cropped(tmp_path, *reading(tmp_path / "gone")).recipe
    assert reads_codes(pretraining) and not reads_codes(cropped(tmp_path).recipe)


def test_validate_without_data_opens_none(tmp_path: Path) -> None:
    checks = validate(cropped(tmp_path, *reading(tmp_path / "absent")), read_data=False)
    assert "step" in {check.name for check in checks if check.done}


# What is refused, before step 0.


def test_another_seed_is_refused(tmp_path: Path, stored: Path) -> None:
    message = refused(tmp_path, stored, "seed=4")
    assert "position 0 of the image stream (train) are of other pixels than those of scenes/train" in message
    assert "vlmoe data tokenize" in message and "tokenizers.visual.tokens=null" in message


def test_another_augmentation_is_refused(tmp_path: Path, stored: Path) -> None:
    assert "of the pair stream (train) are of other pixels" in refused(
        tmp_path, stored, "data.augment.pair.color_jitter=0.1"
    )


def test_other_held_out_data_are_refused(tmp_path: Path, stored: Path) -> None:
    held = "data.eval={image: [{source: scenes, size: 11, image_size: 16, split: eval}]}"
    assert "of the image stream (eval) are of other pixels" in refused(tmp_path, stored, held)


def test_another_tokenizer_is_refused(tmp_path: Path, stored: Path) -> None:
    images = [np.random.default_rng(n).integers(0, 256, (3, 16, 16), np.uint8) for n in range(4)]
    fit_codebook(images, 4, 16, 2, 0).save(tmp_path / "other")
    message = refused(tmp_path, stored, f"tokenizers.visual.load={tmp_path / 'other'}")
    assert f"{stored} was stored for another run: fingerprint {read_manifest(stored).fingerprint}, not " in message


def test_another_precision_is_refused(tmp_path: Path, stored: Path) -> None:
    assert "precision fp32, not bf16" in refused(tmp_path, stored, "tokenizers.visual.precision=bf16")


def test_another_grid_is_refused(tmp_path: Path, stored: Path) -> None:
    assert "image_size 16, not 20; patches 16, not 25" in refused(tmp_path, stored, "model.image_size=20")


def test_another_number_of_codes_is_refused(tmp_path: Path, stored: Path) -> None:
    assert "16 codes, the recipe says 32" in refused(tmp_path, stored, "tokenizers.visual.codebook_size=32")


@pytest.mark.parametrize(("held_out", "position"), [(1, 9), (1, 11), (3, 13)])
def test_ranks_refuse_other_pixels_together(tmp_path: Path, stored: Path, held_out: int, position: int) -> None:
    """One rank meets them, in a step or, behind the steps, in the baseline; both end with its message, none hangs."""
    tokens = shutil.copytree(stored, tmp_path / "tokens")
    path = tokens / "train-image-00000.safetensors"
    tensors = load_file(path)
    crops_N = tensors["crops"].copy()
    crops_N[position] ^= 1
    write_shard(path, tensors["codes"], crops_N)
    loaded = cropped(tmp_path / "recipe", *reading(tokens, f"train.eval_examples={held_out}"))
    errors = on_ranks(2, pretrain_child, loaded, tmp_path / "run")
    assert [type(error) for error in errors] == [TokenizerError] * 2, errors
    assert str(errors[0]) == str(errors[1])
    assert f"the codes at position {position} of the image stream (train)" in str(errors[0])


def test_too_few_positions_are_refused(tmp_path: Path, stored: Path) -> None:
    message = refused(tmp_path, stored, "train.steps=5")
    assert "holds 16 positions of the image stream (train), and the run reads 20" in message
    other = refused(tmp_path / "b", stored, "train.eval_examples=4")
    assert "holds 3 positions of the image stream (eval), and the run reads 4" in other


def test_a_shard_that_was_cut_off_is_refused(tmp_path: Path, stored: Path) -> None:
    tokens = shutil.copytree(stored, tmp_path / "tokens")
    shard = tokens / "train-pair-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert f"{shard} is damaged" in refused(tmp_path, tokens)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, tmp_path / "absent")
    assert "absent holds no stored tokens (tokens.json is not there); make them with vlmoe data tokenize" in message


def test_tokens_without_their_tokenizer_are_refused(tmp_path: Path, stored: Path) -> None:
    tokens = shutil.copytree(stored, tmp_path / "tokens")
    shutil.move(tokens / "tokenizer", tmp_path / "named")
    assert "keeps no tokenizer" in refused(tmp_path, tokens)
    named = cropped(tmp_path, *reading(tokens, f"tokenizers.visual.load={tmp_path / 'named'}"))
    assert check_codes(named.recipe, load_visual_tokenizer(tmp_path / "named")) == 54


def test_what_a_run_would_refuse_is_known_before(tmp_path: Path, stored: Path) -> None:
    visual = load_visual_tokenizer(stored / "tokenizer")
    assert check_codes(cropped(tmp_path, *reading(stored)).recipe, visual) == 54
    with pytest.raises(TokenizerError, match="are of other pixels"):
        check_codes(cropped(tmp_path, *reading(stored, "seed=4")).recipe, visual)
    with pytest.raises(RecipeError, match="this recipe predicts no visual codes"):
        check_codes(cropped(tmp_path, *reading(stored)).recipe, None)


# Storing.


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of at most 6 positions: three micro-batches of the image stream, one of the pair stream."""
    monkeypatch.setattr(tokenize, "SHARD_POSITIONS", 6)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.usefixtures("small_shards")
def test_storing_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, told = cropped(tmp_path).recipe, Told()
    whole = tokenize_images(recipe, tmp_path / "whole", told)
    assert whole.written == 3 + 8 + 1 + 1 and told.batches == told.last == 8 + 8 + 2 + 1
    assert told.notes[1].startswith(f"tokens to store: 54 positions; 0.0 MB in {tmp_path / 'whole'}, ")
    written = 0

    def interrupted(path: Path, *arguments: object) -> None:
        nonlocal written
        written += 1
        if written == 5:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, *arguments)  # type: ignore[arg-type]

    write = tokenize.write_shard
    monkeypatch.setattr(tokenize, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_images(recipe, tmp_path / "tokens", Reporter())
    assert len(shard_bytes(tmp_path / "tokens")) == 4
    monkeypatch.setattr(tokenize, "write_shard", write)
    cut = tmp_path / "tokens" / "train-image-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    resumed = Told()
    again = tokenize_images(recipe, tmp_path / "tokens", resumed)
    assert again.written == 13 - 4 + 1
    assert "positions of 54, the others are there" in resumed.notes[0], "the tokenizer was kept"
    assert shard_bytes(tmp_path / "tokens") == shard_bytes(tmp_path / "whole")
    assert not list((tmp_path / "tokens").glob("*.partial"))


@pytest.mark.usefixtures("small_shards")
def test_small_shards_give_the_same_run(tmp_path: Path, online: Path) -> None:
    tokenize_images(cropped(tmp_path).recipe, tmp_path / "tokens", Reporter())
    train(cropped(tmp_path, *reading(tmp_path / "tokens")), tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(online)
    (tmp_path / "tokens" / "train-pair-00007.safetensors").unlink()
    with pytest.raises(TokenizerError, match="train-pair-00007"):  # far behind the first positions
        check_codes(
            cropped(tmp_path, *reading(tmp_path / "tokens")).recipe,
            load_visual_tokenizer(tmp_path / "tokens" / "tokenizer"),
        )
    message = refused(tmp_path / "again", tmp_path / "tokens")
    assert "train-pair-00007.safetensors is not there: the tokens were not all stored" in message


def test_a_finished_folder_is_kept(tmp_path: Path, stored: Path) -> None:
    before, told = shard_bytes(stored), Told()
    # The recipe may already name the folder.
    found = tokenize_images(cropped(tmp_path, *reading(stored)).recipe, stored, told)
    assert found.written == 0 and told.notes == [f"{stored} holds the tokens of all 54 positions; nothing to do"]
    assert shard_bytes(stored) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("seed=4",), r"was begun with other pixels of the image stream \(train\)"),
        (("train.steps=9",), "was begun for another run: parts 16 positions of train-image, .* not 36 positions"),
        (("tokenizers.visual.precision=bf16",), "was begun for another run: precision fp32, not bf16"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, stored: Path, overrides: Sequence[str], message: str
) -> None:
    before = shard_bytes(stored)
    with pytest.raises(UsageError, match=message):
        tokenize_images(cropped(tmp_path, *overrides).recipe, stored, Reporter())
    assert shard_bytes(stored) == before


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    recipe = cropped(tmp_path).recipe
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files that are no stored tokens"):
        tokenize_images(recipe, tmp_path / "full", Reporter())
    with pytest.raises(UsageError, match="is not a folder"):
        tokenize_images(recipe, tmp_path / "full" / "notes.txt", Reporter())
    with pytest.raises(UsageError, match="can't be written: Not a directory"):
        tokenize_images(recipe, tmp_path / "full" / "notes.txt" / "tokens", Reporter())


def test_recipes_without_codes_are_refused(tmp_path: Path) -> None:
    scenes = "data.train={text: [{source: scenes, size: 9}]}"
    words = tiny(tmp_path, scenes, "data.eval={}", "batch={size: {text: 2}, micro: {text: 2}}")
    for recipe, message in [
        (tuned(tmp_path, "classification").recipe, "task classification predicts no visual codes"),
        (words.recipe, "has neither images nor pairs"),
    ]:
        with pytest.raises(RecipeError, match=message):
            tokenize_images(recipe, tmp_path / "tokens", Reporter())
    assert not (tmp_path / "tokens").exists()


def test_examples_of_several_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_second(recipe: Recipe, *arguments: object, **named: bool) -> MicroBatches:
        dataset = build_image_dataset(recipe, *arguments, **named)  # type: ignore[arg-type]
        prepare = dataset.preparer

        def double(*given: object) -> object:
            sample = prepare(*given)  # type: ignore[arg-type]
            return replace(sample, more_pixels=(sample.pixels,)) if sample.pixels is not None else sample

        return replace(dataset, preparer=double)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenize, "build_image_dataset", with_second)
    with pytest.raises(DataError, match=r"an example of the image stream \(train\) has several pictures"):
        tokenize_images(cropped(tmp_path).recipe, tmp_path / "tokens", Reporter())


# Precision.


class Watched(VisualTokenizer):
    """Notes in which arithmetic it is asked."""

    patch_size, codebook_size, fingerprint = 4, 16, "watched"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("map_DF", torch.randn(48, 8), persistent=False)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        self.dtype = (torch.zeros(1, 48) @ self.map_DF).dtype
        self.grad = torch.is_grad_enabled()
        return torch.zeros(len(images_BCHW), 16, dtype=torch.int64)

    def misfit(self, image_size: int, patch_size: int) -> str | None:
        return None

    def decode(self, ids_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        raise NotImplementedError


@pytest.mark.parametrize("around", [None, torch.bfloat16, torch.float16])
def test_a_tokenizer_has_its_own_precision(around: torch.dtype | None) -> None:
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        visual = Watched()
        with torch.autocast("cpu", dtype=around, enabled=around is not None):
            ids = OnlineTokenizer(visual, precision).encode(images)  # type: ignore[arg-type]
        assert ids.shape == (2, 16) and visual.dtype == dtype and not visual.grad


def test_the_recipe_says_the_precision(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "tokenizers.visual.precision=bf16", "train.precision=fp32").recipe
    objective = build_objective(recipe, Watched())
    before = sorted(objective.state_dict())
    micro = build_image_dataset(recipe, recipe.data.train, training=True)[0]
    objective.targets(micro.batches)  # type: ignore[operator]
    assert objective.visual.visual.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert sorted(build_objective(recipe, None).state_dict()) == before, "the tokenizer is in no state dict"


def test_validate_checks_stored_tokens_as_a_run_would(tmp_path: Path) -> None:
    loaded = cropped(tmp_path / "recipe")
    tokenize_images(loaded.recipe, tmp_path / "tokens", Reporter())
    fits = cropped(tmp_path / "recipe", f"tokenizers.visual.tokens={tmp_path / 'tokens'}")
    checks = {check.name: check for check in validate(fits)}
    assert checks["stored tokens"].figures["positions"] == read_manifest(tmp_path / "tokens").positions
    other = cropped(tmp_path / "recipe", f"tokenizers.visual.tokens={tmp_path / 'tokens'}", "seed=4")
    with pytest.raises(TokenizerError, match="are of other pixels"):
        list(validate(other))
