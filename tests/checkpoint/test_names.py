import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmoe_core.checkpoint.names import fuse, group_experts, layer_of
from vlmoe_core.checkpoint.offers import offer, split
from vlmoe_core.checkpoint.owners import make_plan
from vlmoe_core.errors import CheckpointError

PLAIN = ["embed.weight", "blocks.3.norm.bias", "experts"]
FUSED = ["blocks.3.ffn.vision.experts.up.weight", "blocks.3.ffn.vision.experts.down.bias", "experts.gate", "experts.7"]


def split_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and tensors as they stand on disk."""
    offers = offer(state)
    make_plan("model", [offers], 100)
    return split(state, offers)


def fused_again(split: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and tensors in memory, as a reader of a checkpoint puts them together."""
    return {name: fuse([split[part] for part in parts], name, parts) for name, parts in group_experts(split).items()}


def test_expert_is_a_key_of_its_own() -> None:
    fused = torch.arange(24.0).reshape(4, 3, 2)
    split = split_experts({"blocks.3.ffn.vision.experts.up.weight": fused})
    assert list(split) == [f"blocks.3.ffn.vision.experts.{e}.up.weight" for e in range(4)]
    assert torch.equal(split["blocks.3.ffn.vision.experts.2.up.weight"], fused[2])
    assert split["blocks.3.ffn.vision.experts.2.up.weight"].data_ptr() == fused[2].data_ptr(), "a view, not a copy"


def test_optimiser_names_split_alike_and_scalars_stay() -> None:
    state = {
        "exp_avg.b.experts.up.weight": torch.ones(2, 3),
        "step.b.experts.up.weight": torch.tensor(5.0),
    }
    split = split_experts(state)
    assert list(split) == [
        "exp_avg.b.experts.0.up.weight",
        "exp_avg.b.experts.1.up.weight",
        "step.b.experts.up.weight",
    ]
    assert fused_again(split)["step.b.experts.up.weight"] == 5.0


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(st.sampled_from(PLAIN + FUSED), unique=True), st.randoms())
def test_fuse_is_the_inverse_of_split(num_experts: int, names: list[str], random: "object") -> None:
    state = {name: torch.rand((num_experts, 2) if name in FUSED else (5,)) for name in names}
    shuffled = list(split_experts(state).items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    fused = fused_again(dict(shuffled))
    assert set(fused) == set(state)
    assert all(torch.equal(fused[name], state[name]) for name in names)


def test_experts_are_ordered_by_number_not_by_spelling() -> None:
    names = [f"a.experts.{e}.w" for e in (10, 2, 0, 1, 9, 8, 7, 6, 5, 4, 3)]
    assert group_experts(names) == {"a.experts.w": tuple(f"a.experts.{e}.w" for e in range(11))}


def test_missing_expert_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"'a\.experts\.1\.w' is missing"):
        group_experts(["a.experts.0.w", "a.experts.2.w"])


def test_missing_last_expert_shows_beside_its_siblings() -> None:
    with pytest.raises(CheckpointError, match=r"has 1 experts, but 'a\.experts\.up' of the same layer has 2"):
        group_experts(["a.experts.0.up", "a.experts.1.up", "a.experts.0.down"])


def test_refuses_what_it_could_not_read_back() -> None:
    with pytest.raises(CheckpointError, match="has an expert's number"):
        split_experts({"a.experts.0.w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="no expert to write"):
        split_experts({"a.experts.w": torch.ones(0, 2)})
    with pytest.raises(CheckpointError, match="of the same layer"):
        split_experts({"a.experts.w": torch.ones(3, 2), "a.experts.temperature": torch.ones(1)})
    with pytest.raises(CheckpointError, match="both whole and split"):
        group_experts(["a.experts.w", "a.experts.0.w"])


def test_layer_of() -> None:
    assert layer_of("blocks.3.ffn.text.experts.5.up.weight") == "blocks.3.ffn.text"
    assert layer_of("blocks.3.ffn.text.experts.up.weight") == "blocks.3.ffn.text"
    assert layer_of("blocks.3.norm.weight") is None
