"""Models with the path of one modality: the same answers to its inputs, none to others."""

from typing import Any

import pytest
import torch

from tests.model.support import SHARED, SPARSE, VOCAB, batch_of, config_of, randomise
from tests.model.test_paths import MODELS
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.errors import UsageError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.model.paths import freeze_unused, unused_modules

STREAM_OF: dict[str, StreamName] = {"vision": "image", "text": "text"}
OTHER = {"vision": "text", "text": "vision"}


def without_other(values: dict[str, Any], modality: str) -> dict[str, Any]:
    """The fields of the same model with the path of one modality."""
    pools = {name: pool for name, pool in values.get("moe", {}).items() if name != OTHER[modality]}
    return {**values, "moe": pools, "modality": modality, "vl_layers": 0}


def pair_of(model: str, modality: str) -> tuple[Encoder, Encoder]:
    """A whole encoder and the one with a single path, with the same weights."""
    torch.manual_seed(0)
    whole = Encoder(config_of(**MODELS[model]), VOCAB).eval()
    randomise(whole)
    part = Encoder(config_of(**without_other(MODELS[model], modality)), VOCAB).eval()
    state = whole.state_dict()
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    return whole, part


@pytest.mark.parametrize("modality", ["vision", "text"])
@pytest.mark.parametrize("model", MODELS)
def test_the_same_answers_without_what_is_unused(model: str, modality: str) -> None:
    whole, part = pair_of(model, modality)
    stream = STREAM_OF[modality]
    unused = {id(p) for module in unused_modules(whole, (stream,)) for p in module.parameters()}
    assert set(part.state_dict()) == {name for name, p in whole.named_parameters() if id(p) not in unused}
    batch = batch_of(stream, [4, 9, 2], whole.config)
    wanted, found = whole(batch), part(batch)
    assert torch.equal(found.states_TD, wanted.states_TD)
    assert [(one.layer, one.pool) for one in found.routed] == [(one.layer, one.pool) for one in wanted.routed]
    parameters = sum(p.numel() for p in part.parameters())
    assert parameters == part.config.num_params(VOCAB) < whole.config.num_params(VOCAB)
    sizes = (17, 0) if stream == "image" else (0, 9)
    assert part.config.flops(*sizes) == whole.config.flops(*sizes)
    assert list(unused_modules(part, (stream,))) == []


@pytest.mark.parametrize("modality", ["vision", "text"])
@pytest.mark.parametrize("model", MODELS)
def test_an_empty_batch_of_any_stream_touches_all_parameters(model: str, modality: str) -> None:
    encoder = pair_of(model, modality)[1].train()
    for stream in STREAMS:
        encoder.zero_grad()
        encoded = encoder(batch_of(stream, [], encoder.config))
        assert encoded.states_TD.shape == (0, 24) and encoded.image_states_IND.shape == (0, 17, 24)
        encoded.states_TD.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize(("modality", "inputs"), [("vision", "texts"), ("text", "images")])
def test_the_other_input_is_refused(modality: str, inputs: str) -> None:
    encoder = pair_of("sparse", modality)[1]
    other: StreamName = "text" if modality == "vision" else "image"
    streams: tuple[StreamName, ...] = (other, "pair")
    for stream in streams:
        with pytest.raises(UsageError, match=f"no path for {inputs}: it was exported with --modality {modality}"):
            encoder(batch_of(stream, [3], encoder.config))


@pytest.mark.parametrize("modality", ["vision", "text"])
def test_freezing_for_other_inputs(modality: str) -> None:
    encoder = pair_of("BEiT-3", modality)[1]
    inputs: tuple[StreamName, ...] = ("image", "text", "pair")
    freeze_unused(encoder, inputs)
    assert all(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("pool", ["text", "shared"])
def test_parameters_of_kept_experts(pool: str) -> None:
    values = {"moe": SPARSE} if pool == "text" else SHARED
    moe = {**values["moe"], pool: {**values["moe"][pool], "kept_experts": {2: [0, 1]}}}
    whole, less = config_of(**values), config_of(**{**values, "moe": moe})
    removed = (3 if pool == "text" else 4) - 2
    one = 2 * 24 * 40 + 24 + 40
    assert whole.num_params(VOCAB) - less.num_params(VOCAB) == removed * one
    assert whole.num_active_params(VOCAB) == less.num_active_params(VOCAB)
    assert whole.flops(0, 9) == less.flops(0, 9)
    encoder = Encoder(less, VOCAB)
    assert sum(p.numel() for p in encoder.parameters()) == less.num_params(VOCAB)
    name = f"blocks.2.ffn.{pool}.experts.up.weight"
    assert encoder.state_dict()[name].shape == (2, 40, 24)
    assert encoder(batch_of("text", [5, 3], less)).states_TD.shape == (8, 24)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"modality": "text", "vl_layers": 0, "moe": SPARSE},
            "modality: text has no path for vision tokens; leave out moe",
        ),
        ({"modality": "vision", "vl_layers": 0, "moe": SPARSE}, "has no path for text tokens; leave out moe.text"),
        ({"modality": "vision"}, "modality: vision takes no pairs; set vl_layers to 0, not 1"),
        (
            {"moe": {"text": {"num_experts": 3, "layers": [0], "kept_experts": {1: [0]}}}},
            r"moe.text.kept_experts names block 1; sparse are \[0\]",
        ),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**values)


def test_it_loads_back() -> None:
    config = config_of(modality="text", vl_layers=0, moe={"text": SPARSE["text"]})
    assert config == ModelConfig.model_validate_json(config.model_dump_json())
    assert config.modalities == ("text",) and config_of().modalities == ("vision", "text")
