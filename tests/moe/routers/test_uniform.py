import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.moe.routers.support import router_of


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(0, 70), experts=st.integers(1, 64), data=st.data())
def test_the_experts_take_turns(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(4, experts)))
    plan = router_of("uniform", experts, top_k=top_k)(torch.randn(tokens, 8))
    for t, row in enumerate(plan.expert_TK.tolist()):
        assert row == sorted((t * top_k + k) % experts for k in range(top_k))
    counts = torch.bincount(plan.expert_TK.flatten(), minlength=experts)
    assert counts.max() - counts.min() <= 1


def test_nothing_is_dropped_at_a_capacity_factor_of_one() -> None:
    plan = router_of("uniform", 8, top_k=2, capacity_factor=1.0)(torch.randn(37, 8))
    assert plan.capacity == 10 and plan.kept_TK.all()
