"""Who decays, the learning rate of each step, and its factor for each layer."""

import math
from pathlib import Path

import pytest
import torch

from tests.train.support import tiny
from tests.train.tasks_support import TASKS, tuned
from vlmoe_core.tasks.labels import Labels
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.config import OptimConfig
from vlmoe_core.train.optim import FACTOR, build_optimizer, learning_rate, parameter_roles, rate_factor

# The preset `tiny`: four blocks, experts in the blocks 1 and 3, a VL-FFN in block 3, every switch that adds parameters.
TINY = "model={preset: tiny, layer_scale: 0.1, moe: {vision: {num_experts: 4}, text: {num_experts: 4}}}"

DECAYED = [
    "encoder.embeddings.image.patch.proj.weight",
    "encoder.embeddings.text.word.weight",
    "encoder.blocks.0.attention.qkv.weight",
    "encoder.blocks.0.attention.out.weight",
    "encoder.blocks.0.ffn.vision.up.weight",
    "encoder.blocks.0.ffn.vision.down.weight",
    "encoder.blocks.0.ffn.text.up.weight",
    "encoder.blocks.0.ffn.text.down.weight",
    "encoder.blocks.1.attention.qkv.weight",
    "encoder.blocks.1.attention.out.weight",
    "encoder.blocks.1.ffn.vision.router.weight",
    "encoder.blocks.1.ffn.vision.experts.up.weight",
    "encoder.blocks.1.ffn.vision.experts.down.weight",
    "encoder.blocks.1.ffn.text.router.weight",
    "encoder.blocks.1.ffn.text.experts.up.weight",
    "encoder.blocks.1.ffn.text.experts.down.weight",
    "encoder.blocks.2.attention.qkv.weight",
    "encoder.blocks.2.attention.out.weight",
    "encoder.blocks.2.ffn.vision.up.weight",
    "encoder.blocks.2.ffn.vision.down.weight",
    "encoder.blocks.2.ffn.text.up.weight",
    "encoder.blocks.2.ffn.text.down.weight",
    "encoder.blocks.3.attention.qkv.weight",
    "encoder.blocks.3.attention.out.weight",
    "encoder.blocks.3.ffn.vision.router.weight",
    "encoder.blocks.3.ffn.vision.experts.up.weight",
    "encoder.blocks.3.ffn.vision.experts.down.weight",
    "encoder.blocks.3.ffn.text.router.weight",
    "encoder.blocks.3.ffn.text.experts.up.weight",
    "encoder.blocks.3.ffn.text.experts.down.weight",
    "encoder.blocks.3.ffn.vl.up.weight",
    "encoder.blocks.3.ffn.vl.down.weight",
    "heads.text.weight",
    "heads.image.weight",
]

