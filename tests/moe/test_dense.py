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
