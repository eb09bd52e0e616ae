import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.support import SPARSE, VOCAB, batch_of, collate_of, config_of, randomise, samples_of
from tests.train.support import on_ranks
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.objectives.contrastive import alone, contrast
from vlmoe_core.objectives.heads import ContrastHead, pool_cls

WIDTH = 6
RANKS: dict[str, tuple[list[int], list[int]]] = {
    "unequal": ([0, 1, 0], [2, 1, 3, 4, 4]),
    "an empty one": ([], [0, 1, 1]),
    "all empty": ([], []),
    "one picture": ([7, 7], [7]),
}
"""Pictures of the pairs of each rank; some are on both."""


def states_of(pictures: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """[CLS] of the images and of the texts of pairs."""
    rng = np.random.default_rng(seed)
    image, text = (torch.from_numpy(rng.normal(size=(len(pictures), WIDTH))) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_()


def head_of(scale: float = 7.0) -> ContrastHead:
    torch.manual_seed(3)
    head = ContrastHead(WIDTH).double()
    with torch.no_grad():
        head.temperature.fill_(math.log(scale))
    return head


def units(head: ContrastHead, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = head(image, text)
    return found


def gradients(head: ContrastHead, *states: Tensor) -> dict[str, Any]:
    found = {name: p.grad for name, p in head.named_parameters()}
    found |= {f"states {n}": state.grad for n, state in enumerate(states)}
    return {name: g.numpy().copy() for name, g in found.items() if g is not None}


def plain(image: Tensor, text: Tensor, ids: list[int], scale: Tensor) -> list[Tensor]:
    """Of each pair the mean of two cross-entropies, every text of the same picture a right answer."""
    losses = []
    for i in range(len(ids)):
        same = [j for j, other in enumerate(ids) if other == ids[i]]
        rows = [scale * torch.dot(image[i], text[j]) for j in range(len(ids))]
        columns = [scale * torch.dot(image[j], text[i]) for j in range(len(ids))]
        both = [torch.logsumexp(torch.stack(x), 0) - sum(x[j] for j in same) / len(same) for x in (rows, columns)]
        losses.append((both[0] + both[1]) / 2)
    return losses


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 1, 0, 2, 1, 0], [5], [4, 4]])
def test_contrast_equals_a_double_loop(ids: list[int]) -> None:
    head = head_of()
    image, text = states_of(ids, 0)
    unit = units(head, image, text)
    contrast(*unit, torch.tensor(ids), head.scale, over_ranks=False).backward()
    got = gradients(head, image, text)
    head.zero_grad()
    image.grad = text.grad = None
    wanted = torch.stack(plain(*units(head, image, text), ids, head.scale)).sum()
    wanted.backward()
    assert contrast(*unit, torch.tensor(ids), head.scale, over_ranks=True).item() == pytest.approx(
        wanted.item(), rel=1e-12, abs=1e-14
    )
    for name, gradient in gradients(head, image, text).items():
        np.testing.assert_allclose(got[name], gradient, rtol=1e-10, atol=1e-13, err_msg=name)


