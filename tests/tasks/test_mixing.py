from dataclasses import replace

import torch

from tests.model.support import batch_of, config_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.tasks.mixing import Mixing

CLASSES = 5
LABELS = [0, 3, 1, 4]


def batch() -> Batch:
    """Each picture is of one grey of its own."""
    greys = torch.tensor([10, 20, 40, 80], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 16, 16)
    images = batch_of("image", [0] * 4, config_of())
    return replace(images, pixels_ICHW=greys.clone(), targets=torch.tensor(LABELS))


def mixed(seed: int, mixup: float = 0, cutmix: float = 0, smoothing: float = 0) -> Batch:
    torch.manual_seed(seed)
    return Mixing(mixup, cutmix, smoothing, CLASSES)(batch())


def share_of(result: Batch, number: int = 0) -> float:
    """The weight of a picture's own label."""
    assert result.targets is not None
    return result.targets[number, LABELS[number]].item()


def test_targets_sum_to_one_and_name_the_two_labels() -> None:
    for seed in range(40):
        for settings in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}):
            targets = mixed(seed, **settings).targets
            assert targets is not None and targets.shape == (4, CLASSES)
            torch.testing.assert_close(targets.sum(1), torch.ones(4))
            floor = settings.get("smoothing", 0.0) / CLASSES
            for row, own, other in zip(targets.tolist(), LABELS, LABELS[::-1], strict=True):
                assert all(abs(row[n] - floor) < 1e-6 for n in set(range(CLASSES)) - {own, other})


def test_mixup_blends_with_the_same_share() -> None:
    for seed in range(20):
        result = mixed(seed, mixup=0.8)
        share = share_of(result)
        pixels = batch().pixels_ICHW.double()
        wanted = share * pixels + (1 - share) * pixels.flip(0)
        torch.testing.assert_close(result.pixels_ICHW.double(), wanted, rtol=0, atol=1e-4)


def test_cutmix_shares_as_many_pixels_as_it_pastes() -> None:
    shares = set()
    for seed in range(60):
        result = mixed(seed, cutmix=1.0)
        assert result.pixels_ICHW.dtype == torch.uint8
        for own, other in ((0, 3), (1, 2), (2, 1), (3, 0)):
            picture, before = result.pixels_ICHW[own], batch().pixels_ICHW
            pasted = (picture == before[other]).all(0)
            assert torch.equal(pasted, ~(picture == before[own]).all(0))
            rows, columns = pasted.any(1), pasted.any(0)
            assert torch.equal(pasted, rows[:, None] & columns), "a box"
            assert abs(share_of(result, own) - (1 - pasted.double().mean().item())) < 1e-6
        shares.add(round(share_of(result), 4))
    assert len(shares) > 20


def test_cut_boxes_stand_anywhere() -> None:
    total = sum((mixed(seed, cutmix=1.0).pixels_ICHW[0, 0] == 80).double() for seed in range(400))
    assert isinstance(total, torch.Tensor)
    assert total.min() > 40, "every place is pasted now and then"
    for turned in (total.flip(0), total.flip(1), total.T):
        assert (turned - total).abs().max() < 90


def test_smoothing_alone_leaves_the_pictures() -> None:
    result = mixed(0, smoothing=0.2)
    assert torch.equal(result.pixels_ICHW, batch().pixels_ICHW)
    wanted = torch.full((4, CLASSES), 0.2 / CLASSES)
    for number, label in enumerate(LABELS):
        wanted[number, label] += 0.8
    torch.testing.assert_close(result.targets, wanted)


def test_one_seed_draws_once() -> None:
    first, again, other = (mixed(seed, 0.8, 1.0, 0.1) for seed in (4, 4, 5))
    assert torch.equal(first.pixels_ICHW, again.pixels_ICHW) and torch.equal(first.targets, again.targets)  # type: ignore[arg-type]
    assert not torch.equal(first.targets, other.targets)  # type: ignore[arg-type]


def test_each_batch_draws_mixup_or_cutmix() -> None:
    cuts = sum(mixed(seed, 0.8, 1.0).pixels_ICHW.dtype == torch.uint8 for seed in range(400))
    assert abs(cuts - 200) < 4 * 10  # four standard deviations
    assert all(mixed(seed, mixup=0.8).pixels_ICHW.is_floating_point() for seed in range(20))


def test_shares_are_drawn_from_the_beta_distribution() -> None:
    for alpha in (0.3, 2.0):
        shares = torch.tensor([share_of(mixed(seed, mixup=alpha)) for seed in range(600)])
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(shares.mean().item() - 0.5) < 4 * (variance / 600) ** 0.5
        assert abs(shares.var().item() - variance) < 0.2 * variance
