"""Norm, clipping and overflow of gradients of which each process holds a part."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.train.support import Scaled, bits, fresh_process, on_ranks, tiny
from tests.train.test_ranks import FOUR_MICROS
from vlmoe_core.errors import TrainError
from vlmoe_core.moe.experts import Experts
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train import parallel
from vlmoe_core.train.gradients import Gradients
from vlmoe_core.train.mesh import Mesh
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import open_stepper
from vlmoe_core.train.session import RunOptions, Session, open_session
from vlmoe_core.train.step import Stepper

ALONE = Mesh(1, 1, "none")
MESHES = {
    "2 ranks, expert 2": (2, "parallel.expert=2"),
    "2 ranks, full": (2, "parallel.shard=full"),
    "4 ranks, expert 2": (4, "parallel.expert=2"),
    "4 ranks, expert 4": (4, "parallel.expert=4"),
    "4 ranks, expert 2, full": (4, "parallel={expert: 2, shard: full}"),
}
SPOILT = 1
"""The rank of which one gradient of one expert is not finite."""


def model_with_gradients() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn_like(parameter) * 10**number if number < 4 else None
    model[0].bias.requires_grad_(False)
    model[0].bias.grad = None
    return model


@pytest.mark.parametrize("limit", [0.5, 7.0, 1e9, math.inf])
def test_one_process_clips_as_torch_does(limit: float) -> None:
    found, expected = model_with_gradients(), model_with_gradients()
    gradients = Gradients(found, ALONE)
    gradients.sum_shares()
    norm = gradients.clip(limit)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(expected.parameters(), limit))
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
    assert not gradients.spread


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def opened(loaded: LoadedRecipe, out: Path) -> tuple[Session, Stepper]:
    fresh_process()
    session = open_session(loaded, RunOptions(out, overwrite=True), Reporter())
    return session, open_stepper(session)


def take(session: Session, stepper: Stepper, step: int) -> float | None:
    """A step on this rank's micro-batches; the norm that it tells."""
    ranks, rank = session.accelerator.num_processes, session.accelerator.process_index
    return stepper(step, [session.train_data[n] for n in range(4 * step + rank, 4 * (step + 1), ranks)]).grad_norm


def spoil(session: Session, stepper: Stepper, value: float) -> Callable[[], None]:
    """Let a number of one expert's gradient be no number after the backwards of one rank; returns how to stop that."""
    finish = stepper.gradients.sum_shares

    def spoilt() -> None:
        if session.accelerator.process_index == SPOILT:
            experts = next(module for module in session.objective.modules() if isinstance(module, Experts))
            assert experts.up.weight.grad is not None
            local(experts.up.weight.grad).view(-1)[3] = value
        finish()

    stepper.gradients.sum_shares = spoilt  # type: ignore[method-assign]
    return lambda: setattr(stepper.gradients, "sum_shares", finish)


def held(session: Session) -> dict[str, tuple[Any, ...]]:
    """What this process holds of each weight, bit for bit."""
    parts = {name: local(p.detach()) for name, p in session.objective.named_parameters()}
    return {name: bits(part.clone()) for name, part in parts.items() if part.numel()}


def overflow(loaded: LoadedRecipe, folder: Path) -> dict[str, Any]:
    """For a child: the norm of a step in float32; one in scaled arithmetic whose gradient overflows; the same again."""
    session, stepper = opened(loaded, folder / "plain")
    found: dict[str, Any] = {"plain": take(session, stepper, 0)}
    parallel.Accelerator = Scaled  # type: ignore[misc, assignment]
    session, stepper = opened(loaded, folder / "scaled")
    scaler, before = session.accelerator.scaler, held(session)
    assert scaler is not None
    stop = spoil(session, stepper, math.inf)
    found["spoilt"], found["scale"], after = take(session, stepper, 0), scaler.get_scale(), held(session)
    stop()
    found["again"], found["scale after"], end = take(session, stepper, 0), scaler.get_scale(), held(session)
    moved = [name for name in before if before[name] != after[name]]
    return found | {"moved": moved, "still": [name for name in before if before[name] == end[name]]}


def not_finite(loaded: LoadedRecipe, folder: Path) -> dict[str, Any]:
    """For a child: what a step says whose gradient is no number, without a scaler, and what moved."""
    session, stepper = opened(loaded, folder / "broken")
    before, said = held(session), "nothing"
    spoil(session, stepper, math.nan)
    try:
        take(session, stepper, 0)
    except TrainError as error:
        said = str(error)
    return {"said": said, "moved": [name for name, weight in held(session).items() if weight != before[name]]}


def spoil_all(recipes: dict[str, LoadedRecipe], folder: Path) -> dict[str, Any]:
    """For a child: both of the above on every mesh."""
    found = {}
    for name, loaded in recipes.items():
        accelerator = parallel.Accelerator
        found[name] = overflow(loaded, folder / name)
        parallel.Accelerator = accelerator  # type: ignore[misc]
        found[name]["not finite"] = not_finite(loaded, folder / name)
    return found


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank found, by the names of MESHES."""
    folder = tmp_path_factory.mktemp("spoilt")
    found: dict[str, list[dict[str, Any]]] = {}
    for ranks in (2, 4):
        recipes = {name: tiny(folder, *FOUR_MICROS, mesh) for name, (n, mesh) in MESHES.items() if n == ranks}
        answers = on_ranks(ranks, spoil_all, recipes, folder)
        assert all(isinstance(answer, dict) for answer in answers), answers
        found |= {name: [answer[name] for answer in answers] for name in recipes}
    return found


@pytest.mark.parametrize("name", list(MESHES))
def test_an_overflow_of_one_ranks_expert_skips_the_update_on_all(
    spoilt: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """The scale is halved everywhere, no weight moves; the next try takes the step, with the norm of float32."""
    for rank in spoilt[name]:
        assert rank["spoilt"] is None and rank["moved"] == []
        assert (rank["scale"], rank["scale after"]) == (2.0**19, 2.0**19)
        assert rank["again"] == pytest.approx(rank["plain"], rel=1e-5) and rank["still"] == []
    assert len({(rank["plain"], rank["again"]) for rank in spoilt[name]}) == 1


@pytest.mark.parametrize("name", list(MESHES))
def test_a_gradient_of_one_rank_that_is_no_number_ends_all_of_them(
    spoilt: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for rank in spoilt[name]:
        assert rank["not finite"] == {
            "said": "step 1: the gradient is not finite although the loss is; nothing was updated",
            "moved": [],
        }
