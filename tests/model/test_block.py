"""Blocks against plain arithmetic, stochastic depth, and torch's tools on a sparse block."""

import shutil
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.model.support import SHARED, SPARSE, batch_of, config_of, randomise
from vlmoe_core.data.config import StreamName
from vlmoe_core.model.block import Block
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.layout import Layout, build_layout
from vlmoe_core.model.relative import relate
from vlmoe_core.moe.dense import DenseFFN
from vlmoe_core.moe.layer import SparseFFN

EPS = 1e-6


def block_of(layer: int = 2, **values: Any) -> Block:
    torch.manual_seed(0)
    block = Block(config_of(**values), layer)
    randomise(block)
    return block


def layout_of(stream: StreamName, lengths: list[int], config: ModelConfig) -> Layout:
    return build_layout(batch_of(stream, lengths, config), 1 + config.num_patches)


def tokens_of(layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(layout.sequence_T.shape[0], 24, dtype=dtype)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_which_networks_a_block_has(layer: int) -> None:
    block = block_of(layer, moe=SPARSE, norm="per_modality")
    sparse = {0: {"text"}, 1: {"vision"}, 2: {"vision", "text"}}[layer]
    networks = {"vision", "text"} | ({"vl"} if layer == 2 else set())
    assert set(block.ffn) == networks
    assert set(block.norm2) == networks  # type: ignore[arg-type]
    for modality, ffn in block.ffn.items():
        assert isinstance(ffn, SparseFFN if modality in sparse else DenseFFN)


def test_only_pairs_pass_through_the_fused_network() -> None:
    for stream, used in [("image", {"vision"}), ("text", {"text"}), ("pair", {"vl"})]:
        block = block_of(2)
        layout = layout_of(stream, [3, 4], block_config := config_of())  # type: ignore[arg-type]
        assert block_config.vl_layers == 1
        y, routed = block(tokens_of(layout), layout)
        assert routed == ()
        y.sum().backward()
        touched = {
            m for m, ffn in block.ffn.items() if any(p.grad is not None and p.grad.any() for p in ffn.parameters())
        }
        assert touched == used


def test_plans_come_in_the_order_of_the_modalities() -> None:
    block = block_of(2, moe=SPARSE, vl_layers=0)
    layout = layout_of("pair", [3, 4], config_of())
    _, routed = block(tokens_of(layout), layout)
    assert [(r.layer, r.pool, r.num_image_tokens, r.plan.expert_TK.shape) for r in routed] == [
        (2, "vision", 34, (34, 1)),
        (2, "text", 0, (7, 2)),
    ]


@pytest.mark.parametrize(
    ("stream", "layer", "images", "tokens"),
    [("image", 1, 34, 34), ("text", 1, 0, 7), ("pair", 1, 34, 41), ("image", 2, 34, 34), ("text", 2, 0, 7)],
)
def test_a_shared_pool_routes_all_tokens_of_a_stream_as_one_group(
    stream: StreamName, layer: int, images: int, tokens: int
) -> None:
    block = block_of(layer, **SHARED).double()
    layout = layout_of(stream, [3, 4], config_of())
    x = tokens_of(layout, torch.float64)
    y, (routed,) = block.eval()(x, layout)
    assert (routed.layer, routed.pool, routed.num_image_tokens) == (layer, "shared", images)
    assert routed.plan.expert_TK.shape == (tokens, 2)
    middle = x + block.attention(block.norm1(x), layout)
    update, plan = block.ffn["shared"](block.norm2(middle))
    assert torch.equal(plan.expert_TK, routed.plan.expert_TK)
    torch.testing.assert_close(y, middle + update)


def test_pairs_pass_the_dense_network_above_a_shared_pool_too() -> None:
    block = block_of(2, **SHARED, norm="per_modality")
    assert set(block.ffn) == set(block.norm2) == {"shared", "vl"}  # type: ignore[arg-type]
    assert isinstance(block.ffn["shared"], SparseFFN) and isinstance(block.ffn["vl"], DenseFFN)
    layout = layout_of("pair", [3, 4], config_of())
    y, routed = block(tokens_of(layout), layout)
    y.sum().backward()
    assert routed == ()
    assert {name.split(".")[0] for name, p in block.ffn.named_parameters() if p.grad is not None} == {"vl"}


def test_a_block_without_a_shared_pool_keeps_its_modalities_networks() -> None:
    assert set(block_of(0, **SHARED).ffn) == {"vision", "text"}


def test_the_hash_router_is_told_words_and_places() -> None:
    own = {m: {"num_experts": 5, "layers": [1], "router": "hash"} for m in ("vision", "text")}
    values: dict[str, dict[str, Any]] = {
        "own": {"moe": own},
        "shared": {"expert_pool": "shared", "moe": {"shared": own["vision"]}},
    }
    batch = batch_of("pair", [3, 4], config_of())
    layout = build_layout(batch, 17)
    identity = [*range(17), *range(17), *batch.text_ids_T.tolist()]
    assert layout.identity_T.tolist() == identity
    wanted = [(i * 2_654_435_769 % 2**32 >> 16) % 5 for i in identity]
    for pools in values.values():
        _, routed = block_of(1, **pools).eval()(tokens_of(layout), layout)
        assert [e for one in routed for e in one.plan.expert_TK[:, 0].tolist()] == wanted


def branch_by_hand(block: Block, layout: Layout, x_TD: Tensor, modality: str) -> tuple[Tensor, Tensor]:
    """Attention and feed-forward branch without residual, the latter of `x_TD` as it is."""
    attention = block.attention(F.layer_norm(x_TD, (24,), block.norm1.weight, block.norm1.bias, EPS), layout)
    normed = F.layer_norm(x_TD, (24,), block.norm2.weight, block.norm2.bias, EPS)  # type: ignore[arg-type]
    return attention, block.ffn[modality](normed)


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_drop_path_skips_whole_sequences(layer_scale: float | None) -> None:
    block = block_of(2, drop_path=0.6, layer_scale=layer_scale).double().train()
    lengths = [2, 5, 3, 4, 6, 2, 3, 5]
    layout = layout_of("text", lengths, config_of())
    x = tokens_of(layout, torch.float64)
    torch.manual_seed(4)
    y, _ = block(x, layout)
    torch.manual_seed(4)
    stay = 1 - block.drop_path
    kept = [(torch.rand(8, 1) < stay).double()[layout.sequence_T] / stay for _ in range(2)]
    scales = [1.0, 1.0] if layer_scale is None else [block.scale1, block.scale2]
    middle = x + branch_by_hand(block, layout, x, "text")[0] * scales[0] * kept[0]
    torch.testing.assert_close(y, middle + branch_by_hand(block, layout, middle, "text")[1] * scales[1] * kept[1])
    skipped = (kept[0] + kept[1])[:, 0] == 0
    assert 0 < skipped.sum() < len(x)
    assert torch.equal(y[skipped], x[skipped])


def test_drop_path_is_seeded_by_torch_and_off_in_evaluation() -> None:
    block = block_of(2, drop_path=0.6).train()
    layout = layout_of("pair", [4] * 6, config_of())
    x = tokens_of(layout)
    torch.manual_seed(1)
    first, second = block(x, layout)[0], block(x, layout)[0]
    torch.manual_seed(1)
    assert torch.equal(block(x, layout)[0], first)
    assert not torch.equal(first, second)
    block.eval()
    state = torch.get_rng_state()
    assert torch.equal(block(x, layout)[0], block(x, layout)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_drop_path_rises_linearly_from_zero() -> None:
    config = config_of(layers=5, drop_path=0.4)
    assert [Block(config, i).drop_path for i in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert Block(config_of(layers=1, drop_path=0.4), 0).drop_path == 0


def test_drop_path_keeps_the_mean() -> None:
    block = block_of(2, drop_path=0.5)
    layout = layout_of("text", [1] * 4000, config_of())
    factors = block._survivors(layout, torch.empty(0))
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    assert factors.mean().item() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("stream", ["image", "text", "pair"])
@pytest.mark.parametrize("sequences", [0, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_meta(stream: StreamName, sequences: int, shared: bool) -> None:
    config = config_of(**SHARED if shared else {"moe": SPARSE})
    batch = batch_of(stream, [4, 2, 5][:sequences], config).to("meta")
    with torch.device("meta"):
        block = Block(config, 2).train()
        layout = build_layout(batch, 17)
        x = torch.empty(layout.sequence_T.shape[0], 24, requires_grad=True)
    y, routed = block(x, layout)
    y.sum().backward()
    assert y.is_meta and y.shape == x.shape and y.dtype == torch.float32
    assert len(routed) == (0 if stream == "pair" else 1)
    assert x.grad is not None and x.grad.shape == x.shape


def test_fake_tensors() -> None:
    config = config_of(moe=SPARSE, vl_layers=0)
    batch, block = batch_of("pair", [4, 2], config), Block(config, 2).train()
    with FakeTensorMode() as mode:
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        fake = {name: mode.from_tensor(v) for name, v in tensors.items() if isinstance(v, Tensor)}
        layout = build_layout(replace(batch, **fake), 17)
        weights = {name: mode.from_tensor(p) for name, p in block.named_parameters()}
        y, routed = torch.func.functional_call(block, weights, (torch.empty(40, 24), layout))
        grads = torch.autograd.grad(y.sum(), list(weights.values()))
    assert y.shape == (40, 24) and y.dtype == torch.float32 and len(routed) == 2
    assert [g.shape for g in grads] == [p.shape for p in block.parameters()]


ONE_SPARSE: dict[str, Any] = {"vision": {"num_experts": 4, "eval_capacity_factor": 0.75}}
ONE_SHARED: dict[str, Any] = {"expert_pool": "shared", "moe": {"shared": ONE_SPARSE["vision"]}}


HAS_COMPILER = shutil.which("g++") or shutil.which("clang++")
INDUCTOR = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")


SWITCHED: dict[str, Any] = {"attention": "per_modality", "norm": "per_modality", "moe": ONE_SPARSE}


@pytest.mark.parametrize(
    ("pools", "backend"),
    [
        ({**SWITCHED, "positions": "relative"}, "aot_eager"),
        pytest.param({"moe": ONE_SPARSE}, "inductor", marks=INDUCTOR),
        pytest.param(ONE_SHARED, "inductor", marks=INDUCTOR),
    ],
)
def test_compile_without_graph_break(pools: dict[str, Any], backend: str) -> None:
    torch.compiler.reset()
    config, block = config_of(**pools), block_of(1, **pools).eval()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)

    def run(module: Any, x: Tensor, layout: Layout) -> list[Tensor]:
        block.zero_grad()
        x = x.detach().requires_grad_()
        relative = relate(layout, layout.length - 17, config) if config.positions == "relative" else None
        y, ((_, _, plan, num_image_tokens),) = module(x, layout, relative)
        assert num_image_tokens == layout.num_image_tokens
        assert plan.capacity == -(-3 * plan.expert_TK.shape[0] // 16)
        (y.square().sum() + plan.probs_TE.square().sum()).backward()
        grads = [p.grad.clone() for p in block.parameters() if p.grad is not None]
        assert len(grads) == len(list(block.parameters())) and x.grad is not None
        return [y, x.grad, plan.kept_TK, *grads]

    compilations = set()
    for lengths in ([4, 2, 9], [5, 3], [7, 3, 3, 8]):
        layout = layout_of("pair", lengths, config_of())
        x = tokens_of(layout)
        for got, wanted in zip(run(compiled, x, layout), run(block, x, layout), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "another number of tokens or sequences compiled the block anew"


@pytest.mark.parametrize("pools", [{"moe": ONE_SPARSE}, ONE_SHARED])
def test_compile_with_noise_and_drop_path(pools: dict[str, Any]) -> None:
    block = block_of(1, **pools, drop_path=0.3).train()
    layout = layout_of("pair", [4, 2], config_of())
    y, _ = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")(tokens_of(layout), layout)
    y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.parametrize("pools", [{"moe": SPARSE}, SHARED])
def test_export(pools: dict[str, Any]) -> None:
    block = block_of(2, **pools, vl_layers=0).eval()
    layout = layout_of("pair", [4, 2], config_of())
    program = torch.export.export(block, (tokens_of(layout), layout))
    assert any(node.target is torch.ops.vlmoe.expert_ffn.default for node in program.graph.nodes)
    x = tokens_of(layout)
    (got, got_routed), (wanted, wanted_routed) = program.module()(x, layout), block(x, layout)
    torch.testing.assert_close(got, wanted)
    for one, other in zip(got_routed, wanted_routed, strict=True):
        assert torch.equal(one.plan.expert_TK, other.plan.expert_TK)
        assert (one.pool, one.num_image_tokens) == (other.pool, other.num_image_tokens)


def test_flop_counter_sees_the_experts() -> None:
    layout = layout_of("image", [0, 0], config_of())
    totals = {}
    for name, moe in [("dense", {}), ("sparse", SPARSE)]:
        block = block_of(2, moe=moe).eval()
        with FlopCounterMode(display=False) as counter:
            block(tokens_of(layout), layout)
        totals[name] = counter.get_total_flops()
    assert totals["sparse"] - totals["dense"] == 2 * 34 * 24 * 4
