import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from tests.model.support import SPARSE, collate_of, config_of, samples_of
from tests.tasks.support import QUIET, objective_of, record, shown
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.example import Record, Sample
from vlmoe_core.errors import UsageError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.objectives.contrastive import alone, contrast
from vlmoe_core.objectives.heads import pool_cls
from vlmoe_core.tasks.heads import pool
from vlmoe_core.tasks.kinds import retrieval
from vlmoe_core.tasks.kinds.retrieval import Config, Embedded, Matching, gallery_of, open_task, repaired, with_reranked
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.tasks.task import Scores, Values

PICTURES = [0, 0, 1, 2, 1]
"""Picture of each pair."""


def samples_with(pictures: list[int]) -> list[Sample]:
    """Pairs, those of the same number with the same picture, which is of one grey."""
    config = config_of()
    samples = [shown(s) for s in samples_of("pair", [3, 7, 2, 5, 4][: len(pictures)], config)]
    greys = [np.full((3, 16, 16), 10 * picture, np.uint8) for picture in pictures]
    return [replace(s, pixels=g, image_id=i) for s, g, i in zip(samples, greys, pictures, strict=True)]


def pairs_with(pictures: list[int]) -> Batch:
    return collate_of("pair", samples_with(pictures), config_of())


@pytest.mark.parametrize(
    ("images", "texts"), [([0, 3, 2, 0, 4, 1], [4, 3, 2, 1, 0, 1]), ([2], [1]), ([], []), ([4, 4], [1, 1])]
)
def test_repaired_is_collating_the_new_pairs(images: list[int], texts: list[int]) -> None:
    samples = samples_with([0, 1, 2, 3, 4])
    batch = collate_of("pair", samples, config_of())
    got = repaired(batch, torch.tensor(images, dtype=torch.int64), torch.tensor(texts, dtype=torch.int64))
    new = [
        replace(samples[t], pixels=samples[i].pixels, image_id=samples[i].image_id)
        for i, t in zip(images, texts, strict=True)
    ]
    wanted = collate_of("pair", new, config_of())
    for name, value in vars(wanted).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(got, name), value), name
    assert got.longest_text >= wanted.longest_text and got.fused


def test_the_encoder_reads_new_pairs_as_such() -> None:
    encoder: Encoder = objective_of("retrieval", moe=SPARSE).encoder.eval()
    batch = pairs_with(PICTURES)
    new = repaired(batch, torch.tensor([3, 1]), torch.tensor([0, 2]))
    states = encoder(new)
    for number, (image, text) in enumerate([(3, 0), (1, 2)]):
        samples = samples_with(PICTURES)
        one = collate_of("pair", [replace(samples[text], pixels=samples[image].pixels)], config_of())
        torch.testing.assert_close(
            pool(states, new, "both")[number], pool(encoder(one), one, "both")[0], rtol=0, atol=1e-10
        )


def unit(rng: np.random.Generator, count: int, width: int = 24) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, width))), dim=-1)


def drawn(objective: Matching, pictures: list[int], image: Tensor, text: Tensor) -> tuple[list[int], list[int]]:
    """Numbers of images (by their pair's grey) and texts (by position) of the sequences, negatives included."""
    batch = replace(pairs_with(pictures), positions=torch.arange(len(pictures)))
    batch.pixels_ICHW[:] = torch.arange(len(pictures), dtype=torch.uint8)[:, None, None, None]
    found = objective._with_negatives(batch, image, text)
    return found.pixels_ICHW[:, 0, 0, 0].tolist(), found.positions.tolist()


def test_negatives_are_drawn_by_the_softmax_among_other_pictures() -> None:
    objective = objective_of("retrieval")
    with torch.no_grad():
        objective.contrast.temperature.fill_(math.log(5.0))
    rng, count, draws = np.random.default_rng(0), len(PICTURES), 1500
    image, text = unit(rng, count), unit(rng, count)
    hits = {"text": np.zeros((count, count)), "image": np.zeros((count, count))}
    torch.manual_seed(0)
    for _ in range(draws):
        images, texts = drawn(objective, PICTURES, image, text)
        own = list(range(count))
        assert (images[:5], images[10:], texts[:5], texts[5:10]) == (own, own, own, own)
        hits["image"][own, images[5:10]] += 1
        hits["text"][own, texts[10:]] += 1
    scores = 5.0 * (image @ text.T).numpy()
    for kind, matrix in (("text", scores), ("image", scores.T)):
        for row in range(count):
            chance = np.array([math.exp(s) * (PICTURES[row] != p) for s, p in zip(matrix[row], PICTURES, strict=True)])
            chance /= chance.sum()
            deviation = np.sqrt(chance * (1 - chance) / draws)
            assert (np.abs(hits[kind][row] / draws - chance) <= 4.5 * deviation).all(), (kind, row)


