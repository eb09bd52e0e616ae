"""What each token of an encoder's batch is: its kind, its place, its sequence, its word.

Axis letters: T tokens, S sequences, X examples, R shuffles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.layout import Layout

VISION_KINDS = ("[CLS]", "patch", "masked patch")
"""Kinds of image tokens; a masked patch is hidden from the model."""
TEXT_KINDS = ("[CLS]", "word", "masked word", "[SEP]", "[PAD]")
"""Kinds of text tokens; a masked word is one that the model must predict, whatever stands in its place."""
KINDS = {"vision": VISION_KINDS, "text": TEXT_KINDS}
SHUFFLES = 20
"""R, how often labels are shuffled for the control of mutual information."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the text tokenizer that are no words."""

    sep: int
    """[SEP]."""
    pad: int
    """[PAD]."""


@dataclass(frozen=True)
class TokenFacts:
    """The tokens of one modality in one batch."""

    kind_T: Tensor
    """int64, number in KINDS."""
    place_T: Tensor
    """int64, place in the image ([CLS], then the patches by rows) or in the text."""
    sequence_T: Tensor
    """int64, the sequence of each token."""
    word_T: Tensor
    """int64, id of the token where it is a word that the model sees, else -1; all -1 for an image."""
    class_T: Tensor
    """int64, class of the token's example, -1 where none is known."""
    num_sequences: int
    """S."""
    shuffled_class_RT: Tensor | None = None
    """int64, the same R times with the classes dealt anew to the examples of the batch; null: no class is known."""


def stream_of(batch: Batch) -> StreamName:
    """The stream that a batch belongs to."""
    if batch.fused:
        return "pair"
    return "image" if batch.num_images else "text"


def facts_of(batch: Batch, layout: Layout, special: SpecialIds | None) -> dict[str, TokenFacts]:
    """Of each modality that the batch has tokens of.

    Args:
        batch: what the encoder was given.
        layout: where its tokens stand.
        special: ids that are no words; null: [SEP] and [PAD] count as words.
    """
    images, classes_S, shuffled_RS = layout.num_image_tokens, _classes(batch), _shuffled_classes(batch)
    found = {}
    if images:
        sequence_T = layout.sequence_T[:images]
        found["vision"] = TokenFacts(
            kind_T=_vision_kinds(batch),
            place_T=layout.identity_T[:images],
            sequence_T=sequence_T,
            word_T=torch.full_like(sequence_T, -1),
            class_T=classes_S[sequence_T],
            num_sequences=layout.num_sequences,
            shuffled_class_RT=None if shuffled_RS is None else shuffled_RS[:, sequence_T],
        )
    if images < layout.sequence_T.shape[0]:
        kind_T = _text_kinds(batch, special)
        found["text"] = TokenFacts(
            kind_T=kind_T,
            place_T=batch.text_positions_T,
            sequence_T=batch.sequence_of_text,
            word_T=torch.where(kind_T == TEXT_KINDS.index("word"), batch.text_ids_T, -1),
            class_T=classes_S[batch.sequence_of_text],
            num_sequences=layout.num_sequences,
            shuffled_class_RT=None if shuffled_RS is None else shuffled_RS[:, batch.sequence_of_text],
        )
    return found


def _vision_kinds(batch: Batch) -> Tensor:
    cls_I1 = torch.zeros(batch.num_images, 1, dtype=torch.int64, device=batch.patch_mask_IP.device)
    return torch.cat([cls_I1, 1 + batch.patch_mask_IP.to(torch.int64)], dim=1).flatten()


def _text_kinds(batch: Batch, special: SpecialIds | None) -> Tensor:
    kind_T = torch.full_like(batch.text_ids_T, TEXT_KINDS.index("word"))
    if special is not None:
        kind_T = kind_T.masked_fill(batch.text_ids_T == special.sep, TEXT_KINDS.index("[SEP]"))
        kind_T = kind_T.masked_fill(batch.text_ids_T == special.pad, TEXT_KINDS.index("[PAD]"))
    kind_T = kind_T.masked_fill(batch.text_targets_T >= 0, TEXT_KINDS.index("masked word"))
    return kind_T.masked_fill(batch.text_positions_T == 0, TEXT_KINDS.index("[CLS]"))


def _classes(batch: Batch) -> Tensor:
    """(S,) the class of each sequence's example, where targets are numbers of classes; else -1."""
    classes_X = _class_of_examples(batch)
    return torch.full_like(batch.example_of_sequence, -1) if classes_X is None else classes_X[batch.example_of_sequence]


def _shuffled_classes(batch: Batch) -> Tensor | None:
    """(R, S) the same with the classes dealt anew to the examples: all tokens of an example keep one class.

    What is drawn depends on the examples' positions alone.
    """
    classes_X = _class_of_examples(batch)
    if classes_X is None:
        return None
    drawn = torch.Generator().manual_seed(int(batch.positions.sum()))
    order_RX = torch.stack([torch.randperm(batch.num_examples, generator=drawn) for _ in range(SHUFFLES)])
    return classes_X[order_RX.to(classes_X.device)][:, batch.example_of_sequence]


def _class_of_examples(batch: Batch) -> Tensor | None:
    if batch.targets is None or batch.targets.dim() != 1 or batch.targets.is_floating_point():
        return None
    return batch.targets.to(torch.int64)
