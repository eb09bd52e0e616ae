"""Which parameters of the encoder an input passes."""

from collections.abc import Collection, Iterator

from torch import nn

from vlmoe_core.data.config import StreamName
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder


def ffns_of(config: ModelConfig, layer: int, stream: StreamName) -> tuple[str, ...]:
    """The feed-forward networks of a 0-based block that an input of a stream passes (VL-MoE, figure 1)."""
    there = config.ffns(layer)
    if stream == "pair" and "vl" in there:
        return ("vl",)
    if "shared" in there:
        return ("shared",)
    passed = {"image": ("vision",), "text": ("text",), "pair": ("vision", "text")}[stream]
    return tuple(name for name in passed if name in there)


def unused_modules(encoder: Encoder, inputs: Collection[StreamName]) -> Iterator[nn.Module]:
    """The parts of the encoder that no input of these streams passes."""
    image, text = encoder.embeddings.image, encoder.embeddings.text
    if image is not None and not {"image", "pair"} & set(inputs):
        yield image
    if text is not None and not {"text", "pair"} & set(inputs):
        yield text
    for layer, block in enumerate(encoder.blocks):
        used = {name for stream in inputs for name in ffns_of(encoder.config, layer, stream)}
        for networks in (block.ffn, block.norm2):
            if isinstance(networks, nn.ModuleDict):
                yield from (network for name, network in networks.items() if name not in used)
    yield from _unused_by_modality(encoder, inputs)


def _unused_by_modality(encoder: Encoder, inputs: Collection[StreamName]) -> Iterator[nn.Module]:
    """What each modality has of its own outside the feed-forward networks, of the modality that has no input."""
    for name, streams in (("vision", {"image", "pair"}), ("text", {"text", "pair"})):
        if not streams & set(inputs):
            for block in encoder.blocks:
                yield from (own[name] for part in (block.norm1, block.attention) if name in (own := _children(part)))
            if isinstance(encoder.norm, nn.ModuleDict) and name in encoder.norm:
                yield encoder.norm[name]


def _children(module: object) -> dict[str, nn.Module]:
    return dict(module.named_children()) if isinstance(module, nn.Module) else {}


def freeze_unused(encoder: Encoder, inputs: Collection[StreamName]) -> None:
    """Leave the parameters that no input of these streams passes out of training: they would get no gradient."""
    for module in unused_modules(encoder, inputs):
        module.requires_grad_(False)