UNDECAYED = [
    "encoder.embeddings.kind",
    "encoder.embeddings.image.cls",
    "encoder.embeddings.image.mask",
    "encoder.embeddings.image.position",
    "encoder.embeddings.image.patch.proj.bias",
    "encoder.embeddings.text.position",
    "encoder.blocks.0.scale1",
    "encoder.blocks.0.scale2",
    "encoder.blocks.0.norm1.weight",
    "encoder.blocks.0.norm1.bias",
    "encoder.blocks.0.attention.qkv.bias",
    "encoder.blocks.0.attention.out.bias",
    "encoder.blocks.0.norm2.weight",
    "encoder.blocks.0.norm2.bias",
    "encoder.blocks.0.ffn.vision.up.bias",
    "encoder.blocks.0.ffn.vision.down.bias",
    "encoder.blocks.0.ffn.text.up.bias",
    "encoder.blocks.0.ffn.text.down.bias",
    "encoder.blocks.1.scale1",
    "encoder.blocks.1.scale2",
    "encoder.blocks.1.norm1.weight",
    "encoder.blocks.1.norm1.bias",
    "encoder.blocks.1.attention.qkv.bias",
    "encoder.blocks.1.attention.out.bias",
    "encoder.blocks.1.norm2.weight",
    "encoder.blocks.1.norm2.bias",
    "encoder.blocks.1.ffn.vision.experts.up.bias",
    "encoder.blocks.1.ffn.vision.experts.down.bias",
    "encoder.blocks.1.ffn.text.experts.up.bias",
    "encoder.blocks.1.ffn.text.experts.down.bias",
    "encoder.blocks.2.scale1",
    "encoder.blocks.2.scale2",
    "encoder.blocks.2.norm1.weight",
    "encoder.blocks.2.norm1.bias",
    "encoder.blocks.2.attention.qkv.bias",
    "encoder.blocks.2.attention.out.bias",
    "encoder.blocks.2.norm2.weight",
    "encoder.blocks.2.norm2.bias",
    "encoder.blocks.2.ffn.vision.up.bias",
    "encoder.blocks.2.ffn.vision.down.bias",
    "encoder.blocks.2.ffn.text.up.bias",
    "encoder.blocks.2.ffn.text.down.bias",
    "encoder.blocks.3.scale1",
    "encoder.blocks.3.scale2",
    "encoder.blocks.3.norm1.weight",
    "encoder.blocks.3.norm1.bias",
    "encoder.blocks.3.attention.qkv.bias",
    "encoder.blocks.3.attention.out.bias",
    "encoder.blocks.3.norm2.weight",
    "encoder.blocks.3.norm2.bias",
    "encoder.blocks.3.ffn.vision.experts.up.bias",
    "encoder.blocks.3.ffn.vision.experts.down.bias",
    "encoder.blocks.3.ffn.text.experts.up.bias",
    "encoder.blocks.3.ffn.text.experts.down.bias",
    "encoder.blocks.3.ffn.vl.up.bias",
    "encoder.blocks.3.ffn.vl.down.bias",
    "encoder.norm.weight",
    "encoder.norm.bias",
    "heads.text.bias",
    "heads.image.bias",
]


def groups_of(tmp_path: Path, *overrides: str) -> tuple[set[str], set[str]]:
    """Names in the group that decays and in the one that does not."""
    recipe = tiny(tmp_path, *overrides).recipe
    with torch.device("meta"):
        objective = build_objective(recipe, None)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = build_optimizer(objective, recipe.optim, recipe.model.layers).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, undecayed = ([names[id(p)] for p in group["params"]] for group in groups)
    assert len(decayed) + len(undecayed) == len(set(decayed + undecayed)) == len(names)
    return set(decayed), set(undecayed)


def test_every_parameter_of_tiny(tmp_path: Path) -> None:
    assert groups_of(tmp_path, TINY) == (set(DECAYED), set(UNDECAYED))


def test_what_other_switches_add(tmp_path: Path) -> None:
    """Convolutions decay, their norms and biases do not; norms of each modality and separate q and v biases do not."""
    switches = TINY.replace("layer_scale: 0.1", "patch_embed: conv, norm: per_modality, qkv_bias: qv")
    decayed, undecayed = groups_of(tmp_path, switches)
    stem = "encoder.embeddings.image.patch"
    halvings = range(3)
    assert decayed - set(DECAYED) == {f"{stem}.convs.{i}.weight" for i in halvings}
    own = {f"{stem}.{part}.{i}.bias" for i in halvings for part in ("convs", "norms")}
    own |= {f"{stem}.norms.{i}.weight" for i in halvings}
    own |= {f"encoder.blocks.{layer}.attention.{name}" for layer in range(4) for name in ("q_bias", "v_bias")}
    new = {name for name in undecayed - set(UNDECAYED) if ".norm2." not in name}
    assert new == own
    assert "encoder.blocks.3.norm2.vl.weight" in undecayed


