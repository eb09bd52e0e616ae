import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.tokenizers.quantiser import Quantiser, moved, revived

K, DIM = 12, 5


def unit(rows: int, seed: int, dim: int = DIM) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def quantiser(seed: int = 0) -> Quantiser:
    torch.manual_seed(seed)
    return Quantiser(K, DIM)


def test_nearest_is_the_smallest_distance() -> None:
    codes = quantiser()
    features_NF = unit(200, 1)
    wanted = [int(((codes.codes_KF - feature) ** 2).sum(1).argmin()) for feature in features_NF]
    assert codes.nearest(features_NF).tolist() == wanted


def test_distances_are_not_lowered_by_autocast() -> None:
    codes, features_NF = quantiser(), unit(3000, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes.nearest(features_NF), (features_NF.double() @ codes.codes_KF.double().T).argmax(1))


def by_the_formula(
    codes: NDArray[np.float64], features: NDArray[np.float64], ids: list[int], decay: float
) -> NDArray[np.float64]:
    """The update of each code, one after the other."""
    after = codes.copy()
    for k in range(len(codes)):
        own = features[[i for i, found in enumerate(ids) if found == k]]
        if len(own):
            mean = own.mean(0) / np.linalg.norm(own.mean(0))
            code = decay * codes[k] + (1 - decay) * mean
            after[k] = code / np.linalg.norm(code)
    return after


def sums_of(features_NF: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.stack([features_NF[ids_N == k].sum(0) for k in range(K)])
    return sums, torch.bincount(ids_N, minlength=K)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_codes_move_by_the_formula(decay: float) -> None:
    codes_KF, features_NF = unit(K, 0).double(), unit(40, 1).double()
    ids_N = torch.randint(0, K - 2, (40,), generator=torch.Generator().manual_seed(2))
    after = moved(codes_KF, *sums_of(features_NF, ids_N), decay)
    wanted = by_the_formula(codes_KF.numpy(), features_NF.numpy(), ids_N.tolist(), decay)
    np.testing.assert_allclose(after.numpy(), wanted, atol=1e-14)
    assert torch.equal(after[K - 2 :], codes_KF[K - 2 :]), "codes without patches stay, to the last bit"


def test_shares_are_the_moving_average_of_what_each_code_gets() -> None:
    codes = quantiser()
    before_K = codes.shares_K.clone()
    counts_K = torch.arange(K).float()
    codes.learn(torch.zeros(K, DIM), counts_K, decay=0.9, revive_below=0.0, seed=0)
    torch.testing.assert_close(codes.shares_K, 0.9 * before_K + 0.1 * counts_K / counts_K.sum())


def test_a_step_without_patches_changes_nothing() -> None:
    codes = quantiser()
    codes.start(unit(60, 1), iterations=3, seed=0)
    before = {name: value.clone() for name, value in codes.state_dict().items()}
    codes.learn(torch.zeros(K, DIM), torch.zeros(K), decay=0.5, revive_below=0.03, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in codes.state_dict().items())


def test_a_dead_code_takes_half_of_a_busy_one() -> None:
    codes_KF = unit(K, 0)
    shares_K = torch.full((K,), 1 / K)
    shares_K[3], shares_K[7], shares_K[5] = 0.001 / K, 1.9 / K, 1.099 / K
    after_KF, shared_K = revived(codes_KF, shares_K, 0.03, seed=4)
    assert float((after_KF[3] - codes_KF[7]).norm()) < 0.2, "beside the busiest"
    assert shared_K[3] == shared_K[7] == shares_K[7] / 2
    others = [k for k in range(K) if k != 3]
    assert torch.equal(after_KF[others], codes_KF[others])
    torch.testing.assert_close(after_KF.norm(dim=1), torch.ones(K))
    around_NF = F.normalize(codes_KF[7] + 0.1 * torch.randn(400, DIM), dim=-1)
    won = torch.bincount((around_NF @ after_KF[[3, 7]].T).argmax(1), minlength=2)
    assert int(won.min()) > 100, "each of the two gets its part of the patches"


def test_the_deadest_goes_to_the_busiest_and_nobody_else_moves() -> None:
    codes_KF, shares_K = unit(K, 0), torch.full((K,), 1 / K)
    shares_K[0], shares_K[1] = 0.002 / K, 0.001 / K
    shares_K[10], shares_K[11] = 1.4 / K, 1.5 / K
    after_KF, _ = revived(codes_KF, shares_K, 0.03, seed=0)
    assert float((after_KF[1] - codes_KF[11]).norm()) < 0.2
    assert float((after_KF[0] - codes_KF[10]).norm()) < 0.2


def test_revival_is_the_same_on_every_rank_and_differs_from_step_to_step() -> None:
    codes_KF, shares_K = unit(K, 0), torch.full((K,), 1 / K)
    shares_K[0], shares_K[1] = 0.0, 2 / K
    torch.manual_seed(1)
    first, _ = revived(codes_KF, shares_K, 0.03, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, revived(codes_KF, shares_K, 0.03, seed=5)[0])
    assert not torch.equal(first, revived(codes_KF, shares_K, 0.03, seed=6)[0])


@pytest.mark.parametrize("below", [0.0, 0.03])
def test_without_a_dead_code_nothing_is_revived(below: float) -> None:
    codes_KF, shares_K = unit(K, 0), torch.full((K,), 1 / K)
    shares_K[0], shares_K[1] = (0.0 if below == 0 else 0.1) / K, 1.9 / K
    after_KF, after_K = revived(codes_KF, shares_K, below, seed=0)
    assert torch.equal(after_KF, codes_KF)
    assert torch.equal(after_K, shares_K)


def test_dead_codes_come_back_to_use() -> None:
    """All patches lie in a corner that one code sees: after some steps all codes are in use."""
    codes = quantiser()
    features_NF = F.normalize(torch.tensor([4.0, 1, 1, 1, 1]) + torch.randn(600, DIM), dim=-1)
    used = []
    for step in range(200):
        ids_N = codes.nearest(features_NF)
        used.append(len(ids_N.unique()))
        codes.learn(*sums_of(features_NF, ids_N), decay=0.9, revive_below=0.1, seed=step)
    assert used[0] < K
    assert used[-1] == K


def test_the_start_is_k_means() -> None:
    codes, centres_KF = quantiser(), unit(K, 3)
    assert not codes.started
    features_NF = F.normalize(centres_KF.repeat(30, 1) + 0.02 * torch.randn(30 * K, DIM), dim=-1)
    codes.start(features_NF, iterations=10, seed=0)
    assert codes.started
    torch.testing.assert_close(codes.codes_KF.norm(dim=1), torch.ones(K))
    counts_K = torch.bincount(codes.nearest(features_NF), minlength=K)
    torch.testing.assert_close(codes.shares_K, counts_K / len(features_NF))
    near = (features_NF - codes.codes_KF[codes.nearest(features_NF)]).square().sum(1).mean()
    assert float(near) < float((features_NF - centres_KF[0]).square().sum(1).mean()) / 10
    again = quantiser(seed=9)
    again.start(features_NF, iterations=10, seed=0)
    assert torch.equal(again.codes_KF, codes.codes_KF), "the same features and seed give the same codes"


def test_codes_have_no_gradient_and_belong_to_the_state() -> None:
    assert list(quantiser().parameters()) == []
    assert list(quantiser().state_dict()) == ["codes_KF", "shares_K"]
