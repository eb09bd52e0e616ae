"""What a model itself answers to a batch: the reference for its exported graphs.

It goes the way of training and evaluation, not through the modules that are exported.

Axis letters: T tokens of a batch (those of images first), X examples, N tokens of an image, F features, K choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.block import Routed
from vlmoe_core.model.encoder import Encoded, Encoder
from vlmoe_core.objectives.heads import pool_cls
from vlmoe_core.objectives.kinds.masked import MaskedModelling
from vlmoe_core.tasks.kinds.retrieval import Matching
from vlmoe_core.tasks.objective import Choosing
from vlmoe_core.train.trained import Trained


@dataclass(frozen=True)
class Reference:
    """The answer of a model to a batch."""

    encoded: Encoded
    """Layout and plans."""
    outputs: Mapping[str, Tensor]
    """The outputs of the graph by name; those of texts without padding, (T, F)."""


@torch.no_grad()
def answer_natively(trained: Trained, stream: StreamName, batch: Batch) -> Reference:
    """Run the model on a batch of a stream in which no patch is hidden."""
    objective = trained.objective
    encoder = objective.encoder
    assert isinstance(encoder, Encoder)
    encoded = encoder(batch)
    if isinstance(objective, Choosing):
        logits = objective({stream: batch}).outputs
        assert logits is not None
        return Reference(encoded, {"logits": logits})
    if isinstance(objective, Matching):
        return Reference(encoded, _of_matching(objective, stream, batch))
    assert isinstance(objective, MaskedModelling)
    return Reference(encoded, _of_masked(objective, stream, batch, encoded))


def _of_matching(objective: Matching, stream: StreamName, batch: Batch) -> dict[str, Tensor]:
    if stream == "pair":
        return {"logits": objective.match_logits(batch)}
    embed = objective.embed_images if stream == "image" else objective.embed_texts
    return {f"{stream}_vectors": embed(batch)}


def _of_masked(objective: MaskedModelling, stream: StreamName, batch: Batch, encoded: Encoded) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    text_logits, image_logits = objective.predict(batch)
    if stream != "text":
        outputs |= {"image_states": encoded.image_states_IND, "image_logits": image_logits}
    if stream != "image":
        outputs |= {"text_states": encoded.text_states_TD, "text_logits": text_logits}
    if objective.contrast is not None and stream != "pair":
        head = objective.contrast.image if stream == "image" else objective.contrast.text
        outputs[f"{stream}_vectors"] = F.normalize(head(pool_cls(encoded)), dim=-1)
    return outputs


def tokens_of(routed: Routed, encoded: Encoded) -> slice:
    """The tokens of a batch that passed a sparse layer."""
    start = encoded.layout.num_image_tokens if routed.num_image_tokens == 0 else 0
    return slice(start, start + routed.plan.expert_TK.shape[0])