@pytest.mark.parametrize(("pictures", "judged"), [([4, 4, 4], 3), ([4], 1), ([], 0), ([4, 4, 5], 9)])
def test_without_another_picture_true_pairs_alone_are_judged(pictures: list[int], judged: int) -> None:
    """A true pair must never be trained as a false one."""
    objective = objective_of("retrieval", moe=QUIET, drop_path=0).train()
    batches = {"pair": pairs_with(pictures)}
    seen = inputs_of(objective)
    loss = objective(batches)
    assert loss.parts["itm"].count == objective.counts(batches)["itm"] == seen[2].num_sequences == judged
    logs = torch.log_softmax(objective.match(pool(objective.encoder(seen[2]), seen[2], objective.config.pool)), -1)
    true = len(pictures)
    wanted = -(logs[:true, 1].sum() + logs[true:, 0].sum()).item()
    assert loss.parts["itm"].sum.item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)


def test_a_nan_is_left_to_the_check_of_the_loss() -> None:
    objective = objective_of("retrieval").train()
    with torch.no_grad():
        objective.contrast.temperature.fill_(math.nan)
    assert objective({"pair": pairs_with(PICTURES)}).parts["itc"].sum.isnan()


def inputs_of(objective: Matching) -> list[Batch]:
    """Fills with every batch that the encoder gets."""
    seen: list[Batch] = []
    objective.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("pictures", [PICTURES, [3, 3], []])
def test_evaluation_encodes_each_picture_once_and_matches_nothing(pictures: list[int]) -> None:
    objective = objective_of("retrieval").eval()
    pairs = pairs_with(pictures)
    seen = inputs_of(objective)
    loss = objective({"pair": pairs})
    assert [(b.fused, b.num_images, b.num_sequences) for b in seen] == [
        (False, len(set(pictures)), len(set(pictures))),
        (False, 0, len(pictures)),
    ]
    images, texts = (pool_cls(objective.encoder(batch)) for batch in alone(pairs).values())
    vectors: tuple[Tensor, Tensor] = objective.contrast(images, texts)
    torch.testing.assert_close(loss.outputs, torch.cat(vectors, dim=1))
    itc = contrast(*vectors, pairs.image_ids, objective.contrast.scale, over_ranks=False)
    assert list(loss.parts) == ["itc"]
    assert loss.parts["itc"].sum.item() == pytest.approx(itc.item(), rel=1e-10, abs=1e-12)


def test_pictures_and_texts_are_embedded_alone() -> None:
    objective = objective_of("retrieval").eval()
    pairs = pairs_with(PICTURES)
    got = [objective.embed_images(alone(pairs)["image"]), objective.embed_texts(alone(pairs)["text"])]
    torch.testing.assert_close(torch.cat(got, dim=1), objective({"pair": pairs}).outputs)


@pytest.mark.parametrize("name", ["retrieval", "retrieval both"])
def test_losses_by_their_formulas(name: str) -> None:
    objective = objective_of(name, moe=QUIET, drop_path=0).train()
    seen = inputs_of(objective)
    pairs = pairs_with(PICTURES)
    loss = objective({"pair": pairs})
    assert [(b.fused, b.num_images > 0, len(b.text_ids_T) > 0, b.num_sequences) for b in seen[:3]] == [
        (False, True, False, 5),
        (False, False, True, 5),
        (True, True, True, 15),
    ]
    images, texts = (pool_cls(objective.encoder(batch)) for batch in alone(pairs).values())
    unit_vectors: tuple[Tensor, Tensor] = objective.contrast(images, texts)
    itc = contrast(*unit_vectors, pairs.image_ids, objective.contrast.scale, over_ranks=False)
    assert loss.parts["itc"].sum.item() == pytest.approx(itc.item(), rel=1e-10)
    logs = torch.log_softmax(objective.match(pool(objective.encoder(seen[2]), seen[2], objective.config.pool)), -1)
    wanted = -(logs[:5, 1].sum() + logs[5:, 0].sum()).item()
    assert loss.parts["itm"].sum.item() == pytest.approx(wanted, rel=1e-10)
    assert {n: (p.count, p.weight, p.streams) for n, p in loss.parts.items()} == {
        "itc": (5, 1.0, ("pair",)),
        "itm": (15, 1.0, ("pair",)),
    }
    torch.testing.assert_close(loss.outputs, torch.cat(unit_vectors, dim=1))
    logits = objective.match_logits(seen[2])
    torch.testing.assert_close(torch.log_softmax(logits, -1), logs.float(), rtol=1e-5, atol=1e-5)


