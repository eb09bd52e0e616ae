"""Held-out loss on the same examples and masks each time; the unigram baseline; the lines of metrics.jsonl."""

import hashlib
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.train.support import bits, fresh_process, metrics, tiny, train
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.objectives.kinds.masked import MaskedModelling
from vlmoe_core.objectives.loss import Loss
from vlmoe_core.train.evaluate import evaluate, unigram_baseline
from vlmoe_core.train.health import RouterHealth
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.session import RunOptions, Session, open_session


@pytest.fixture
def session(tmp_path: Path) -> Session:
    fresh_process()
    return open_session(tiny(tmp_path, "train.eval_examples=9"), RunOptions(tmp_path / "run"), Reporter())


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A digest of everything in every held-out batch that the objective sees."""
    seen: list[str] = []
    forward = MaskedModelling.forward

    def spy(self: MaskedModelling, batches: dict[StreamName, Batch]) -> Loss:
        if not self.training:
            values = [v for batch in batches.values() for v in vars(batch).values()]
            shown = [bits(v) if hasattr(v, "dtype") else v for v in values]
            seen.append(hashlib.sha256(repr(shown).encode()).hexdigest())
        return forward(self, batches)

    monkeypatch.setattr(MaskedModelling, "forward", spy)
    return seen


def test_every_evaluation_sees_the_same_batches(tmp_path: Path, evaluated: list[str]) -> None:
    train(tiny(tmp_path), tmp_path / "run")
    first, second, third = (evaluated[i : i + 2] for i in (0, 2, 4))
    assert len(evaluated) == 6 and len(set(first)) == 2
    assert first == second == third


@pytest.mark.parametrize("workers", [1, 2])
def test_the_lines_do_not_depend_on_the_number_of_workers(tmp_path: Path, straight: Path, workers: int) -> None:
    train(tiny(tmp_path, f"data.workers={workers}"), tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(straight)


def test_an_evaluation_leaves_no_trace(tmp_path: Path, straight: Path) -> None:
    """Training is the same however often it is looked at: no generator moves, no weight."""
    train(tiny(tmp_path, "train.eval_every=1"), tmp_path / "run")
    runs = ([line for line in metrics(r) if line["split"] == "train"] for r in (tmp_path / "run", straight))
    first, second = runs
    assert first == second


def test_the_mean_is_over_all_held_out_examples(session: Session) -> None:
    """By hand: sums over counts, not a mean of the micro-batches' means."""
    record = evaluate(session.objective, session.eval_micros(), session.accelerator.device, RouterHealth())
    sums: dict[str, float] = Counter()
    counts: dict[str, int] = Counter()
    objective = session.objective.eval()
    for n in range(5):  # 9 examples in micro-batches of 2
        for name, part in objective(session.eval_data[n].batches).parts.items():
            sums[name] += part.sum.item()
            counts[name] += part.count
    means = {f"loss/{name}": sums[name] / counts[name] for name in ("mlm", "mim", "vlm_text", "vlm_image")}
    assert {k: v for k, v in record.items() if k in means} == pytest.approx(means, rel=1e-6)
    assert record["loss/total"] == pytest.approx(sum(means.values()), rel=1e-6)
    positions = [session.eval_data[n].batches["text"].positions.tolist() for n in range(5)]
    assert [p for some in positions for p in some] == list(range(9))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_all_ranks_read_as_many_micro_batches_and_together_each_example_once(session: Session, ranks: int) -> None:
    """9 examples in micro-batches of 2 are 5: ranks that share weights compute at the same time, if need be nothing."""
    found = []
    for rank in range(ranks):
        place = SimpleNamespace(num_processes=ranks, process_index=rank)
        found.append(list(replace(session, accelerator=place).eval_micros()))  # type: ignore[arg-type]
    assert {len(micros) for micros in found} == {math.ceil(5 / ranks)}
    read = [p for micros in found for micro in micros for p in micro.batches["text"].positions.tolist()]
    assert sorted(read) == list(range(9))


