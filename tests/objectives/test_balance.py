"""Balance losses of a model's sparse layers: which groups, over which ranks, in value and gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.support import SHARED, SPARSE, VOCAB, batch_of, config_of
from tests.train.support import on_ranks
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.model.block import Routed
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.moe import scope
from vlmoe_core.moe.config import BalanceConfig
from vlmoe_core.moe.losses import balance_loss
from vlmoe_core.moe.plan import RoutingPlan, make_plan
from vlmoe_core.objectives.balance import Balance

Key = tuple[StreamName, str, int]
"""Stream, pool and layer of a plan."""

EVERY = {"vloss": 1.0, "switch": 0.7, "z": 0.3, "local_entropy": 0.4, "global_entropy": 0.6}


def pools_of(vision: str, text: str) -> dict[str, Any]:
    scopes = {"vision": vision, "text": text}
    return {"moe": {m: {**moe, "balance": EVERY, "balance_scope": scopes[m]} for m, moe in SPARSE.items()}}


def shared_of(scope: str) -> dict[str, Any]:
    moe = SHARED["moe"]["shared"] | {"balance": EVERY, "text_balance": EVERY, "balance_scope": scope}
    return {"expert_pool": "shared", "moe": {"shared": moe}}


MODELS: dict[str, dict[str, Any]] = {
    "own": pools_of("ranks", "ranks"),
    "mixed": pools_of("ranks", "micro"),
    "own micro": pools_of("micro", "micro"),
    "shared": shared_of("ranks"),
    "shared micro": shared_of("micro"),
}
Lengths = Mapping[StreamName, list[int]]
GROUPS: dict[str, tuple[Lengths, Lengths]] = {
    "full": (
        {"image": [0, 0], "text": [6, 3], "pair": [4, 5]},
        {"image": [0], "text": [9], "pair": [2, 7, 3]},
    ),
    "empty": ({"image": [0, 0], "text": [6, 3], "pair": []}, {"image": [0], "text": [], "pair": [2, 7, 3]}),
    "all empty": ({"image": [], "text": [], "pair": []}, {"image": [], "text": [], "pair": []}),
    "no texts": ({"image": [0], "text": [5], "pair": [4, 5]}, {"image": [0], "text": [9], "pair": [-1, -1]}),
}
"""Text lengths of each rank's streams; -1: an image without its text."""


def batches_of(config: ModelConfig, lengths: Lengths) -> dict[StreamName, Batch]:
    """A batch a stream; one of images without texts is not fused."""
    return {
        stream: batch_of("image", [0] * len(of_stream), config)
        if -1 in of_stream
        else batch_of(stream, of_stream, config)
        for stream, of_stream in lengths.items()
    }


@dataclass
class Plans:
    """The plans of a micro-batch, each from logits of its own, so that no layer's logits depend on another's."""

    routed: dict[StreamName, tuple[Routed, ...]]
    logits: dict[Key, Tensor]


def plan_of(clean: Tensor, noise: Tensor, config: ModelConfig, pool: str) -> RoutingPlan:
    moe = config.pools[pool]
    return make_plan(
        clean,
        clean + noise,
        top_k=moe.top_k,
        weights="gate",
        priority="gate",
        capacity=None,
        noise_std=1 / moe.num_experts,
    )


def plans_of(config: ModelConfig, batches: Mapping[StreamName, Batch], seed: int) -> Plans:
    """Which layers run is the encoder's word; the logits are random."""
    torch.manual_seed(seed)
    encoder = Encoder(config, VOCAB).double().train()
    plans = Plans({}, {})
    for stream in STREAMS:
        again = []
        for one in encoder(batches[stream]).routed:
            clean = torch.randn_like(one.plan.clean_logits_TE).requires_grad_()
            plans.logits[stream, one.pool, one.layer] = clean
            again.append(one._replace(plan=plan_of(clean, noise_of(clean, seed), config, one.pool)))
        plans.routed[stream] = tuple(again)
    return plans


def noise_of(clean: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clean.shape, generator=generator, dtype=clean.dtype) / clean.shape[1]


