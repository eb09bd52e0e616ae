"""The encoder: embeddings, blocks, final norm.

Axis letters: T tokens, D width, I images, N tokens of an image.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmoe_core.data.batch import Batch
from vlmoe_core.errors import UsageError
from vlmoe_core.model.attention import Projections
from vlmoe_core.model.block import Block, Routed
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.embeddings import Embeddings
from vlmoe_core.model.layout import Layout, build_layout
from vlmoe_core.model.norms import build_norm, normed
from vlmoe_core.model.relative import Relative, RelativeBias, relate
from vlmoe_core.moe.dense import DenseFFN
from vlmoe_core.moe.experts import Experts


@dataclass(frozen=True)
class Encoded:
    """What the encoder makes of one batch."""

    states_TD: Tensor
    """Final states of all tokens, image tokens first."""
    layout: Layout
    """Where the tokens stand."""
    routed: tuple[Routed, ...]
    """One plan for each sparse layer and modality that ran."""
    intermediates: Mapping[str, Tensor]
    """(T, D) states by name, as asked for: `embeddings`, `blocks.0`, ..."""

    @property
    def image_states_IND(self) -> Tensor:
        """(I, 1 + P, D): [CLS], then the patches."""
        images = self.states_TD[: self.layout.num_image_tokens]
        return images.view(-1, self.layout.image_length, self.states_TD.shape[1])

    @property
    def text_states_TD(self) -> Tensor:
        """(T, D) of the text tokens."""
        return self.states_TD[self.layout.num_image_tokens :]

    @property
    def image_cls_ID(self) -> Tensor:
        """(I, D) of each image's [CLS]."""
        return self.image_states_IND[:, 0]

    @property
    def text_cls_SD(self) -> Tensor:
        """(S, D) of each text's [CLS], of a batch in which every sequence has a text."""
        sequence_T = self.layout.sequence_T[self.layout.num_image_tokens :]
        starts_S = torch.searchsorted(sequence_T, torch.arange(self.layout.num_sequences, device=sequence_T.device))
        return self.text_states_TD.index_select(0, starts_S)


class Encoder(nn.Module):
    """Vision-language transformer with modality feed-forward networks, dense or sparse (VL-MoE, 2303.07226, section 3).

    Args:
        config: sizes and switches.
        vocab_size: rows of the word embedding.
        recompute: keep no activations inside the blocks; run each block again in the backward pass.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.vocab_size, self.recompute = config, vocab_size, recompute
        self.embeddings = Embeddings(config, vocab_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.relative = RelativeBias(config) if config.positions == "relative_shared" else None
        self.norm = build_norm(config)
        initialise(self, config.init_std)

    def forward(self, batch: Batch, intermediates: Collection[str] = ()) -> Encoded:
        """Encode a batch; `intermediates` names the states to keep.

        Raises ValueError if there is no state of such a name, DataError for a text that is longer than the relative
        positions allow, UsageError for an input that the model has no path for.
        """
        self._check_names(intermediates)
        self._check_inputs(batch)
        layout = self.layout(batch)
        relative = self._relate(layout, batch.longest_text)
        x_TD = self.embeddings(batch.pixels_ICHW, batch.patch_mask_IP, batch.text_ids_T, batch.text_positions_T)
        kept = {"embeddings": x_TD} if "embeddings" in intermediates else {}
        routed: tuple[Routed, ...] = ()
        for number, block in enumerate(self.blocks):
            x_TD, more = self._run(block, x_TD, layout, relative)
            routed += more
            if (name := f"blocks.{number}") in intermediates:
                kept[name] = x_TD
        return Encoded(normed(self.norm, x_TD, layout), layout, routed, kept)

    def layout(self, batch: Batch) -> Layout:
        """Where the tokens of a batch stand."""
        return build_layout(batch, 1 + self.config.num_patches, self.config.modalities)

    def _check_names(self, intermediates: Collection[str]) -> None:
        known = ["embeddings", *(f"blocks.{i}" for i in range(len(self.blocks)))]
        if unknown := sorted(set(intermediates) - set(known)):
            raise ValueError(f"no states are called {', '.join(unknown)}; known: {', '.join(known)}")

    def _check_inputs(self, batch: Batch) -> None:
        given = {"vision": ("images", batch.num_images), "text": ("texts", batch.text_ids_T.shape[0])}
        for modality, (inputs, count) in given.items():
            if modality not in self.config.modalities and count:
                raise UsageError(
                    f"this model has no path for {inputs}: it was exported with --modality {self.config.modality}; use "
                    "the whole model that it comes from"
                )

    def _relate(self, layout: Layout, longest_text: int) -> Relative | None:
        """How the tokens stand to each other: once a batch, for all blocks."""
        if self.config.positions == "absolute":
            return None
        relative = relate(layout, longest_text, self.config)
        return relative if self.relative is None else replace(relative, bias_XHLL=self.relative(relative))

    def _run(
        self, block: nn.Module, x_TD: Tensor, layout: Layout, relative: Relative | None
    ) -> tuple[Tensor, tuple[Routed, ...]]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x_TD, layout, relative, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x_TD, layout, relative)  # type: ignore[no-any-return]


@torch.no_grad()
def initialise(encoder: Encoder, std: float) -> None:
    """Truncated normal weights, zero biases and relative tables; output maps of block l (1-based) divided by sqrt(2 l)
    (BEiT, 2106.08254).

    With sub-norms instead the maps of values, of attention's output and of the feed-forward networks times
    sqrt(log(2 x blocks)) (Magneto, 2210.06423). Experts differ from each other.
    """
    initialise_maps(encoder, std)
    image, text = encoder.embeddings.image, encoder.embeddings.text
    of_images = () if image is None else (image.cls, image.mask, image.position)
    of_texts = () if text is None else (text.position,)
    for parameter in (*of_images, *of_texts, encoder.embeddings.kind):
        nn.init.trunc_normal_(parameter, std=std)
    scale_outputs(encoder.blocks, encoder.config.sub_norm)


@torch.no_grad()
def initialise_maps(module: nn.Module, std: float) -> None:
    """Truncated normal weights and zero biases of all linear maps, convolutions and embeddings below."""
    for inner in module.modules():
        if isinstance(inner, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.trunc_normal_(inner.weight, std=std)
        if isinstance(inner, nn.Linear | nn.Conv2d) and inner.bias is not None:
            nn.init.zeros_(inner.bias)


@torch.no_grad()
def scale_outputs(blocks: nn.ModuleList, sub_norm: bool) -> None:
    """The last step of `initialise`: scale the maps that write into the residual stream."""
    for number, block in enumerate(blocks, start=1):
        if sub_norm:
            for weight in _output_weights(block) + _value_weights(block):
                weight.mul_(math.sqrt(math.log(2 * len(blocks))))
        else:
            for weight in _output_weights(block):
                weight.div_(math.sqrt(2 * number))


def _output_weights(block: nn.Module) -> list[Tensor]:
    """The weights that write into the residual stream."""
    outputs = [m.out.weight for m in block.modules() if isinstance(m, Projections)]
    return outputs + [m.down.weight for m in block.modules() if isinstance(m, DenseFFN | Experts)]


def _value_weights(block: nn.Module) -> list[Tensor]:
    """Those of attention's values, and of the first maps of the feed-forward networks."""
    values = [m.qkv.weight.chunk(3)[2] for m in block.modules() if isinstance(m, Projections)]
    return values + [m.up.weight for m in block.modules() if isinstance(m, DenseFFN | Experts)]