def contrast_on_rank() -> dict[str, Any]:
    """For a child: value, gradients and value among its own pairs of each case."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for case, pictures in RANKS.items():
        head, own = head_of(), pictures[rank]
        states = states_of(own, rank)
        ids = torch.tensor(own, dtype=torch.int64)
        value = contrast(*units(head, *states), ids, head.scale, over_ranks=True)
        value.backward()
        own_value = contrast(*units(head, *states), ids, head.scale, over_ranks=False).item()
        found[case] = (value.item(), gradients(head, *states), own_value)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found() -> list[Any]:
    answers = on_ranks(2, contrast_on_rank)
    for answer in answers:
        assert isinstance(answer, dict), answer
    return answers


@pytest.mark.parametrize("case", RANKS)
def test_ranks_together_are_one_process(found: list[Any], case: str) -> None:
    head, (first, second) = head_of(), RANKS[case]
    states = [states_of(pictures, rank) for rank, pictures in enumerate(RANKS[case])]
    image, text = (torch.cat(parts) for parts in zip(*states, strict=True))
    losses = plain(*units(head, image, text), first + second, head.scale)
    if losses:
        torch.stack(losses).sum().backward()
    values, parts, alone_values = zip(*(answer[case] for answer in found), strict=True)
    own = [losses[: len(first)], losses[len(first) :]]
    for rank in range(2):
        assert values[rank] == pytest.approx(sum(x.item() for x in own[rank]), rel=1e-10, abs=1e-12)
        for name, gradient in gradients(head, *states[rank]).items():
            if name.startswith("states"):
                np.testing.assert_allclose(parts[rank][name], gradient, rtol=1e-10, atol=1e-12, err_msg=name)
        here = RANKS[case][rank]
        wanted = plain(*units(head, *states[rank]), here, head.scale)
        assert alone_values[rank] == pytest.approx(sum(x.item() for x in wanted), rel=1e-10, abs=1e-12)
    for name, gradient in gradients(head).items():
        np.testing.assert_allclose(sum(p[name] for p in parts), gradient, rtol=1e-10, atol=1e-12, err_msg=name)


def test_the_lengths_of_all_ranks_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits for the device."""
    reads: list[str] = []
    as_list = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append("list") or as_list(self))
    for name in ("__int__", "__index__", "item"):
        monkeypatch.setattr(Tensor, name, lambda self, name=name: pytest.fail(f"{name} waits for the device"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_gather", lambda parts, own: [part.copy_(own) for part in parts])
    head = head_of()
    contrast(*units(head, *states_of([0, 1], 0)), torch.tensor([0, 1]), head.scale, over_ranks=True)
    assert reads == ["list"]


def test_the_scale_is_bounded_and_starts_at_clips() -> None:
    assert ContrastHead(WIDTH).scale.item() == pytest.approx(1 / 0.07)
    assert head_of(99.0).scale.item() == pytest.approx(99)
    assert head_of(1e6).scale.item() == 100


def test_features_are_unit_vectors_of_linear_maps() -> None:
    head, (image, text) = head_of(), states_of([0, 1, 2], 0)
    for got, state, linear in zip(head(image, text), (image, text), (head.image, head.text), strict=True):
        mapped = state @ linear.weight.T
        torch.testing.assert_close(got, mapped / mapped.square().sum(1, keepdim=True).sqrt())
        assert linear.bias is None


def test_autocast_keeps_the_loss_in_float32() -> None:
    head, (image, text) = head_of(80.0).float(), (s.float() for s in states_of([0, 1, 2], 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unit = units(head, image, text)
        got = contrast(*unit, torch.arange(3), head.scale, over_ranks=False)
    assert got.dtype == torch.float32
    image_XD, text_XD = (u.double() for u in unit)
    wanted = torch.stack(plain(image_XD, text_XD, [0, 1, 2], head.scale.double())).sum()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def singles(stream: StreamName, lengths: list[int]) -> Batch:
    """The images, or the texts, of the pairs of those lengths, collated alone with nothing hidden."""
    config = config_of()
    samples = []
    for sample in samples_of("pair", lengths, config):
        assert sample.text_ids is not None and sample.text_targets is not None and sample.patch_mask is not None
        image = replace(sample, text_ids=None, text_targets=None, patch_mask=np.zeros_like(sample.patch_mask))
        text = replace(
            sample, pixels=None, patch_mask=None, text_targets=np.full_like(sample.text_targets, -1), image_id=-1
        )
        samples.append(image if stream == "image" else text)
    return collate_of(stream, samples, config)


def corrupted(lengths: list[int]) -> Batch:
    """The pairs, their hidden words replaced."""
    batch = batch_of("pair", lengths, config_of())
    assert (batch.text_targets_T >= 0).any() == bool(lengths)
    return replace(batch, text_ids_T=torch.where(batch.text_targets_T >= 0, 49, batch.text_ids_T))


@pytest.mark.parametrize("lengths", [[6, 2, 11, 5], []])
@pytest.mark.parametrize("stream", ["image", "text"])
def test_alone_is_collating_one_by_one_with_nothing_hidden(stream: StreamName, lengths: list[int]) -> None:
    got, wanted = alone(corrupted(lengths))[stream], singles(stream, lengths)
    for name, value in vars(wanted).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(got, name), value), name
        else:
            assert getattr(got, name) == value, name


@pytest.mark.parametrize("stream", ["image", "text"])
def test_the_encoder_sees_what_single_examples_show(stream: StreamName) -> None:
    torch.manual_seed(0)
    encoder = Encoder(config_of(moe=SPARSE), VOCAB)
    randomise(encoder)
    encoder.double().eval()
    got = encoder(alone(corrupted([6, 2, 11]))[stream])
    assert got.states_TD.shape[0] == (51 if stream == "image" else 19)
    torch.testing.assert_close(got.states_TD, encoder(singles(stream, [6, 2, 11])).states_TD, rtol=0, atol=1e-12)
    starts = [0, 17, 34] if stream == "image" else [0, 6, 8]
    assert torch.equal(pool_cls(got), got.states_TD[starts])


def test_alone_leaves_the_batch_as_it_is() -> None:
    batch, again = corrupted([4, 3]), corrupted([4, 3])
    alone(batch)
    assert all(torch.equal(value, getattr(again, n)) for n, value in vars(batch).items() if isinstance(value, Tensor))