def test_the_unigram_baseline_equals_brute_force(session: Session) -> None:
    micros, held = list(session.baseline_micros()), list(session.eval_micros())
    assert len(micros) == 4 * len(held)
    found = unigram_baseline(session.objective, micros, held, session.accelerator.device)
    assert found.keys() == {f"baseline/{part}" for part in ("mlm", "mim", "vlm_text", "vlm_image")}
    visual = session.objective.visual
    seen: dict[str, Counter[int]] = {}
    asked: dict[str, list[int]] = {}
    for micros_of, is_train in ((micros, True), (held, False)):
        for micro in micros_of:
            for name, stream in (("mlm", "text"), ("vlm_text", "pair")):
                ids = [t for t in micro.batches[stream].text_targets_T.tolist() if t >= 0]  # type: ignore[index]
                seen.setdefault(name, Counter()).update(ids) if is_train else asked.setdefault(name, []).extend(ids)
            for name, stream in (("mim", "image"), ("vlm_image", "pair")):
                batch = micro.batches[stream]  # type: ignore[index]
                if not batch.num_images:
                    continue
                codes = visual.encode(batch.pixels_ICHW).tolist()  # type: ignore[union-attr, operator]
                hidden = batch.patch_mask_IP.tolist()
                ids = [c for i, row in enumerate(codes) for p, c in enumerate(row) if hidden[i][p]]
                seen.setdefault(name, Counter()).update(ids) if is_train else asked.setdefault(name, []).extend(ids)
    for name in seen:
        kinds = set(seen[name]) | set(asked[name])
        total = sum(seen[name][kind] + 1 for kind in kinds)
        nats = [-math.log((seen[name][target] + 1) / total) for target in asked[name]]
        assert found[f"baseline/{name}"] == pytest.approx(sum(nats) / len(nats), rel=1e-9)


LOSSES = {f"loss/{name}" for name in ("total", "mlm", "mim", "vlm_text", "vlm_image")}
HEALTH = {
    f"router/{place}/{figure}"
    for place in ("vision/1", "text/0")
    for figure in ("busiest", "dead", "dropped", "entropy")
}


def test_the_lines_of_a_run(straight: Path) -> None:
    lines = metrics(straight)
    assert [(line["split"], line["step"]) for line in lines] == [
        ("eval", 0), ("train", 1), ("train", 2), ("train", 3), ("eval", 3), ("train", 4), ("train", 5), ("train", 6),
        ("eval", 6),
    ]  # fmt: skip
    baselines = {name.replace("loss/", "baseline/") for name in LOSSES - {"loss/total"}}
    assert lines[0].keys() == {"step", "split"} | LOSSES | HEALTH | baselines
    assert lines[4].keys() == {"step", "split"} | LOSSES | HEALTH
    balance = {"balance/vision/1", "balance/text/0"}
    assert lines[1].keys() == {"step", "split", "lr", "grad_norm"} | LOSSES | HEALTH | balance


def test_the_first_line_is_from_before_any_update(tmp_path: Path, straight: Path, session: Session) -> None:
    """The untrained model's losses, near those of a uniform guess, of the same examples."""
    loaded = tiny(tmp_path)
    fresh_process()
    untrained = open_session(loaded, RunOptions(tmp_path / "other"), Reporter())
    record = evaluate(untrained.objective, untrained.eval_micros(), untrained.accelerator.device, RouterHealth())
    first = metrics(straight)[0]
    assert {name: first[name] for name in LOSSES} == {name: record[name] for name in LOSSES}
    assert first["loss/mlm"] == pytest.approx(math.log(200), abs=0.3)
    assert first["loss/mim"] == pytest.approx(math.log(16), abs=0.3)


def test_log_every_and_rates(tmp_path: Path) -> None:
    import json

    train(tiny(tmp_path, "train.log_every=4", "train.eval_every=100"), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in lines] == [
        ("eval", 0), ("train", 1), ("train", 4), ("eval", 6),
    ]  # fmt: skip
    assert all(line["samples_per_s"] > 0 for line in lines if line["split"] == "train")
    assert lines[0]["time"] < lines[1]["time"] < lines[2]["time"]


def test_routers_that_draw_give_the_same_held_out_loss_each_time(tmp_path: Path) -> None:
    fresh_process()
    loaded = tiny(
        tmp_path,
        "model.moe.vision.router=random",
        "model.moe.text.priority=random",
        "model.moe.text.eval_capacity_factor=0.5",
    )
    session = open_session(loaded, RunOptions(tmp_path / "run", overwrite=True), Reporter())
    records = []
    for _ in range(2):
        torch.rand(3)  # what came before does not matter
        records.append(evaluate(session.objective, session.eval_micros(), session.accelerator.device, RouterHealth()))
    assert records[0] == records[1]
    assert records[0]["router/text/0/dropped"] > 0
