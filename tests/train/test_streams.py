"""Runs without one or two of the streams, alone and on two ranks: no parameter is missed, none is updated by chance."""

from pathlib import Path

import pytest
import torch

from tests.train.support import metrics, on_ranks, pretrain_child, tensors, tiny, train
from vlmoe_core.data.config import STREAMS
from vlmoe_core.recipe.load import LoadedRecipe

PARTS = {"image": {"mim"}, "text": {"mlm"}, "pair": {"vlm_text", "vlm_image"}}
IMAGE_ONLY = "encoder.embeddings.image.patch.proj.weight"
TEXT_ONLY = "encoder.embeddings.text.word.weight"


def only(folder: Path, *streams: str, extra: tuple[str, ...] = ()) -> LoadedRecipe:
    """The tiny recipe with these streams alone."""
    split = [f"{s}: [{{source: scenes, size: 50, image_size: 16}}]" for s in streams]
    sizes = ", ".join(f"{s}: 4" for s in streams)
    micro = ", ".join(f"{s}: 2" for s in streams)
    return tiny(
        folder,
        f"data.train={{{', '.join(split)}}}",
        f"data.eval={{{', '.join(split)}}}",
        f"batch={{size: {{{sizes}}}, micro: {{{micro}}}}}",
        "train.steps=2",
        *extra,
    )


CASES = [("text",), ("image",), ("pair",), ("text", "pair"), ("image", "text")]


@pytest.mark.parametrize("streams", CASES, ids="+".join)
def test_a_run_without_some_streams(tmp_path: Path, streams: tuple[str, ...]) -> None:
    loaded = only(tmp_path, *streams)
    train(loaded, tmp_path / "run")
    losses = {name for line in metrics(tmp_path / "run") for name in line if name.startswith("loss/")}
    assert losses == {"loss/total"} | {f"loss/{part}" for s in streams for part in PARTS[s]}
    state = metrics(tmp_path / "run")[-1]
    assert state["loss/total"] == pytest.approx(sum(state[name] for name in losses - {"loss/total"}))
    moments = tensors(tmp_path / "run", 2)
    for name, uses in ((IMAGE_ONLY, {"image", "pair"}), (TEXT_ONLY, {"text", "pair"})):
        assert bool(moments[f"optimizer/exp_avg_sq.{name}"].any()) == bool(uses & set(streams))


@pytest.mark.parametrize("streams", [("text",), ("image",), ("text", "pair")], ids="+".join)
def test_two_ranks_find_all_parameters(tmp_path: Path, streams: tuple[str, ...]) -> None:
    extra = ("model.patch_embed=conv",) if "image" not in streams else ("train.activation_checkpointing=true",)
    loaded = only(tmp_path, *streams, extra=extra)
    answers = on_ranks(2, pretrain_child, loaded, tmp_path / "two")
    assert [answer.step for answer in answers] == [2, 2], answers
    train(loaded, tmp_path / "one")
    for name, value in tensors(tmp_path / "two", 2).items():
        torch.testing.assert_close(value, tensors(tmp_path / "one", 2)[name], rtol=0, atol=1e-3, msg=name)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two["loss/total"] == pytest.approx(one["loss/total"], abs=1e-4)


def test_a_run_without_held_out_data(tmp_path: Path) -> None:
    train(tiny(tmp_path, "data.eval={}", "train.steps=2"), tmp_path / "run")
    assert [line["split"] for line in metrics(tmp_path / "run")] == ["train", "train"]


def test_held_out_data_of_a_stream_that_is_not_trained(tmp_path: Path) -> None:
    held = "data.eval={pair: [{source: scenes, size: 9, split: eval, image_size: 16}]}"
    train(only(tmp_path, "text", "image", extra=(held,)), tmp_path / "run")
    assert {name for name in metrics(tmp_path / "run")[0] if name.startswith("loss/")} == {
        "loss/total", "loss/vlm_text", "loss/vlm_image",
    }  # fmt: skip
    assert STREAMS == ("image", "text", "pair")
