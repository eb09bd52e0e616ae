"""The dense network, and the shared expert that is one."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vlmoe_core.moe.config import MoEConfig
from vlmoe_core.moe.dense import DenseFFN
from vlmoe_core.moe.layer import SparseFFN


def layer_of(**values: Any) -> SparseFFN:
    torch.manual_seed(0)
    return SparseFFN(8, 16, MoEConfig.model_validate({"num_experts": 4, **values}), init_std=0.3).double()


def test_two_linear_maps_with_gelu_between() -> None:
    ffn, x = DenseFFN(8, 16), torch.randn(5, 8)
    assert {name: tuple(p.shape) for name, p in ffn.named_parameters()} == {
        "up.weight": (16, 8),
        "up.bias": (16,),
        "down.weight": (8, 16),
        "down.bias": (8,),
    }
    hidden = x @ ffn.up.weight.T + ffn.up.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(ffn(x), hidden @ ffn.down.weight.T + ffn.down.bias)


@pytest.mark.parametrize("experts", ["grouped", "loop"])
def test_the_shared_expert_serves_every_token_dropped_ones_as_well(experts: str) -> None:
    values = {"top_k": 2, "eval_capacity_factor": 0.25, "experts": experts}
    layer, plain = layer_of(**values, shared_expert=True).eval(), layer_of(**values).eval()
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if not n.startswith("shared_expert.")})
    x = torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    y, plan = layer(x)
    routed, same = plain(x)
    assert torch.equal(plan.kept_TK, same.kept_TK)
    assert layer.shared_expert is not None
    torch.testing.assert_close(y, routed + layer.shared_expert(x))
    dropped = ~plan.kept_TK.any(1)
    assert 0 < dropped.sum() < 24
    assert (routed[dropped] == 0).all()
    torch.testing.assert_close(y[dropped], layer.shared_expert(x[dropped]))
    y[dropped].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.shared_expert.parameters())


def test_without_the_switch_there_is_no_shared_expert() -> None:
    assert layer_of().shared_expert is None
    assert not any("shared" in name for name in layer_of().state_dict())


def test_the_shared_expert_follows_autocast() -> None:
    layer = layer_of(shared_expert=True).float().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x := torch.randn(6, 8))
    assert y.dtype == torch.bfloat16
    wanted, _ = layer(x)
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=0.05 * wanted.abs().max().item())
    assert layer.shared_expert is not None
    hidden = F.gelu(F.linear(x, layer.shared_expert.up.weight, layer.shared_expert.up.bias))
    torch.testing.assert_close(
        wanted - layer.experts(x, layer.router(x)),
        F.linear(hidden, layer.shared_expert.down.weight, layer.shared_expert.down.bias),
    )


def test_a_sub_norm_stands_before_the_second_map() -> None:
    ffn, x = DenseFFN(8, 16, sub_norm_eps=0.1), torch.randn(5, 8)
    assert ffn.norm is not None
    torch.nn.init.normal_(ffn.norm.weight)
    torch.nn.init.normal_(ffn.norm.bias)
    hidden = F.gelu(ffn.up(x))
    centred = hidden - hidden.mean(1, keepdim=True)
    hidden = centred / (centred.square().mean(1, keepdim=True) + 0.1).sqrt() * ffn.norm.weight + ffn.norm.bias
    torch.testing.assert_close(ffn(x), ffn.down(hidden))


def sub_normed(**values: Any) -> SparseFFN:
    config = MoEConfig.model_validate({"num_experts": 4, "experts": "loop", **values})
    torch.manual_seed(0)
    layer = SparseFFN(8, 16, config, init_std=0.3, sub_norm_eps=0.1)
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("top_k", [1, 2])
def test_each_expert_has_a_sub_norm_of_its_own(top_k: int) -> None:
    layer = sub_normed(top_k=top_k, shared_expert=True).double().eval()
    x = torch.randn(24, 8, dtype=torch.float64)
    y, plan = layer(x)
    state, wanted = layer.state_dict(), layer.shared_expert(x)  # type: ignore[misc]
    assert state["experts.norm.weight"].shape == state["experts.norm.bias"].shape == (4, 16)
    assert layer.shared_expert is not None and layer.shared_expert.norm is not None
    assert len(set(plan.expert_TK.flatten().tolist())) == 4
    for token in range(24):
        for expert, weight in zip(plan.expert_TK[token].tolist(), plan.weight_TK[token], strict=True):
            dense = DenseFFN(8, 16, sub_norm_eps=0.1).double()
            dense.load_state_dict(
                {n.removeprefix("experts."): t[expert] for n, t in state.items() if n.startswith("experts.")}
            )
            wanted[token] += weight * dense(x[token])
    torch.testing.assert_close(y, wanted)


def test_the_sub_norms_of_experts_follow_autocast() -> None:
    layer = sub_normed().eval()
    x = torch.randn(24, 8)
    wanted, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = layer(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=0.05 * wanted.abs().max().item())
