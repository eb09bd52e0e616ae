"""bfloat16 with its copies of the expert weights, recomputed activations, compiled blocks."""

from functools import partialmethod
from pathlib import Path

import pytest
import torch

import vlmoe_core.train.step as step_module
from tests.train.support import Blow, Child, assert_same_run, fresh_process, metrics, pretrain_child, tiny, train
from vlmoe_core.errors import RecipeError
from vlmoe_core.moe.experts import ExpertLinear
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import Trainer, open_stepper
from vlmoe_core.train.session import RunOptions, Session, open_session

BF16 = "train.precision=bf16"


def opened(loaded: LoadedRecipe, run: Path, resume: str | None = None) -> Session:
    fresh_process()
    return open_session(loaded, RunOptions(run, resume), Reporter())


def expert_weights(session: Session) -> list[ExpertLinear]:
    return [module for module in session.objective.modules() if isinstance(module, ExpertLinear)]


def assert_copies_are_fresh(session: Session) -> None:
    found = expert_weights(session)
    assert len(found) == 4
    for linear in found:
        assert linear.copy is not None and linear.copy.dtype == torch.bfloat16
        assert linear.weight.dtype == torch.float32
        assert torch.equal(linear.copy, linear.weight.to(torch.bfloat16))


def steps(session: Session, count: int) -> None:
    stepper = open_stepper(session)
    for step in range(count):
        stepper(step, [session.train_data[2 * step], session.train_data[2 * step + 1]])


def test_copies_are_refreshed_after_each_step_and_after_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, run = tiny(tmp_path, BF16), tmp_path / "run"
    session = opened(loaded, run)
    assert_copies_are_fresh(session)
    steps(session, 2)
    assert_copies_are_fresh(session)
    trainer = Trainer(session, Reporter())
    trainer._save()
    trainer.saving.finish()
    saved = [linear.weight.clone() for linear in expert_weights(session)]
    again = opened(loaded, run, "auto")
    for linear, weight in zip(expert_weights(again), saved, strict=True):
        assert torch.equal(linear.weight, weight)
    assert_copies_are_fresh(again)


def test_the_test_above_sees_a_forgotten_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "refresh_expert_copies", lambda model: None)
    session = opened(tiny(tmp_path, BF16), tmp_path / "run")
    steps(session, 1)
    with pytest.raises(AssertionError):
        assert_copies_are_fresh(session)


def test_float32_holds_no_copies(tmp_path: Path) -> None:
    assert all(linear.copy is None for linear in expert_weights(opened(tiny(tmp_path), tmp_path / "run")))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    train(tiny(folder, BF16, "train.steps=16", "train.save_every=4"), folder / "run")
    return folder / "run"


def test_bf16_learns(bf16: Path) -> None:
    held_out = [line["loss/total"] for line in metrics(bf16) if line["split"] == "eval"]
    assert held_out[-1] < held_out[0] - 0.5


def test_bf16_computes_in_bf16(bf16: Path, straight: Path) -> None:
    """Close to float32, and not the same: held out and in training alike."""
    for low, full in zip(metrics(bf16)[:2], metrics(straight)[:2], strict=True):
        assert low["loss/total"] == pytest.approx(full["loss/total"], rel=0.01)
        assert low["loss/total"] != pytest.approx(full["loss/total"], rel=1e-7)


def test_bf16_resumes_bit_for_bit(tmp_path: Path, bf16: Path) -> None:
    loaded = tiny(tmp_path, BF16, "train.steps=16", "train.save_every=4")
    blow = Blow("vlmoe_core.train.run:Stepper", "__call__", 10)
    assert Child(pretrain_child, loaded, tmp_path / "run", None, blow).wait() == -9
    train(loaded, tmp_path / "run", resume="auto")
    assert_same_run(tmp_path / "run", bf16, 16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_change_nothing(tmp_path: Path, straight: Path, bf16: Path, precision: str) -> None:
    """Noise, drop path and capacity on: the recompute draws the same numbers and routes the same way."""
    loaded = tiny(tmp_path, f"train.precision={precision}", "train.activation_checkpointing=true")
    kept = tiny(tmp_path, f"train.precision={precision}")
    train(loaded, tmp_path / "recomputed")
    if precision == "bf16":
        train(kept, tmp_path / "kept")
    expected = straight if precision == "fp32" else tmp_path / "kept"
    assert metrics(tmp_path / "recomputed") == metrics(expected)


def test_fp16_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="fp16, which needs a GPU; use bf16 or fp32"):
        train(tiny(tmp_path, "train.precision=fp16"), tmp_path / "run")


def test_compiled_blocks_train_and_none_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward graphs of a block, for texts and for the batches of other streams, which are empty.

    They are not made into C++ here, which takes a minute. The limit on the variants of one function is lowered, so that
    one block is enough to meet it.
    """
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="aot_eager"))
    texts = "{text: [{source: scenes, size: 50}]}"
    small = (f"data.train={texts}", "data.eval={}", "batch={size: {text: 2}, micro: {text: 2}}", "train.steps=2")
    small += ("model.layers=1", "model.moe={text: {num_experts: 4, layers: [0]}}")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        train(tiny(tmp_path, *small, "train.compile=true"), tmp_path / "compiled")
    train(tiny(tmp_path, *small), tmp_path / "eager")
    for compiled, eager in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), strict=True):
        assert compiled["loss/total"] == pytest.approx(eager["loss/total"], rel=1e-4)
