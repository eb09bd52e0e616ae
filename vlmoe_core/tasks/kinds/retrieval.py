"""Image-text retrieval: a dual encoder trained by contrast, and a fused one by matching (VL-MoE, arXiv 2303.07226).

Axis letters: X pairs, S sequences, D width, N images, M texts.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Example, Record
from vlmoe_core.errors import UsageError
from vlmoe_core.model.encoder import Encoded, Encoder
from vlmoe_core.model.paths import freeze_unused
from vlmoe_core.objectives.balance import Balance
from vlmoe_core.objectives.contrastive import alone, contrast
from vlmoe_core.objectives.heads import ContrastHead, pool_cls
from vlmoe_core.objectives.loss import Loss, Part
from vlmoe_core.tasks.config import TaskConfig
from vlmoe_core.tasks.heads import Pool, initialise_head, pool, sentence_head
from vlmoe_core.tasks.labels import NO_LABELS, Labels
from vlmoe_core.tasks.metrics.retrieval import CUTS, Ranks, feature_ranks, fold_ranks
from vlmoe_core.tasks.task import Scores, Task, Values

FOLD = 1000
"""Pictures of a fold of COCO 1K."""
INPUTS: tuple[StreamName, ...] = ("image", "text", "pair")


class Config(TaskConfig):
    """Captions and their pictures."""

    name: Literal["retrieval"] = "retrieval"
    """Image-text retrieval."""
    itc_weight: float = Field(1.0, gt=0)
    """Weight of image-text contrast."""
    itm_weight: float = Field(1.0, ge=0)
    """Weight of image-text matching with hard negatives; 0: a dual encoder alone (BEiT-3, VLMo)."""
    pool: Pool = "image"
    """Which final states of a fused pair the matching head reads."""
    rerank: int = Field(32, ge=0)
    """Best candidates of each query that the matching head ranks anew (VLMo: 32); 0: none."""


class Matching(nn.Module):
    """Contrast of images and texts encoded alone; matching of pairs encoded together.

    Args:
        config: weights.
        encoder: the encoder.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        dim, std = encoder.config.dim, encoder.config.init_std
        self.contrast = initialise_head(ContrastHead(dim), std)
        self.match = initialise_head(sentence_head(config.pool, dim, 2), std)
        self.match.requires_grad_(config.itm_weight > 0)
        self.balance = Balance(encoder.config)
        freeze_unused(encoder, INPUTS if config.itm_weight else INPUTS[:2])

    def forward(self, batches: Mapping[StreamName, Batch]) -> Loss:
        """The losses of one micro-batch; outputs are (X, 2 D), the unit vectors of image and text.

        In evaluation there is contrast alone, and a picture of several captions is encoded once.
        """
        return self._train(batches["pair"]) if self.training else self._evaluate(batches["pair"])

    def _train(self, pairs: Batch) -> Loss:
        judged = self._num_judged(pairs)  # first of all: it waits for the device, which has no work yet
        batches = alone(pairs)
        encoded = {stream: self.encoder(batch) for stream, batch in batches.items()}
        image_XD, text_XD = self.contrast(pool_cls(encoded["image"]), pool_cls(encoded["text"]))
        parts = {"itc": self._contrasting(pairs, image_XD, text_XD)}
        if judged is not None:
            has_negatives = judged > pairs.num_examples
            detached = (image_XD.detach(), text_XD.detach())
            batches["pair"] = self._with_negatives(pairs, *detached) if has_negatives else pairs
            encoded["pair"] = self.encoder(batches["pair"])
            itm = self._matching(encoded["pair"], batches["pair"], pairs.num_examples)
            parts["itm"] = Part(itm, judged, self.config.itm_weight, ("pair",))
        parts |= self.balance.parts(batches, {stream: one.routed for stream, one in encoded.items()})
        return _loss(parts, encoded, image_XD, text_XD)

    def _evaluate(self, pairs: Batch) -> Loss:
        batches = alone(pairs)
        batches["image"], place_X = _each_once(batches["image"])
        encoded = {stream: self.encoder(batch) for stream, batch in batches.items()}
        image_ID, text_XD = self.contrast(pool_cls(encoded["image"]), pool_cls(encoded["text"]))
        image_XD = image_ID[place_X]
        return _loss({"itc": self._contrasting(pairs, image_XD, text_XD)}, encoded, image_XD, text_XD)

    def counts(self, batches: Mapping[StreamName, Batch]) -> dict[str, int]:
        """The count of every part in training, from the batches alone."""
        pairs = batches["pair"]
        views, judged = alone(pairs), self._num_judged(pairs)
        counts = {"itc": pairs.num_examples}
        if judged is not None:
            views["pair"] = pairs
            counts["itm"] = judged
        return counts | self.balance.counts(views)

    def _num_judged(self, pairs: Batch) -> int | None:
        """Pairs that the matching head judges: the true ones and twice as many false ones; null without a head.

        A micro-batch of one picture has no false ones: every text of it is true. Of two or more, every pair has.
        """
        if not self.config.itm_weight:
            return None
        differ = bool((pairs.image_ids != pairs.image_ids[:1]).any())
        return (3 if differ else 1) * pairs.num_examples

    def match_logits(self, batch: Batch) -> Tensor:
        """(S, 2) logits that image and text of each sequence don't match, and that they do."""
        logits_S2: Tensor = self.match(pool(self.encoder(batch), batch, self.config.pool)).float()
        return logits_S2

    def embed_images(self, images: Batch) -> Tensor:
        """(I, D) unit vectors of images alone."""
        return self.contrast.of_images(pool_cls(self.encoder(images)))

    def embed_texts(self, texts: Batch) -> Tensor:
        """(S, D) unit vectors of texts alone."""
        return self.contrast.of_texts(pool_cls(self.encoder(texts)))

    def _contrasting(self, pairs: Batch, image_XD: Tensor, text_XD: Tensor) -> Part:
        itc = contrast(image_XD, text_XD, pairs.image_ids, self.contrast.scale, over_ranks=self.training)
        return Part(itc, pairs.num_examples, self.config.itc_weight, ("pair",))

    def _matching(self, encoded: Encoded, batch: Batch, num_pairs: int) -> Tensor:
        """The sum of the cross-entropies of the true pairs, which come first, and of the false ones."""
        logits_S2 = self.match(pool(encoded, batch, self.config.pool))
        logits_S2 = logits_S2.to(torch.promote_types(logits_S2.dtype, torch.float32))
        true_S = (torch.arange(logits_S2.shape[0], device=logits_S2.device) < num_pairs).to(torch.int64)
        return F.cross_entropy(logits_S2, true_S, reduction="sum")

    def _with_negatives(self, pairs: Batch, image_XD: Tensor, text_XD: Tensor) -> Batch:
        """The pairs, each text with a hard other image, each image with a hard other text (ALBEF, arXiv 2107.07651).

        A negative is drawn in proportion to the softmax of the contrast's logits, among the pairs of this micro-batch
        that show another picture; there must be one.
        """
        number_X = torch.arange(pairs.num_examples, device=image_XD.device)
        logits_XX = (self.contrast.scale * (image_XD @ text_XD.T)).float()
        same_XX = pairs.image_ids[:, None] == pairs.image_ids
        text_of_image = _draw(logits_XX, same_XX)
        image_of_text = _draw(logits_XX.T, same_XX)
        images = torch.cat([number_X, image_of_text, number_X])
        texts = torch.cat([number_X, number_X, text_of_image])
        return repaired(pairs, images, texts)