@pytest.mark.parametrize("positions", ["relative", "relative_shared"])
def test_sub_norms_and_relative_tables_do_not_decay(tmp_path: Path, positions: str) -> None:
    switches = f"sub_norm: true, text_embed_norm: true, positions: {positions}"
    looped = TINY.replace("num_experts: 4", "num_experts: 4, experts: loop").replace("layer_scale: 0.1", switches)
    decayed, undecayed = groups_of(tmp_path, looped)
    assert decayed == set(DECAYED)
    new = undecayed - set(UNDECAYED)
    assert {name for name in new if "norm" not in name} == {name for name in new if name.endswith("relative.table")}
    assert "encoder.blocks.1.ffn.vision.experts.norm.weight" in new


def test_warm_up_and_cosine_by_hand() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4)
    rates = [learning_rate(step, 12, config) for step in range(12)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.2 + 0.8 / 2)
    assert rates[6] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(12, 12, config) == pytest.approx(0.2)


def test_no_warm_up_and_nothing_but_warm_up() -> None:
    assert learning_rate(0, 5, OptimConfig(lr=0.1, warmup_steps=0)) == pytest.approx(0.1)
    assert [learning_rate(s, 2, OptimConfig(lr=0.1, warmup_steps=2)) for s in range(2)] == pytest.approx([0.05, 0.1])


def published_layer(name: str, layers: int) -> int:
    """The layer of a parameter as BEiT numbers them: embeddings 0, block l of L is l, all behind them L + 1."""
    if name.startswith("encoder.embeddings."):
        return 0
    return int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks.") else layers + 1


@pytest.mark.parametrize("decay", [0.5, 0.85, 1.0])
def test_factors_are_the_published_ones(tmp_path: Path, decay: float) -> None:
    """lr_l = lr x decay^(L + 1 - l) (BEiT, arXiv 2106.08254, appendix)."""
    loaded = tuned(tmp_path, "vqa", f"optim.layer_decay={decay}")
    with torch.device("meta"):
        objective = build_objective(loaded.recipe, None, Labels(("a", "b")))
    layers = loaded.recipe.model.layers
    names = parameter_roles(objective)
    for name in names:
        expected = decay ** (layers + 1 - published_layer(name, layers))
        assert rate_factor(name, layers, loaded.recipe.optim) == pytest.approx(expected), name
    groups = build_optimizer(objective, loaded.recipe.optim, layers).param_groups
    assert len(groups) == (8 if decay < 1 else 2)  # four factors, with decay and without
    held = {id(p): (group[FACTOR], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(held) == len(names)
    for name, parameter in objective.named_parameters():
        if name in names:
            factor = rate_factor(name, layers, loaded.recipe.optim)
            assert held[id(parameter)] == (factor, 0.05 if names[name] else 0.0), name


@pytest.mark.parametrize("task", TASKS)
def test_the_factor_of_the_heads_is_theirs_alone(tmp_path: Path, task: str) -> None:
    loaded = tuned(tmp_path, task, "optim.layer_decay=0.5", "optim.head_lr=20")
    with torch.device("meta"):
        objective = build_objective(loaded.recipe, None, Labels(("a", "b")))
    fast = {n for n in parameter_roles(objective) if rate_factor(n, 2, loaded.recipe.optim) == 20}
    assert fast and fast == {n for n in parameter_roles(objective) if not n.startswith("encoder.")}
    heads = {name.split(".")[0] for name in fast}
    assert heads == ({"contrast", "match"} if task == "retrieval" else {"head"})
    assert rate_factor("encoder.norm.weight", 2, loaded.recipe.optim) == 1.0


def test_what_is_frozen_or_never_met_is_in_no_group(tmp_path: Path) -> None:
    loaded = tuned(tmp_path, "classification", "train.freeze=[routers]")
    with torch.device("meta"):
        objective = build_objective(loaded.recipe, None, Labels(("a", "b")))
    roles = parameter_roles(objective)
    assert not [n for n in roles if ".text." in n or ".vl." in n or ".router." in n]
    assert [n for n in roles if ".ffn.vision.experts." in n]
