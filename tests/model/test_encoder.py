import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.model.support import (
    BEIT3,
    SHARED,
    SPARSE,
    VLMO,
    VOCAB,
    batch_of,
    collate_of,
    config_of,
    looped,
    randomise,
    samples_of,
)
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.model.config import PRESETS, ModelConfig
from vlmoe_core.model.encoder import Encoded, Encoder, initialise
from vlmoe_core.moe.experts import ExpertNorm
from vlmoe_core.moe.losses import balance_loss
from vlmoe_core.moe.plan import RoutingPlan
from vlmoe_core.moe.routers.softmax import Router


def encoder_of(dtype: torch.dtype = torch.float64, recompute: bool = False, **values: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config_of(**values), VOCAB, recompute)
    randomise(encoder)
    return encoder.to(dtype).eval()


def plain_sequence(encoder: Encoder, x_LD: Tensor, image_tokens: int, fused: bool) -> Tensor:
    """The blocks and the final norm over one sequence, head by head: pre-norm blocks written once more."""
    weights, config = dict(encoder.named_parameters()), encoder.config
    dim, size = config.dim, config.dim // config.heads

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for i in range(config.layers):
        block = f"blocks.{i}"
        qkv = linear(norm(x_LD, f"{block}.norm1"), f"{block}.attention.qkv")
        heads = []
        for h in range(config.heads):
            q, k, v = (qkv[:, part * dim + h * size : part * dim + (h + 1) * size] for part in range(3))
            heads.append(torch.softmax(q @ k.T / math.sqrt(size), dim=-1) @ v)
        x_LD = x_LD + linear(torch.cat(heads, dim=1), f"{block}.attention.out")
        is_fused = fused and i >= config.layers - config.vl_layers
        spans = {"vl": slice(None)} if is_fused else {"vision": slice(image_tokens), "text": slice(image_tokens, None)}
        branches = []
        for modality, span in spans.items():
            normed = norm(x_LD[span], f"{block}.norm2" if config.norm == "shared" else f"{block}.norm2.{modality}")
            hidden = linear(normed, f"{block}.ffn.{modality}.up")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            branches.append(linear(hidden, f"{block}.ffn.{modality}.down"))
        x_LD = x_LD + torch.cat(branches)
    return norm(x_LD, "norm")


def sequences_of(states_TD: Tensor, batch: Batch, image_length: int) -> list[Tensor]:
    """The states of each sequence, its image tokens first."""
    owner = torch.cat([batch.sequence_of_image.repeat_interleave(image_length), batch.sequence_of_text])
    return [states_TD[owner == s] for s in range(batch.num_sequences)]


@pytest.mark.parametrize("norm", ["shared", "per_modality"])
@pytest.mark.parametrize("stream", STREAMS)
def test_encoder_equals_a_plain_implementation(stream: StreamName, norm: str) -> None:
    encoder = encoder_of(norm=norm, vl_layers=2)
    batch = batch_of(stream, [4, 9, 2], encoder.config)
    encoded = encoder(batch, ["embeddings"])
    image_tokens = 0 if stream == "text" else 17
    start = sequences_of(encoded.intermediates["embeddings"], batch, 17)
    got = sequences_of(encoded.states_TD, batch, 17)
    for x_LD, states_LD in zip(start, got, strict=True):
        wanted = plain_sequence(encoder, x_LD, image_tokens, stream == "pair")
        torch.testing.assert_close(states_LD, wanted, rtol=1e-10, atol=1e-10)


POOLS: list[dict[str, Any]] = [{}, {"moe": SPARSE}, SHARED]
SWITCHED: list[dict[str, Any]] = [
    *POOLS,
    {**BEIT3, **looped({"moe": SPARSE})},
    {**BEIT3, **looped(SHARED), "positions": "relative"},
    {**VLMO, "moe": SPARSE},
    {"positions": "relative_shared", "attention": "per_modality"},
]