def _draw(logits_XX: Tensor, same_XX: Tensor) -> Tensor:
    """(X,) a column of each row, none of `same_XX`, in proportion to the softmax of the logits.

    The largest of the logits with Gumbel noise is such a draw. It waits for no device, and leaves a NaN to the check of
    the loss.
    """
    gumbel_XX = -torch.empty_like(logits_XX).exponential_().log()
    return (logits_XX + gumbel_XX).masked_fill(same_XX, -math.inf).argmax(dim=1)


def _each_once(images: Batch) -> tuple[Batch, Tensor]:
    """The different pictures (I) of a batch of images alone, and the place of each example's picture in them (X,)."""
    ids_I, place_X, times_I = torch.unique(images.image_ids, return_inverse=True, return_counts=True)
    first_I = images.image_ids.argsort(stable=True)[times_I.cumsum(0) - times_I]
    number_I = torch.arange(ids_I.shape[0], device=ids_I.device)
    once = replace(
        images,
        pixels_ICHW=images.pixels_ICHW[first_I],
        patch_mask_IP=images.patch_mask_IP[first_I],
        image_ids=ids_I,
        sequence_of_image=number_I,
        example_of_sequence=number_I,
        positions=images.positions[first_I],
    )
    return once, place_X


def _loss(parts: Mapping[str, Part], encoded: Mapping[StreamName, Encoded], image_XD: Tensor, text_XD: Tensor) -> Loss:
    routed = tuple((stream, plan) for stream, one in encoded.items() for plan in one.routed)
    return Loss(parts, routed, torch.cat([image_XD, text_XD], dim=-1).detach())


