"""1 process x 4 micro-batches, 2 x 2 and 4 x 1: the same examples, loss and gradient."""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.train.support import Blow, Child, metrics, on_ranks, pretrain_child, tiny
from vlmoe_core.data.loader import MicroBatch
from vlmoe_core.errors import DataError, RecipeError, TokenizerError, UsageError
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train import build, session
from vlmoe_core.train.build import build_dataset, build_objective
from vlmoe_core.train.config import TrainConfig
from vlmoe_core.train.fitting import obtain_tokenizers
from vlmoe_core.train.folder import RunFolder
from vlmoe_core.train.init import Start, load_run_recipe
from vlmoe_core.train.mesh import open_mesh
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.parallel import build_accelerator, end_processes, of_all
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.step import Stepper
from vlmoe_core.train.wrapping import shared_out, wrap

Gradients = dict[str, NDArray[np.float64]]

STEPS = 3
FOUR_MICROS = ("batch.size={image: 8, text: 8, pair: 8}",)
EXACT = (
    *FOUR_MICROS,
    "model.moe.vision.experts=loop",
    "model.moe.text.experts=loop",
    "data.augment.image.crop_scale=[1,1]",
    "model.moe.vision.router={name: bias-balanced, update_rate: 0.05}",
    "model.moe.vision.balance.vloss=0.01",
    "model.moe.text.priority=random",
    "model.moe.text.expert_dropout=0.2",
)


def float64_steps(loaded: LoadedRecipe, folder: Path) -> dict[str, Any]:
    """For a child: some steps in float64. Losses and gradients of each, and the positions of this rank's examples."""
    recipe = loaded.recipe
    accelerator = build_accelerator(recipe.train)
    tokenizers = obtain_tokenizers(recipe, folder, Reporter())
    mesh = open_mesh(recipe.parallel, accelerator.device.type)
    with shared_out(mesh):
        objective = build_objective(recipe, tokenizers.visual).double()
    model = wrap(accelerator, objective, mesh, recipe.train.precision)
    optimizer = accelerator.prepare(build_optimizer(objective, recipe.optim, recipe.model.layers))
    stepper = Stepper(accelerator, model, mesh, optimizer, recipe.optim, recipe.train.steps, recipe.seed)
    data = build_dataset(recipe, recipe.data.train, tokenizers, training=True)
    ranks, rank, per_step = accelerator.num_processes, accelerator.process_index, recipe.batch.num_micro
    found: dict[str, Any] = {
        "losses": [],
        "gradients": [],
        "positions": [],
        "biases": [],
        "kinds": str(accelerator.distributed_type),
    }
    for step in range(STEPS):
        micros = [data[n] for n in range(step * per_step + rank, (step + 1) * per_step, ranks)]
        result = stepper(step, micros)
        found["losses"].append(dict(result.losses) | {"norm": result.grad_norm})
        found["gradients"].append({n: p.grad.numpy().copy() for n, p in objective.named_parameters()})
        found["positions"].append([positions_of(m) for m in micros])
        found["biases"].append({n: b.numpy().copy() for n, b in objective.named_buffers() if n.endswith("router.bias")})
    return found


