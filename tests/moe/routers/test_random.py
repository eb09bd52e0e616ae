import torch

from tests.moe.routers.support import router_of


def test_k_different_experts_that_the_default_generator_draws() -> None:
    for train in (True, False):
        router = router_of("random", 6, top_k=4, train=train)
        torch.manual_seed(3)
        first, second = router(torch.zeros(40, 8)).expert_TK, router(torch.zeros(40, 8)).expert_TK
        torch.manual_seed(3)
        assert torch.equal(router(torch.ones(40, 8)).expert_TK, first)
        assert not torch.equal(first, second)
        assert all(len(set(row)) == 4 for row in first.tolist())


def test_all_experts_are_as_likely() -> None:
    torch.manual_seed(0)
    plan = router_of("random", 5, top_k=2)(torch.zeros(20000, 8))
    shares = torch.bincount(plan.expert_TK.flatten(), minlength=5) / 20000
    assert (shares - 2 / 5).abs().max() < 0.02
