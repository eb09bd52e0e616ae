"""Upcycling against the dense model itself: same function, copied weights and moments, a true receipt."""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.support import BEIT3, VLMO, VOCAB, batch_of, config_of, randomise
from tests.train.support import assert_same_bits, fresh_process, tiny, train
from tests.train.tasks_support import finetuned
from vlmoe_core.analysis.routing.trace import encoder_of
from vlmoe_core.checkpoint.layout import latest_checkpoint
from vlmoe_core.checkpoint.manifest import write_manifest
from vlmoe_core.checkpoint.read import Checkpoint, read_checkpoint
from vlmoe_core.checkpoint.restore import load_model_state, load_named_optimizer_state
from vlmoe_core.checkpoint.state import RunState, write_state
from vlmoe_core.checkpoint.write import write_model
from vlmoe_core.data.config import STREAMS
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.upcycling.receipt import Comparison
from vlmoe_core.hub.upcycling.recipe import (
    Asked,
    notes_on,
    parse_capacity,
    parse_layers,
    parse_modalities,
    sparse_recipe,
)
from vlmoe_core.hub.upcycling.samples import Samples, samples_of
from vlmoe_core.hub.upcycling.upcycle import EncoderAlone, upcycle
from vlmoe_core.hub.upcycling.weights import Site, Ways, upcycled_moments, upcycled_tensors
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.recipe.load import dump_recipe, load_model_recipe, load_recipe
from vlmoe_core.tokenizers.config import TextTokenizerConfig, TokenizersConfig
from vlmoe_core.train.build import build_dataset
from vlmoe_core.train.init import load_run_recipe
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.trained import Trained, load_trained

DENSE = ("model.moe.vision=null", "model.moe.text=null")
EVERY = {"every": 1}
SITES = [f"encoder.blocks.{layer}.ffn.{pool}" for layer in (0, 1) for pool in ("vision", "text")]
EQUAL = 1e-6
"""Largest difference of float32 states about as large as 3."""


@pytest.fixture(autouse=True)
def alone() -> None:
    fresh_process()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of the tiny recipe, weights far from their initialisation."""
    folder = tmp_path_factory.mktemp("dense")
    train(tiny(folder, *DENSE, "train.steps=4"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both blocks and modalities of the run in 4 experts, dropless."""
    out = tmp_path_factory.mktemp("sparse") / "model"
    upcycle(dense, Asked(Ways(4), EVERY, capacity_factor=None), out)
    return out


def checkpoint_of(run: Path) -> Checkpoint:
    newest = latest_checkpoint(run)
    assert newest is not None
    return read_checkpoint(newest)


def first_held_out(trained: Trained) -> MicroBatch:
    dataset = build_dataset(trained.recipe, trained.recipe.data.eval, trained.tokenizers, training=False)
    return dataset[0]


def apart(left: nn.Module, right: nn.Module, micro: MicroBatch) -> float:
    """Largest difference of the encoders' states on all streams."""
    with torch.no_grad():
        pairs = [[encoder_of(model)(batch).states_TD for model in (left, right)] for batch in micro.batches.values()]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (8, 1), (8, 2), (1, 1)])
def test_computes_what_the_dense_model_did(dense: Path, tmp_path: Path, experts: int, top_k: int) -> None:
    receipt = upcycle(dense, Asked(Ways(experts, router_std=0.5), EVERY, top_k=top_k), tmp_path / "out")
    before, after = load_trained(dense), load_trained(tmp_path / "out")
    assert after.recipe.model.pools.keys() == {"vision", "text"}
    assert {moe.num_experts for moe in after.recipe.model.pools.values()} == {experts}
    micro = first_held_out(before)
    assert apart(before.objective, after.objective, micro) <= EQUAL
    assert receipt.difference.states <= EQUAL < receipt.difference.largest_state
    assert receipt.difference.loss_after == pytest.approx(receipt.difference.loss_before, abs=1e-5)
    assert receipt.notes == () and receipt.samples.startswith("held-out examples")
    assert receipt.examples == {"image": 10, "text": 10, "pair": 10}


