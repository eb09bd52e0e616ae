import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.support import CODES, SHARED, SPARSE, VOCAB, batch_of, collate_of, config_of, randomise, samples_of
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.errors import TokenizerError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.moe.losses import balance_loss
from vlmoe_core.moe.plan import make_plan
from vlmoe_core.objectives.kinds.masked import Config, MaskedModelling
from vlmoe_core.tokenizers.visual import VisualTokenizer, to_patches

PARTS = ["mlm", "mim", "vlm_text", "vlm_image"]
LENGTHS: dict[StreamName, list[int]] = {"image": [0, 0, 0, 0], "text": [6, 11, 3, 8], "pair": [5, 2, 9, 4]}


class SumOfPixels(VisualTokenizer):
    """The code of a patch is the sum of its pixels, modulo the number of codes."""

    patch_size, codebook_size, fingerprint = 4, CODES, "sum"

    def misfit(self, image_size: int, patch_size: int) -> str | None:
        return None

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return to_patches(images_BCHW, 4).long().sum(-1) % CODES

    def decode(self, ids_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        raise NotImplementedError


def objective_of(
    dtype: torch.dtype = torch.float64, weights: Mapping[str, float] | None = None, **values: Any
) -> MaskedModelling:
    torch.manual_seed(0)
    encoder = Encoder(config_of(**values), VOCAB)
    config = Config.model_validate({"weights": weights or {}})
    objective = MaskedModelling(config, encoder, VOCAB, CODES, SumOfPixels())
    randomise(objective)
    return objective.to(dtype)


def samples_of_all(objective: MaskedModelling) -> dict[StreamName, list[Sample]]:
    return {s: samples_of(s, LENGTHS[s], objective.encoder.config, seed=n) for n, s in enumerate(STREAMS)}


def batches_of(objective: MaskedModelling, samples: Mapping[StreamName, Sequence[Sample]]) -> dict[StreamName, Batch]:
    return {s: collate_of(s, samples.get(s, []), objective.encoder.config) for s in STREAMS}


@torch.no_grad()
def test_losses_equal_a_loop_over_the_hidden_tokens() -> None:
    objective = objective_of(weights={"mlm": 0.5, "vlm_image": 2.0}).eval()
    samples = samples_of_all(objective)
    loss = objective(batches_of(objective, samples))
    sums, counts = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
    for stream, words, patches in [("image", None, "mim"), ("text", "mlm", None), ("pair", "vlm_text", "vlm_image")]:
        for sample in samples[stream]:  # type: ignore[index]
            word_logits, patch_logits = objective.predict(collate_of(stream, [sample], objective.encoder.config))  # type: ignore[arg-type]
            if words and sample.text_targets is not None:
                for logits, target in zip(word_logits, sample.text_targets.tolist(), strict=True):
                    if target != -1:
                        sums[words] += math.log(logits.exp().sum()) - logits[target].item()
                        counts[words] += 1
            if patches and sample.pixels is not None and sample.patch_mask is not None:
                for p in range(16):
                    row, column = 4 * (p // 4), 4 * (p % 4)
                    code = int(sample.pixels[:, row : row + 4, column : column + 4].astype(int).sum()) % CODES
                    if sample.patch_mask[p]:
                        sums[patches] += math.log(patch_logits[0, p].exp().sum()) - patch_logits[0, p, code].item()
                        counts[patches] += 1
    assert list(loss.parts) == ["mim", "mlm", "vlm_text", "vlm_image"]
    for name, part in loss.parts.items():
        assert part.count == counts[name] > 0
        assert part.sum.item() == pytest.approx(sums[name], rel=1e-9)
    assert {name: part.weight for name, part in loss.parts.items()} == {
        "mlm": 0.5,
        "mim": 1.0,
        "vlm_text": 1.0,
        "vlm_image": 2.0,
    }
    assert {name: part.streams for name, part in loss.parts.items()} == {
        "mlm": ("text",),
        "mim": ("image",),
        "vlm_text": ("pair",),
        "vlm_image": ("pair",),
    }


CUTS: list[dict[StreamName, list[int]]] = [
    {"image": [4], "text": [4], "pair": [4]},
    {"image": [1, 1, 1, 1], "text": [1, 1, 1, 1], "pair": [1, 1, 1, 1]},
    {"image": [2, 2], "text": [2, 2], "pair": [2, 2]},
    {"image": [3, 1, 0], "text": [0, 0, 4], "pair": [0, 4, 0]},
]


def step(objective: MaskedModelling, micros: Sequence[dict[StreamName, Batch]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one step cut into micro-batches."""
    objective.zero_grad()
    local = [objective.counts(micro) for micro in micros]
    counts = {name: float(sum(c[name] for c in local)) for name in local[0]}
    total = 0.0
    for micro in micros:
        share = objective(micro).total(counts)
        share.backward()
        total += share.item()
    return total, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def cut(
    objective: MaskedModelling, samples: Mapping[StreamName, list[Sample]], sizes: Mapping[StreamName, list[int]]
) -> list[dict[StreamName, Batch]]:
    left = {s: list(samples[s]) for s in STREAMS}
    micros = []
    for n in range(len(sizes["image"])):
        taken = {s: [left[s].pop(0) for _ in range(sizes[s][n])] for s in STREAMS}
        micros.append(batches_of(objective, taken))
    assert not any(left.values())
    return micros


@pytest.mark.parametrize("sizes", CUTS[1:])
def test_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(sizes: dict[StreamName, list[int]]) -> None:
    objective = objective_of(weights={"mim": 0.7}).train()
    samples = samples_of_all(objective)
    whole, wanted = step(objective, cut(objective, samples, CUTS[0]))
    total, got = step(objective, cut(objective, samples, sizes))
    assert total == pytest.approx(whole, rel=1e-12)
    assert got.keys() == wanted.keys() == dict(objective.named_parameters()).keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


PRESENT: list[set[StreamName]] = [
    {"image", "text", "pair"},
    {"image"},
    {"text"},
    {"pair"},
    {"image", "text"},
    {"text", "pair"},
    set(),
]


@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("moe", [{}, SPARSE, {"text": {"num_experts": 3}}])
def test_counts_equal_what_forward_reports(present: set[StreamName], moe: dict[str, Any]) -> None:
    objective = objective_of(torch.float32, moe=moe, vl_layers=2).train()
    samples = {s: v for s, v in samples_of_all(objective).items() if s in present}
    batches = batches_of(objective, samples)
    loss = objective(batches)
    counts = objective.counts(batches)
    assert {name: part.count for name, part in loss.parts.items()} == counts
    sites = [(m, layer) for m in ("vision", "text") for layer in objective.encoder.config.sparse_layers(m)]
    assert set(counts) == {*PARTS, *(f"balance/{m}/{layer}" for m, layer in sites)}
    for modality, layer in sites:
        own = {"vision": "image", "text": "text"}[modality]
        through = {own, "pair"} if layer < 1 else {own}
        assert counts[f"balance/{modality}/{layer}"] == len(through & present)
        assert set(loss.parts[f"balance/{modality}/{layer}"].streams) == through
    for name, part in loss.parts.items():
        if part.count == 0:
            assert part.sum.item() == 0, name
    assert torch.isfinite(loss.total(counts))


@pytest.mark.parametrize("pools", [{}, {"moe": SPARSE}, SHARED])
@pytest.mark.parametrize("recompute", [False, True])
def test_empty_streams_give_every_parameter_a_zero_gradient(pools: dict[str, Any], recompute: bool) -> None:
    objective = objective_of(torch.float32, **pools, drop_path=0.1, norm="per_modality").train()
    objective.encoder.recompute = recompute
    batches = batches_of(objective, {})
    total = objective(batches).total(objective.counts(batches))
    total.backward()
    assert total.item() == 0
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


def test_an_empty_stream_changes_nothing_of_the_others() -> None:
    objective = objective_of(moe=SPARSE).eval()
    text = batch_of("text", [5, 7], objective.encoder.config)
    alone, beside = objective({"text": text}), objective({**batches_of(objective, {}), "text": text})
    assert alone.parts["mlm"].sum.item() == beside.parts["mlm"].sum.item() > 0


def test_balance_is_the_mean_over_the_non_empty_groups() -> None:
    objective = objective_of(moe=SPARSE).train()
    samples = samples_of_all(objective)
    del samples["text"]
    batches = batches_of(objective, samples)
    torch.manual_seed(3)
    loss = objective(batches)
    counts = objective.counts(batches)
    config = objective.encoder.config
    for modality, layer, groups in [("vision", 1, 2), ("vision", 2, 1), ("text", 0, 1), ("text", 2, 0)]:
        balance = getattr(config.moe, modality).balance
        plans = [r.plan for _, r in loss.routed if (r.pool, r.layer) == (modality, layer)]
        terms = [balance_loss(plan, balance).item() for plan in plans if len(plan.expert_TK)]
        part = loss.parts[f"balance/{modality}/{layer}"]
        assert (part.count, part.weight, len(terms)) == (groups, 1.0, groups)
        assert part.sum.item() == pytest.approx(sum(terms))
        assert (part.sum.item() > 0) == (groups > 0)
    means = {name: p.weight * p.sum.item() / p.count for name, p in loss.parts.items() if p.count}
    assert loss.total(counts).item() == pytest.approx(sum(means.values()))


def test_balance_reaches_the_routers() -> None:
    moe = {m: {**c, "balance": {"vloss": 5.0}} for m, c in SPARSE.items()}
    objective = objective_of(moe=moe, weights=dict.fromkeys(PARTS, 0.0)).train()
    batches = batches_of(objective, samples_of_all(objective))
    objective(batches).total(objective.counts(batches)).backward()
    for name, parameter in objective.named_parameters():
        if "router" in name:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_balance_is_computed_in_training_alone() -> None:
    objective = objective_of(moe=SPARSE).eval()
    batches = batches_of(objective, samples_of_all(objective))
    loss = objective(batches)
    assert set(loss.parts) == set(PARTS)
    assert objective.train()(batches).parts.keys() - set(PARTS) == {
        "balance/vision/1",
        "balance/vision/2",
        "balance/text/0",
        "balance/text/2",
    }


@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("vl_layers", [0, 1, 2])
def test_counts_of_a_shared_pool_equal_what_forward_reports(present: set[StreamName], vl_layers: int) -> None:
    objective = objective_of(torch.float32, **SHARED, vl_layers=vl_layers).train()
    batches = batches_of(objective, {s: v for s, v in samples_of_all(objective).items() if s in present})
    loss, counts = objective(batches), objective.counts(batches)
    assert {name: part.count for name, part in loss.parts.items()} == counts
    streams: dict[str, set[StreamName]] = {
        "shared": {"image", "text", "pair"},
        "vision": {"image", "pair"},
        "text": {"text", "pair"},
    }
    for tokens, of_tokens in streams.items():
        for layer in (1, 2):
            through = of_tokens - ({"pair"} if layer >= 3 - vl_layers else set())
            assert counts[f"balance/{tokens}/{layer}"] == len(through & present)
            assert set(loss.parts[f"balance/{tokens}/{layer}"].streams) == through
    assert set(counts) == {*PARTS, *(f"balance/{t}/{layer}" for t in streams for layer in (1, 2))}
    for name, part in loss.parts.items():
        assert (part.sum.item() == 0) == (part.count == 0), name


def test_a_shared_pool_balances_all_tokens_and_each_modality() -> None:
    objective = objective_of(**SHARED).train()
    batches = batches_of(objective, samples_of_all(objective))
    loss = objective(batches)
    pool = objective.encoder.config.moe.shared
    assert pool is not None
    sets = {"shared": pool.balance, "vision": pool.vision_balance, "text": pool.text_balance}
    for tokens, losses in sets.items():
        for layer in (1, 2):
            terms = []
            for stream, one in loss.routed:
                images = batches[stream].num_images * 17
                rows = {"shared": slice(None), "vision": slice(images), "text": slice(images, None)}[tokens]
                if one.layer == layer and len(one.plan.expert_TK[rows]):
                    logits = (one.plan.clean_logits_TE[rows], one.plan.noisy_logits_TE[rows])
                    plan = make_plan(
                        *logits, top_k=2, weights="gate", priority="gate", capacity=None, noise_std=one.plan.noise_std
                    )
                    terms.append(balance_loss(plan, losses).item())
            part = loss.parts[f"balance/{tokens}/{layer}"]
            assert part.count == len(terms) == {"shared": 3, "vision": 2, "text": 2}[tokens] - (layer == 2)
            assert part.sum.item() == pytest.approx(sum(terms), rel=1e-9)


def test_a_shared_pool_under_recompute_and_autocast() -> None:
    gradients = []
    for recompute in (False, True):
        objective = objective_of(torch.float32, **SHARED, drop_path=0.2).train()
        objective.encoder.recompute = recompute
        batches = batches_of(objective, samples_of_all(objective))
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = objective(batches).total(objective.counts(batches))
        total.backward()
        gradients.append([p.grad for p in objective.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.isfinite(one).all() and torch.equal(one, other)


def test_a_loss_of_weight_zero_is_no_part() -> None:
    moe = {m: {**c, "balance": {"vloss": 0}} for m, c in SPARSE.items()}
    objective = objective_of(moe=moe).train()
    batches = batches_of(objective, samples_of_all(objective))
    assert set(objective(batches).parts) == set(objective.counts(batches)) == set(PARTS)


def test_routed_names_the_stream_of_every_plan() -> None:
    objective = objective_of(moe=SPARSE).eval()
    loss = objective(batches_of(objective, samples_of_all(objective)))
    tokens = {(s, r.pool, r.layer): r.plan.expert_TK.shape[0] for s, r in loss.routed}
    assert len(tokens) == len(loss.routed)
    assert {k: n for k, n in tokens.items() if n} == {
        ("image", "vision", 1): 68,
        ("image", "vision", 2): 68,
        ("text", "text", 0): 28,
        ("text", "text", 2): 28,
        ("pair", "vision", 1): 68,
        ("pair", "text", 0): 20,
    }


def test_targets_are_the_hidden_words_and_codes() -> None:
    objective = objective_of()
    samples = samples_of_all(objective)
    batches = batches_of(objective, samples)
    targets = objective.targets(batches)
    assert set(targets) == set(PARTS)
    sizes = objective.target_sizes
    assert sizes == {"mlm": VOCAB, "vlm_text": VOCAB, "mim": CODES, "vlm_image": CODES}
    for name, stream in [("mlm", "text"), ("vlm_text", "pair")]:
        wanted = [t for s in samples[stream] for t in s.text_targets.tolist() if t != -1]  # type: ignore[index, union-attr]
        assert targets[name].tolist() == wanted
    for name, stream in [("mim", "image"), ("vlm_image", "pair")]:
        batch = batches[stream]  # type: ignore[index]
        codes = SumOfPixels().encode(batch.pixels_ICHW)
        assert targets[name].tolist() == codes[batch.patch_mask_IP].tolist()
    assert {name: len(t) for name, t in targets.items()} == objective.counts(batches)
    assert all(len(t) == 0 for t in objective.targets(batches_of(objective, {})).values())


def test_predictions_stand_in_the_order_of_the_tokens() -> None:
    objective = objective_of().eval()
    words, patches = objective.predict(batch_of("pair", [5, 3], objective.encoder.config))
    assert words.shape == (8, VOCAB) and patches.shape == (2, 16, CODES)


def test_images_without_a_visual_tokenizer_are_refused() -> None:
    objective = objective_of()
    objective.visual = None
    batches = batches_of(objective, samples_of_all(objective))
    with pytest.raises(TokenizerError, match="without a visual tokenizer; load or fit one"):
        objective(batches)
    texts = batches_of(objective, {"text": samples_of_all(objective)["text"]})
    assert objective(texts).parts["mlm"].count > 0


def test_codes_that_a_batch_brings_are_the_targets() -> None:
    objective = objective_of()
    batches = batches_of(objective, samples_of_all(objective))
    batch = batches["image"]
    stored_IP = torch.arange(batch.patch_mask_IP.numel()).view_as(batch.patch_mask_IP) % CODES
    coded = {"image": replace(batch, codes_IP=stored_IP)}
    assert objective.targets(coded)["mim"].tolist() == stored_IP[batch.patch_mask_IP].tolist()
    assert objective.targets({"image": batch})["mim"].tolist() != stored_IP[batch.patch_mask_IP].tolist()
    objective.visual = None
    assert objective(coded).parts["mim"].count == batch.num_masked_patches > 0


def test_the_visual_tokenizer_is_no_part_of_the_state() -> None:
    objective = objective_of(moe=SPARSE)
    heads = {f"heads.{head}.{kind}" for head in ("text", "image") for kind in ("weight", "bias")}
    assert objective.state_dict().keys() == heads | {f"encoder.{n}" for n in objective.encoder.state_dict()}


def test_heads_start_like_the_encoder() -> None:
    config = config_of(dim=96, init_std=0.03)
    heads = MaskedModelling(Config(), Encoder(config, 400), 400, 300, None).heads
    for head, outputs in ((heads.text, 400), (heads.image, 300)):
        assert head.weight.shape == (outputs, 96)
        assert head.weight.std().item() == pytest.approx(0.03, rel=0.03)
        assert (head.bias == 0).all()


def test_the_loss_is_float32_under_autocast() -> None:
    objective = objective_of(torch.float32, moe=SPARSE).train()
    batches = batches_of(objective, samples_of_all(objective))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(batches)
    assert {part.sum.dtype for part in loss.parts.values()} == {torch.float32}
    loss.total(objective.counts(batches)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())