def test_a_dual_encoder_alone_has_no_matching() -> None:
    objective = objective_of("retrieval contrast").train()
    batches = {"pair": pairs_with(PICTURES)}
    assert list(objective(batches).parts) == list(objective.counts(batches)) == ["itc"]
    assert not any(p.requires_grad for p in objective.match.parameters())
    assert not any(p.requires_grad for n, p in objective.named_parameters() if ".ffn.vl." in n)


def test_weights_of_the_config() -> None:
    task = open_task(Config(itc_weight=0.5, itm_weight=2.0))
    objective = task.build(Encoder(config_of(), 50), Labels())
    weights = {name: part.weight for name, part in objective({"pair": pairs_with(PICTURES)}).parts.items()}
    assert weights == {"itc": 0.5, "itm": 2.0}
    with pytest.raises(ValidationError, match="itc_weight"):
        Config(itc_weight=0)


def test_matching_has_no_gradient_for_the_contrast() -> None:
    objective = objective_of("retrieval").train()
    objective({"pair": pairs_with(PICTURES)}).parts["itm"].sum.backward()
    assert all(p.grad is None for p in objective.contrast.parameters())
    assert all(p.grad is not None for p in objective.match.parameters())


def split(image_ids: list[int], seed: int = 0) -> tuple[list[Record], list[Embedded]]:
    """Records and random answers of a split; captions of a picture have its vector."""
    rng = np.random.default_rng(seed)
    images = {i: unit(rng, 1, 4)[0].numpy().astype(np.float32) for i in sorted(set(image_ids))}
    answers = [Embedded(images[i], unit(rng, 1, 4)[0].numpy().astype(np.float32)) for i in image_ids]
    return [record(n, image_id=i) for n, i in enumerate(image_ids)], answers


IDS = [7, 3, 7, 12, 3, 3, 40, 12, 9, 9, 41, 42, 43, 44, 45, 46]


def brute(records: list[Record], answers: list[Embedded]) -> dict[str, float]:
    """Recalls by sorting every picture's captions and every caption's pictures."""
    pictures = {r.image_id: a.image_D.astype(float) for r, a in zip(records, answers, strict=True)}
    found: dict[str, list[bool]] = {f"{way}@{k}": [] for way in ("tr", "ir") for k in (1, 5, 10)}
    for image_id, image in pictures.items():
        order = sorted(zip(records, answers, strict=True), key=lambda pair: -float(image @ pair[1].text_D))
        own = [pair[0].image_id == image_id for pair in order]
        for k in (1, 5, 10):
            found[f"tr@{k}"].append(any(own[:k]))
    for one, answer in zip(records, answers, strict=True):
        ranked = sorted(pictures, key=lambda i: -float(pictures[i] @ answer.text_D))
        for k in (1, 5, 10):
            found[f"ir@{k}"].append(one.image_id in ranked[:k])
    return {name: 100 * float(np.mean(hits)) for name, hits in found.items()}


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_each_picture_stands_once_in_the_gallery() -> None:
    records, answers = split(IDS)
    gallery = gallery_of(records, answers)
    assert gallery.image_of_text_M.tolist() == [0, 1, 0, 2, 1, 1, 3, 2, 4, 4, 5, 6, 7, 8, 9, 10]
    firsts = [IDS.index(i) for i in (7, 3, 12, 40, 9, 41, 42, 43, 44, 45, 46)]
    np.testing.assert_array_equal(gallery.image_ND, [answers[n].image_D for n in firsts])
    np.testing.assert_array_equal(gallery.text_MD, [a.text_D for a in answers])


def test_recalls_by_brute_force() -> None:
    records, answers = split(IDS)
    scores, wanted = open_task(Config()).score(records, answers), brute(records, answers)
    six = list(wanted.values())
    assert scores.percents() == pytest.approx({**wanted, "mean": sum(six) / 6, "rsum": sum(six)})
    assert 0 < wanted["tr@1"] < wanted["tr@10"]
    groups = scores.metrics["ir@1"].groups
    assert groups is not None and groups.tolist() == gallery_of(records, answers).image_of_text_M.tolist()
    assert scores.metrics["tr@1"].drawn_together.tolist() == list(range(len(set(IDS))))


