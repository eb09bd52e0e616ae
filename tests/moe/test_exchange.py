"""Experts on several processes = the loop on one: outputs, every gradient, and what travels.

Oracle: one process that holds all experts computes the tokens of each rank as one routing group after the other.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.train.support import on_ranks
from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.exchange import Exchange, Journey
from vlmoe_core.moe.experts import Experts, expert_shares
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.plan import Assignment
from vlmoe_core.moe.share import Share

needs_tutel = pytest.mark.skipif(importlib.util.find_spec("tutel") is None, reason="the tutel package is absent")

DIM, HIDDEN, EXPERTS = 6, 10, 8
PULL = 40.0
"""Added to the logits of the experts that a case's tokens go to."""


@dataclass(frozen=True)
class Case:
    """A layer, the tokens of each rank, and how it is computed."""

    config: dict[str, Any] = field(default_factory=dict)
    experts: str = "loop"
    dtype: torch.dtype = torch.float64
    tokens: tuple[int, int, int, int] = (9, 14, 1, 6)
    """Of ranks 0 to 3."""
    pulled: tuple[int, ...] = ()
    """The experts that all tokens go to; none: as the router says."""
    sub_norm: bool = False
    mode: Literal["train", "eval", "no_grad", "checkpoint"] = "train"
    autocast: bool = False
    copies: bool = False
    """Hold copies of the weights in bfloat16."""

    def layer(self, experts: str) -> SparseFFN:
        """The whole layer; the same on every process."""
        torch.manual_seed(0)
        config = MoEConfig.model_validate({"num_experts": EXPERTS, **self.config, "experts": experts})
        layer = SparseFFN(DIM, HIDDEN, config, 0.5, 1e-5 if self.sub_norm else None).to(self.dtype)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("bias") or ".norm." in name:
                    parameter.normal_()
            layer.router.weight[list(self.pulled), 0] += PULL  # type: ignore[union-attr, index]
        return layer.train(self.mode in ("train", "checkpoint"))

    def group(self, rank: int) -> tuple[Tensor, Tensor]:
        """The tokens of a rank, and the gradient that comes to their outputs."""
        drawn = torch.randn(2, self.tokens[rank], DIM, generator=torch.Generator().manual_seed(rank + 1))
        x_TD, grad_TD = drawn.to(self.dtype)
        x_TD[:, 0] = 1
        return x_TD, grad_TD


CASES = {
    "capacity": Case({"capacity_factor": 0.75}),
    "capacity, top 2": Case({"capacity_factor": 0.5, "top_k": 2}),
    "dropless": Case({"capacity_factor": None}),
    "dropless, top 2": Case({"capacity_factor": None, "top_k": 2, "weights": "renormalised"}),
    "one expert gets all": Case({"capacity_factor": None}, pulled=(5,)),
    "one expert gets all, few places": Case({"capacity_factor": 0.5, "top_k": 2, "priority": "random"}, pulled=(2,)),
    "nobody to some ranks": Case({"capacity_factor": None, "top_k": 2}, pulled=(2, 3)),
    "ranks without tokens": Case({"top_k": 2}, tokens=(0, 11, 7, 0)),
    "no tokens at all": Case(tokens=(0, 0, 0, 0)),
    "dropout": Case({"expert_dropout": 0.4, "top_k": 2, "capacity_factor": 0.75}),
    "sub-norm": Case({"top_k": 2}, sub_norm=True),
    "shared expert": Case({"shared_expert": True, "top_k": 2}),
    "evaluation": Case({"expert_dropout": 0.4, "eval_capacity_factor": 0.5}, mode="eval"),
    "no grad": Case({"top_k": 2}, mode="no_grad"),
    "recompute": Case({"expert_dropout": 0.4, "top_k": 2, "priority": "random"}, mode="checkpoint"),
    "grouped": Case({"top_k": 2, "expert_dropout": 0.3}, experts="grouped", dtype=torch.float32),
    "grouped, nobody to some ranks": Case({"top_k": 2}, "grouped", torch.float32, (0, 8, 3, 0), pulled=(6, 7)),
    "grouped, recompute": Case({"expert_dropout": 0.4}, "grouped", torch.float32, mode="checkpoint"),
    "grouped, no grad": Case({"top_k": 2}, "grouped", torch.float32, mode="no_grad"),
    "autocast": Case({"top_k": 2, "expert_dropout": 0.3}, dtype=torch.float32, autocast=True),
    "grouped, autocast": Case({"top_k": 2}, "grouped", torch.float32, (40, 60, 0, 33), autocast=True),
    "grouped, autocast, copies": Case({"top_k": 2}, "grouped", torch.float32, autocast=True, copies=True),
}
TUTEL = {
    "tutel": Case({"top_k": 2}, "tutel"),
    "tutel, nobody to some ranks": Case({"top_k": 2}, "tutel", torch.float32, (0, 8, 3, 0), pulled=(6, 7)),
}
ALL = CASES | (TUTEL if importlib.util.find_spec("tutel") else {})