def repaired(pairs: Batch, images: Tensor, texts: Tensor) -> Batch:
    """Sequence n has image number images[n] and text number texts[n] of a batch of pairs."""
    lengths = torch.bincount(pairs.sequence_of_text, minlength=pairs.num_examples)
    starts = lengths.cumsum(0) - lengths
    own = lengths[texts]
    number = torch.arange(texts.shape[0], device=texts.device)
    sequence_T = number.repeat_interleave(own)
    inside_T = torch.arange(sequence_T.shape[0], device=texts.device) - (own.cumsum(0) - own).repeat_interleave(own)
    token_T = starts[texts].repeat_interleave(own) + inside_T
    return replace(
        pairs,
        pixels_ICHW=pairs.pixels_ICHW[images],
        patch_mask_IP=pairs.patch_mask_IP[images],
        image_ids=pairs.image_ids[images],
        sequence_of_image=number,
        text_ids_T=pairs.text_ids_T[token_T],
        text_targets_T=pairs.text_targets_T[token_T],
        text_positions_T=pairs.text_positions_T[token_T],
        sequence_of_text=sequence_T,
        example_of_sequence=number,
        positions=pairs.positions[texts],
    )


@dataclass(frozen=True)
class Embedded:
    """What a model makes of one pair."""

    image_D: NDArray[np.float32]
    """Unit vector of the image."""
    text_D: NDArray[np.float32]
    """Unit vector of the text."""


class Retrieval(Task):
    """Ranks all captions for a picture and all pictures for a caption; recall at 1, 5 and 10."""

    stream = "pair"
    best = "mean"
    tested = "ir@1"
    known_labels = NO_LABELS
    needs_whole_batch = True
    has_server = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.inputs = INPUTS if config.itm_weight else INPUTS[:2]

    def find_labels(self, train: Iterable[Example], held_out: Iterable[Example]) -> Labels:
        """None."""
        return Labels()

    def target(self, example: Example, labels: Labels, training: bool) -> NDArray[np.generic] | None:
        """None: which caption belongs to which picture is in the batch."""
        return None

    def stand_in(self, noise: Example, labels: Labels, rng: random.Random) -> Example:
        """As it is."""
        return noise

    def build(self, encoder: Encoder, labels: Labels) -> nn.Module:
        """Contrast and matching heads."""
        return Matching(self.config, encoder)

    def read(self, outputs_XF: Tensor, labels: Labels) -> list[Embedded]:
        """The unit vectors of image and text."""
        image_XD, text_XD = outputs_XF.float().cpu().chunk(2, dim=-1)
        return [Embedded(i, t) for i, t in zip(image_XD.numpy(), text_XD.numpy(), strict=True)]

    def score(self, records: Sequence[Record], answers: Sequence[Embedded]) -> Scores:
        """Recalls of the dual encoder among all pictures and captions of the split."""
        gallery = gallery_of(records, answers)
        features = (gallery.image_ND, gallery.text_MD, gallery.image_of_text_M)
        scores = recall_scores(feature_ranks(*features), gallery)
        if len(gallery.image_ND) <= FOLD or len(gallery.image_ND) % FOLD:
            return scores
        return Scores({**scores.metrics, **_fold_metrics(fold_ranks(*features, FOLD), gallery)}, scores.totals)

    def write_submission(self, records: Sequence[Record], answers: Sequence[Embedded], path: Path) -> None:
        """There is no server for it."""
        raise UsageError("retrieval has no server that takes submissions; --json prints the recalls")

    def can_score(self, records: Sequence[Record]) -> bool:
        """Always."""
        return True

    def truth(self, example: Example | Record) -> str | None:
        """None."""
        return None

    def chance(self, records: Sequence[Record]) -> Mapping[str, float]:
        """The expected recalls of a random order, in percent."""
        captions = np.unique([r.image_id for r in records], return_counts=True)[1]
        images, texts = len(captions), len(records)
        found = {f"tr@{k}": 100 * (1 - float(np.mean([_none_of(texts, int(n), k) for n in captions]))) for k in CUTS}
        return found | {f"ir@{k}": 100 * min(1.0, k / images) for k in CUTS}


