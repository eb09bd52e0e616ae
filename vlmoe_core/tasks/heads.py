"""What stands on the encoder in a downstream task.

Axis letters: T text tokens, S sequences, D width, R groups of tokens, X examples, F features of an example, A labels.
"""

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from vlmoe_core.data.batch import Batch
from vlmoe_core.model.encoder import Encoded

EPS = 1e-6
"""Of the norms in the heads."""

Head = TypeVar("Head", bound=nn.Module)
EPS = 1e-6
Pool = Literal["image", "text", "both", "mean", "means"]
"""Which final states speak for a sequence: [CLS] of the image, of the text, both side by side, the mean of the patches,
or the means of patches and of text tokens side by side."""
TextPool = Literal["text", "sentences"]
"""For two sentences: [CLS], or the means of either sentence, their difference and product (arXiv 1705.02364)."""


def pool(encoded: Encoded, batch: Batch, which: Pool | TextPool) -> Tensor:
    """(S, F), F = `width_of`, of a batch in which every sequence has what is asked for, and of its encoding."""
    match which:
        case "image":
            return encoded.image_cls_ID
        case "text":
            return encoded.text_cls_SD
        case "both":
            return torch.cat([encoded.image_cls_ID, encoded.text_cls_SD], dim=-1)
        case "mean":
            return _mean_of_patches(encoded)
        case "means":
            return torch.cat([_mean_of_patches(encoded), _mean_of_texts(encoded)], dim=-1)
        case "sentences":
            return _compared(*_means_of_sentences(encoded, batch))


def _compared(first_SD: Tensor, second_SD: Tensor) -> Tensor:
    return torch.cat([first_SD, second_SD, (first_SD - second_SD).abs(), first_SD * second_SD], dim=-1)


def _mean_of_patches(encoded: Encoded) -> Tensor:
    """(S, D) mean of the patches of each sequence."""
    return encoded.image_states_IND[:, 1:].mean(1)


def _mean_of_texts(encoded: Encoded) -> Tensor:
    """(S, D) mean of the text tokens of each sequence."""
    layout = encoded.layout
    return _means(encoded.text_states_TD, layout.sequence_T[layout.num_image_tokens :], layout.num_sequences)


def _means_of_sentences(encoded: Encoded, batch: Batch) -> tuple[Tensor, Tensor]:
    """(S, D) mean of the tokens of the first and of the second sentence; zero where there is no second."""
    second_T = batch.second_text_T
    sentence_T = torch.zeros_like(batch.sequence_of_text) if second_T is None else second_T.to(torch.int64)
    means_RD = _means(encoded.text_states_TD, 2 * batch.sequence_of_text + sentence_T, 2 * batch.num_sequences)
    return means_RD[::2], means_RD[1::2]


def _means(states_TD: Tensor, group_T: Tensor, groups: int) -> Tensor:
    """(groups, D) mean of the states of each group, zero for an empty one."""
    sums_RD = states_TD.new_zeros(groups, states_TD.shape[1]).index_add(0, group_T, states_TD)
    counts_R = states_TD.new_zeros(groups).index_add(0, group_T, torch.ones_like(states_TD[:, 0]))
    return sums_RD / counts_R[:, None].clamp(min=1)


def width_of(which: Pool | TextPool, dim: int) -> int:
    """Features of a sequence."""
    return {"both": 2, "means": 2, "sentences": 4}.get(which, 1) * dim


class Pooler(nn.Module):
    """Linear map and tanh of the pooled state (BERT; BEiT-3's puts a LayerNorm before it)."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features, eps=EPS)
        self.dense = nn.Linear(features, dim)

    def forward(self, x_SF: Tensor) -> Tensor:
        """(S, F) -> (S, D)."""
        return torch.tanh(self.dense(self.norm(x_SF)))


class MLPHead(nn.Module):
    """Linear map to 2 D, LayerNorm, GELU, linear map to the labels (VLMo, BEiT-3)."""

    def __init__(self, features: int, dim: int, num_labels: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, 2 * dim)
        self.norm = nn.LayerNorm(2 * dim, eps=EPS)
        self.out = nn.Linear(2 * dim, num_labels)

    def forward(self, x_XF: Tensor) -> Tensor:
        """(X, F) -> (X, A)."""
        logits_XA: Tensor = self.out(nn.functional.gelu(self.norm(self.up(x_XF))))
        return logits_XA


def answer_head(which: Pool, dim: int, num_answers: int) -> nn.Sequential:
    """Pooler and two-layer head over the answers of VQA (VLMo, BEiT-3)."""
    return nn.Sequential(Pooler(width_of(which, dim), dim), MLPHead(dim, dim, num_answers))


def sentence_head(which: Pool | TextPool, dim: int, num_labels: int) -> nn.Sequential:
    """Pooler and a linear map (BERT, arXiv 1810.04805): for NLI, and for the matching of image and text."""
    return nn.Sequential(Pooler(width_of(which, dim), dim), nn.Linear(dim, num_labels))


def pictures_head(which: Pool, dim: int, num_images: int, num_labels: int) -> nn.Sequential:
    """LayerNorm and a two-layer head on the encodings of several pictures, side by side (BEiT-3)."""
    features = num_images * width_of(which, dim)
    return nn.Sequential(nn.LayerNorm(features), MLPHead(features, dim, num_labels))


def class_head(dim: int, num_labels: int) -> nn.Linear:
    """A linear map to the classes of images (VL-MoE)."""
    return nn.Linear(dim, num_labels)


def choose(head: nn.Module, encoded: Encoded, batch: Batch, which: Pool | TextPool, num_images: int = 1) -> Tensor:
    """(X, A) logits of a head on the pooled states of an example's sequences, side by side."""
    features_SF = pool(encoded, batch, which)
    logits_XA: Tensor = head(features_SF.reshape(-1, num_images * features_SF.shape[1]))
    return logits_XA


@torch.no_grad()
def initialise_head(head: Head, std: float) -> Head:
    """Normal weights and zero biases, as the encoder's."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return head
