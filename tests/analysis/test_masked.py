"""Predicting the gaps of a text and of a picture."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.analysis.codes.support import random_tokenizer, tokenizer_run
from tests.train.support import tiny, train
from vlmoe_core.analysis.masked import GAP, VEIL, fill_gaps, save_picture
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.images import ImageTransform
from vlmoe_core.data.scenes.draw import draw
from vlmoe_core.data.scenes.world import make_scene
from vlmoe_core.errors import DataError, UsageError
from vlmoe_core.train.trained import Trained, load_trained, newest_pretrained


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    draw(make_scene("eval", 0, 3), 16).save(path)
    return path


def test_each_mask_gets_the_most_probable_words_first(trained: Trained) -> None:
    filled = fill_gaps(trained, None, "a red [MASK] left of a [MASK]", top=4, seed=0)
    assert [gap.place for gap in filled.gaps] == [0, 1]
    assert filled.picture is None and filled.hidden == 0
    encoder = trained.tokenizers.text
    for gap in filled.gaps:
        probabilities = [p for _, p in gap.words]
        assert len(gap.words) == 4 and probabilities == sorted(probabilities, reverse=True)
        assert all(encoder.token_to_id(word) in encoder.word_ids for word, _ in gap.words)


def test_the_text_is_seen_with_the_picture(trained: Trained, picture: Path) -> None:
    alone = fill_gaps(trained, None, "a red [MASK]", top=3, seed=0)
    with_picture = fill_gaps(trained, picture, "a red [MASK]", top=3, seed=0)
    assert alone.gaps[0].words != with_picture.gaps[0].words


def test_the_picture_shows_what_is_seen_hidden_and_filled(trained: Trained, picture: Path) -> None:
    filled = fill_gaps(trained, picture, None, top=1, seed=1)
    assert filled.picture is not None
    shown = np.asarray(filled.picture)
    width = (shown.shape[1] - GAP) // 3 - GAP
    seen, hidden, full = (shown[GAP : GAP + width, GAP + i * (width + GAP) :][:, :width] for i in range(3))
    veiled = (hidden == VEIL).all(-1)
    share = filled.hidden / trained.recipe.model.num_patches
    assert share == pytest.approx(round(0.4 * 16) / 16)
    assert veiled.mean() == pytest.approx(share)
    assert (seen[~veiled] == hidden[~veiled]).all() and (seen[~veiled] == full[~veiled]).all()
    assert (full[veiled] != VEIL).any()


def test_the_same_seed_hides_the_same_patches(trained: Trained, picture: Path) -> None:
    pictures = [fill_gaps(trained, picture, None, top=1, seed=s).picture for s in (1, 1, 2)]
    first, again, other = (np.asarray(p) for p in pictures)
    assert (first == again).all() and (first != other).any()


def test_loading_gives_the_trained_weights(trained: Trained, run_folder: Path) -> None:
    assert trained.step == 2 and not trained.objective.training
    fresh = trained.objective.state_dict()
    from vlmoe_core.checkpoint.read import read_checkpoint

    stored = read_checkpoint(trained.path).model
    assert all(torch.equal(fresh[name], stored[name]) for name in fresh)


@pytest.mark.parametrize(("text", "message"), [(None, "nothing to predict"), ("word " * 50 + "[MASK]", "shorten it")])
def test_what_can_not_be_predicted_is_refused(trained: Trained, text: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fill_gaps(trained, None, text, top=1, seed=0)


def test_a_broken_picture_is_named(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_text("no picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        fill_gaps(trained, path, None, top=1, seed=0)
    with pytest.raises(DataError, match="can't be read"):
        fill_gaps(trained, tmp_path / "absent.png", None, top=1, seed=0)


def test_a_gray_picture_of_another_size_is_taken(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "gray.png"
    Image.new("L", (50, 30), 90).save(path)
    assert fill_gaps(trained, path, None, top=1, seed=0).hidden == 6


def test_a_text_without_a_mask_is_refused(trained: Trained) -> None:
    with pytest.raises(UsageError, match=r"has no \[MASK\]"):
        fill_gaps(trained, None, "a red square", top=1, seed=0)


def test_input_that_the_model_was_not_trained_on_is_refused(tmp_path: Path) -> None:
    empty = ["data.train.text=[]", "data.train.pair=[]", "data.eval.text=[]", "data.eval.pair=[]"]
    sizes = [f"batch.{which}.{stream}=0" for which in ("size", "micro") for stream in ("text", "pair")]
    folder = train(tiny(tmp_path, "train.steps=1", "optim.warmup_steps=1", *empty, *sizes), tmp_path / "out").folder
    with pytest.raises(UsageError, match="trained on the streams image, not on single texts"):
        fill_gaps(load_trained(folder), None, "a red [MASK]", top=1, seed=0)


def test_the_newest_finished_run_that_fits_is_found(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        newest_pretrained("text", tmp_path)
    for name in ("older", "newer", "unfinished"):
        shutil.copytree(run_folder, tmp_path / name)
    os.utime(tmp_path / "older" / "metrics.jsonl", (1, 1))
    recipe = tmp_path / "unfinished" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 5"))
    assert newest_pretrained("text", tmp_path) == tmp_path / "newer"


def test_a_tokenizer_is_no_pretrained_model(tmp_path: Path) -> None:
    run = tokenizer_run(tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "tokens")
    with pytest.raises(UsageError, match=r"no finished run under .* was pretrained on the image stream"):
        newest_pretrained("image", tmp_path / "runs")
    with pytest.raises(UsageError, match=r"is a visual tokenizer: .*tokenizers.visual.load="):
        fill_gaps(load_trained(run), None, "a red [MASK]", top=1, seed=0)


def test_patches_are_drawn_by_the_models_tokenizer_in_sight_of_each_other(tmp_path: Path, picture: Path) -> None:
    visual = random_tokenizer()
    visual.save(tmp_path / "visual")
    words = f"tokenizers.visual={{kind: vqkd, load: {tmp_path / 'visual'}, codebook_size: 16}}"
    run = train(tiny(tmp_path, "train.steps=1", "optim.warmup_steps=1", words), tmp_path / "out").folder
    trained = load_trained(run)
    seen: dict[str, torch.Tensor] = {}
    predict = trained.objective.predict

    def listen(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TV, logits_IPC = predict(batch)  # type: ignore[operator]
        seen.update(mask=batch.patch_mask_IP[0], codes=logits_IPC.argmax(-1)[0], pixels=batch.pixels_ICHW)
        return logits_TV, logits_IPC

    trained.objective.predict = listen
    shown = np.asarray(fill_gaps(trained, picture, None, top=1, seed=1).picture)
    whole = np.asarray(ImageTransform(16, None, 10**6)(picture.read_bytes(), random.Random(0)))
    codes = torch.where(seen["mask"], seen["codes"], visual.encode(torch.from_numpy(whole)[None])[0])
    drawn = (visual.decode(codes[None])[0] * 255).round().byte().numpy()
    hidden = seen["mask"].numpy().reshape(4, 4).repeat(4, 0).repeat(4, 1)
    side = shown.shape[0] - 2 * GAP
    filled = shown[GAP : GAP + side, 2 * (side + GAP) + GAP :][:, :side][:: side // 16, :: side // 16]
    assert (filled == np.where(hidden, drawn, whole).transpose(1, 2, 0)).all()
    assert hidden.sum() == 6 * 16


def test_the_picture_is_a_png_whatever_its_name(trained: Trained, picture: Path, tmp_path: Path) -> None:
    filled = fill_gaps(trained, picture, None, top=1, seed=0)
    assert filled.picture is not None
    save_picture(filled.picture, tmp_path / "filled")
    assert (tmp_path / "filled").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="can't be written"):
        save_picture(filled.picture, tmp_path / "nowhere" / "filled.png")
