"""Retrieval's second look: the matching head ranks the best candidates of the dual encoder anew.

Axis letters: N pictures, M captions, K candidates, P pairs of a picture and a caption.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.tasks.kinds.retrieval import Gallery, Matching, repaired
from vlmoe_core.tasks.metrics.retrieval import Candidates, Ranks, best_items, candidate_ranks
from vlmoe_core.train.parallel import all_sum, wide_dtype

Numbers = NDArray[np.int64]


def rerank(objective: Matching, gallery: Gallery, pairs: Batch, per_pass: int, rank: int, ranks: int) -> Ranks:
    """Ranks by the contrast's logit plus the matching head's logit of yes, for the best K of each query (VLMo).

    The contrast's logit is scale x cosine of the dual encoder's vectors. Candidates of a picture and of a caption often
    are the same pair, which is encoded once. The processes share the pairs.

    Args:
        objective: with a matching head.
        gallery: unit vectors of all pictures and captions.
        pairs: all pictures (N) and captions (M) of the split, on the CPU.
        per_pass: pairs that are encoded at a time.
        rank: this process.
        ranks: processes.
    """
    k, scale = objective.config.rerank, float(objective.contrast.scale.detach())
    texts = best_items(gallery.image_ND, gallery.text_MD, k)
    images = best_items(gallery.text_MD, gallery.image_ND, k)
    of_images, of_texts = _pairs(texts), _pairs(images)[:, ::-1]
    wanted_P2, place = np.unique(np.concatenate([of_images, of_texts]), axis=0, return_inverse=True)
    logits_P = _match_logits(objective, pairs, wanted_P2, per_pass, rank, ranks)[place.reshape(-1)]
    return candidate_ranks(
        _rescored(texts, scale, logits_P[: len(of_images)]),
        _rescored(images, scale, logits_P[len(of_images) :]),
        gallery.image_of_text_M,
    )


def _pairs(candidates: Candidates) -> Numbers:
    """(Q K, 2) number of the query and of its candidate."""
    queries = np.repeat(np.arange(len(candidates.items)), candidates.items.shape[1])
    return np.stack([queries, candidates.items.reshape(-1)], axis=1)


def _rescored(candidates: Candidates, scale: float, logits: NDArray[np.float64]) -> Candidates:
    return replace(candidates, scores=scale * candidates.scores + logits.reshape(candidates.scores.shape))


@torch.no_grad()
def _match_logits(
    objective: Matching, pairs: Batch, wanted_P2: Numbers, per_pass: int, rank: int, ranks: int
) -> NDArray[np.float64]:
    """(P,) logits of yes of every wanted pair of picture and caption; every rank computes its share and gets all."""
    device = next(objective.parameters()).device
    logits_P = torch.zeros(len(wanted_P2), dtype=wide_dtype(device), device=device)
    for start in range(rank * per_pass, len(wanted_P2), ranks * per_pass):
        images, texts = torch.from_numpy(wanted_P2[start : start + per_pass].copy()).unbind(1)
        batch = repaired(pairs, images, texts).to(device)
        logits_P[start : start + per_pass] = objective.match_logits(batch)[:, 1].to(logits_P.dtype)
    found: NDArray[np.float64] = all_sum(logits_P).cpu().numpy().astype(np.float64)
    return found


def joined(micros: Iterable[MicroBatch], num_images: int) -> Batch:
    """All captions, and all N pictures each once, of micro-batches of pairs, in their order.

    Memory: N x 3 x H x W bytes on each process; 750 MB for the 5,000 pictures of COCO's test set at 224 x 224.

    Args:
        micros: with records.
        num_images: N.
    """
    numbers: dict[int, int] = {}
    parts: list[Batch] = []
    pixels_NCHW = torch.empty(0)
    for micro in micros:
        batch = micro.batches["pair"]
        if not parts:
            pixels_NCHW = batch.pixels_ICHW.new_empty(num_images, *batch.pixels_ICHW.shape[1:])
        for record, pixels_CHW in zip(micro.records, batch.pixels_ICHW, strict=True):
            if record.image_id not in numbers:
                numbers[record.image_id] = len(numbers)
                pixels_NCHW[numbers[record.image_id]] = pixels_CHW
        parts.append(replace(batch, pixels_ICHW=pixels_NCHW))  # no view of its own pixels, which would keep them
    return _with_captions(parts, pixels_NCHW)


def _with_captions(parts: Sequence[Batch], pixels_NCHW: Tensor) -> Batch:
    """All pictures, and the captions of all parts; not yet pairs of the two."""
    starts = np.cumsum([0, *(part.num_examples for part in parts)]).tolist()
    number_N = torch.arange(pixels_NCHW.shape[0])
    return replace(
        parts[0],
        pixels_ICHW=pixels_NCHW,
        patch_mask_IP=torch.zeros(pixels_NCHW.shape[0], parts[0].patch_mask_IP.shape[1], dtype=torch.bool),
        image_ids=number_N,
        sequence_of_image=number_N,
        text_ids_T=torch.cat([part.text_ids_T for part in parts]),
        text_targets_T=torch.cat([part.text_targets_T for part in parts]),
        text_positions_T=torch.cat([part.text_positions_T for part in parts]),
        sequence_of_text=torch.cat([p.sequence_of_text + s for p, s in zip(parts, starts, strict=False)]),
        example_of_sequence=torch.arange(starts[-1]),
        positions=torch.cat([part.positions for part in parts]),
        longest_text=max(part.longest_text for part in parts),
    )