@pytest.mark.parametrize("pools", SWITCHED)
@pytest.mark.parametrize("stream", STREAMS)
def test_padding_length_changes_nothing(stream: StreamName, pools: dict[str, Any]) -> None:
    encoder = encoder_of(**pools)
    samples = samples_of(stream, [4, 20, 2], encoder.config)
    together = collate_of(stream, samples, encoder.config)
    states = sequences_of(encoder(together).states_TD, together, 17)
    for sample, wanted in zip(samples, states, strict=True):
        alone = encoder(collate_of(stream, [sample], encoder.config)).states_TD
        torch.testing.assert_close(alone, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pools", SWITCHED)
@pytest.mark.parametrize("stream", STREAMS)
def test_order_of_sequences_does_not_matter(stream: StreamName, pools: dict[str, Any]) -> None:
    encoder = encoder_of(**pools)
    samples = samples_of(stream, [4, 20, 2, 7], encoder.config)
    order = [2, 0, 3, 1]
    batch, permuted = (collate_of(stream, s, encoder.config) for s in (samples, [samples[i] for i in order]))
    states = sequences_of(encoder(batch).states_TD, batch, 17)
    others = sequences_of(encoder(permuted).states_TD, permuted, 17)
    for i, other in zip(order, others, strict=True):
        torch.testing.assert_close(other, states[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("switches", SWITCHED[1:])
def test_images_alone_and_texts_alone_share_a_batch(switches: dict[str, Any]) -> None:
    encoder = encoder_of(**switches)
    images, texts = batch_of("image", [0, 0], encoder.config), batch_of("text", [5, 3], encoder.config)
    both = replace(
        texts,
        pixels_ICHW=images.pixels_ICHW,
        patch_mask_IP=images.patch_mask_IP,
        image_ids=images.image_ids,
        sequence_of_image=images.sequence_of_image,
        sequence_of_text=texts.sequence_of_text + 2,
        example_of_sequence=torch.arange(4),
    )
    encoded = encoder(both)
    torch.testing.assert_close(encoded.image_states_IND, encoder(images).image_states_IND)
    torch.testing.assert_close(encoded.text_states_TD, encoder(texts).text_states_TD)


def test_pad_tokens_are_routed_and_belong_to_their_own_sequence() -> None:
    # data.pad_text_to appends [PAD] ids: tokens like all others, not padding.
    encoder = encoder_of(moe=SPARSE)
    samples = samples_of("pair", [4, 6], encoder.config)
    ids, targets = samples[0].text_ids, samples[0].text_targets
    assert ids is not None and targets is not None
    padded = replace(samples[0], text_ids=F.pad(torch.tensor(ids), (0, 8)).numpy())
    padded = replace(padded, text_targets=F.pad(torch.tensor(targets), (0, 8), value=-1).numpy())
    plain, longer = (collate_of("pair", [s, samples[1]], encoder.config) for s in (samples[0], padded))
    assert longer.num_masked_words == plain.num_masked_words
    before, after = encoder(plain), encoder(longer)
    counts = [[r.plan.expert_TK.shape[0] for r in e.routed if r.pool == "text"] for e in (before, after)]
    assert counts == [[10], [18]]
    other, same = (sequences_of(e.states_TD, b, 17)[1] for e, b in ((before, plain), (after, longer)))
    torch.testing.assert_close(same, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("pools", SWITCHED)
@pytest.mark.parametrize("recompute", [False, True])
def test_an_empty_batch_gives_zero_gradients(stream: StreamName, pools: dict[str, Any], recompute: bool) -> None:
    encoder = encoder_of(torch.float32, recompute, **{**pools, "drop_path": 0.2, "norm": "per_modality"}).train()
    encoded = encoder(batch_of(stream, [], encoder.config))
    assert encoded.states_TD.shape == (0, 24)
    assert encoded.image_states_IND.shape == (0, 17, 24) and encoded.text_states_TD.shape == (0, 24)
    total = encoded.states_TD.sum() + sum(r.plan.weight_TK.sum() for r in encoded.routed)
    total.backward()
    assert all((p.grad == 0).all() for p in encoder.parameters() if p.grad is not None)
    touched = {name for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder(batch_of(stream, [3, 5], encoder.config)).states_TD.sum().backward()
    # Processes that share experts must pass the same layers, with tokens or without.
    passed = {name for name, p in encoder.named_parameters() if p.grad is not None}
    inputs = {name for name in touched if name.startswith("encoder.embeddings.") or name.startswith("embeddings.")}
    assert passed <= touched and touched - passed <= inputs
    assert touched != {name for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize("pools", SWITCHED)
def test_the_three_streams_together_touch_every_parameter(pools: dict[str, Any]) -> None:
    encoder = encoder_of(torch.float32, **pools).train()
    for stream in STREAMS:
        encoder(batch_of(stream, [], encoder.config)).states_TD.sum().backward()
    routers = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert routers == set()


def test_intermediates_by_name() -> None:
    encoder = encoder_of()
    batch = batch_of("pair", [4, 3], encoder.config)
    names = ["embeddings", "blocks.0", "blocks.1", "blocks.2"]
    encoded = encoder(batch, names)
    assert set(encoded.intermediates) == set(names)
    assert dict(encoder(batch).intermediates) == {}
    assert set(encoder(batch, ["blocks.1"]).intermediates) == {"blocks.1"}
    x = encoded.intermediates["embeddings"]
    for block, name in zip(encoder.blocks, names[1:], strict=True):
        x, _ = block(x, encoded.layout)
        torch.testing.assert_close(encoded.intermediates[name], x)
    torch.testing.assert_close(encoder.norm(x), encoded.states_TD)
    with pytest.raises(ValueError, match=r"no states are called blocks\.3; known: embeddings, blocks\.0"):
        encoder(batch, ["blocks.3"])


def train_once(encoder: Encoder, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, list[RoutingPlan]]]:
    """Gradients of one step, and the plans that each router made in the order of its calls."""
    seen: dict[str, list[RoutingPlan]] = {}
    hooks = []
    for name, module in encoder.named_modules():
        if isinstance(module, Router):
            plans = seen.setdefault(name, [])
            hooks.append(module.register_forward_hook(lambda _m, _i, plan, plans=plans: plans.append(plan)))
    torch.manual_seed(11)
    encoder.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        encoded: Encoded = encoder(batch)
        balance = [balance_loss(r.plan, encoder.config.pools[r.pool].balance) for r in encoded.routed]
        total = total + encoded.states_TD.square().sum() + sum(balance)
    torch.rand(5)
    total.backward()
    for hook in hooks:
        hook.remove()
    return {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize(
    ("dtype", "switches"),
    [
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.float32, VLMO),
        (torch.float32, {"positions": "relative_shared"}),
    ],
)
def test_activation_checkpointing_makes_the_same_plans_and_gradients(
    dtype: torch.dtype, switches: dict[str, Any]
) -> None:
    moe = {m: {**c, "noise": 4.0, "capacity_factor": 0.8} for m, c in SPARSE.items()}
    plain = encoder_of(dtype, moe=moe, drop_path=0.5, **switches).train()
    recomputing = copy.deepcopy(plain)
    recomputing.recompute = True
    batches = [batch_of(stream, [6, 9, 3, 8], plain.config) for stream in STREAMS]
    wanted, made_once = train_once(plain, batches)
    got, made_twice = train_once(recomputing, batches)
    assert got.keys() == wanted.keys() and len(got) == len(list(plain.parameters()))
    for name in got:
        assert torch.equal(got[name], wanted[name]), name
    dropped = 0
    for name, plans in made_once.items():
        again = made_twice[name]
        assert len(again) == 2 * len(plans)
        # The last forward is recomputed first.
        for plan, forward, recomputed in zip(plans, again, reversed(again), strict=False):
            for field in ("expert_TK", "slot_TK", "kept_TK", "noisy_logits_TE", "weight_TK"):
                assert torch.equal(getattr(forward, field), getattr(plan, field)), (name, field)
                assert torch.equal(getattr(recomputed, field), getattr(plan, field)), (name, field)
            dropped += int((~plan.kept_TK).sum())
    assert dropped > 0


def test_checkpointing_keeps_no_graph_without_gradients() -> None:
    encoder = encoder_of(recompute=True, moe=SPARSE)
    with torch.no_grad():
        assert not encoder(batch_of("pair", [3], encoder.config)).states_TD.requires_grad


def test_initialisation() -> None:
    torch.manual_seed(0)
    config = config_of(dim=64, heads=4, hidden=96, layers=4, moe=SPARSE, init_std=0.03, patch_embed="conv")
    encoder = Encoder(config, 400)
    for name, parameter in encoder.named_parameters():
        role = name.removesuffix(".weight")
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in role:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 500:
            writes = role.endswith(("attention.out", ".down"))
            depth = int(name.split(".")[1]) + 1 if writes else 0
            wanted = 0.03 / math.sqrt(2 * depth) if writes else 0.03
            assert parameter.std().item() == pytest.approx(wanted, rel=0.08), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.2 * wanted), name
        else:
            assert parameter.any(), name


def test_experts_start_different_from_each_other() -> None:
    encoder = Encoder(config_of(moe=SPARSE), VOCAB)
    stacks = [p for n, p in encoder.named_parameters() if "experts" in n and n.endswith("weight")]
    assert len(stacks) == 8
    for stack in stacks:
        for e in range(1, len(stack)):
            assert (stack[0] != stack[e]).float().mean() > 0.99


def test_biases_of_query_and_value_start_at_zero_and_layer_scale_at_its_value() -> None:
    encoder = Encoder(config_of(qkv_bias="qv", layer_scale=0.1), VOCAB)
    for block in encoder.blocks:
        assert (block.attention.q_bias == 0).all() and (block.attention.v_bias == 0).all()
        assert torch.equal(block.scale1, torch.full((24,), 0.1)) and torch.equal(block.scale2, torch.full((24,), 0.1))


@pytest.mark.parametrize("positions", ["relative", "relative_shared"])
def test_relative_tables_start_at_zero_and_norms_at_one_and_zero(positions: str) -> None:
    values = {**BEIT3, **looped({"moe": SPARSE}), "positions": positions, "text_embed_norm": True}
    encoder = Encoder(config_of(**values), VOCAB)
    seen = set()
    for name, parameter in encoder.named_parameters():
        *parts, kind = name.split(".")
        if kind == "table":
            assert (parameter == 0).all() and parameter.shape == (encoder.config.relative_rows, 3)
        elif any(part.startswith("norm") for part in parts):
            assert (parameter == (1 if kind == "weight" else 0)).all(), name
        else:
            continue
        seen.add(kind)
    assert seen == {"table", "weight", "bias"}
    for module_name, module in encoder.named_modules():
        if isinstance(module, nn.LayerNorm | ExpertNorm):
            assert module.eps == (1e-12 if module_name == "embeddings.text.norm" else 1e-5), module_name


@pytest.mark.parametrize("attention", ["shared", "per_modality"])
def test_sub_norms_change_the_scale_of_what_goes_into_the_branches(attention: str) -> None:
    torch.manual_seed(0)
    values = {"dim": 64, "heads": 4, "hidden": 96, "layers": 4, "attention": attention, "init_std": 0.03}
    encoder = Encoder(config_of(**values, **looped({"moe": SPARSE}), sub_norm=True), VOCAB)
    gain = math.sqrt(math.log(2 * 4))
    for name, parameter in encoder.blocks.named_parameters():
        if name.endswith("qkv.weight"):
            query, key, value = parameter.chunk(3)
            assert torch.cat([query, key]).std().item() == pytest.approx(0.03, rel=0.08), name
            assert value.std().item() == pytest.approx(0.03 * gain, rel=0.08), name
        elif name.endswith(("out.weight", "up.weight", "down.weight")):
            assert parameter.std().item() == pytest.approx(0.03 * gain, rel=0.08), name


def test_initialisation_is_a_function_of_the_seed() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(Encoder(config_of(moe=SPARSE), VOCAB).state_dict())
    first, same, other = states
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first["blocks.0.attention.qkv.weight"], other["blocks.0.attention.qkv.weight"])


def test_output_maps_are_divided_once() -> None:
    encoder = Encoder(config_of(moe=SPARSE), VOCAB)
    for _ in range(2):
        torch.manual_seed(5)
        initialise(encoder, 0.02)
    assert encoder.blocks[2].attention.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.15)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def block_names(i: int, ffns: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {
        "norm1.weight": (128,),
        "norm1.bias": (128,),
        "attention.qkv.weight": (384, 128),
        "attention.qkv.bias": (384,),
        "attention.out.weight": (128, 128),
        "attention.out.bias": (128,),
        "norm2.weight": (128,),
        "norm2.bias": (128,),
    }
    for modality, shapes in ffns.items():
        names |= {f"ffn.{modality}.{name}": shape for name, shape in shapes.items()}
    return {f"blocks.{i}.{name}": shape for name, shape in names.items()}


DENSE: dict[str, tuple[int, ...]] = {
    "up.weight": (512, 128),
    "up.bias": (512,),
    "down.weight": (128, 512),
    "down.bias": (128,),
}


def test_names_and_shapes_in_the_state_dict() -> None:
    moe = {"vision": {"num_experts": 8, "layers": [1]}}
    encoder = Encoder(ModelConfig.model_validate({"preset": "tiny", "layers": 2, "moe": moe}), 1000)
    sparse: dict[str, tuple[int, ...]] = {
        "router.weight": (8, 128),
        "experts.up.weight": (8, 512, 128),
        "experts.up.bias": (8, 512),
        "experts.down.weight": (8, 128, 512),
        "experts.down.bias": (8, 128),
    }
    assert shapes_of(encoder) == {
        "embeddings.kind": (2, 128),
        "embeddings.image.cls": (128,),
        "embeddings.image.mask": (128,),
        "embeddings.image.position": (65, 128),
        "embeddings.image.patch.proj.weight": (128, 192),
        "embeddings.image.patch.proj.bias": (128,),
        "embeddings.text.position": (128, 128),
        "embeddings.text.word.weight": (1000, 128),
        **block_names(0, {"vision": DENSE, "text": DENSE}),
        **block_names(1, {"vision": sparse, "text": DENSE, "vl": DENSE}),
        "norm.weight": (128,),
        "norm.bias": (128,),
    }


def test_names_and_shapes_of_a_shared_pool() -> None:
    moe = {"num_experts": 8, "layers": [1], "router": {"name": "cosine", "dim": 6}, "shared_expert": True}
    values = {"preset": "tiny", "layers": 2, "expert_pool": "shared", "moe": {"shared": moe}}
    shapes = shapes_of(Encoder(ModelConfig.model_validate(values), 1000))
    sparse: dict[str, tuple[int, ...]] = {
        "router.projection": (6, 128),
        "router.weight": (8, 6),
        "router.temperature": (),
        "experts.up.weight": (8, 512, 128),
        "experts.up.bias": (8, 512),
        "experts.down.weight": (8, 128, 512),
        "experts.down.bias": (8, 128),
        **{f"shared_expert.{name}": shape for name, shape in DENSE.items()},
    }
    wanted = block_names(0, {"vision": DENSE, "text": DENSE}) | block_names(1, {"shared": sparse, "vl": DENSE})
    assert {name: shape for name, shape in shapes.items() if name.startswith("blocks.")} == wanted


def test_names_of_the_switches() -> None:
    plain = shapes_of(Encoder(config_of(), VOCAB))
    values = {"qkv_bias": "qv", "norm": "per_modality", "layer_scale": 0.1, "patch_embed": "conv"}
    switched = shapes_of(Encoder(config_of(**values), VOCAB))
    last = {n: s for n, s in switched.items() if n not in plain and not n.startswith(("blocks.0.", "blocks.1."))}
    assert last == {
        "embeddings.image.patch.convs.0.weight": (12, 3, 3, 3),
        "embeddings.image.patch.convs.0.bias": (12,),
        "embeddings.image.patch.convs.1.weight": (24, 12, 3, 3),
        "embeddings.image.patch.convs.1.bias": (24,),
        "embeddings.image.patch.norms.0.weight": (12,),
        "embeddings.image.patch.norms.0.bias": (12,),
        "embeddings.image.patch.norms.1.weight": (24,),
        "embeddings.image.patch.norms.1.bias": (24,),
        "blocks.2.attention.q_bias": (24,),
        "blocks.2.attention.v_bias": (24,),
        "blocks.2.scale1": (24,),
        "blocks.2.scale2": (24,),
        **{f"blocks.2.norm2.{m}.{k}": (24,) for m in ("vision", "text", "vl") for k in ("weight", "bias")},
    }
    gone = {n for n in plain if n not in switched and n.startswith("blocks.2.")}
    assert gone == {"blocks.2.attention.qkv.bias", "blocks.2.norm2.weight", "blocks.2.norm2.bias"}


def test_names_of_beit3s_and_vlmos_switches() -> None:
    def further(**values: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        plain, switched = (shapes_of(Encoder(config_of(**looped(v)), VOCAB)) for v in ({"moe": SPARSE}, values))
        below = ("blocks.0.", "blocks.1.")
        return (
            {n: s for n, s in switched.items() if n not in plain and not n.startswith(below)},
            {n for n in plain if n not in switched and not n.startswith(below)},
        )

    def pairs(*names: str, shape: tuple[int, ...] = (24,)) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{kind}": shape for name in names for kind in ("weight", "bias")}

    own = {}
    for m in ("vision", "text"):
        own |= {f"blocks.2.attention.{m}.qkv.weight": (72, 24), f"blocks.2.attention.{m}.qkv.bias": (72,)}
        own |= {f"blocks.2.attention.{m}.out.weight": (24, 24), f"blocks.2.attention.{m}.out.bias": (24,)}
        own |= pairs(f"norm.{m}", f"blocks.2.norm1.{m}", f"blocks.2.norm2.{m}", f"blocks.2.attention.{m}.norm")
    new, gone = further(**BEIT3, moe=SPARSE)
    assert new == {
        **own,
        **pairs("blocks.2.norm2.vl"),
        **pairs("blocks.2.ffn.vl.norm", shape=(40,)),
        **pairs("blocks.2.ffn.vision.experts.norm", shape=(4, 40)),
        **pairs("blocks.2.ffn.text.experts.norm", shape=(3, 40)),
    }
    old = ("blocks.2.attention.qkv", "blocks.2.attention.out", "blocks.2.norm1", "blocks.2.norm2", "norm")
    assert gone == set(pairs(*old))
    new, _ = further(**{**VLMO, "norm": "shared"}, moe=SPARSE)
    rows = 7**2 + 3 + 2 + 2 * 24
    assert {n: s for n, s in new.items() if "_bias" not in n and "scale" not in n} == {
        **pairs("embeddings.text.norm"),
        "blocks.2.attention.relative.table": (rows, 3),
    }
    assert further(positions="relative_shared", moe=SPARSE) == ({"relative.table": (rows, 3)}, set())
    new, _ = further(sub_norm=True, moe=SPARSE)
    assert new.keys() & set(pairs("blocks.2.attention.norm", "blocks.2.ffn.vl.norm")) and len(new) == 8


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("moe", [{}, {"vision": {"num_experts": 4}, "text": {"num_experts": 4}}])
def test_every_preset_runs_on_meta(preset: str, moe: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({"preset": preset, "moe": moe})
    with torch.device("meta"):
        encoder = Encoder(config, 1000)
        encoded = encoder(batch_of("pair", [5, 3], config).to("meta"))
    assert encoded.states_TD.is_meta
    assert encoded.states_TD.shape == (2 * (1 + config.num_patches) + 8, config.dim)
    fused = config.layers - config.vl_layers
    sites = {(i, m) for m in moe for i in range(1, fused, 2)}
    assert {(r.layer, r.pool) for r in encoded.routed} == sites
