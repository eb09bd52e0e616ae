"""Re-ranking equals a brute force that scores every candidate pair alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.multiprocessing.reductions import StorageWeakRef

from tests.train.tasks_support import finetuned, names, percents, scored
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.collate import collate
from vlmoe_core.data.example import Example
from vlmoe_core.data.loader import MicroBatch, MicroBatches
from vlmoe_core.tasks.kinds.retrieval import Matching, gallery_of, recall_scores
from vlmoe_core.tasks.metrics.retrieval import feature_ranks
from vlmoe_core.train.build import recipe_preparer, whole_dataset
from vlmoe_core.train.reranking import joined, rerank
from vlmoe_core.train.trained import Trained, load_trained

Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model whose matching head speaks loudly, so that it changes the order."""
    run = finetuned(tmp_path_factory.mktemp("retrieval"), "retrieval", "train.steps=2")
    model = load_trained(run)
    with torch.no_grad():
        model.objective.match[1].weight.mul_(100)  # type: ignore[index, union-attr, operator]
    return replace(model, objective=model.objective.double())


def with_top(trained: Trained, top: int) -> Trained:
    """The same model with another number of candidates."""
    objective = trained.objective
    assert isinstance(objective, Matching) and trained.recipe.task is not None
    objective.config = objective.config.model_copy(update={"rerank": top})
    return replace(trained, recipe=trained.recipe.model_copy(update={"task": objective.config}))


def batch_of_one(trained: Trained, image: Example, text: str) -> Batch:
    """One picture and one caption, alone."""
    recipe = trained.recipe
    assert recipe.task is not None
    preparer = recipe_preparer(recipe, trained.tokenizers.text, trained.tokenizers.labels, training=False)
    sample = preparer("pair", 0, Example("pair", image.image, text, 0), Random(0))
    return collate("pair", [sample], recipe.model.image_size, recipe.model.num_patches)


@dataclass(frozen=True)
class Table:
    """Every picture with every caption, each pair encoded by itself."""

    cosine: Floats
    logit: Floats
    owner: list[int]
    """Number of the picture of each caption."""


@pytest.fixture(scope="module")
def table(trained: Trained) -> Table:
    dataset, objective = test_split(trained), trained.objective.eval()
    examples = [dataset.streams["pair"][place] for place in range(dataset.limit or 0)]
    pictures = list({e.image_id: e for e in examples}.values())
    texts = [e.text or "" for e in examples]
    owner = [[p.image_id for p in pictures].index(e.image_id) for e in examples]
    with torch.no_grad():
        own = [objective({"pair": batch_of_one(trained, e, e.text or "")}).outputs.chunk(2, -1) for e in examples]
        logits = [
            [float(objective.match_logits(batch_of_one(trained, p, t))[0, 1]) for t in texts]  # type: ignore[operator]
            for p in pictures
        ]
    images = torch.cat([own[owner.index(i)][0] for i in range(len(pictures))])
    return Table((images @ torch.cat([text for _, text in own]).T).numpy(), np.array(logits), owner)


def brute_force(trained: Trained, table: Table, top: int) -> tuple[list[int], list[int]]:
    """Ranks both ways, every list sorted in full."""
    scale = float(trained.objective.contrast.scale.detach())  # type: ignore[union-attr]
    cosine, logit, owner = table.cosine, table.logit, table.owner

    def rescored(cosines: Floats, logits: Floats) -> list[float]:
        best = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:top]
        return [scale * cosines[i] + logits[i] if i in best else -100.0 for i in range(len(cosines))]

    def place(scores: list[float], own: list[int]) -> int:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return min(order.index(i) for i in own)

    to_text = [
        place(rescored(cosine[i], logit[i]), [t for t, o in enumerate(owner) if o == i]) for i in range(len(cosine))
    ]
    to_image = [place(rescored(cosine[:, t], logit[:, t]), [owner[t]]) for t in range(len(owner))]
    return to_text, to_image


def test_split(trained: Trained) -> MicroBatches:
    return whole_dataset(trained.recipe, trained.recipe.data.test, trained.tokenizers, None)


test_split.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("top", [1, 3, 100])
def test_ranks_are_those_of_the_brute_force(trained: Trained, table: Table, top: int) -> None:
    model = with_top(trained, top)
    evaluated = scored(model, micro=5)
    gallery = gallery_of(evaluated.records, evaluated.answers)
    assert (gallery.image_ND.shape, gallery.text_MD.shape) == ((14, 16), (28, 16))
    dataset = test_split(model)
    objective = model.objective
    assert isinstance(objective, Matching)
    pairs = joined((dataset[number] for number in range(4)), 14)
    assert (pairs.num_images, pairs.num_examples) == (14, 28)
    ranks = rerank(objective, gallery, pairs, 5, 0, 1)
    to_text, to_image = brute_force(model, table, top)
    assert ranks.image_to_text.tolist() == to_text
    assert ranks.text_to_image.tolist() == to_image
    before = feature_ranks(gallery.image_ND, gallery.text_MD, gallery.image_of_text_M)
    assert ranks.text_to_image.tolist() != before.text_to_image.tolist()
    told, expected = percents(evaluated), recall_scores(ranks, gallery).percents()
    assert {name: told[name] for name in expected} == expected
    assert told["itc/ir@1"] == pytest.approx(100 * (before.text_to_image < 1).mean())


@pytest.mark.parametrize("micro", [1, 3, 28, 64])
def test_the_size_of_a_batch_changes_nothing(trained: Trained, micro: int) -> None:
    model = with_top(trained, 4)
    expected, found = scored(model, micro=8), scored(model, micro=micro)
    assert names(found) == names(expected)
    assert percents(found) == percents(expected)


def test_pictures_are_kept_once_and_captions_in_their_order(trained: Trained) -> None:
    dataset = replace(test_split(trained), sizes={"pair": 3})  # captions of one picture lie in two micro-batches
    pairs, whole = joined((dataset[n] for n in range(10)), 14), replace(dataset, sizes={"pair": 28})[0].batches["pair"]
    assert torch.equal(pairs.pixels_ICHW, whole.pixels_ICHW[::2])
    for field in ("text_ids_T", "text_positions_T", "sequence_of_text", "positions"):
        assert torch.equal(getattr(pairs, field), getattr(whole, field)), field
    assert pairs.longest_text == whole.longest_text


def test_no_micro_batch_keeps_its_pictures(trained: Trained) -> None:
    """The pictures of a split are many: they are held once."""
    dataset = replace(test_split(trained), sizes={"pair": 4})
    storages: list[StorageWeakRef] = []

    def told() -> Iterator[MicroBatch]:
        for number in range(7):
            assert all(storage.expired() for storage in storages[:-1])  # but that in use
            micro = dataset[number]
            storages.append(StorageWeakRef(micro.batches["pair"].pixels_ICHW.untyped_storage()))
            yield micro

    pairs = joined(told(), 14)
    assert pairs.pixels_ICHW.untyped_storage().nbytes() == 14 * 3 * 16 * 16
    assert len(storages) == 7


def test_nothing_is_ranked_anew_without_candidates_or_head(trained: Trained, tmp_path: Path) -> None:
    assert not [name for name in percents(scored(with_top(trained, 0))) if name.startswith("itc/")]
    run = finetuned(tmp_path, "retrieval", "task.itm_weight=0", "train.steps=2")
    assert not [name for name in percents(scored(run)) if name.startswith("itc/")]
