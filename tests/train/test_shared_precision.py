"""bfloat16 on every rank that shares experts or holds a part of the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.support import fresh_process, on_ranks, tiny
from tests.train.test_ranks import FOUR_MICROS
from vlmoe_core.moe.experts import ExpertLinear
from vlmoe_core.objectives.loss import Loss
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.session import RunOptions, open_session
from vlmoe_core.train.step import Stepper


class Listening(Stepper):
    """Notes what each micro-batch of this rank says, before it is summed over the ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard: list[dict[str, float]] = []

    def _backward(self, *args: Any, **kwargs: Any) -> Loss:
        loss = super()._backward(*args, **kwargs)
        self.heard.append({name: float(part.sum) for name, part in loss.parts.items()})
        return loss


class Dtypes(TorchDispatchMode):
    """Notes in which dtypes weights are gathered and their gradients reduced where fully_shard has cut them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {"_allgather_base_": set(), "_reduce_scatter_base_": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in self.seen:
            self.seen[name].add(str(args[0].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


def listen(recipes: Mapping[str, LoadedRecipe], folder: Path) -> dict[str, Any]:
    """For a child: what a session's first three steps say on this rank, and how it holds its experts."""
    found = {}
    for name, loaded in recipes.items():
        fresh_process()
        session, recipe = open_session(loaded, RunOptions(folder / name), Reporter()), loaded.recipe
        stepper = Listening(
            session.accelerator, session.model, session.mesh, session.optimizer, recipe.optim, 6, recipe.seed
        )
        micros = session.train_micros()
        per_rank = recipe.batch.num_micro // session.accelerator.num_processes
        with Dtypes() as dtypes:
            told = [dict(stepper(step, [next(micros) for _ in range(per_rank)]).losses) for step in range(3)]
        linears = [module for module in session.objective.modules() if isinstance(module, ExpertLinear)]
        found[name] = {
            "heard": stepper.heard,
            "told": told,
            "sent": dtypes.seen,
            "dtypes": {str(p.dtype) for p in session.objective.parameters()},
            "fresh": [x.copy is not None and torch.equal(x.copy, x.weight.bfloat16()) for x in linears],
        }
    return found


BF16 = {"none": "parallel={expert: 2}", "full": "parallel={expert: 2, shard: full}"}


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks heard in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("heard")
    recipes = {
        f"{precision}, {shard}": tiny(folder, *FOUR_MICROS, mesh, f"train.precision={precision}")
        for precision in ("fp32", "bf16")
        for shard, mesh in BF16.items()
    }
    answers = on_ranks(4, listen, recipes, folder)
    assert all(isinstance(answer, dict) for answer in answers), answers
    return answers


@pytest.mark.parametrize("shard", list(BF16))
def test_bf16_losses_of_every_rank_are_near_those_of_float32(heard: list[dict[str, Any]], shard: str) -> None:
    for rank in heard:
        low, full = rank[f"bf16, {shard}"], rank[f"fp32, {shard}"]
        assert low["dtypes"] == {"torch.float32"}, "masters"
        assert low["fresh"] == [shard == "none"] * 4 and full["fresh"] == [False] * 4
        for key in ("heard", "told"):
            losses = [[{k: v for k, v in one.items() if "balance" not in k} for one in way[key]] for way in (low, full)]
            for one, expected in zip(*losses, strict=True):
                assert one == pytest.approx(expected, rel=0.02)
                assert one != pytest.approx(expected, rel=1e-7)


def test_cut_experts_travel_in_bf16_and_their_gradients_in_float32(heard: list[dict[str, Any]]) -> None:
    """All else is gathered in float32: autocast casts it where it is used."""
    for rank in heard:
        for precision, gathered in (("bf16", {"bfloat16", "float32"}), ("fp32", {"float32"})):
            sent = rank[f"{precision}, full"]["sent"]
            assert sent == {"_allgather_base_": gathered, "_reduce_scatter_base_": {"float32"}}
            assert not any(rank[f"{precision}, none"]["sent"].values())
