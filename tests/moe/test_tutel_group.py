"""Tutel's exchange between processes: what the loop on one process computes, whatever the group."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.train.support import on_ranks
from vlmoe_core.errors import RecipeError
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.exchange import Exchange
from vlmoe_core.moe.implementations import tutel
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.share import Share

needs_tutel = pytest.mark.skipif(importlib.util.find_spec("tutel") is None, reason="the tutel package is absent")

DIM, HIDDEN, EXPERTS, GROUP = 7, 11, 6, 2
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Case:
    """A layer, and how many tokens ranks 0 to 3 bring."""

    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tokens: tuple[int, int, int, int] = (9, 14, 1, 6)
    pulled: int | None = None
    """The expert that all tokens prefer."""
    recompute: bool = False
    autocast: bool = False

    def layer(self, experts: str) -> SparseFFN:
        torch.manual_seed(0)
        config = MoEConfig.model_validate({"num_experts": EXPERTS, **self.config, "experts": experts})
        layer = SparseFFN(DIM, HIDDEN, config, init_std=0.5).to(self.dtype)
        with torch.no_grad():
            for name, parameter in layer.experts.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
            if self.pulled is not None:
                layer.router.weight[self.pulled, 0] += 40  # type: ignore[operator, index]
        return layer

    def compute(self, layer: SparseFFN, rank: int) -> dict[str, Any]:
        """Output of one rank's tokens and the gradient at them; those of the weights gather in the layer."""
        drawn = torch.randn(2, self.tokens[rank], DIM, generator=torch.Generator().manual_seed(rank))
        x_TD, grad_TD = drawn.to(self.dtype)
        x_TD[:, 0] = 1
        x_TD.requires_grad_()
        torch.manual_seed(100 + rank)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            y_TD, plan = checkpoint(layer, x_TD, use_reentrant=False) if self.recompute else layer(x_TD)
        y_TD.backward(grad_TD.to(y_TD.dtype))
        return {"y": y_TD.detach().float() if self.autocast else y_TD.detach(), "x": x_TD.grad, "plan": plan}


CASES = {
    "dropless": Case({"capacity_factor": None}),
    "dropless, top 2": Case({"capacity_factor": None, "top_k": 2}),
    "capacity": Case({"capacity_factor": 0.75}),
    "capacity, top 2": Case({"capacity_factor": 0.5, "top_k": 2, "priority": "random"}),
    "float32": Case({"top_k": 2}, torch.float32),
    "float32, dropless": Case({"capacity_factor": None}, torch.float32, (40, 33, 2, 61)),
    "one expert gets all": Case({"capacity_factor": None}, pulled=4),
    "ranks without tokens": Case({"top_k": 2}, tokens=(0, 11, 7, 0)),
    "no tokens at all": Case(tokens=(0, 0, 0, 0)),
    "shared expert": Case({"shared_expert": True}),
    "recompute": Case({"capacity_factor": 0.75, "top_k": 2}, recompute=True),
    "autocast": Case({"top_k": 2}, torch.float32, (40, 33, 0, 61), autocast=True),
}


def compute_here(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """For one of four children, of which two by two share the experts: its part of each case."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    exchange, share = Exchange(groups[rank // GROUP]), EXPERTS // GROUP
    found = {}
    for name, case in cases.items():
        layer = case.layer("tutel")
        layer.experts.keep(Share(rank % GROUP * share, share, EXPERTS), exchange)
        one = case.compute(layer, rank)
        found[name] = {"y": one["y"], "x": one["x"], **{n: p.grad for n, p in layer.named_parameters()}}
    dist.destroy_process_group()
    return {name: {key: _numbers(value) for key, value in one.items()} for name, one in found.items()}


def _numbers(tensor: Tensor | None) -> Any:
    """Shared memory would go with the process that made it."""
    return None if tensor is None else tensor.numpy()


@pytest.fixture(scope="module")
def several() -> list[dict[str, Any]]:
    answers = on_ranks(4, compute_here, CASES)
    assert all(isinstance(answer, dict) for answer in answers), answers
    return answers


@needs_tutel
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_two_groups_of_two_compute_what_one_process_does(several: list[dict[str, Any]], name: str, group: int) -> None:
    case, ranks = CASES[name], (GROUP * group, GROUP * group + 1)
    layer = case.layer("loop")
    wanted = [case.compute(layer, rank) for rank in ranks]
    found = [several[rank][name] for rank in ranks]
    for one, expected in zip(found, wanted, strict=True):
        assert_near(case, one["y"], expected["y"], "y")
        assert_near(case, one["x"], expected["x"], "gradient of x")
    for parameter, tensor in layer.named_parameters():
        parts = [torch.from_numpy(one[parameter]) for one in found]
        whole = torch.cat(parts) if parameter.startswith("experts.") else sum(parts[1:], parts[0])
        assert_near(case, whole.numpy(), tensor.grad, parameter)


def assert_near(case: Case, found: Any, wanted: Tensor | None, what: str) -> None:
    assert wanted is not None
    found = torch.from_numpy(found)
    if case.autocast:
        assert found.shape == wanted.shape and found.dtype == wanted.dtype, what
        bound = 0.02 * float(wanted.abs().max()) if wanted.numel() else 0.0
        assert wanted.numel() == 0 or float((found - wanted).abs().max()) <= bound, what
        return
    bound = TOLERANCE[case.dtype]
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound, msg=lambda m: f"{what}: {m}")


def test_choices_are_dropped_where_they_should_be() -> None:
    """Else the equalities would say little of capacity."""
    for name in ("capacity", "capacity, top 2", "float32", "recompute"):
        case = CASES[name]
        plans = [case.compute(case.layer("loop"), rank)["plan"] for rank in range(4)]
        assert any(not bool(plan.kept_TK.all()) for plan in plans), name


def tutel_notes_what_travels() -> list[Any]:
    """For a child: the shapes that Tutel's all-to-all gets, and how often ours is asked."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    net = importlib.import_module("tutel.net")
    shapes: list[Any] = []
    theirs: Callable[..., Tensor] = net.all_to_all_single

    def noted(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        shapes.append(tuple(x.shape))
        return theirs(x, group)

    net.all_to_all_single = noted  # type: ignore[attr-defined]
    case = CASES["dropless"]
    layer = case.layer("tutel")
    layer.experts.keep(Share(rank * 3, 3, EXPERTS), Exchange(dist.group.WORLD))
    plan = case.compute(layer, rank)["plan"]
    dist.destroy_process_group()
    return [shapes, int(plan.slot_TK[plan.kept_TK].max()) + 1]


@needs_tutel
def test_places_of_the_busiest_expert_travel_there_and_back() -> None:
    answers = on_ranks(2, tutel_notes_what_travels)
    busiest = max(busiest for _, busiest in answers)
    assert [shapes for shapes, _ in answers] == [[(EXPERTS, busiest, DIM)] * 2] * 2
    assert len({busiest for _, busiest in answers}) == 2, "the case would say nothing of unequal capacities"


def test_an_exchange_that_is_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    communicate = ModuleType("communicate")
    communicate.TUTEL_SKIP_A2A = True  # type: ignore[attr-defined]
    modules = {"tutel.net": ModuleType("net"), "tutel.impls.communicate": communicate}
    monkeypatch.setattr(tutel, "_package", modules.__getitem__)
    with pytest.raises(RecipeError, match="SKIP_A2A: unset it, or use 'experts: grouped'"):
        tutel.run_in_group(torch.zeros(3, 2), *[None] * 4)  # type: ignore[arg-type]
