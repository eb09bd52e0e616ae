import pytest
import torch

from vlmoe_core.objectives.loss import Loss, Part


def loss_of(**parts: tuple[float, int, float]) -> Loss:
    made = {
        name: Part(torch.tensor(value, dtype=torch.float64, requires_grad=True), count, weight, ("text",))
        for name, (value, count, weight) in parts.items()
    }
    return Loss(made)


def test_total_is_weight_times_sum_over_the_count_of_the_step() -> None:
    loss = loss_of(mlm=(6.0, 3, 1.0), mim=(10.0, 4, 0.5))
    total = loss.total({"mlm": 12, "mim": 20, "vlm_text": 7})
    assert total.item() == pytest.approx(6 / 12 + 0.5 * 10 / 20)
    total.backward()
    assert loss.parts["mlm"].sum.grad == pytest.approx(1 / 12)
    assert loss.parts["mim"].sum.grad == pytest.approx(0.5 / 20)


def test_a_part_without_terms_contributes_zero() -> None:
    loss = loss_of(mlm=(6.0, 3, 1.0), mim=(0.0, 0, 1.0))
    assert loss.total({"mlm": 3, "mim": 0}).item() == 2


def test_shares_of_micro_batches_sum_to_the_loss_of_the_step() -> None:
    first, second = loss_of(mlm=(6.0, 3, 2.0)), loss_of(mlm=(1.0, 1, 2.0))
    counts = {"mlm": 4}
    assert (first.total(counts) + second.total(counts)).item() == pytest.approx(2 * 7 / 4)


def test_a_part_without_a_count_is_an_error() -> None:
    with pytest.raises(KeyError):
        loss_of(mlm=(6.0, 3, 1.0)).total({})


def test_detached_keeps_the_numbers_alone() -> None:
    detached = loss_of(mlm=(6.0, 3, 1.0)).detached()
    part = detached.parts["mlm"]
    assert (part.sum.item(), part.count, part.weight, part.streams) == (6.0, 3, 1.0, ("text",))
    assert not part.sum.requires_grad
    assert detached.routed == ()
