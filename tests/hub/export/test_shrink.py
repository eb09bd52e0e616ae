"""Models without a path or without experts, against the whole model on real samples."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.model.support import batch_of
from tests.train.support import tiny, train
from tests.train.tasks_support import finetuned, percents, recipe_text, scored, tuned
from vlmoe_core.analysis.routing.summary import CellSummary, RoutingSummary
from vlmoe_core.analysis.routing.trace import encoder_of
from vlmoe_core.checkpoint.quantised import dequantised
from vlmoe_core.data.config import STREAMS, StreamName
from vlmoe_core.data.loader import load_all
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.export.native import NativeOptions, write_native
from vlmoe_core.hub.export.quantise import quantise
from vlmoe_core.hub.export.shrink import Cut, Remainder, cut_of, parse_share, shrink
from vlmoe_core.hub.export.used import smallest_set, used_experts
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.recipe.load import dump_recipe, load_model_recipe
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import build_dataset, whole_dataset
from vlmoe_core.train.scoring import ask
from vlmoe_core.train.trained import Trained, load_trained

TOP_2 = ("model.moe.text.top_k=2", "model.moe.text.layers=[0,1]", "model.moe.text.num_experts=6")


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return load_trained(finetuned(tmp_path_factory.mktemp("nli"), "nli", *TOP_2))


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return load_trained(finetuned(tmp_path_factory.mktemp("vqa"), "vqa", "train.steps=1", "optim.warmup_steps=0"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("pretrained")
    return load_trained(train(tiny(folder, "train.steps=1", "optim.warmup_steps=0"), folder / "run").folder)


def parameters(trained: Trained) -> int:
    return sum(p.numel() for p in trained.objective.parameters())


def written(trained: Trained, folder: Path) -> Path:
    return write_native(
        trained.recipe, trained.tokenizers, trained.objective, trained.step, folder / "out", NativeOptions()
    )


def choices(trained: Trained) -> dict[tuple[str, int], Counter[int]]:
    """The experts of every token of the training split, counted from the plans."""
    recipe = trained.recipe
    dataset = whole_dataset(recipe, recipe.data.train, trained.tokenizers, recipe.train.eval_examples)
    found: dict[tuple[str, int], Counter[int]] = {}
    assert recipe.task is not None
    stream = open_task(recipe.task).stream
    with torch.no_grad():
        for micro in load_all(dataset, range(dataset.num_micros), recipe.data, 1):
            for one in encoder_of(trained.objective)(micro.batches[stream]).routed:
                found.setdefault((one.pool, one.layer), Counter()).update(one.plan.expert_TK.flatten().tolist())
    return found


def carries(counts: Mapping[int, int], experts: tuple[int, ...]) -> float:
    return sum(counts[e] for e in experts) / sum(counts.values())


def cell(pool: str, layer: int, wanted: list[int], top_k: int = 1, task: str = "mlm") -> CellSummary:
    """A cell of which all that matters is filled in."""
    bare: dict[str, Any] = dict.fromkeys(CellSummary.__dataclass_fields__)
    named = {"pool": pool, "layer": layer, "wanted": wanted, "top_k": top_k, "num_experts": len(wanted), "task": task}
    return CellSummary(**{**bare, **named})


def summary(*cells: CellSummary) -> RoutingSummary:
    return RoutingSummary("m", 1, "d", {}, {}, {}, cells)


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [90, 0, 9, 1], [0, 0, 1, 0], [3, 8, 2, 8], [1, 99, 0, 0]])
def test_the_smallest_set_by_trying_all(counts: list[int], share: float, least: int) -> None:
    percent = round(100 * share)
    sizes = range(least, 5)
    fitting = [
        s for n in sizes for s in combinations(range(4), n) if 100 * sum(counts[e] for e in s) >= percent * sum(counts)
    ]
    fewest = min(len(s) for s in fitting)
    wanted = min((s for s in fitting if len(s) == fewest), key=lambda s: (-sum(counts[e] for e in s), s))
    assert smallest_set(counts, share, least) == wanted


def test_a_share_is_taken_as_it_is_written() -> None:
    assert 0.55 * 100 > 55
    assert smallest_set([55, 30, 15], 0.55, 1) == (0,)


def test_used_experts_adds_up_what_a_layer_got() -> None:
    found = used_experts(
        summary(
            cell("text", 0, [0, 50, 0, 50]),
            cell("text", 0, [97, 0, 3, 0], task="vlm"),
            cell("text", 2, [100, 0, 0, 0]),
            cell("vision", 1, [1, 0, 0], top_k=2),
            cell("vision", 2, [0, 0, 0], top_k=2),
        ),
        0.98,
    )
    assert found == {"text": {0: (0, 1, 3), 2: (0,)}, "vision": {1: (0, 1)}}


@pytest.mark.parametrize("experts", ["used", "0.9", "used:", "used:x", "used 0.9", "USED:0.9"])
def test_other_words_are_refused(experts: str) -> None:
    with pytest.raises(UsageError, match=r"give used:SHARE, such as used:0\.99"):
        parse_share(experts)


@pytest.mark.parametrize("experts", ["used:0", "used:-0.5", "used:1.01", "used:nan", "used:inf"])
def test_a_share_that_is_none_is_refused(experts: str) -> None:
    with pytest.raises(UsageError, match=f"--experts {experts}: the share must be above 0 and at most 1"):
        parse_share(experts)


def test_the_words_of_the_command_line() -> None:
    assert Cut.parse("text", "used:0.9", "drop") == Cut("text", 0.9, "drop")
    assert Cut.parse(None, None, "next") == Cut() and not Cut().asked
    assert Cut.parse(None, "used:1", "next").asked and Cut.parse("vision", None, "next").asked
    with pytest.raises(UsageError, match="--modality txt: did you mean 'text'"):
        Cut.parse("txt", None, "next")
    with pytest.raises(UsageError, match="--removed drop says where tokens of removed experts go: give --experts"):
        Cut.parse("text", None, "drop")
    with pytest.raises(UsageError, match="--removed best: known: drop, next"):
        Cut.parse(None, None, "best")


def test_the_path_of_a_text_task_answers_the_same(nli: Trained, tmp_path: Path) -> None:
    part = shrink(nli, cut_of(nli, Cut("text"), None))
    whole_answers, answers = scored(nli), scored(part)
    assert answers.answers == whole_answers.answers and percents(answers) == percents(whole_answers)
    assert parameters(part) < 0.75 * parameters(nli)
    assert not any("vision" in name or ".image." in name or ".vl." in name for name in part.objective.state_dict())
    loaded = load_trained(written(part, tmp_path))
    assert loaded.recipe == part.recipe
    assert scored(loaded).answers == whole_answers.answers


def test_used_experts_of_the_task_are_counted_on_its_training_data(nli: Trained) -> None:
    counts = choices(nli)
    kept = cut_of(nli, Cut(share=0.8), None).kept
    assert kept is not None and set(kept) == {"text"} and set(kept["text"]) == {0, 1}
    for layer, experts in kept["text"].items():
        own = counts["text", layer]
        assert carries(own, experts) >= 0.8 and len(experts) >= 2
        fewer = [one for one in combinations(experts, len(experts) - 1) if carries(own, one) >= 0.8 and len(one) >= 2]
        assert not fewer
    assert any(len(experts) < 6 for experts in kept["text"].values())


@pytest.mark.parametrize("removed", ["next", "drop"])
def test_a_model_with_fewer_experts(nli: Trained, tmp_path: Path, removed: Any) -> None:
    remainder = Remainder(kept={"text": {0: (1, 4), 1: (0, 1, 2, 3, 4, 5)}}, removed=removed)
    part = shrink(nli, remainder)
    moe = part.recipe.model.moe.text
    assert moe is not None and (moe.kept_experts, moe.removed) == ({0: (1, 4)}, removed)
    whole_state, state = nli.objective.state_dict(), part.objective.state_dict()
    name = "encoder.blocks.0.ffn.text.experts.down.weight"
    assert torch.equal(state[name], whole_state[name][[1, 4]])
    assert all(torch.equal(state[n], whole_state[n]) for n in state if not n.startswith(name[:33]))
    expert = 2 * 16 * 32 + 16 + 32
    assert parameters(nli) - parameters(part) == 4 * expert
    loaded = load_trained(written(part, tmp_path))
    assert loaded.recipe == part.recipe
    found, wanted = scored(loaded), scored(part)
    assert found.answers == wanted.answers and percents(found) == percents(wanted)
    _check_first_layer(nli, part, removed)


def _check_first_layer(nli: Trained, part: Trained, removed: str) -> None:
    """On the same tokens, which the first sparse layer still gets, gates are the same and choices as they should be."""
    whole, less = encoder_of(nli.objective), encoder_of(part.objective)
    batch = batch_of("text", [9, 4, 12], whole.config)
    before, plan = whole(batch).routed[0].plan, less(batch).routed[0].plan
    assert torch.equal(plan.probs_TE, before.probs_TE) and plan.num_experts == 6
    if removed == "next":
        assert plan.kept_TK.all() and set(plan.expert_TK.flatten().tolist()) == {1, 4}
    else:
        assert torch.equal(plan.expert_TK, before.expert_TK)
        assert torch.equal(plan.kept_TK, torch.isin(before.expert_TK, torch.tensor([1, 4])))


def test_all_the_experts_that_a_split_uses_answer_it_the_same(nli: Trained) -> None:
    remainder = cut_of(nli, Cut(share=1.0), None)
    counts = choices(nli)
    assert remainder.kept == {"text": {layer: tuple(sorted(counts["text", layer])) for layer in (0, 1)}}
    some = replace(remainder, kept={"text": {0: tuple(range(6)), 1: tuple(range(6))}})
    whole = shrink(nli, some)
    assert whole.recipe == nli.recipe
    on_train = ask(nli, None, "train", None, None)
    assert scored(shrink(nli, remainder), on_train).answers == scored(nli, on_train).answers


def test_both_at_once_and_a_second_time(nli: Trained) -> None:
    part = shrink(nli, Remainder("text", {"text": {0: (0, 5)}}))
    assert part.recipe.model.modality == "text" and part.recipe.model.moe.vision is None
    assert shrink(part, Remainder("text")).recipe == part.recipe
    with pytest.raises(UsageError, match="lost experts before; take the whole model"):
        cut_of(part, Cut(share=0.9), None)
    with pytest.raises(UsageError, match=r"--modality vision: .* has the path for text tokens alone"):
        cut_of(part, Cut("vision"), None)


def test_what_a_model_needs_is_not_left_out(vqa: Trained, pretrained: Trained) -> None:
    modality: Any
    for modality in ("text", "vision"):
        with pytest.raises(
            UsageError, match=f"--modality {modality}: .* was finetuned on vqa, with inputs of the kind pair"
        ):
            shrink(vqa, Remainder(modality))
    batch = pretrained.recipe.batch
    none = batch.size.model_copy(update={"image": 0, "text": 0})
    pairs = replace(
        pretrained, recipe=pretrained.recipe.model_copy(update={"batch": batch.model_copy(update={"size": none})})
    )
    with pytest.raises(UsageError, match="was pretrained on inputs of the kind pair"):
        shrink(pairs, Remainder("text"))
    dense = pretrained.recipe.model.model_copy(update={"moe": type(pretrained.recipe.model.moe)()})
    with pytest.raises(UsageError, match="has no experts"):
        cut_of(replace(pretrained, recipe=pretrained.recipe.model_copy(update={"model": dense})), Cut(share=0.9), None)


@pytest.mark.parametrize("modality", ["vision", "text"])
def test_a_pretrained_model(pretrained: Trained, tmp_path: Path, modality: Any) -> None:
    part = shrink(pretrained, cut_of(pretrained, Cut(modality, 0.9), None))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(part.recipe))
    assert load_model_recipe(tmp_path / "recipe.yaml") == part.recipe
    loaded = load_trained(written(part, tmp_path))
    stream: StreamName = "image" if modality == "vision" else "text"
    assert [s for s in STREAMS if loaded.recipe.batch.size.of(s)] == [stream]
    config = pretrained.recipe.model
    batches = {s: batch_of(s, [4, 6] if s == stream else [], config) for s in STREAMS}
    own = shrink(pretrained, Remainder(modality))  # with all experts
    wanted = pretrained.objective(batches).parts
    found = own.objective(batches).parts
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].sum, wanted[name].sum) for name in wanted)
    assert loaded.objective(batches).parts.keys() == wanted.keys()


def test_one_path_is_counted_on_its_own_inputs(pretrained: Trained, vqa: Trained, tmp_path: Path) -> None:
    # Texts come to the text experts of block 0 alone; pairs too, and would be counted for the whole model.
    dataset = replace(
        build_dataset(pretrained.recipe, pretrained.recipe.data.train, pretrained.tokenizers, training=False), limit=3
    )
    counts: Counter[int] = Counter()
    with torch.no_grad():
        for micro in load_all(dataset, range(dataset.num_micros), pretrained.recipe.data, 1):
            for one in encoder_of(pretrained.objective)(micro.batches["text"]).routed:
                counts.update(one.plan.expert_TK.flatten().tolist())
    kept = cut_of(pretrained, Cut("text", 0.6), None).kept
    assert kept == {"text": {0: smallest_set([counts[e] for e in range(4)], 0.6, 1)}}
    (tmp_path / "vqa.yaml").write_text(recipe_text("vqa"))
    with pytest.raises(
        UsageError, match=r"no input of .*vqa\.yaml comes to an expert that could stay; give other --data"
    ):
        cut_of(pretrained, Cut("text", 0.6), str(tmp_path / "vqa.yaml"))


def test_int8_of_what_stays_answers_as_the_dequantised_weights_do(nli: Trained, tmp_path: Path) -> None:
    part = shrink(nli, Remainder("text", {"text": {0: (1, 4)}}, "drop"))
    state = quantise(part.objective.state_dict())[0]
    options = NativeOptions(change=lambda state: quantise(state)[0], max_shard_bytes=4000)
    loaded = load_trained(
        write_native(part.recipe, part.tokenizers, part.objective, part.step, tmp_path / "int8", options)
    )
    part.objective.load_state_dict(dequantised(state))
    assert scored(loaded).answers == scored(part).answers


def test_finetuning_goes_on_from_it(nli: Trained, tmp_path: Path) -> None:
    part = shrink(nli, Remainder("text", {"text": {0: (0, 5)}}))
    folder = written(part, tmp_path)
    run = train(tuned(tmp_path, "nli", "train.steps=1", "optim.warmup_steps=0", init=str(folder)), tmp_path / "again")
    again = load_trained(run.folder)
    assert again.recipe.model == part.recipe.model
    encoder = cast(Encoder, again.objective.encoder)
    assert encoder.embeddings.image is None and encoder.embeddings.text is not None
