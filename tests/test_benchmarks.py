"""The benchmarks run in a small form and print what they promise; how fast they are is no test's business."""

import json
import math
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.benchmarks import (
    collectives,
    common,
    expert_parallel,
    loader,
    moe_layer,
    peers,
    predicted_step,
    pretrain_step,
    route_trace,
    startup,
)
from tests.benchmarks.workload import CAPTIONS_OF_LENGTH, caption_lengths, make_batch, make_model, num_tokens
from vlmoe_core.errors import UsageError
from vlmoe_core.moe.plan import make_plan


def run_quick(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the module prints with --quick --json."""
    figures = json_of(module, capsys)
    assert figures["bounds"] == module.BOUNDS
    assert set(module.BOUNDS) < set(figures)
    assert all(value > 0 for name, value in figures.items() if name.endswith(("_s", "over_dense", "over_padded")))
    return figures


def json_of(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the module prints with --quick --json."""
    common.run(module.__doc__, module.measure, ["--quick", "--json"])
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    return figures


def test_pretrain_step(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run_quick(pretrain_step, capsys)
    # 2 images of 65 tokens, alone and in pairs; texts of 96 and 128 tokens; two captions.
    assert 4 * 65 + 224 + 2 * 4 <= figures["tokens"] <= 4 * 65 + 224 + 2 * 64
    assert 0.25 <= figures["busiest"] < 1
    assert 0.5 < figures["token_ratio"] < 1
    assert figures["sparse_over_dense"] == pytest.approx(figures["sparse_step_s"] / figures["dense_step_s"], rel=0.02)


def test_the_full_pretrain_step_has_8k_tokens_in_three_streams_and_16_experts() -> None:
    size = pretrain_step.FULL
    config = make_model(size.preset, size.experts)
    batches = pretrain_step._three_streams(size, config)
    assert set(batches) == {"image", "text", "pair"}
    assert num_tokens(batches, config) >= 8000
    assert config.sparse_layers("vision") == config.sparse_layers("text") == (1, 3, 5, 7)
    assert config.moe.vision is not None
    assert config.moe.vision.num_experts == 16
    assert config.moe.vision.capacity_factor is None


def test_peers(capsys: pytest.CaptureFixture[str]) -> None:
    if not peers.available():
        pytest.skip(peers.ABSENT)
    figures = run_quick(peers, capsys)
    assert figures["ours_million_params"] == pytest.approx(figures["torchscale_million_params"], rel=0.1)


def test_peers_without_torchscale_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "available", lambda: False)
    assert peers.measure(quick=True) == {
        "skipped": "the torchscale package is absent; install it with: pip install --no-deps torchscale fairscale"
    }


def test_torchscale_reads_the_same_words_and_does_not_look_at_padding() -> None:
    if not peers.available():
        pytest.skip(peers.ABSENT)
    config = make_model("tiny", None, image_size=128, patch_size=16, layers=2, vl_layers=1, drop_path=0)
    batch = make_batch("pair", config, 2, [5, 9], pad_text_to=peers.PADDED)
    theirs = peers.build_beit3(config).eval()
    with torch.no_grad():
        states = peers._forward_beit3(theirs, batch, 2)()
        theirs.text_embed.weight[0] += 1
        same = peers._forward_beit3(theirs, batch, 2)()
    real = 65 + 5
    assert states.shape == (2, 65 + 64, config.dim)
    torch.testing.assert_close(states[0, :real], same[0, :real])


def test_expert_parallel(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run_quick(expert_parallel, capsys)
    seconds = figures["seconds"]
    for name, (above, below) in expert_parallel.RATIOS.items():
        assert figures[name] == pytest.approx(seconds[f"{above}_s"] / seconds[f"{below}_s"], rel=0.05)
        assert figures["spread"][name][0] <= figures[name] <= figures["spread"][name][1]
    assert 0.5 <= figures["busier"] <= 1
    assert 1 <= figures["wire_overhead"] <= 1.1 and 1 <= figures["wire_overhead_top2"] <= 1.1
    assert figures["wire_over_merged_top2"] >= figures["wire_overhead_top2"]
    assert 0 < figures["begin_share"] < 1


def test_the_full_expert_parallel_step_has_16_experts_in_every_second_block() -> None:
    config = expert_parallel.make_config(expert_parallel.FULL, top_k=2)
    assert config.sparse_layers("vision") == config.sparse_layers("text") == (1, 3)
    for moe in config.pools.values():
        assert (moe.num_experts, moe.top_k, moe.capacity_factor) == (16, 2, None)


def test_a_token_whose_two_experts_are_on_one_process_is_counted_once() -> None:
    logits_TE = torch.tensor([[0.0, 0, 9, 8], [9, 0, 0, 8], [9, 8, 0, 0], [0, 0, 9, 8]])
    plan = make_plan(logits_TE, logits_TE, top_k=2, weights="gate", priority="position", capacity=1, noise_std=0.0)
    assert plan.kept_TK.tolist() == [[True, True], [True, False], [False, True], [False, False]]
    assert expert_parallel.process_TK(plan).tolist() == [[1, 1], [0, 1], [0, 0], [1, 1]]
    assert [expert_parallel._processes_elsewhere(plan, rank) for rank in (0, 1)] == [1, 2]


def test_collectives(capsys: pytest.CaptureFixture[str]) -> None:
    figures = json_of(collectives, capsys)
    assert figures["bounds"] == {}
    for name in collectives.SENT:
        assert {f"{name}_2_gb_s", f"{name}_2_alpha_us", f"{name}_2_error"} < set(figures)


def test_a_line_through_calls_counts_each_size_alike() -> None:
    line = collectives.fit([0, 1e6, 1e9], [2e-3, 2e-3 + 1e-3, 2e-3 + 1.0])
    assert [line.alpha, line.beta] == pytest.approx([2e-3, 1e-9])
    assert line.error == pytest.approx(0, abs=1e-9)
    shares = collectives.fit([0, 1e9], [1.0, 3.0])
    assert [shares.alpha, shares.beta] == pytest.approx([1.0, 2e-9])


def test_predicted_step(capsys: pytest.CaptureFixture[str]) -> None:
    figures = json_of(predicted_step, capsys)
    measured, predicted = figures["measured_s"], figures["predicted_s"]
    assert predicted["alone"] == pytest.approx(measured["alone"], abs=2e-4)
    for name in ("dp2", "ep2"):
        assert figures[f"{name}_error"] == pytest.approx(predicted[name] / measured[name] - 1, abs=0.01)
        assert sum(figures["parts_s"][name].values()) == pytest.approx(predicted[name], abs=1e-3)
    assert (
        figures["parts_s"]["dp2"]["exchange inside a node"] == 0 < figures["parts_s"]["ep2"]["exchange inside a node"]
    )
    assert 1 <= figures["constants"]["busier"] <= 2


def test_loader(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run_quick(loader, capsys)
    assert 0 <= figures["wait_share"] < 1
    assert figures["speedup"] == pytest.approx(figures["ours_images_per_s"] / figures["plain_images_per_s"], rel=0.5)


def test_startup(capsys: pytest.CaptureFixture[str]) -> None:
    run_quick(startup, capsys)


def test_route_trace(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run_quick(route_trace, capsys)
    assert figures["traced_over_plain"] == pytest.approx(figures["traced_s"] / figures["plain_s"], rel=0.02)
    # 2 images of 65 tokens, alone and in pairs; texts of 96 and 128 tokens; two captions.
    assert 4 * 65 + 224 + 2 * 4 <= figures["tokens"] <= 4 * 65 + 224 + 2 * 64


def test_the_full_route_trace_has_the_sizes_of_a_recipe() -> None:
    config = route_trace.make_config(route_trace.FULL, top_k=1)
    assert (config.dim, config.layers, config.patch_size, config.image_size) == (384, 8, 16, 224)
    assert config.moe.vision == config.moe.text and config.moe.vision is not None
    assert (config.moe.vision.num_experts, config.sparse_layers("text")) == (16, (1, 3, 5, 7))


def test_moe_layer(capsys: pytest.CaptureFixture[str]) -> None:
    moe_layer.main(["--quick", "--json"])
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [case["dtype"] for case in cases] == ["float32", "bfloat16"]
    for case in cases:
        ratios = [case, *([case["autocast"]] if case["dtype"] == "bfloat16" else [])]
        assert set(case["bounds"]) < set(case)
        assert all(one["grouped_over_dense"] > 0 and one["grouped_peak_over_dense"] > 0 for one in ratios)
        assert all((one["grouped_over_tutel"] is not None) == moe_layer.tutel_available() for one in ratios)
        assert 1 / case["num_experts"] <= case["busiest"] <= 1
        assert case["seconds"].keys() == case["peak_mib"].keys() >= {"dense", "grouped"}
    assert cases[0]["autocast"] is None


def test_moe_layer_without_tutel_says_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_layer, "tutel_available", lambda: False)
    (case,) = moe_layer.measure(quick=True, only=0)["cases"]  # type: ignore[misc]
    assert case["grouped_over_tutel"] is None and case["tutel_over_dense"] is None
    with pytest.raises(UsageError, match="no case 2; there are 0 to 1"):
        moe_layer.measure(quick=True, only=2)


def test_the_full_moe_layer_has_the_rows_and_bounds_of_the_goal() -> None:
    rows = [(*moe_layer._sizes(row.case).values(), row.over_dense, row.over_tutel) for row in moe_layer.FULL.rows]
    assert rows == [
        (768, 3072, 16, 4096, 1, "float32", 1.08, 0.75),
        (384, 1536, 16, 8192, 1, "float32", 1.00, 0.73),
        (384, 1536, 32, 8192, 2, "float32", 1.07, 0.70),
        (384, 1536, 16, 8192, 1, "bfloat16", 1.20, 0.70),
        (768, 3072, 32, 4096, 1, "bfloat16", 1.35, 0.67),
    ]
    assert (moe_layer.FULL.threads, moe_layer.PEAK_BOUND) == (2, 1.25)


def test_sides_under_autocast_hold_float32_and_ours_its_copies() -> None:
    sides = moe_layer.sides_of(moe_layer.QUICK.rows[1].case, autocast=True)
    for side in sides.values():
        assert {p.dtype for p in side.layer.parameters()} == {torch.float32}
        assert side.autocast == torch.bfloat16
    assert sides["grouped"].layer.experts.up.copy.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_tutels_layer_routes_as_ours_does() -> None:
    if not moe_layer.tutel_available():
        pytest.skip("the tutel package is absent")
    sides = moe_layer.sides_of(moe_layer.QUICK.rows[0].case)
    ours = sides["grouped"].layer.router.weight
    (gate,) = sides["tutel"].layer.gates
    assert torch.equal(gate.wg.weight, ours) and gate.capacity_factor == 1.25
    experts = sum(p.numel() for n, p in sides["tutel"].layer.named_parameters() if n.startswith("experts"))
    assert experts == sum(p.numel() for p in sides["grouped"].layer.experts.parameters())


def test_curves_of_the_moe_layer(capsys: pytest.CaptureFixture[str]) -> None:
    moe_layer.main(["--quick", "--json", "--curves"])
    curves = json.loads(capsys.readouterr().out)["curves"]
    assert [point["top_k"] for point in curves["top_k"]] == [1, 2, 3, 4]
    assert [point["num_experts"] for point in curves["num_experts"]] == [4, 8]
    assert all(point["seconds"].keys() >= {"dense", "grouped", "traffic"} for point in curves["top_k"])


def test_traffic_reads_every_weight_and_writes_its_gradient() -> None:
    case = moe_layer.QUICK.curve
    traffic = moe_layer.WeightTraffic(case)
    x_TD = torch.randn(case.tokens, case.dim, requires_grad=True)
    traffic(x_TD).sum().backward()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in traffic.parameters())
    assert sum(p.numel() for p in traffic.parameters()) == 2 * case.num_experts * case.dim * case.hidden


def test_lines_for_people_and_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"ratio": 0.123456, "count": 3, "bounds": {"ratio": 1}}
    common.run("Doc.", lambda quick: figures, [])
    assert capsys.readouterr().out == "ratio: 0.1235\ncount: 3\nbounds: {'ratio': 1}\n"
    common.run("Doc.", lambda quick: figures, ["--json"])
    assert json.loads(capsys.readouterr().out) == {**figures, "ratio": 0.1235}
    common.show({"cases": [{"ratio": 0.123456, "count": 3, "none": None}]}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"cases": [{"ratio": 0.1235, "count": 3, "none": None}]}


def test_cases_take_turns_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    times = common.timings({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_of_each_repeats_own() -> None:
    assert common.median_ratio([2.0, 30.0, 3.0], [1.0, 10.0, 2.0]) == 2.0


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), common.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_padding_adds_tokens_and_nothing_to_predict() -> None:
    config = make_model("tiny", None, image_size=128, patch_size=16)
    packed = make_batch("pair", config, 2, [5, 9])
    padded = make_batch("pair", config, 2, [5, 9], pad_text_to=64)
    assert (packed.text_ids_T.shape[0], padded.text_ids_T.shape[0]) == (14, 128)
    assert (packed.num_masked_words, packed.num_masked_patches) == (padded.num_masked_words, padded.num_masked_patches)
    torch.testing.assert_close(padded.text_ids_T.view(2, 64)[0, :5], packed.text_ids_T[:5])


def test_caption_lengths_without_the_file_follow_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(sys.modules["tests.benchmarks.workload"], "SHARED", tmp_path)
    lengths = caption_lengths(5000)
    mean = sum(n * c for n, c in CAPTIONS_OF_LENGTH.items()) / sum(CAPTIONS_OF_LENGTH.values())
    assert sum(lengths) / 5000 == pytest.approx(mean, abs=0.3)
    assert set(Counter(lengths)) <= set(CAPTIONS_OF_LENGTH)


def test_caption_lengths_of_the_file() -> None:
    from tests.benchmarks.workload import SHARED

    if not SHARED.exists():
        pytest.skip("../shared is absent")
    lengths = caption_lengths(300)
    assert len(lengths) == 300
    assert math.isclose(sum(lengths) / 300, 14.3, abs_tol=1.0)
