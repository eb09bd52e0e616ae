"""One optimiser step: clipping, skipped updates, losses that are not finite."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.train.support import Scaled, assert_same_bits, fresh_process, on_ranks, tensors, tiny, train
from vlmoe_core.checkpoint.layout import list_checkpoints
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.errors import TrainError
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import open_stepper, run_training
from vlmoe_core.train.session import RunOptions, Session, open_session
from vlmoe_core.train.step import Stepper


@dataclass
class Ready:
    """A session and the micro-batches of its first step."""

    session: Session
    stepper: Stepper
    micros: list[MicroBatch]

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.session.objective.named_parameters()}


@pytest.fixture
def ready(tmp_path: Path) -> Callable[..., Ready]:
    def make(*overrides: str) -> Ready:
        fresh_process()
        loaded = tiny(tmp_path, *overrides)
        session = open_session(loaded, RunOptions(tmp_path / "run", overwrite=True), Reporter())
        micros = [session.train_data[n] for n in range(loaded.recipe.batch.num_micro)]
        return Ready(session, open_stepper(session), micros)

    return make


def norm_of(gradients: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))


def test_the_gradient_is_clipped_by_its_global_norm(ready: Callable[..., Ready]) -> None:
    norms, clipped = [], []
    for limit in ("null", "0.5", "1000"):
        now = ready(f"optim.clip_norm={limit}")
        norms.append(now.stepper(0, now.micros).grad_norm)
        clipped.append(norm_of([p.grad for p in now.session.objective.parameters() if p.grad is not None]))
    assert norms[0] == norms[1] == norms[2] and norms[0] is not None and norms[0] > 0.5
    assert clipped == pytest.approx([norms[0], 0.5, norms[0]], rel=1e-4)


def test_a_step_is_the_sum_of_its_micro_batches(ready: Callable[..., Ready]) -> None:
    """The loss of a step by hand: each part's sums over the counts of the whole step."""
    now = ready()
    result = now.stepper(0, now.micros)
    now = ready()
    objective = now.session.objective.train()
    parts: dict[str, list[Tensor | int]] = {}
    for micro in now.micros:
        torch.manual_seed(_noise_seed(now, micro))
        for name, part in objective(micro.batches).parts.items():
            both = parts.setdefault(name, [torch.zeros(()), 0])
            both[0], both[1] = both[0] + part.sum.detach(), both[1] + part.count
    means = {name: float(total) / count for name, (total, count) in parts.items()}
    assert result.losses == pytest.approx(means | {"total": sum(means.values())}, rel=1e-5)


def _noise_seed(now: Ready, micro: MicroBatch) -> int:
    from vlmoe_core.data.order import derive_key

    return derive_key(now.session.recipe.seed, 0, micro.number) >> 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_and_updates_nothing(ready: Callable[..., Ready], value: float) -> None:
    now = ready()
    with torch.no_grad():
        now.session.objective.heads.text.weight[7, 0] = value  # type: ignore[union-attr, index]
    before = now.weights()
    with pytest.raises(TrainError) as caught:
        now.stepper(0, now.micros)
    message = str(caught.value)
    assert message.startswith("step 1: the loss is not finite in ")
    assert message.endswith("; nothing was updated")
    assert "mlm (text stream, positions 0 to 1)" in message
    assert "vlm_text (pair stream, positions 2 to 3)" in message
    assert "mim" not in message and "vlm_image" not in message and "balance" not in message
    assert_same_bits(now.weights(), before)
    assert not now.session.optimizer.state


def test_a_router_that_is_not_finite_names_its_balance_loss(ready: Callable[..., Ready]) -> None:
    now = ready()
    with torch.no_grad():
        now.session.objective.encoder.blocks[0].ffn["text"].router.weight.fill_(float("nan"))  # type: ignore[union-attr, index]
    with pytest.raises(
        TrainError, match=r"balance/text/0 \(text stream, positions 0 to 1; pair stream, positions 0 to 1\)"
    ):
        now.stepper(0, now.micros)


def test_a_gradient_that_is_not_finite_updates_nothing(ready: Callable[..., Ready]) -> None:
    now = ready()
    now.session.objective.encoder.norm.weight.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[union-attr]
    before = now.weights()
    with pytest.raises(TrainError, match="step 4: the gradient is not finite although the loss is;") as caught:
        now.stepper(3, now.micros)
    assert caught.value.of_all and str(caught.value).endswith("; nothing was updated")
    assert_same_bits(now.weights(), before)


def test_an_overflow_in_fp16_skips_the_update_and_lowers_the_scale(
    ready: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ready()
    norm = expected.stepper(0, expected.micros).grad_norm
    monkeypatch.setattr("vlmoe_core.train.parallel.Accelerator", Scaled)
    now = ready()
    scaler = now.session.accelerator.scaler
    assert scaler is not None
    hook = now.session.objective.encoder.norm.weight.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[union-attr]
    before = now.weights()
    assert now.stepper(0, now.micros).grad_norm is None
    assert_same_bits(now.weights(), before)
    assert scaler.get_scale() == 2.0**19
    hook.remove()
    assert now.stepper(0, now.micros).grad_norm == pytest.approx(norm, rel=1e-5)
    for name, weight in now.weights().items():
        torch.testing.assert_close(weight, expected.weights()[name], rtol=0, atol=1e-4)


def poisoned(loaded: LoadedRecipe, out: Path, step: int, rank: int = 0, module: str = "heads.text") -> object:
    """For a child: a weight of one rank becomes NaN before a step."""
    import os

    if int(os.environ.get("RANK", "0")) == rank:
        call = Stepper.__call__

        def poison(self: Stepper, now: int, *args: object, **kwargs: object) -> object:
            if now == step:
                head: nn.Linear = self.accelerator.unwrap_model(self.model).get_submodule(module)
                head.weight.data[7, 0] = float("nan")
            return call(self, now, *args, **kwargs)  # type: ignore[arg-type]

        Stepper.__call__ = poison  # type: ignore[method-assign, assignment]
    return run_training(loaded, RunOptions(out), Reporter())


def test_the_last_good_checkpoint_is_kept(tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stepper, "__call__", Stepper.__call__)
    with pytest.raises(TrainError, match="step 6: the loss is not finite in mlm"):
        poisoned(tiny(tmp_path), tmp_path / "run", step=5)
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-00000003", "step-00000004"]
    monkeypatch.undo()
    train(tiny(tmp_path), tmp_path / "run", resume="auto")
    assert_same_bits(tensors(tmp_path / "run", 6), tensors(straight, 6))


def test_ranks_stop_together_with_the_same_message(tmp_path: Path) -> None:
    """Rank 1 alone is not finite: micro-batch 5 of step 3, so position 10 of each stream, is its share."""
    errors = on_ranks(2, poisoned, tiny(tmp_path), tmp_path / "run", 2, 1)
    assert [(type(error), error.of_all) for error in errors] == [(TrainError, True)] * 2
    assert str(errors[0]) == str(errors[1])
    assert "step 3: the loss is not finite in mlm (text stream, positions 10 to 11)" in str(errors[0])
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_a_held_out_loss_that_is_not_finite_stops_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Stepper._update

    def poison(self: Stepper, step: int) -> float | None:
        norm = call(self, step)
        if step == 2:
            self.accelerator.unwrap_model(self.model).heads.image.weight.data[3, 0] = float("nan")
        return norm

    monkeypatch.setattr(Stepper, "_update", poison)
    with pytest.raises(TrainError, match="step 3: the held-out loss is not finite in total, mim, vlm_image"):
        train(tiny(tmp_path), tmp_path / "run")
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
