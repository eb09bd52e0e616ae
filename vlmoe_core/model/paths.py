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
    return {"image": ("vision",), "text": ("text",), "pair": ("vision", "text")}[stream]


def unused_modules(encoder: Encoder, inputs: Collection[StreamName]) -> Iterator[nn.Module]:
    """The parts of the encoder that no input of these streams passes."""
    if not {"image", "pair"} & set(inputs):
        yield encoder.embeddings.image
    if not {"text", "pair"} & set(inputs):
        yield encoder.embeddings.text
    for layer, block in enumerate(encoder.blocks):
        used = {name for stream in inputs for name in ffns_of(encoder.config, layer, stream)}
        for networks in (block.ffn, block.norm2):
            if isinstance(networks, nn.ModuleDict):
                yield from (network for name, network in networks.items() if name not in used)


def freeze_unused(encoder: Encoder, inputs: Collection[StreamName]) -> None:
    """Leave the parameters that no input of these streams passes out of training: they would get no gradient."""
    for module in unused_modules(encoder, inputs):
        module.requires_grad_(False)
