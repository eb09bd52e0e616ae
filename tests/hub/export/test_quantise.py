"""int8 against arithmetic of its own, and a model that is loaded from it."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.support import BEIT3, SHARED, SPARSE, VLMO, VOCAB, batch_of, config_of, looped, randomise
from vlmoe_core.checkpoint.quantised import dequantise, dequantised
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.restore import load_model_state
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.checkpoint.write import write_model
from vlmoe_core.errors import HubError
from vlmoe_core.hub.export.quantise import quantise, quantise_weight
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.tasks.heads import answer_head

MODELS: dict[str, dict[str, Any]] = {
    "sparse": {"moe": SPARSE, "patch_embed": "conv"},
    "cosine": {"moe": {"text": {"num_experts": 4, "router": "cosine"}}},
    "BEiT-3": {**BEIT3, **looped({"moe": SPARSE})},
    "VLMo": VLMO,
    "shared": SHARED,
}


class Model(nn.Module):
    """An encoder with a head."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.encoder = Encoder(config_of(**values), VOCAB)
        self.head = answer_head("text", 24, 7)
        randomise(self)


def brute_force(weight: list[float]) -> tuple[list[int], float]:
    """One channel in exact rationals, its scale rounded to float32; ties to even."""
    scale = torch.tensor(max(abs(w) for w in weight) / 127, dtype=torch.float32).item()
    return [round(Fraction(w) / Fraction(scale)) if scale else 0 for w in weight], scale


@pytest.mark.parametrize("shape", [(6, 9), (3, 4, 5), (1, 1)])
def test_against_exact_arithmetic(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    numbers, scale = quantise_weight(weight, "w")
    assert numbers.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == shape[:-1]
    rows = zip(weight.flatten(0, -2), numbers.flatten(0, -2), scale.flatten(), strict=True)
    for row, got, own in rows:
        wanted, wanted_scale = brute_force(row.tolist())
        assert (got.tolist(), own.item()) == (wanted, pytest.approx(wanted_scale, rel=1e-7))
    assert ((dequantise(numbers, scale) - weight).abs() <= 0.5001 * scale[..., None]).all()


def test_zero_channels_and_the_ends_of_the_range() -> None:
    weight = torch.tensor([[0.0, -0.0, 0.0], [-2.0, 1.0, 0.0], [3e38, -3e38, 1e38], [1e-44, 0.0, -1e-44]])
    numbers, scale = quantise_weight(weight, "w")
    assert numbers[0].tolist() == [0, 0, 0] and scale[0] == 0
    assert numbers[1].tolist() == [-127, 64, 0]  # the largest is negative; 63.5 goes to the even neighbour
    assert numbers[2].tolist() == [127, -127, 42]
    found = dequantise(numbers, scale)
    assert torch.isfinite(found).all() and (found[0] == 0).all() and (found[3] == 0).all()


def test_half_goes_to_even() -> None:
    halves = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 62.5])
    assert quantise_weight(halves[None], "w")[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 62]]


def test_a_weight_that_is_not_contiguous_or_of_another_type() -> None:
    weight = torch.randn(3, 5, 4)
    for view, whole in ((weight.mT, weight.mT.contiguous()), (weight[:, ::2], weight[:, ::2].clone())):
        for got, wanted in zip(quantise_weight(view, "w"), quantise_weight(whole, "w"), strict=True):
            assert torch.equal(got, wanted)
    half = weight.bfloat16()
    for got, wanted in zip(quantise_weight(half, "w"), quantise_weight(half.float(), "w"), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_has_no_scale(value: float) -> None:
    with pytest.raises(HubError, match=r"'a\.weight' holds values that are infinite or not numbers"):
        quantise({"a.weight": torch.tensor([[1.0, value]])})


def test_refuses_a_tensor_that_is_named_like_scales() -> None:
    with pytest.raises(HubError, match=r"'a\.weight_scale' is a tensor of the model"):
        quantise({"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(2)})


def is_linear(state: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """The weights of attention, feed-forward networks, experts and heads, found by the modules that hold them."""
    linear = (nn.Linear,)
    found = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, linear)}
    found |= {name for name in state if name.endswith(("experts.up.weight", "experts.down.weight"))}
    return {name for name in found if ".embeddings." not in name and ".router." not in name}


@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)
def test_every_linear_map_is_quantised_and_nothing_else(values: dict[str, Any]) -> None:
    model = Model(**values)
    state = model.state_dict()
    quantised, share = quantise(state)
    assert quantised.quantised == is_linear(state, model)
    untouched = set(state) - quantised.quantised
    assert all(torch.equal(quantised[name], state[name]) for name in untouched)
    assert set(quantised) == set(state) | {f"{name}_scale" for name in quantised.quantised}
    assert share.values_total == sum(p.numel() for p in state.values())
    assert share.values_quantised == sum(state[name].numel() for name in quantised.quantised)
    assert share.values_total - share.values_quantised == sum(share.values_left.values())
    assert share.bytes_before == 4 * share.values_total
    assert share.bytes_after == sum(tensor.nbytes for tensor in quantised.values()) < share.bytes_before
    assert share.share == share.values_quantised / share.values_total > 0.6


def test_what_is_left_says_why() -> None:
    model = Model(moe=SPARSE)
    share = quantise(model.state_dict())[1]
    routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert share.values_left["its choice of experts could flip"] == routers
    assert share.values_left["a norm"] == norms
    assert share.values_left["an embedding or position"] == sum(
        p.numel() for p in model.encoder.embeddings.parameters()
    )


@pytest.mark.parametrize(
    "names", [("embeddings.word.weight", "head.weight"), ("head.weight", "embeddings.word.weight")]
)
def test_tied_weights_stay_tied_and_an_embedding_decides(names: tuple[str, str]) -> None:
    word, other = torch.randn(5, 3), torch.randn(4, 3)
    state = {**dict.fromkeys(names, word), "a.weight": other, "b.weight": other}
    quantised, share = quantise(state)
    assert quantised.quantised == {"a.weight", "b.weight"}
    assert quantised["head.weight"] is quantised["embeddings.word.weight"] is word
    assert quantised["a.weight"] is quantised["b.weight"]
    assert quantised["a.weight_scale"] is quantised["b.weight_scale"]
    assert (share.values_total, share.bytes_before, share.bytes_after) == (27, 108, 60 + 12 + 16)


@pytest.mark.parametrize("limit", [1, 10_000])
def test_a_loaded_model_has_the_dequantised_weights_bit_for_bit(tmp_path: Path, limit: int) -> None:
    model, loaded, wanted = Model(moe=SPARSE), Model(moe=SPARSE).eval(), Model(moe=SPARSE).eval()
    state = quantise(model.state_dict())[0]
    write_model(tmp_path / "m", state, RunState(1, {}), "seed: 0\n", lambda folder: None, max_shard_bytes=limit)
    load_model_state(loaded, read_checkpoint(tmp_path / "m").model)
    wanted.load_state_dict(dequantised(state))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), wanted.state_dict().values(), strict=True)
    )
    for name in state.quantised:
        exact = state[name].double() * state[f"{name}_scale"].double()[..., None]
        assert torch.equal(loaded.state_dict()[name], exact.float())
    batch = batch_of("pair", [4, 7], loaded.encoder.config)
    assert torch.equal(loaded.encoder(batch).states_TD, wanted.encoder(batch).states_TD)