@pytest.mark.parametrize("switches", [{}, BEIT3, VLMO], ids=["VL-MoE", "BEiT-3", "VLMo"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_same_function_in_double_precision(top_k: int, switches: dict[str, Any]) -> None:
    config = config_of(**switches)
    encoder = EncoderAlone(Encoder(config, VOCAB)).double().eval()
    randomise(encoder)
    asked = Asked(Ways(4, router_std=1.0), EVERY, top_k=top_k)
    model = sparse_recipe(ModelRecipe(model=config), asked).model
    other = EncoderAlone(Encoder(model, VOCAB)).double().eval()
    sites = [Site(layer, pool) for pool in ("vision", "text") for layer in range(3)]
    load_model_state(other, upcycled_tensors(encoder.state_dict(), sites, asked.ways))
    batches = {stream: batch_of(stream, (5, 9, 3), config) for stream in STREAMS}
    assert apart(encoder, other, MicroBatch(0, batches, ())) < 1e-12


def test_every_expert_is_the_network_and_all_else_is_as_it_was(dense: Path, sparse: Path) -> None:
    before, after = checkpoint_of(dense).model, read_checkpoint(sparse, verify="sha256").model
    used = set()
    for name in before:
        site = next((site for site in SITES if name.startswith(site)), None)
        new = name if site is None else f"{site}.experts.{name.removeprefix(site + '.')}"
        copies = after[new] if site else after[new].unsqueeze(0)
        assert len(copies) == (4 if site else 1) and all(copy.equal(before[name]) for copy in copies), name
        used.add(new)
    assert set(after) - used == {f"{site}.router.weight" for site in SITES}
    assert not after.tied, "every expert has its own bytes on disk"
    routers = torch.stack([after[f"{site}.router.weight"] for site in SITES])
    assert 0.003 < float(routers.std()) < 0.007 and not routers[0].equal(routers[1])


def test_noise_and_drop_change_the_function_and_the_receipt_says_how_much(dense: Path, tmp_path: Path) -> None:
    ways = {"noise": Ways(4, noise=0.1), "drop": Ways(4, drop=0.5)}
    for name, asked in ways.items():
        receipt = upcycle(dense, Asked(asked, EVERY), tmp_path / name)
        before, after = load_trained(dense), load_trained(tmp_path / name)
        measured = apart(before.objective, after.objective, first_held_out(before))
        assert 1e-3 < measured <= receipt.difference.states + EQUAL
        assert receipt.difference.loss_after != receipt.difference.loss_before
        assert any("function changes" in note for note in receipt.notes)
        up = read_checkpoint(tmp_path / name).model[f"{SITES[0]}.experts.up.weight"]
        assert not up[0].equal(up[1])


def test_noise_is_relative_to_the_spread_of_the_weights() -> None:
    dense = {"encoder.blocks.0.ffn.text.up.weight": 3 * torch.randn(400, 50), **network(400, 50)}
    made = upcycled_tensors(dense, [Site(0, "text")], Ways(4, noise=0.1))
    for part, spread in (("up", 3.0), ("down", 1.0)):
        apart = (
            made[f"encoder.blocks.0.ffn.text.experts.{part}.weight"] - dense[f"encoder.blocks.0.ffn.text.{part}.weight"]
        )
        assert float(apart.std()) == pytest.approx(0.1 * spread, rel=0.02)
    bias = made["encoder.blocks.0.ffn.text.experts.up.bias"]
    assert bias.equal(dense["encoder.blocks.0.ffn.text.up.bias"].expand(4, -1)), "biases are copied as they are"


def test_the_seed_decides_on_all_that_is_drawn() -> None:
    dense = {"encoder.blocks.0.ffn.text.up.weight": torch.randn(8, 4), **network(8, 4)}
    first, again, other = (
        upcycled_tensors(dense, [Site(0, "text")], Ways(2, noise=0.1, drop=0.5, seed=seed)) for seed in (3, 3, 4)
    )
    assert all(first[name].equal(again[name]) for name in first)
    for part in ("router.weight", "experts.up.weight", "experts.down.weight"):
        name = f"encoder.blocks.0.ffn.text.{part}"
        assert not first[name].equal(other[name])


def network(hidden: int, dim: int) -> dict[str, Tensor]:
    """A dense network but for its first weight, which a test makes itself."""
    prefix = "encoder.blocks.0.ffn.text"
    known = {"up.bias": torch.randn(hidden), "down.weight": torch.randn(dim, hidden), "down.bias": torch.randn(dim)}
    return {f"{prefix}.{name}": tensor for name, tensor in known.items()}


def test_drop_draws_whole_hidden_units_anew_as_the_original_is_spread() -> None:
    hidden, dim, prefix = 200, 300, "encoder.blocks.0.ffn.text"
    dense = {f"{prefix}.up.weight": 2 + 0.5 * torch.randn(hidden, dim), **network(hidden, dim)}
    made = upcycled_tensors(dense, [Site(0, "text")], Ways(3, drop=0.25))
    chosen = []
    for expert in range(3):
        parts = {name: made[f"{prefix}.experts.{name}"][expert] for name in ("up.weight", "up.bias", "down.weight")}
        changed = {
            "up.weight": (parts["up.weight"] != dense[f"{prefix}.up.weight"]).all(dim=1),
            "up.bias": parts["up.bias"] != dense[f"{prefix}.up.bias"],
            "down.weight": (parts["down.weight"] != dense[f"{prefix}.down.weight"]).all(dim=0),
        }
        units = changed["up.weight"]
        assert int(units.sum()) == 50 and all(one.equal(units) for one in changed.values())
        kept = ~units
        assert parts["up.weight"][kept].equal(dense[f"{prefix}.up.weight"][kept])
        assert parts["down.weight"][:, kept].equal(dense[f"{prefix}.down.weight"][:, kept])
        new = parts["up.weight"][units]
        assert float(new.mean()) == pytest.approx(2, abs=0.02) and float(new.std()) == pytest.approx(0.5, rel=0.05)
        assert float(parts["down.weight"][:, units].std()) == pytest.approx(1, rel=0.05)
        chosen.append(units)
    assert not chosen[0].equal(chosen[1]), "each expert draws units of its own"


def test_the_norm_inside_a_network_becomes_the_experts() -> None:
    prefix = "encoder.blocks.0.ffn.text"
    tensors = {f"{prefix}.up.weight": torch.randn(8, 4), **network(8, 4), f"{prefix}.norm.weight": torch.randn(8)}
    made = upcycled_tensors(tensors, [Site(0, "text")], Ways(2))
    assert made[f"{prefix}.experts.norm.weight"].equal(tensors[f"{prefix}.norm.weight"].expand(2, -1))


def test_one_training_step_changes_experts_differently(sparse: Path) -> None:
    trained = load_trained(sparse)
    objective = trained.objective.train()
    start = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    optimizer = build_optimizer(objective, trained.recipe.optim, trained.recipe.model.layers)
    torch.manual_seed(0)
    batches = build_dataset(trained.recipe, trained.recipe.data.train, trained.tokenizers, training=True)[0].batches
    loss = objective(batches)
    loss.total({name: float(part.count) for name, part in loss.parts.items()}).backward()
    chosen = chosen_experts(loss)
    optimizer.step()
    after = objective.state_dict()
    for site in SITES:
        assert len(chosen[site]) > 1, "the batch reaches more than one expert"
        up, before = after[f"{site}.experts.up.weight"], start[f"{site}.experts.up.weight"]
        first, second = sorted(chosen[site])[:2]
        assert before[first].equal(before[second]) and not up[first].equal(up[second]), site
        assert not after[f"{site}.router.weight"].equal(start[f"{site}.router.weight"])


def chosen_experts(loss: object) -> dict[str, set[int]]:
    """The experts that some token of a loss went to, by layer."""
    found: dict[str, set[int]] = {}
    for _, one in loss.routed:  # type: ignore[attr-defined]
        name = f"encoder.blocks.{one.layer}.ffn.{one.pool}"
        found.setdefault(name, set()).update(one.plan.expert_TK.unique().tolist())
    return found


def test_moments_are_copied_and_go_on(dense: Path, sparse: Path) -> None:
    moments, optimizer_before = read_checkpoint(sparse).optimizer, checkpoint_of(dense).optimizer
    assert moments is not None and optimizer_before is not None
    trained = load_trained(sparse)
    parameters = dict(trained.objective.named_parameters())
    optimizer = build_optimizer(trained.objective, trained.recipe.optim, trained.recipe.model.layers)
    load_named_optimizer_state(optimizer, parameters.items(), moments)
    for site in SITES:
        expert, router = (
            optimizer.state[parameters[f"{site}.{part}"]] for part in ("experts.up.weight", "router.weight")
        )
        for kind in ("exp_avg", "exp_avg_sq"):
            original = optimizer_before[f"{kind}.{site}.up.weight"]
            assert expert[kind].equal(original.expand(4, -1, -1)) and original.any()
            assert router[kind].shape == parameters[f"{site}.router.weight"].shape and not router[kind].any()
        assert (float(expert["step"]), float(router["step"])) == (4.0, 0.0)
    name = "exp_avg.encoder.norm.weight"
    assert moments[name].equal(optimizer_before[name])
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert {key.partition(".")[2] for key in moments} == trainable, "none is missing, so a run can go on"


def test_moments_of_a_parameter_that_never_had_a_gradient_are_not_made_up() -> None:
    site = Site(0, "text")
    other = {"exp_avg.encoder.blocks.0.ffn.vision.down.weight": torch.ones(2)}
    assert upcycled_moments(other, [site], {}, Ways(4)) == other


def test_training_starts_from_the_folder(sparse: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    tiny(tmp_path, *DENSE)
    text = path.read_text()
    path.write_text(text[: text.index("model:")] + text[text.index("data:") :])
    loaded = load_run_recipe(str(path), ("train.steps=2",), model=sparse)
    train(loaded, tmp_path / "run")
    after = checkpoint_of(tmp_path / "run").model
    up = after[f"{SITES[0]}.experts.up.weight"]
    assert up.shape[0] == 4 and not all(one.equal(up[0]) for one in up)


def test_a_run_that_was_not_at_its_end_goes_on_with_its_moments(dense: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    upcycle(with_recipe(dense, tmp_path, train={"steps": 6}), Asked(Ways(4), EVERY), model)
    outcome = train(load_recipe(str(model / "recipe.yaml")), tmp_path / "run", resume=str(model))
    assert (outcome.step, outcome.finished) == (6, True)
    moments = checkpoint_of(tmp_path / "run").optimizer
    assert moments is not None and float(moments[f"step.{SITES[0]}.experts.up.weight"].max()) == 6


def test_the_receipt_counts_loads_and_drops_as_a_plain_count_does() -> None:
    config = config_of()
    asked = Asked(Ways(4, router_std=0.3), (1,), modalities=("text",), capacity_factor=1.25)
    model = sparse_recipe(ModelRecipe(model=config), asked).model
    dense, sparse = (EncoderAlone(Encoder(one, VOCAB)).eval() for one in (config, model))
    load_model_state(sparse, upcycled_tensors(dense.state_dict(), [Site(1, "text")], asked.ways))
    batches = [batch_of("text", (7, 11, 5), config, seed) for seed in (0, 1)]
    micros = tuple(MicroBatch(n, {"text": batch}, ()) for n, batch in enumerate(batches))
    quiet = model.pools["text"].model_copy(update={"noise": 0.0})
    comparison = Comparison(model, {"text": quiet})
    comparison.run(dense, sparse, Samples("", micros, whole=False))
    counts = [[(sparse.encoder(b).routed[0].plan.expert_TK == e).sum().item() for e in range(4)] for b in batches]
    total = [sum(group[e] for group in counts) for e in range(4)]
    tokens = sum(total)
    (load,) = comparison.loads
    assert (load.layer, load.modality, load.tokens) == (1, "text", tokens) and tokens == 46
    assert (load.busiest, load.idlest) == (max(total) / tokens, min(total) / tokens)
    differences = sum(abs(a - b) for a in total for b in total)
    assert load.gini == pytest.approx(differences / (2 * 4 * tokens))
    for factor in (1.0, 1.25, 2.0):
        lost = sum(max(0, n - ceil(23 * factor / 4)) for group in counts for n in group)
        assert comparison.dropped[f"{factor:g}"] == pytest.approx(lost / tokens)
    assert load.dropped == comparison.dropped["1.25"] > 0


def test_the_receipt_lies_in_the_folder_with_parameters_before_and_after(sparse: Path, dense: Path) -> None:
    found = json.loads((sparse / "upcycle.json").read_text())
    before, after = load_trained(dense).objective, load_trained(sparse).objective
    sizes = [sum(tensor.numel() for tensor in one.state_dict().values()) for one in (before, after)]
    assert [found["before"]["total"], found["after"]["total"]] == sizes
    assert found["before"]["active"] == sizes[0]
    assert found["after"]["active"] == sizes[0] + sum(4 * 16 for _ in SITES), "one network and its router"
    assert found["moments"] is True and found["capacity_factor"] is None
    assert all(load["dropped"] == 0 for load in found["loads"]), "dropless"
    assert (found["source"], found["step"]) == ("run/checkpoints/step-00000004", 4)
    assert read_checkpoint(sparse, verify="sha256").state.step == 4


def test_a_task_keeps_its_answers(tmp_path: Path) -> None:
    run = finetuned(tmp_path, "nli", *DENSE, "train.steps=2")
    receipt = upcycle(run, Asked(Ways(4), (0,), modalities=("text",)), tmp_path / "out")
    assert receipt.difference.outputs is not None and receipt.difference.outputs <= EQUAL
    assert receipt.layers == {"text": (0,)} and receipt.examples == {"text": 6}
    assert load_trained(tmp_path / "out").tokenizers.labels == load_trained(run).tokenizers.labels
    changed = upcycle(run, Asked(Ways(4, noise=1.0), (0,), modalities=("text",)), tmp_path / "changed")
    assert changed.difference.outputs is not None and changed.difference.outputs > 1e-5


def imported(folder: Path, dense: Path, with_text: bool) -> tuple[Path, Mapping[str, Tensor]]:
    """A model folder as an importer writes it: an encoder, a tensor beside it, no moments; and its tensors."""
    trained = load_trained(dense)
    recipe = ModelRecipe(model=trained.recipe.model, tokenizers=trained.recipe.tokenizers)
    tensors = {f"encoder.{name}": t for name, t in encoder_of(trained.objective).state_dict().items()}
    tensors["heads.text.weight"] = torch.ones(3, 2)
    tokenizers = trained.tokenizers.text if with_text else None

    def write(place: Path) -> None:
        if tokenizers is not None:
            tokenizers.save(place / "text")

    return write_model(folder, tensors, RunState(step=0, positions={}), dump_recipe(recipe), write), tensors


@pytest.mark.parametrize("with_text", [True, False])
def test_an_imported_encoder_is_compared_on_scenes(dense: Path, tmp_path: Path, with_text: bool) -> None:
    source, tensors = imported(tmp_path / "imported", dense, with_text)
    receipt = upcycle(source, Asked(Ways(4), EVERY, top_k=2), tmp_path / "out")
    assert "drawn scenes" in receipt.samples and "names no data" in receipt.samples
    assert set(receipt.examples) == ({"image", "text", "pair"} if with_text else {"image"})
    assert receipt.difference.states <= EQUAL and receipt.difference.loss_before is None and not receipt.moments
    unseen = [load for load in receipt.loads if load.tokens == 0]
    assert {load.modality for load in unseen} == (set() if with_text else {"text"})
    found = read_checkpoint(tmp_path / "out")
    assert found.optimizer is None
    recipe = load_model_recipe(tmp_path / "out" / "recipe.yaml")
    assert not isinstance(recipe, Recipe) and recipe.model.pools["text"].top_k == 2
    assert_same_bits(
        {name: found.model[name] for name in found.model if ".ffn.vision" not in name and ".ffn.text" not in name},
        {name: t for name, t in tensors.items() if ".ffn.vision" not in name and ".ffn.text" not in name},
    )


def test_data_that_is_gone_is_said(dense: Path) -> None:
    trained = load_trained(dense)
    missing = {"source": "image-folder", "path": "/nowhere/at/all"}
    said = trained.recipe.model_dump(mode="json")
    said["data"]["eval"] = {"image": [missing]}
    samples = samples_of(Recipe.model_validate(said), trained.tokenizers)
    assert "can't be read" in samples.told and samples.trouble is not None and "/nowhere/at/all" in samples.trouble
    assert samples.examples == {"image": 64, "text": 64, "pair": 64} and not samples.whole


def with_recipe(dense: Path, folder: Path, **changes: Mapping[str, object]) -> Path:
    """The same checkpoint, its recipe changed."""
    checkpoint, said = checkpoint_of(dense), load_trained(dense).recipe.model_dump(mode="json")
    for part, change in changes.items():
        said[part] |= change
    model, moments = ({name: found[name] for name in found} for found in (checkpoint.model, checkpoint.optimizer or {}))
    recipe = dump_recipe(Recipe.model_validate(said))
    return write_model(folder / "moved", model, checkpoint.state, recipe, checkpoint.tokenizers, moments)


def test_what_belongs_to_the_dense_run_stays_there(dense: Path, tmp_path: Path) -> None:
    theirs = {"best_score": 0.5, "best_step": 3, "metrics_offset": 77, "tracker_run": "abc"}
    moved = with_recipe(dense, tmp_path)
    write_state(moved / "state.json", replace(read_checkpoint(moved).state, **theirs))
    write_manifest(moved, 0, {})
    assert read_checkpoint(moved).state.best_score == 0.5
    upcycle(moved, Asked(Ways(2), EVERY), tmp_path / "out")
    state = read_checkpoint(tmp_path / "out").state
    assert (state.best_score, state.best_step, state.metrics_offset, state.tracker_run) == (None, None, 0, "")
    assert state.step == 4


def test_parts_of_the_loss_count_by_their_weights(dense: Path, tmp_path: Path) -> None:
    weights = {"vlm_text": 0.0, "vlm_image": 0.0}
    losses = []
    for number, factor in enumerate((1.0, 3.0)):
        (tmp_path / str(number)).mkdir()
        said = weights | {"mlm": factor, "mim": factor}
        model = with_recipe(dense, tmp_path / str(number), objective={"weights": said})
        losses.append(upcycle(model, Asked(Ways(2), EVERY), tmp_path / str(number) / "out").difference)
    for one in ("loss_before", "loss_after"):
        assert getattr(losses[1], one) == pytest.approx(3 * getattr(losses[0], one), rel=1e-5)


def test_what_is_frozen_has_no_moments(dense: Path, tmp_path: Path) -> None:
    upcycle(with_recipe(dense, tmp_path, train={"freeze": ["routers"]}), Asked(Ways(2), EVERY), tmp_path / "out")
    moments = read_checkpoint(tmp_path / "out").optimizer
    assert moments is not None and not any("router" in name for name in moments)


def test_the_receipt_names_no_path_of_data_that_is_gone(dense: Path, tmp_path: Path) -> None:
    told = list[str]()
    moved = with_recipe(
        dense, tmp_path, data={"eval": {"image": [{"source": "image-folder", "path": "/nowhere/at/all"}]}}
    )
    receipt = upcycle(moved, Asked(Ways(4), EVERY), tmp_path / "out", tell=told.append)
    written = (tmp_path / "out" / "upcycle.json").read_text()
    assert "its held-out data can't be read" in receipt.samples and "/nowhere" not in written
    (line,) = told
    assert "/nowhere/at/all" in line


def test_sub_norms_need_the_loop_and_the_receipt_says_so() -> None:
    asked = Asked(Ways(4), EVERY)
    model = sparse_recipe(dense_recipe(**BEIT3), asked).model
    assert {moe.experts for moe in model.pools.values()} == {"loop"}
    assert any("experts: loop" in note for note in notes_on(asked, model))


@pytest.mark.parametrize(("weights", "top_k"), [("gate", 1), ("gate", 2), ("unit", 2)])
def test_other_weights_change_the_function_and_are_told(dense: Path, tmp_path: Path, weights: str, top_k: int) -> None:
    asked = Asked(Ways(4), EVERY, top_k=top_k, weights=weights)  # type: ignore[arg-type]
    receipt = upcycle(dense, asked, tmp_path / "out")
    assert receipt.difference.states > 0.01
    (note,) = receipt.notes
    assert f"weights {weights}" in note and asked.keeping_weights in note


def dense_recipe(**model: object) -> ModelRecipe:
    return ModelRecipe(
        model=config_of(**model), tokenizers=TokenizersConfig(text=TextTokenizerConfig(vocab_size=VOCAB))
    )


ASKED = Asked(Ways(4), (1,))


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (
            {"moe": {"vision": {"num_experts": 6, "layers": [1]}}},
            ASKED,
            "sparse already: vision has 6 experts in blocks 1",
        ),
        ({"moe": {"text": {"num_experts": 6, "layers": [0]}}}, ASKED, "sparse already: text has 6 experts in blocks 0"),
        (
            {"expert_pool": "shared", "moe": {"shared": {"num_experts": 4, "layers": [0]}}},
            ASKED,
            "vision and text share 4 experts",
        ),
        ({}, replace(ASKED, layers=(1, 7)), r"moe.vision.layers \[1, 7\] must be distinct blocks from 0 to 2"),
        ({}, replace(ASKED, layers={"every": 4}), "every 4 does not fit 3 layers"),
        ({}, replace(ASKED, top_k=5), r"top_k \(5\) is more than num_experts \(4\)"),
        ({}, replace(ASKED, weights="renormalised"), "gives the router no gradient"),
        ({}, replace(ASKED, ways=Ways(4, router_std=0.0)), "--router-std 0: give more than 0"),
    ],
)
def test_what_does_not_fit_is_refused(model: dict[str, object], asked: Asked, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sparse_recipe(dense_recipe(**model), asked)


def test_a_modality_that_is_sparse_stays_beside_a_new_one() -> None:
    recipe = dense_recipe(moe={"vision": {"num_experts": 6, "layers": [1]}})
    model: ModelConfig = sparse_recipe(recipe, replace(ASKED, modalities=("text",))).model
    assert model.pools["vision"] == recipe.model.pools["vision"] and model.sparse_layers("text") == (1,)


def test_a_folder_that_holds_files_is_refused_before_any_work(dense: Path, sparse: Path) -> None:
    with pytest.raises(UsageError, match="not empty"):
        upcycle(dense, ASKED, sparse)


def test_words_of_the_command_line() -> None:
    assert (parse_layers("every:3"), parse_layers("1, 3,5")) == ({"every": 3}, (1, 3, 5))
    assert parse_modalities("text, vision") == ("text", "vision")
    assert (parse_capacity("1.5"), parse_capacity("none")) == (1.5, None)
    for parse, word in (
        (parse_layers, "all"),
        (parse_layers, "each:2"),
        (parse_layers, "every:"),
        (parse_layers, "1,,2"),
        (parse_modalities, "audio"),
        (parse_modalities, "text,text"),
        (parse_capacity, "0"),
        (parse_capacity, "nan"),
        (parse_capacity, "much"),
    ):
        with pytest.raises(UsageError, match=f"{word}: give"):
            parse(word)