class Traffic(TorchDispatchMode):
    """Notes the shape and dtype of whatever goes through an all-to-all, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all" in str(func):
            self.sent.append((tuple(args[0].shape), args[0].dtype))
        return func(*args, **(kwargs or {}))


def compute(case: Case, layer: SparseFFN, rank: int) -> dict[str, Any]:
    """Forward and backward of the tokens of one rank; gradients of parameters gather in the layer."""
    x_TD, grad_TD = case.group(rank)
    x_TD.requires_grad_(case.mode != "no_grad")
    torch.manual_seed(100 + rank)
    traffic = Traffic()
    with traffic, torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        if case.mode == "checkpoint":
            y_TD, plan = checkpoint(layer, x_TD, use_reentrant=False)
        else:
            with torch.set_grad_enabled(case.mode != "no_grad"):
                y_TD, plan = layer(x_TD)
    found = {"y": y_TD.detach().clone(), "dtype": y_TD.dtype, "kept": int(plan.kept_TK.sum())}
    if case.mode != "no_grad":
        if case.mode != "checkpoint":
            plan.weight_TK.retain_grad()
            found["expert"] = plan.expert_TK
        with traffic:
            y_TD.backward(grad_TD.to(y_TD.dtype))
        found["x"] = x_TD.grad
        found["weight"] = plan.weight_TK.grad if case.mode != "checkpoint" else None
    return found | {"sent": traffic.sent}


def gradients(layer: SparseFFN) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in layer.named_parameters()}


def compute_here(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """For a child: its part of each case."""
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    exchange = Exchange(dist.group.WORLD)
    found = {}
    for name, case in cases.items():
        layer = case.layer(case.experts)
        layer.experts.keep(Share(rank * EXPERTS // ranks, EXPERTS // ranks, EXPERTS), exchange)
        if case.copies:
            layer.experts.hold_copies(torch.bfloat16)
        one = compute(case, layer, rank)
        shapes = {n: tuple(p.shape) for n, p in layer.experts.named_parameters()}
        found[name] = one | {"gradients": gradients(layer), "shapes": shapes, "shares": expert_shares(layer)}
    dist.destroy_process_group()
    return _as_lists(found)


def _as_lists(found: Any) -> Any:
    """Tensors travel to the parent as numbers: shared memory goes with the process that made it."""
    if isinstance(found, dict):
        return {key: _as_lists(value) for key, value in found.items()}
    if isinstance(found, Tensor):
        return (found.double() if found.is_floating_point() else found).numpy()
    return found


@pytest.fixture(scope="module")
def several() -> dict[int, list[dict[str, Any]]]:
    """What each rank found in every case, by the number of ranks."""
    found = {ranks: on_ranks(ranks, compute_here, ALL) for ranks in (2, 4)}
    for answers in found.values():
        assert all(isinstance(answer, dict) for answer in answers), answers
    return found


@pytest.fixture(scope="module")
def alone() -> Callable[[str, int], tuple[list[dict[str, Any]], dict[str, Tensor | None]]]:
    """What one process finds with `loop`: each rank's outputs, and the gradients of the parameters over all."""

    def compute_alone(name: str, ranks: int) -> tuple[list[dict[str, Any]], dict[str, Tensor | None]]:
        case = ALL[name]
        layer = case.layer("loop")
        return [compute(case, layer, rank) for rank in range(ranks)], gradients(layer)

    return compute_alone


def tolerance(case: Case) -> dict[str, float]:
    bound = 1e-12 if case.dtype == torch.float64 else 1e-5
    return {"rtol": bound, "atol": bound}


def assert_near(case: Case, found: Any, wanted: Tensor | None, what: str) -> None:
    if wanted is None:
        assert found is None, what
        return
    assert found is not None, f"{what}: no gradient"
    found, wanted = torch.from_numpy(found), wanted.double()
    if case.autocast:
        assert found.shape == wanted.shape, what
        if wanted.numel():
            assert float((found - wanted).abs().max()) <= 0.02 * float(wanted.abs().max()), what
        return
    torch.testing.assert_close(found, wanted, **tolerance(case), msg=lambda m: f"{what}: {m}")


