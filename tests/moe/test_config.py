"""The sparse layers' part of a recipe: its words, defaults and refusals."""

from typing import Any

import pytest

from tests.moe.routers.support import ALL, BASELINES, config_of
from vlmoe_core.config import Config
from vlmoe_core.errors import RecipeError
from vlmoe_core.moe.config import BalanceConfig, MoEConfig, SharedMoEConfig
from vlmoe_core.moe.routers import bias_balanced, cosine
from vlmoe_core.recipe.mistakes import validated
from vlmoe_core.recipe.overrides import apply_overrides
from vlmoe_core.recipe.yaml12 import parse


class Root(Config):
    moe: MoEConfig
    pool: SharedMoEConfig | None = None


def read(text: str, *overrides: str) -> Root:
    tree = parse(text, "f.yaml")
    assert tree is not None
    return validated(Root, apply_overrides(tree, overrides), "f.yaml")


def mistakes(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_one_word_and_the_mapping_say_the_same(name: str) -> None:
    word, mapping = (
        read(f"moe: {{num_experts: 4, router: {name}}}"),
        read(f"moe: {{num_experts: 4, router: {{name: {name}}}}}"),
    )
    assert word == mapping == read("moe: {num_experts: 4}", f"moe.router={name}")
    assert word.moe.router.name == name
    assert word.moe.balance.vloss == (0.01 if name in ("softmax", "cosine") else 0.0)
    assert word.moe == MoEConfig.model_validate(word.moe.model_dump())
    assert word.moe == MoEConfig.model_validate_json(word.moe.model_dump_json())


def test_the_defaults_are_the_papers() -> None:
    moe = read("moe: {num_experts: 32}").moe
    assert moe.router.name == "softmax"
    assert moe.balance == BalanceConfig(vloss=0.01)
    assert (moe.top_k, moe.noise, moe.weights, moe.priority) == (1, 1.0, "gate", "gate")
    assert (moe.capacity_factor, moe.eval_capacity_factor) == (1.25, None)
    assert (moe.balance_scope, moe.experts, moe.shared_expert, moe.expert_dropout) == ("micro", "grouped", False, 0.0)


def test_options_of_a_router() -> None:
    text = "moe: {num_experts: 4, router: {name: cosine, dim: 8, temperature: 0.2}}"
    assert read(text).moe.router == cosine.Config(dim=8, temperature=0.2)
    assert read(text, "moe.router.dim=3").moe.router == cosine.Config(dim=3, temperature=0.2)
    slow = read("moe: {num_experts: 4, router: {name: bias-balanced, update_rate: 1e-4}}").moe
    assert slow.router == bias_balanced.Config(update_rate=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("router: sofmax", "f.yaml:1: moe.router: unknown name 'sofmax'; did you mean 'softmax'?"),
        ("router: bias_balanced", "f.yaml:1: moe.router: unknown name 'bias_balanced'; did you mean 'bias-balanced'?"),
        (
            "router: top-two",
            "f.yaml:1: moe.router: unknown name 'top-two'; known: "
            "bias-balanced, cosine, hash, random, softmax, uniform",
        ),
        ("router: {name: cosin}", "f.yaml:1: moe.router: unknown name 'cosin'; did you mean 'cosine'?"),
        (
            "router: {dim: 3}",
            "f.yaml:1: moe.router: needs an entry 'name' that names one of: "
            "bias-balanced, cosine, hash, random, softmax, uniform",
        ),
        (
            "router: 3",
            "f.yaml:1: moe.router: needs an entry 'name' that names one of: "
            "bias-balanced, cosine, hash, random, softmax, uniform",
        ),
        ("router: {name: softmax, temperature: 0.1}", "f.yaml:1: moe.router.temperature: unknown key; known: name"),
        (
            "router: {name: cosine, update_rate: 0.1}",
            "f.yaml:1: moe.router.update_rate: unknown key; known: dim, name, temperature",
        ),
        ("router: {name: cosine, dim: x}", "f.yaml:1: moe.router.dim: must be a whole number, not 'x'"),
        ("top_k: 5", "f.yaml:1: moe: top_k (5) is more than num_experts (4); lower top_k or add experts"),
        ("priority: first", "f.yaml:1: moe.priority: must be 'gate', 'position' or 'random', not 'first'"),
        ("experts: fast", "f.yaml:1: moe.experts: must be 'grouped', 'loop' or 'tutel', not 'fast'"),
        ("balance_scope: world", "f.yaml:1: moe.balance_scope: must be 'micro' or 'ranks', not 'world'"),
        ("balance: {vlos: 1}", "f.yaml:1: moe.balance.vlos: unknown key; did you mean 'vloss'?"),
        (
            "noise: 0",
            "f.yaml:1: moe: the load loss and vloss are defined with noise only: "
            "set noise above 0, or their weights in balance to 0",
        ),
        (
            "router: uniform, balance: {z: 0.1}",
            "f.yaml:1: moe: router 'uniform' learns nothing: set the weights of balance to 0",
        ),
        (
            "experts: tutel, expert_dropout: 0.1",
            "f.yaml:1: moe: expert_dropout is not built for experts 'tutel': use 'grouped', or set it to 0",
        ),
        ("layers: {}", "f.yaml:1: moe: layers is empty: give a list of blocks, or {every: n}"),
    ],
)
def test_a_mistake_is_one_clear_line(text: str, message: str) -> None:
    assert mistakes(f"moe: {{num_experts: 4, {text}}}") == message


def test_renormalised_weights_need_two_choices() -> None:
    assert "gives the router no gradient; use 'gate' or 'unit'" in mistakes(
        "moe: {num_experts: 4, weights: renormalised}"
    )


@pytest.mark.parametrize("balance", [{"vloss": 0}, {"load": 0, "vloss": 0, "z": 1}])
def test_without_noise_all_other_losses_stand(balance: dict[str, Any]) -> None:
    assert config_of(noise=0, balance=balance).noise == 0
    assert config_of("bias-balanced", noise=0).balance.weights == {}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_no_loss_unless_one_is_asked_for(name: str) -> None:
    assert config_of(name).balance.weights == {}
    with pytest.raises(ValueError, match=f"router '{name}' learns nothing: set the weights of balance to 0"):
        config_of(name, balance={"vloss": 0.1})


@pytest.mark.parametrize("which", ["vision_balance", "text_balance"])
def test_the_sets_of_a_shared_pool_are_checked_like_its_own(which: str) -> None:
    shared = {"num_experts": 4, which: {"load": 0.1}}
    assert SharedMoEConfig.model_validate(shared).balance.vloss == 0.01
    with pytest.raises(
        ValueError, match=f"defined with noise only: set noise above 0, or their weights in {which} to 0"
    ):
        SharedMoEConfig.model_validate({**shared, "noise": 0, "balance": {"vloss": 0}})
    with pytest.raises(ValueError, match=f"router 'hash' learns nothing: set the weights of {which} to 0"):
        SharedMoEConfig.model_validate({"num_experts": 4, "router": "hash", which: {"z": 0.1}})


def test_the_sets_of_a_shared_pool_have_no_default_weight() -> None:
    shared = read("moe: {num_experts: 4}\npool: {num_experts: 4, text_balance: {local_entropy: 0.04}}").pool
    assert shared is not None
    assert (shared.vision_balance.weights, shared.text_balance.weights) == ({}, {"local_entropy": 0.04})