def positions_of(micro: MicroBatch) -> tuple[int, dict[str, list[int]]]:
    return micro.number, {stream: batch.positions.tolist() for stream, batch in micro.batches.items()}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank found in float64, by the number of ranks."""
    folder = tmp_path_factory.mktemp("exact")
    loaded = tiny(folder, *EXACT)
    alone = Child(float64_steps, loaded, folder / "tokenizers").answer()
    several = {ranks: on_ranks(ranks, float64_steps, loaded, folder / "tokenizers") for ranks in (2, 4)}
    return {1: [alone]} | several


def test_all_ranks_together_draw_the_same_examples(exact: dict[int, list[dict[str, Any]]]) -> None:
    for ranks in (1, 2, 4):
        for step in range(STEPS):
            drawn = dict(pair for found in exact[ranks] for pair in found["positions"][step])
            assert sorted(drawn) == [4 * step + m for m in range(4)]
            for number, positions in drawn.items():
                assert positions == {s: [2 * number, 2 * number + 1] for s in ("image", "text", "pair")}


def test_several_processes_meet_through_gloo(exact: dict[int, list[dict[str, Any]]]) -> None:
    assert [exact[ranks][0]["kinds"] for ranks in (1, 2, 4)] == [
        "DistributedType.NO", "DistributedType.MULTI_CPU", "DistributedType.MULTI_CPU",
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_float64_loss_and_gradient_do_not_depend_on_the_ranks(
    exact: dict[int, list[dict[str, Any]]], ranks: int
) -> None:
    expected = exact[1][0]
    for found in exact[ranks]:
        for step in range(STEPS):
            assert found["losses"][step] == pytest.approx(expected["losses"][step], rel=1e-10, abs=1e-10)
            assert_close(found["gradients"][step], expected["gradients"][step])


def test_loss_free_balancing_counts_the_choices_of_all_ranks(exact: dict[int, list[dict[str, Any]]]) -> None:
    expected = exact[1][0]["biases"]
    for step, biases in enumerate(expected):
        (bias,) = biases.values()
        assert (np.abs(bias) <= 0.05 * (step + 1) + 1e-9).all() and bias.any()
    for found in [*exact[2], *exact[4]]:
        for step in range(STEPS):
            assert_close(found["biases"][step], expected[step])


def test_balance_over_ranks_is_one_loss_for_all(exact: dict[int, list[dict[str, Any]]], tmp_path: Path) -> None:
    loaded = tiny(tmp_path, *EXACT, "model.moe.vision.balance_scope=ranks", "model.moe.text.balance_scope=ranks")
    first, second = on_ranks(2, float64_steps, loaded, tmp_path / "tokenizers")
    for step in range(STEPS):
        assert first["losses"][step] == second["losses"][step]
        assert_close(first["gradients"][step], second["gradients"][step])
    joined, single = first["losses"][0], exact[2][0]["losses"][0]
    for place in ("vision/1", "text/0"):
        # Two groups balanced as one are at most as unbalanced as they are on average.
        assert 0 < joined[f"balance/{place}"] < single[f"balance/{place}"]
    assert joined["mlm"] == pytest.approx(single["mlm"], rel=1e-12)


def assert_close(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-10, atol=1e-10, err_msg=name)


def test_what_must_be_on_is_on(exact: dict[int, list[dict[str, Any]]]) -> None:
    """Else the equality above would say nothing of noise, drop path, capacity and balance loss."""
    losses = exact[1][0]["losses"][0]
    assert {"mlm", "mim", "vlm_text", "vlm_image", "balance/vision/1", "balance/text/0"} <= losses.keys()
    assert all(losses[f"balance/{place}"] > 0 for place in ("vision/1", "text/0"))
    assert all(np.abs(g).max() > 0 for g in exact[1][0]["gradients"][0].values())


LONG = ("train.steps=20", "train.eval_every=20", "train.save_every=20", *FOUR_MICROS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run folders of 20 steps in float32 with grouped experts, by the number of ranks."""
    folder = tmp_path_factory.mktemp("runs")
    loaded = tiny(folder, *LONG)
    Child(pretrain_child, loaded, folder / "1").answer()
    for ranks in (2, 4):
        answers = on_ranks(ranks, pretrain_child, loaded, folder / str(ranks))
        assert [answer.step for answer in answers] == [20] * ranks, answers
        assert [answer.is_main for answer in answers] == [True] + [False] * (ranks - 1)
    return {ranks: folder / str(ranks) for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_float32_losses_of_20_steps(runs: dict[int, Path], ranks: int) -> None:
    expected, found = metrics(runs[1]), metrics(runs[ranks])
    assert len(found) == len(expected) == 22
    for line, straight in zip(found, expected, strict=True):
        losses = {k: v for k, v in straight.items() if k.startswith(("loss/", "balance/", "baseline/"))}
        assert losses.keys() <= line.keys() == straight.keys()
        assert {k: line[k] for k in losses} == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_held_out_loss_does_not_depend_on_the_ranks(runs: dict[int, Path], ranks: int) -> None:
    """At step 0 the weights are the same: what differs is who reads which of the two held-out micro-batches."""
    assert metrics(runs[ranks])[0] == pytest.approx(metrics(runs[1])[0], abs=1e-6)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, runs: dict[int, Path], first: int, then: int
) -> None:
    loaded, run = tiny(tmp_path, *LONG, "train.save_every=3"), tmp_path / "run"
    stop = Blow("vlmoe_core.train.step:Stepper", "_backward", 8 * 4 // first, signal=15)
    outcomes = on_ranks(first, pretrain_child, loaded, run, None, stop)
    assert [(o.step, o.finished) for o in outcomes] == [(8, False)] * first, outcomes
    assert [o.step for o in on_ranks(then, pretrain_child, loaded, run, "auto")] == [20] * then
    for line, straight in zip(metrics(run), metrics(runs[1]), strict=True):
        assert line["loss/total"] == pytest.approx(straight["loss/total"], abs=1e-4)


def test_a_number_of_processes_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    answers = on_ranks(3, pretrain_child, tiny(tmp_path, *FOUR_MICROS), tmp_path / "run")
    assert [type(answer) for answer in answers] == [RecipeError] * 3
    assert "can't be dealt to 3 processes; these numbers of processes fit: 1, 2, 4" in str(answers[1])


def no_data() -> None:
    """This process does not find what the recipe names."""

    def absent(*_: Any) -> None:
        raise DataError("nothing matches 'pictures'")

    setattr(build, "open_streams", absent)  # noqa: B010


def other_disk() -> None:
    """This process does not see what the first one writes into the run folder."""
    is_dir = Path.is_dir
    seen = lambda path: path.parts[-2:] != ("run", "tokenizers") and is_dir(path)  # noqa: E731
    setattr(Path, "is_dir", seen)  # noqa: B010


def no_start() -> None:
    """This process can't read the tokenizer of the model that the run starts from."""

    def broken(*_: Any) -> None:
        raise TokenizerError("tokenizer.json is no tokenizer")

    setattr(Start, "tokenizers", broken)  # noqa: B010


ALONE = {"nothing matches 'pictures'": no_data, "must share its disk": other_disk, "is no tokenizer": no_start}
"""What befalls one process while a run is opened, by a word of what all of them then say."""


def told(loaded: LoadedRecipe, out: Path, befall: Callable[[], None]) -> str:
    """For a child: how a run ends of which the last process alone meets something."""
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        befall()
    return str(pretrain_child(loaded, out))


@pytest.mark.parametrize("words", list(ALONE))
def test_what_befalls_one_process_at_the_start_is_told_by_all(tmp_path: Path, words: str) -> None:
    """With no word of a process that went away: nobody waits until a time-out tells."""
    Child(pretrain_child, tiny(tmp_path, "train.steps=2"), tmp_path / "before").answer()
    loaded = load_run_recipe(str(tmp_path / "tiny.yaml"), ("train.steps=2",), tmp_path / "before")
    answers = on_ranks(2, told, loaded, tmp_path / "run", ALONE[words])
    assert all(isinstance(one, DataError | TokenizerError) and one.of_all for one in answers), answers
    assert all(words in str(one) for one in answers), answers


def slow_to_leave(leave: Callable[[], object], mark: Path) -> bool:
    """For a child: whether the second process, which is late, had come when this one could leave."""
    build_accelerator(TrainConfig(steps=1))
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
        mark.touch()
    leave()
    return mark.exists()


@pytest.mark.parametrize("leave", [end_processes, partial(of_all, UsageError("refused by all"))])
def test_no_process_leaves_before_all_have_come(tmp_path: Path, leave: Callable[[], object]) -> None:
    """Else a slow one finds it gone in the midst of what it was told last."""
    assert on_ranks(2, slow_to_leave, leave, tmp_path / "came") == [True, True]


def resumed_late(loaded: LoadedRecipe, out: Path, model: Path) -> Any:
    """For a child: a run that goes on from a model of no run; the second process looks at folders a while later."""
    if os.environ["RANK"] == "1":

        def late(path: Path) -> RunFolder:
            time.sleep(2.0)
            return RunFolder(path)

        setattr(session, "RunFolder", late)  # noqa: B010
    return pretrain_child(loaded, out, str(model))


def test_a_slow_process_does_not_mistake_the_new_folder_for_another_run(tmp_path: Path) -> None:
    loaded = tiny(tmp_path, "train.save_every=3")
    Child(pretrain_child, loaded, tmp_path / "before").answer()
    (model,) = (tmp_path / "before" / "checkpoints").glob("*3")
    shutil.copytree(model, tmp_path / "model")
    answers = on_ranks(2, resumed_late, loaded, tmp_path / "run", tmp_path / "model")
    assert [getattr(answer, "step", answer) for answer in answers] == [6, 6]