NAMES = [*CASES, *(pytest.param(name, marks=needs_tutel) for name in TUTEL)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_all_gradients_are_those_of_one_process(
    several: dict[int, list[dict[str, Any]]], alone: Callable[..., Any], name: str, ranks: int
) -> None:
    case, found = ALL[name], [answer[name] for answer in several[ranks]]
    wanted, of_parameters = alone(name, ranks)
    for rank, (one, expected) in enumerate(zip(found, wanted, strict=True)):
        assert one["dtype"] == expected["dtype"], rank
        assert_near(case, one["y"], expected["y"], f"y of rank {rank}")
        for key in ("x", "weight"):
            assert (key in one) == (key in expected) == (case.mode != "no_grad")
            if key in expected:
                assert_near(case, one[key], expected[key], f"gradient of {key} of rank {rank}")
        if "expert" in expected:
            assert one["expert"].tolist() == expected["expert"].tolist()
    for parameter, expected in of_parameters.items():
        parts = [one["gradients"][parameter] for one in found]
        assert_near(case, _together(parameter, parts), expected, parameter)


def _together(parameter: str, parts: list[Any]) -> Any:
    """The gradient over all ranks: experts' lie side by side, all others are summed."""
    if any(part is None for part in parts):
        assert all(part is None for part in parts), parameter
        return None
    if parameter.startswith("experts."):
        return torch.cat([torch.from_numpy(part) for part in parts]).numpy()
    return sum(parts)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_process_holds_its_share_alone(several: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    each = EXPERTS // ranks
    for rank, answer in enumerate(several[ranks]):
        one = answer["sub-norm"]
        assert one["shares"] == {"experts": Share(rank * each, each, EXPERTS)}
        assert one["shapes"] == {
            "up.weight": (each, HIDDEN, DIM), "up.bias": (each, HIDDEN), "norm.weight": (each, HIDDEN),
            "norm.bias": (each, HIDDEN), "down.weight": (each, DIM, HIDDEN), "down.bias": (each, DIM),
        }  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].mode == "train" and "dropout" not in name])
def test_only_kept_choices_travel(several: dict[int, list[dict[str, Any]]], name: str, ranks: int) -> None:
    """Tokens there, outputs back, and the same for gradients; in the dtype of the arithmetic, counts but once."""
    case, answers = CASES[name], [answer[name] for answer in several[ranks]]
    dtype = torch.bfloat16 if case.autocast else case.dtype
    for one in answers:
        rows = [(shape[0], kind) for shape, kind in one["sent"] if len(shape) == 2 and shape[1] == DIM]
        (there, back, gradient_there, gradient_back), kinds = zip(*rows, strict=True)
        assert set(kinds) == {dtype}
        assert there == gradient_there == one["kept"] and back == gradient_back
        counts = [shape for shape, kind in one["sent"] if kind in (torch.int32, torch.int64)]
        assert counts == [(ranks, EXPERTS // ranks)]
        one["arrived"] = back
    assert sum(one["arrived"] for one in answers) == sum(one["kept"] for one in answers)


def test_what_must_occur_occurs(alone: Callable[..., Any]) -> None:
    """Else the equalities above would say little of drops, steering and dropout."""
    kept = {name: [one["kept"] for one in alone(name, 4)[0]] for name in CASES}
    choices = {name: [t * case.config.get("top_k", 1) for t in case.tokens] for name, case in CASES.items()}
    for name in ("capacity", "capacity, top 2", "one expert gets all, few places", "dropout", "evaluation"):
        assert sum(kept[name]) < sum(choices[name]), name
    for name in ("dropless", "dropless, top 2", "one expert gets all", "nobody to some ranks"):
        assert kept[name] == choices[name], name
    for name, experts in (("one expert gets all", {5}), ("nobody to some ranks", {2, 3})):
        chosen = {e for one in alone(name, 4)[0] for e in one["expert"].reshape(-1).tolist()}
        assert chosen == experts, name
    dropped, plain = (alone(name, 2)[0][0]["y"] for name in ("dropout", "capacity, top 2"))
    assert not torch.allclose(dropped, plain)


def test_one_process_keeps_all_and_needs_no_exchange() -> None:
    layer = Case().layer("loop")
    assert expert_shares(layer) == {"experts": Share(0, EXPERTS, EXPERTS)}
    assert isinstance(layer.experts, Experts) and layer.experts.exchange is None


def test_frozen_experts_stay_frozen() -> None:
    layer = Case().layer("loop")
    layer.experts.requires_grad_(False)
    layer.experts.keep(Share(2, 3, EXPERTS), exchange=None)  # type: ignore[arg-type]
    assert [p.requires_grad for p in layer.experts.parameters()] == [False] * 4
    assert torch.equal(layer.experts.up.weight, Case().layer("loop").experts.up.weight[2:5])


def test_what_is_beside_the_experts_is_computed_while_the_tokens_travel() -> None:
    done: list[str] = []

    class Noting(Exchange):
        def send(self, x_TD: Tensor, plan: Assignment) -> Journey:
            done.append("send")
            return super().send(x_TD, plan)

        def send_back(self, out_RD: Tensor, journey: Journey, plan: Assignment) -> Tensor:
            done.append("send back")
            return super().send_back(out_RD, journey, plan)

    case = Case({"shared_expert": True}, mode="eval")
    layer, (x_TD, _) = case.layer("loop"), case.group(0)
    assert layer.shared_expert is not None
    layer.shared_expert.register_forward_hook(lambda *_: done.append("beside"))
    expected, _ = layer(x_TD)
    done.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        layer.experts.keep(Share(0, EXPERTS, EXPERTS), Noting(dist.group.WORLD))
        torch.testing.assert_close(layer(x_TD)[0], expected, **tolerance(case))
    finally:
        dist.destroy_process_group()
    assert done == ["send", "beside", "send back"]
