import pytest
import torch

from tests.moe.routers.support import identities, router_of


def expert_by_hand(identity: int, experts: int) -> int:
    """The upper half of a 32-bit product with 2^32 over the golden ratio."""
    return ((identity * 2_654_435_769) & 0xFFFFFFFF) // 65536 % experts


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (5, 3), (32, 2), (3, 3)])
def test_experts_follow_from_the_identity(experts: int, top_k: int) -> None:
    identity = identities(200)
    plan = router_of("hash", experts, top_k=top_k)(torch.randn(200, 8), identity)
    for row, token in zip(plan.expert_TK.tolist(), identity.tolist(), strict=True):
        first = expert_by_hand(token, experts)
        assert row == sorted((first + k) % experts for k in range(top_k))


def test_states_layers_seeds_modes_and_neighbours_change_nothing() -> None:
    identity = identities(50)
    wanted = router_of("hash", 8, top_k=2)(torch.randn(50, 8), identity).expert_TK
    other = router_of("hash", 8, top_k=2, dim=3, seed=9, train=False)
    assert torch.equal(other(torch.randn(50, 3), identity).expert_TK, wanted)
    assert torch.equal(other(torch.randn(50, 3), identity.flip(0)).expert_TK, wanted.flip(0))


@pytest.mark.parametrize("experts", [2, 3, 7, 8, 16, 32, 64])
@pytest.mark.parametrize("top_k", [1, 2])
def test_all_words_of_a_vocabulary_fill_the_experts_evenly(experts: int, top_k: int) -> None:
    words = torch.arange(30000)
    plan = router_of("hash", experts, top_k=top_k)(torch.zeros(30000, 8), words)
    counts = torch.bincount(plan.expert_TK.flatten(), minlength=experts)
    even = 30000 * top_k / experts
    assert 0.9 * even < counts.min() and counts.max() < 1.1 * even


@pytest.mark.parametrize("experts", [4, 16, 32])
def test_the_places_of_an_image_use_every_expert(experts: int) -> None:
    plan = router_of("hash", experts)(torch.zeros(197, 8), torch.arange(197))
    counts = torch.bincount(plan.expert_TK.flatten(), minlength=experts)
    assert counts.min() > 0 and counts.max() < 2.5 * 197 / experts


def test_without_identities_it_says_so() -> None:
    with pytest.raises(ValueError, match="the hash router needs identity_T, the id or place of each token"):
        router_of("hash")(torch.zeros(3, 8))