@dataclass(frozen=True)
class Gallery:
    """All pictures and captions of a split, each picture once."""

    image_ND: NDArray[np.float32]
    """Unit vectors of the pictures, in the order of their first caption."""
    text_MD: NDArray[np.float32]
    """Unit vectors of the captions."""
    image_of_text_M: NDArray[np.int64]
    """The picture of each caption."""


def gallery_of(records: Sequence[Record], answers: Sequence[Embedded]) -> Gallery:
    """The pictures and captions of the pairs of a split."""
    numbers: dict[int, int] = {}
    first: list[int] = []
    for place, record in enumerate(records):
        if record.image_id not in numbers:
            numbers[record.image_id] = len(numbers)
            first.append(place)
    image_of_text = np.array([numbers[r.image_id] for r in records], dtype=np.int64)
    images = np.stack([answers[place].image_D for place in first])
    return Gallery(images, np.stack([a.text_D for a in answers]), image_of_text)


def recall_scores(ranks: Ranks, gallery: Gallery) -> Scores:
    """Recalls at 1, 5 and 10 both ways, their mean and sum. A picture and its captions are drawn together."""
    captions, pictures = gallery.image_of_text_M, np.arange(len(gallery.image_ND))
    metrics = {f"tr@{k}": Values((ranks.image_to_text < k).astype(np.float64), pictures) for k in CUTS}
    metrics |= {f"ir@{k}": Values((ranks.text_to_image < k).astype(np.float64), captions) for k in CUTS}
    names = tuple(metrics)
    return Scores(metrics, {"mean": names, "rsum": names})


def _fold_metrics(folds: Sequence[Ranks], gallery: Gallery) -> dict[str, Values]:
    """Mean recalls of the dual encoder over folds of 1,000 pictures; every fold counts the same (COCO 1K)."""
    texts = np.array([len(fold.text_to_image) for fold in folds])
    weights = np.repeat(texts.sum() / (len(folds) * texts), texts)
    order = np.argsort(gallery.image_of_text_M // FOLD, kind="stable")
    to_text = np.concatenate([fold.image_to_text for fold in folds])
    to_image = np.concatenate([fold.text_to_image for fold in folds])
    metrics = {f"1k/tr@{k}": Values((to_text < k).astype(np.float64)) for k in CUTS}
    groups = gallery.image_of_text_M[order]
    return metrics | {f"1k/ir@{k}": Values((to_image < k) * weights, groups) for k in CUTS}


def with_reranked(after: Scores, before: Scores | None) -> Scores:
    """The recalls after re-ranking, and those of the dual encoder alone under `itc/`."""
    metrics = {} if before is None else {f"itc/{name}": values for name, values in before.metrics.items()}
    return Scores({**after.metrics, **metrics}, after.totals)


def _none_of(texts: int, own: int, k: int) -> float:
    """Probability that k of all texts, drawn at random, hold none of the own ones."""
    return math.comb(texts - own, k) / math.comb(texts, k) if k <= texts else 0.0


def open_task(config: Config) -> Retrieval:
    """The task."""
    return Retrieval(config)
