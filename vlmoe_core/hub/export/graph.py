"""A model's path as a function of plain tensors, for the formats that hold a graph.

Padding is taken out at the entrance: behind it there are the real tokens alone, as in training, so that none of it
reaches a feed-forward network or a router, where with a capacity it would take places.

Axis letters: B examples, n images of an example, L places of a text, T real tokens, K choices.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.hub.export.answers import Answer, answer_of
from vlmoe_core.hub.export.chance import refuse_chance
from vlmoe_core.hub.export.plain_batch import batch_of_images, batch_of_pairs, batch_of_texts
from vlmoe_core.model.block import Routed
from vlmoe_core.model.embeddings import IMAGE_KIND, TEXT_KIND, Embeddings
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.model.paths import unused_modules
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.train.trained import Trained

Module = TypeVar("Module", bound=nn.Module)

EXAMPLES, LENGTH = 2, 3
"""B and L of the run that is traced; a 1 would be taken for a constant."""


class Graph(nn.Module):
    """Encoder and head for one stream.

    The outputs are the answer's, then `experts.<layer>.<pool>` (T, K) of every sparse layer: the experts of each real
    token, those of images first, and -1 where a choice was dropped.
    """

    def __init__(self, encoder: Encoder, answer: Answer) -> None:
        super().__init__()
        self.encoder, self.answer = encoder, answer
        self.config = encoder.config

    @property
    def samples(self) -> dict[str, Tensor]:
        """Inputs to trace the graph with, by name, in the order of `forward`'s arguments."""
        raise NotImplementedError

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs by name."""
        encoded = self.encoder(batch)
        outputs: dict[str, Tensor] = self.answer(encoded, batch)
        return outputs | {name_of(one): experts_of(one) for one in encoded.routed}

    def _images(self) -> Tensor:
        size, several = self.config.image_size, self.answer.num_images
        shape = (EXAMPLES, 3, size, size) if several == 1 else (EXAMPLES, several, 3, size, size)
        return torch.zeros(shape, dtype=torch.uint8)

    def _words(self) -> Tensor:
        return torch.ones(EXAMPLES, LENGTH, dtype=torch.int64)


class ImageGraph(Graph):
    """Images alone."""

    @property
    def samples(self) -> dict[str, Tensor]:
        """Of the one input."""
        return {"pixel_values": self._images()}

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """pixel_values: (B, 3, H, W) uint8 RGB."""
        return self.run(batch_of_images(pixel_values, self.config.num_patches))


class TextGraph(Graph):
    """Texts alone."""

    @property
    def samples(self) -> dict[str, Tensor]:
        """Of both inputs."""
        return {"input_ids": self._words(), "attention_mask": self._words()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """(B, L) int64: tokens, [CLS] and [SEP] included; and 1 for a token, 0 for the padding behind them.

        Every text has a token.
        """
        return self.run(batch_of_texts(input_ids, attention_mask, None, self.config))


class SentencesGraph(Graph):
    """Texts of two sentences, which the head keeps apart."""

    @property
    def samples(self) -> dict[str, Tensor]:
        """Of the three inputs."""
        return {name: self._words() for name in ("input_ids", "attention_mask", "token_type_ids")}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        """token_type_ids: (B, L) int64, 1 for the tokens of the second sentence; the others as in `TextGraph`."""
        return self.run(batch_of_texts(input_ids, attention_mask, token_type_ids, self.config))


class PairGraph(Graph):
    """An image, or as many as an example has, and a text."""

    @property
    def samples(self) -> dict[str, Tensor]:
        """Of the three inputs."""
        return {"pixel_values": self._images(), "input_ids": self._words(), "attention_mask": self._words()}

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """pixel_values: (B, 3, H, W) uint8 RGB, or (B, n, 3, H, W) of several; the others as in `TextGraph`."""
        return self.run(batch_of_pairs(pixel_values, input_ids, attention_mask, self.config.num_patches))


class _OneKind(nn.Module):
    """The embeddings of images alone or of texts alone; the other's weights are left out."""

    def __init__(self, embeddings: Embeddings, stream: StreamName) -> None:
        super().__init__()
        self.is_image = stream == "image"
        own = embeddings.image if self.is_image else embeddings.text
        assert own is not None, "the model has a path for what it was trained for"
        self.own: nn.Module = own
        row = embeddings.kind[IMAGE_KIND if self.is_image else TEXT_KIND]
        self.kind = nn.Parameter(row.detach().clone(), requires_grad=False)

    def forward(self, pixels_ICHW: Tensor, mask_IP: Tensor, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """-> (T, D)."""
        x: Tensor = self.own(pixels_ICHW, mask_IP).flatten(0, 1) if self.is_image else self.own(ids_T, positions_T)
        return x + self.kind


def graph_of(trained: Trained, stream: StreamName) -> Graph:
    """The graph of a model for one stream; its weights are the model's own memory.

    Raises:
        UsageError: the model was not trained for the stream, or decides by chance, which no graph repeats.
    """
    answer = answer_of(trained, stream)
    encoder = trained.objective.encoder
    assert isinstance(encoder, Encoder)
    refuse_chance(encoder.config)
    graphs: dict[StreamName, type[Graph]] = {"image": ImageGraph, "text": TextGraph, "pair": PairGraph}
    graph = SentencesGraph if answer.keeps_sentences_apart else graphs[stream]
    return graph(_path(encoder, stream), _frozen(answer)).eval()


def _path(encoder: Encoder, stream: StreamName) -> Encoder:
    """A copy of the encoder that holds only what the stream passes."""
    path = _frozen(encoder)
    for unused in unused_modules(path, (stream,)):
        _empty(unused)
    if stream != "pair":
        path.embeddings = _OneKind(path.embeddings, stream)  # type: ignore[assignment]
    for layer in path.modules():
        if isinstance(layer, SparseFFN):
            _simplify(layer)
    return path


def _empty(module: nn.Module) -> None:
    """Take all parameters out of a part that is never run."""
    for part in module.modules():
        for name, _ in list(part.named_parameters(recurse=False)):
            setattr(part, name, None)


def _frozen(module: Module) -> Module:
    """A copy whose parameters are the same memory and take no gradient: with one, attention takes another kernel."""
    memory: dict[int, object] = {id(buffer): buffer for buffer in module.buffers()}
    memory |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memory)


def _simplify(layer: SparseFFN) -> None:
    """All experts in one operator, which the formats translate; no queue where nobody is dropped."""
    if layer.experts.norm is None:  # the loop alone has norms
        layer.experts.implementation = "grouped"
    router = layer.router
    if router.eval_factor is None:
        router.config = router.config.model_copy(update={"priority": "position"})


def name_of(routed: Routed) -> str:
    """The output that tells the experts of a sparse layer."""
    return f"experts.{routed.layer}.{routed.pool}"


def experts_of(routed: Routed) -> Tensor:
    """(T, K) experts of each token, -1 where a choice was dropped."""
    return routed.plan.expert_TK.masked_fill(~routed.plan.kept_TK, -1)