def test_whole_folds_are_scored_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FOLD", 4)
    ids = [0, 1, 4, 2, 2, 3, 5, 6, 7, 1, 7, 6, 0]
    records, answers = split(ids, seed=1)
    got = open_task(Config()).score(records, answers).percents()
    order: list[int] = list(dict.fromkeys(ids))
    folds = [
        brute(
            *map(list, zip(*((r, a) for r, a in zip(records, answers, strict=True) if r.image_id in own), strict=True))
        )
        for own in (order[:4], order[4:])
    ]
    for name in folds[0]:
        assert got[f"1k/{name}"] == pytest.approx((folds[0][name] + folds[1][name]) / 2), name
    assert got["rsum"] == pytest.approx(sum(brute(records, answers).values()))
    monkeypatch.setattr(retrieval, "FOLD", 3)
    assert not any(name.startswith("1k/") for name in open_task(Config()).score(records, answers).metrics)


def test_chance_is_what_random_orders_reach() -> None:
    records, _ = split(IDS)
    chance = open_task(Config()).chance(records)
    rng, owners = np.random.default_rng(0), np.array(IDS)
    pictures = np.unique(owners)
    trials = 800
    hits: dict[str, list[float]] = {name: [] for name in chance}
    for _ in range(trials):
        captions = [rng.permutation(owners) for _ in pictures]
        images = [rng.permutation(pictures) for _ in owners]
        for k in (1, 5, 10):
            hits[f"tr@{k}"].append(share([i in c[:k] for i, c in zip(pictures, captions, strict=True)]))
            hits[f"ir@{k}"].append(share([i in p[:k] for i, p in zip(owners, images, strict=True)]))
    assert set(chance) == {f"{way}@{k}" for way in ("tr", "ir") for k in (1, 5, 10)}
    for name, values in hits.items():
        assert chance[name] == pytest.approx(100 * np.mean(values), abs=450 * np.std(values) / trials**0.5 + 1e-9), name


def test_chance_of_few_is_certain() -> None:
    chance = open_task(Config()).chance(split([1, 1, 2])[0])
    assert (chance["ir@1"], chance["ir@5"], chance["tr@5"], chance["tr@10"]) == (50, 100, 100, 100)
    assert chance["tr@1"] == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)


def test_reranked_scores_keep_the_first_ones_beside_them() -> None:
    def scores(value: float, *names: str) -> Scores:
        return Scores({name: Values(np.array([value])) for name in names}, {"mean": names, "rsum": names})

    both = with_reranked(scores(0.8, "tr@1", "ir@1"), scores(0.5, "tr@1", "ir@1"))
    wanted = {"tr@1": 80, "ir@1": 80, "itc/tr@1": 50, "itc/ir@1": 50, "mean": 80, "rsum": 160}
    assert both.percents() == pytest.approx(wanted)
    assert next(iter(both.metrics)) == "tr@1"
    assert with_reranked(scores(0.8, "tr@1"), None).percents() == pytest.approx({"tr@1": 80, "mean": 80, "rsum": 80})


def test_sum_and_mean_have_intervals() -> None:
    scores = open_task(Config()).score(*split(IDS))
    found = scores.intervals()
    (low, high), six = found["rsum"], scores.totals["rsum"]
    assert found["mean"] == pytest.approx((low / 6, high / 6))
    assert low < scores.percents()["rsum"] < high
    assert sum(found[name][0] for name in six) - 1e-9 <= low < high <= sum(found[name][1] for name in six) + 1e-9


def test_read_parts_the_two_vectors() -> None:
    outputs = torch.arange(12, dtype=torch.float64).view(2, 6)
    first, second = open_task(Config()).read(outputs, Labels())
    values: list[NDArray[np.float32]] = [first.image_D, first.text_D, second.image_D, second.text_D]
    assert [v.tolist() for v in values] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert values[0].dtype == np.float32


def test_what_the_task_has_not(tmp_path: Path) -> None:
    task: Any = open_task(Config())
    assert task.find_labels([], []) == Labels()
    assert task.target(split([1])[0][0], Labels(), True) is None
    assert task.truth(split([1])[0][0]) is None and task.can_score([])
    with pytest.raises(UsageError, match="retrieval has no server"):
        task.write_submission(*split([1]), tmp_path / "out.json")