def balance_on_rank() -> dict[tuple[str, str], dict[str, Any]]:
    """For a child: the parts of every model and case, and the gradient of their sum."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for model, values in MODELS.items():
        for case, lengths in GROUPS.items():
            found[model, case] = balanced(config_of(**values), lengths[rank], rank)
    dist.destroy_process_group()
    return found


def balanced(config: ModelConfig, lengths: Lengths, rank: int) -> dict[str, Any]:
    batches = batches_of(config, lengths)
    plans, balance = plans_of(config, batches, rank), Balance(config)
    parts = balance.parts(batches, plans.routed)
    assert {name: part.count for name, part in parts.items()} == balance.counts(batches)
    torch.stack([part.sum.double() for part in parts.values()]).sum().backward()
    return {
        "sums": {name: part.sum.item() for name, part in parts.items()},
        "grads": {key: grad_of(clean).numpy() for key, clean in plans.logits.items()},
    }


def grad_of(clean: Tensor) -> Tensor:
    return torch.zeros_like(clean) if clean.grad is None else clean.grad


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[str, str], dict[str, Any]]]:
    answers = on_ranks(2, balance_on_rank)
    for answer in answers:
        assert isinstance(answer, dict), answer
    return answers


def sets_of(config: ModelConfig) -> list[tuple[str, int, str, BalanceConfig]]:
    """(pool, layer, tokens, losses)"""
    found = []
    for pool, moe in config.pools.items():
        sets = {pool: moe.balance}
        if config.moe.shared is not None:
            sets |= {"vision": config.moe.shared.vision_balance, "text": config.moe.shared.text_balance}
        found += [
            (pool, layer, tokens, losses) for layer in config.sparse_layers(pool) for tokens, losses in sets.items()
        ]
    return found


def rows_of(batch: Batch, pool: str, tokens: str, clean: Tensor) -> Tensor:
    if tokens == pool:
        return clean
    images = batch.num_images * 17
    return clean[:images] if tokens == "vision" else clean[images:]


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("model", MODELS)
def test_balance_over_two_ranks(model: str, case: str, found: list[dict[tuple[str, str], dict[str, Any]]]) -> None:
    config = config_of(**MODELS[model])
    batches = [batches_of(config, lengths) for lengths in GROUPS[case]]
    plans = [plans_of(config, batches[rank], rank) for rank in range(2)]
    wanted = [{f"balance/{tokens}/{layer}": 0.0 for _, layer, tokens, _ in sets_of(config)} for _ in range(2)]
    total = torch.zeros((), dtype=torch.float64)
    for pool, layer, tokens, losses in sets_of(config):
        for stream in STREAMS if layer < 2 else STREAMS[:2]:
            groups = []
            for rank in range(2):
                clean = plans[rank].logits.get(
                    (stream, pool, layer), torch.zeros(0, config.pools[pool].num_experts).double()
                )
                rows = [rows_of(batches[rank][stream], pool, tokens, t) for t in (clean, noise_of(clean, rank))]
                groups.append(rows)
            if config.pools[pool].balance_scope == "micro":
                values = [balance_loss(plan_of(*rows, config, pool), losses) for rows in groups]
            else:
                clean, noise = (torch.cat([rows[i] for rows in groups]) for i in range(2))
                joined = balance_loss(plan_of(clean, noise, config, pool), losses)
                values = [joined * (len(rows[0]) > 0) for rows in groups]
            total = total + sum(values)
            for rank, value in enumerate(values):
                wanted[rank][f"balance/{tokens}/{layer}"] += value.item()
    total.backward()
    for rank in range(2):
        got = found[rank][model, case]
        assert got["sums"] == pytest.approx(wanted[rank], rel=1e-10)
        for key, clean in plans[rank].logits.items():
            torch.testing.assert_close(torch.from_numpy(got["grads"][key]), grad_of(clean), rtol=1e-9, atol=1e-12)
    assert (total.item() > 0) == (case != "all empty")


def test_the_scope_matters_on_two_ranks(found: list[dict[tuple[str, str], dict[str, Any]]]) -> None:
    ranks, micro = found[0]["own", "full"]["sums"], found[0]["own micro", "full"]["sums"]
    assert all(abs(ranks[name] - micro[name]) > 1e-4 for name in ranks)
    assert (
        found[1]["mixed", "full"]["sums"]["balance/text/0"] == found[1]["own micro", "full"]["sums"]["balance/text/0"]
    )


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize(("one", "other"), [("own", "own micro"), ("mixed", "own micro"), ("shared", "shared micro")])
def test_on_one_process_ranks_is_micro(case: str, one: str, other: str) -> None:
    got, wanted = (balanced(config_of(**MODELS[model]), GROUPS[case][0], 0) for model in (one, other))
    assert got["sums"] == wanted["sums"]
    assert all((got["grads"][key] == wanted["grads"][key]).all() for key in wanted["grads"])


def test_micro_asks_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a group that is balanced on its own was sent to the ranks")

    monkeypatch.setattr("vlmoe_core.objectives.balance.over_ranks", refuse)
    balanced(config_of(**MODELS["own micro"]), GROUPS["full"][0], 0)
    with pytest.raises(AssertionError, match="sent to the ranks"):
        balanced(config_of(**MODELS["mixed"]), GROUPS["full"][0], 0)


def test_sets_without_a_weight_are_no_sites() -> None:
    config = config_of(**shared_of("micro"))
    assert {site.tokens for site in Balance(config).sites} == {"shared", "vision", "text"}
    moe = {"num_experts": 4, "router": "uniform"}
    assert Balance(config_of(expert_pool="shared", moe={"shared": moe})).sites == ()
    assert Balance(config_of()).sites == ()
    assert Balance(config_of(moe={"vision": moe, "text": {"num_experts": 4, "layers": [0]}})).counts(
        batches_of(config, GROUPS["full"][0])
    ) == {"balance/text/0": 2}


def test_the_reduction_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: calls.append(tuple(tensor.shape)))
    own = [torch.ones(3, requires_grad=True), torch.zeros(2)]
    totals = scope.over_ranks(own, [True, False])
    assert calls == [(7,)]
    assert [t.tolist() for t in totals] == [[1.0] * 3, [0.0] * 2]
