"""Experts shared by processes, and weights cut over them: whatever the mesh, a run is that of one process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.train.support import Child, fresh_process, on_ranks, tiny
from tests.train.test_ranks import EXACT, FOUR_MICROS, Gradients, assert_close
from vlmoe_core.data.loader import MicroBatch, MicroBatches
from vlmoe_core.moe.experts import Experts, expert_shares
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.build import build_dataset, build_objective
from vlmoe_core.train.fitting import obtain_tokenizers
from vlmoe_core.train.health import RouterHealth
from vlmoe_core.train.mesh import Mesh, open_mesh
from vlmoe_core.train.optim import FACTOR, build_optimizer
from vlmoe_core.train.parallel import build_accelerator
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.step import Stepper
from vlmoe_core.train.wrapping import num_parameters, shared_out, wrap

CLIP = 0.1
ADAM_STEPS = 20

EIGHT_MICROS = "batch={size: {image: 16, text: 16, pair: 16}, micro: {image: 2, text: 2, pair: 2}}"
SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "exact": (*EXACT, f"optim.clip_norm={CLIP}", "train.steps=20"),
    "few": (*EXACT, f"optim.clip_norm={CLIP}", "model.moe.text.num_experts=2", "model.moe.vision.num_experts=2"),
    "mixed": (
        *EXACT,
        EIGHT_MICROS,
        "optim.clip_norm=null",
        "train.activation_checkpointing=true",
        "model.moe.text.router=cosine",  # its temperature is a scalar, which can not be cut
    ),
    "frozen experts": (*EXACT, "train.freeze=[experts]"),
    "frozen routers": (*EXACT, "train.freeze=[routers]"),
}
"""What is trained: the tiny recipe with noise, drop path, capacity, expert dropout and balance losses on, and more."""


@dataclass(frozen=True)
class Way:
    """A subject and a mesh."""

    subject: str
    ranks: int
    expert: int = 1
    shard: str = "none"

    def __str__(self) -> str:
        return f"{self.subject}, {self.ranks} ranks, expert {self.expert}, shard {self.shard}"


SIZES = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
FOLLOWED = [
    Way("exact", 2, 2),
    Way("exact", 4, 1),
    Way("exact", 4, 4),
    Way("exact", 4, 2, "full"),
]
"""Those that are trained on with AdamW."""
WAYS = [
    *(Way("exact", ranks, expert, shard) for shard in ("none", "full") for ranks, expert in SIZES),
    Way("few", 4, 1, "full"),
    Way("few", 4, 2, "full"),
    Way("few", 4, 2, "none"),
    Way("mixed", 4, 2, "full"),
    Way("mixed", 2, 2, "none"),
    Way("frozen experts", 2, 2, "none"),
    Way("frozen experts", 4, 2, "full"),
    Way("frozen routers", 2, 2, "full"),
    Way("frozen routers", 4, 2, "none"),
]


@dataclass
class Built:
    """Everything that takes steps."""

    objective: nn.Module
    mesh: Mesh
    stepper: Stepper
    data: MicroBatches
    num_micro: int

    def micros(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        accelerator = self.stepper.accelerator
        first, last = step * self.num_micro, (step + 1) * self.num_micro
        numbers = range(first + accelerator.process_index, last, accelerator.num_processes)
        return [self.data[number] for number in numbers]

    def whole(self, part: Callable[[nn.Parameter], Tensor | None]) -> Gradients:
        """Something of every parameter, from all processes together, as one process would hold it."""
        shared = {name for name, share in expert_shares(self.objective).items() if not share.whole}
        found = {}
        for name, parameter in self.objective.named_parameters():
            if (tensor := part(parameter)) is None:
                continue
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if any(name.startswith(f"{experts}.") for experts in shared):
                tensor = self._side_by_side(tensor.detach())
            found[name] = tensor.detach().numpy().copy()
        return found

    def _side_by_side(self, tensor: Tensor) -> Tensor:
        assert self.mesh.grid is not None
        parts = [torch.empty_like(tensor) for _ in range(self.mesh.expert)]
        dist.all_gather(parts, tensor.contiguous(), group=self.mesh.grid.get_group("expert"))
        return torch.cat(parts)


def as_it_is(objective: nn.Module) -> None:
    """The weights stay those that were drawn."""


def build(
    loaded: LoadedRecipe, folder: Path, sgd: bool = False, prepare: Callable[[nn.Module], None] = as_it_is
) -> Built:
    """As a session does, in float64; `prepare` changes what was built before it is wrapped."""
    fresh_process()
    recipe = loaded.recipe
    accelerator = build_accelerator(recipe.train)
    tokenizers = obtain_tokenizers(recipe, folder, Reporter())
    mesh = open_mesh(recipe.parallel, accelerator.device.type)
    with shared_out(mesh):
        objective = build_objective(recipe, tokenizers.visual).double()
    prepare(objective)
    model = wrap(accelerator, objective, mesh, recipe.train.precision)
    optimizer: torch.optim.Optimizer = build_optimizer(objective, recipe.optim, recipe.model.layers)
    if sgd:
        groups = [{key: group[key] for key in ("params", FACTOR)} for group in optimizer.param_groups]
        optimizer = torch.optim.SGD(groups, lr=1.0)
    prepared: AcceleratedOptimizer = accelerator.prepare(optimizer)
    stepper = Stepper(accelerator, model, mesh, prepared, recipe.optim, recipe.train.steps, recipe.seed)
    data = build_dataset(recipe, recipe.data.train, tokenizers, training=True)
    return Built(objective, mesh, stepper, data, recipe.batch.num_micro)


def one_sgd_step(loaded: LoadedRecipe, folder: Path, prepare: Callable[[nn.Module], None] = as_it_is) -> dict[str, Any]:
    """Gradient (clipped) and weights of one step, and how the parameters lie."""
    built = build(loaded, folder, sgd=True, prepare=prepare)
    health = RouterHealth()
    before = built.whole(lambda p: p)
    result = built.stepper(0, built.micros(0), health)
    return {
        "before": before,
        "losses": dict(result.losses),
        "norm": result.grad_norm,
        "gradients": built.whole(lambda p: p.grad),
        "weights": built.whole(lambda p: p),
        "health": dict(health.summary().figures),
        "size": num_parameters(built.objective),
        "lie": {name: lie(p) for name, p in built.objective.named_parameters()},
        "experts": [name for name, module in built.objective.named_modules() if isinstance(module, Experts)],
    }


def adam_steps(loaded: LoadedRecipe, folder: Path) -> dict[str, Any]:
    """Losses, norms and health of each step; weights, moments and router biases at the end."""
    built = build(loaded, folder)
    told = []
    for step in range(ADAM_STEPS):
        health = RouterHealth()
        result = built.stepper(step, built.micros(step), health)
        told.append({**result.losses, "norm": result.grad_norm or 0.0, **health.summary().figures})
    state = built.stepper.optimizer.state
    return {
        "told": told,
        "weights": built.whole(lambda p: p),
        "moments": built.whole(lambda p: state[p]["exp_avg"]),
        "biases": {n: b.numpy().copy() for n, b in built.objective.named_buffers() if n.endswith("router.bias")},
    }


def lie(parameter: nn.Parameter) -> dict[str, Any]:
    """How a parameter is cut: placement, ranks, its shape on all of them and here."""
    if not isinstance(parameter, DTensor):
        return {"cut": False, "shape": tuple(parameter.shape)}
    mesh = parameter.device_mesh
    return {
        "cut": True,
        "placements": [str(placement) for placement in parameter.placements],
        "ranks": mesh.mesh.tolist(),
        "shape": tuple(parameter.shape),
        "here": tuple(parameter.to_local().shape),
        "grad": type(parameter.grad) is type(parameter) or isinstance(parameter.grad, DTensor),
    }


def go(recipes: Mapping[str, tuple[LoadedRecipe, bool]], folder: Path) -> dict[str, dict[str, Any]]:
    """For a child: a step of each recipe, and 20 with AdamW of some."""
    found = {}
    for name, (loaded, follows) in recipes.items():
        found[name] = one_sgd_step(loaded, folder / "tokenizers")
        if follows:
            found[name]["adam"] = adam_steps(loaded, folder / "tokenizers")
    return found


Found = Callable[[Way], tuple[dict[str, Any], list[dict[str, Any]]]]


def find(folder: Path) -> Found:
    """What one process found of a way's subject, and what each rank found on its mesh."""

    def recipes(ways: Sequence[Way]) -> dict[str, tuple[LoadedRecipe, bool]]:
        meshes = {str(way): (way, f"parallel={{expert: {way.expert}, shard: {way.shard}}}") for way in ways}
        return {n: (tiny(folder, *SUBJECTS[w.subject], m), follows(w)) for n, (w, m) in meshes.items()}

    def follows(way: Way) -> bool:
        return way in FOLLOWED or way == Way("exact", 1)

    subjects = {way.subject for way in WAYS}
    alone = Child(go, recipes([Way(subject, 1) for subject in sorted(subjects)]), folder).answer()
    several = {n: on_ranks(n, go, recipes([w for w in WAYS if w.ranks == n]), folder) for n in (2, 4)}
    for answers in ([alone], *several.values()):
        assert all(isinstance(answer, dict) for answer in answers), answers
    return lambda way: (alone[str(Way(way.subject, 1))], [answer[str(way)] for answer in several[way.ranks]])


CUT = [way for way in WAYS if way.shard == "full"]


def assert_every_process_knows_the_size_of_the_whole_model(exact: Found, way: Way) -> None:
    alone, found = exact(way)
    weights = sum(weight.size for weight in alone["weights"].values())
    assert {one["size"] for one in (alone, *found)} == {weights}


def assert_cut_as_planned(exact: Found, way: Way) -> None:
    """Before anything else: all are DTensors, the dense ones over all ranks, experts over the replicas of a share."""
    alone, found = exact(way)
    data = way.ranks // way.expert
    for rank, one in enumerate(found):
        assert one["lie"].keys() == alone["lie"].keys()
        for name, said in one["lie"].items():
            whole = alone["lie"][name]["shape"]
            assert said["cut"] == (whole != ()), "all but scalars, which can't be"
            if whole == ():
                continue
            if not any(name.startswith(f"{experts}.") for experts in one["experts"]):
                assert said["ranks"] == list(range(way.ranks)) and said["placements"] == ["S(0)"], name
                assert said["shape"] == whole, name
                continue
            share = whole[0] // way.expert
            assert said["shape"] == (share, *whole[1:]), name
            assert said["ranks"] == list(range(rank % way.expert, way.ranks, way.expert)), name
            dim = 0 if share >= data else 1
            assert said["placements"] == [f"S({dim})"], name
            assert said["here"] == tuple(n // data if d == dim else n for d, n in enumerate(said["shape"])), name
        held = sum(np.prod(said.get("here", ())) for said in one["lie"].values())
        most = sum(np.prod(said["shape"]) for said in alone["lie"].values())
        assert held < 1.2 * most / way.ranks


def assert_experts_are_cut_along_both_dimensions(exact: Found) -> None:
    """Else the test above does not say it of both."""
    placements = {tuple(s["placements"]) for w in CUT for s in exact(w)[1][0]["lie"].values() if s["cut"]}
    assert placements == {("S(0)",), ("S(1)",)}


def assert_plain(exact: Found, way: Way) -> None:
    alone, found = exact(way)
    for one in found:
        for name, said in one["lie"].items():
            whole = alone["lie"][name]["shape"]
            is_expert = any(name.startswith(f"{experts}.") for experts in one["experts"])
            assert said == {"cut": False, "shape": (whole[0] // way.expert, *whole[1:]) if is_expert else whole}, name


def assert_weights_drawn_as_by_one_process(exact: Found, way: Way) -> None:
    alone, found = exact(way)
    for one in found:
        assert one["before"].keys() == alone["before"].keys()
        for name, weight in alone["before"].items():
            assert np.array_equal(one["before"][name], weight), name


def assert_one_step_is_that_of_one_process(exact: Found, way: Way) -> None:
    """Losses, the norm of all gradients, the clipped gradients, the weights after SGD, and the routers' health."""
    alone, found = exact(way)
    for one in found:
        assert one["losses"] == pytest.approx(alone["losses"], rel=1e-10, abs=1e-10)
        assert one["norm"] == pytest.approx(alone["norm"], rel=1e-10)
        assert_close(one["gradients"], alone["gradients"])
        assert_close(one["weights"], alone["weights"])
        assert one["health"] == pytest.approx(alone["health"], rel=1e-12, abs=1e-12)


UNMOVED = "num_experts: 4, experts: loop, noise: 0, balance: {vloss: 0}, capacity_factor: null"
QUIET = (
    *FOUR_MICROS,
    "optim.clip_norm=0.01",
    f"model.moe.vision={{layers: [1], {UNMOVED}}}",
    f"model.moe.text={{layers: [0], {UNMOVED}}}",
)
"""Without what would spread the tokens."""


def to_the_first(objective: nn.Module) -> None:
    """All experts are equally likely, and of those a token chooses the first."""
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name.endswith("router.weight"):
                parameter.zero_()


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize(("ranks", "expert"), [(2, 2), (4, 4), (4, 2)])
def test_experts_of_some_ranks_that_nobody_chooses(tmp_path: Path, ranks: int, expert: int, shard: str) -> None:
    """Those of all ranks but the first of a group compute no token of the step, and their gradient is zero."""
    alone = Child(one_sgd_step, tiny(tmp_path, *QUIET), tmp_path / "tokenizers", to_the_first).answer()
    mesh = f"parallel={{expert: {expert}, shard: {shard}}}"
    found = on_ranks(ranks, one_sgd_step, tiny(tmp_path, *QUIET, mesh), tmp_path / "tokenizers", to_the_first)
    for one in found:
        assert_close(one["gradients"], alone["gradients"])
        assert_close(one["weights"], alone["weights"])
        assert one["norm"] == pytest.approx(alone["norm"], rel=1e-10)
        for name in (n for n in one["gradients"] if ".experts." in n):
            busy = np.abs(one["gradients"][name].reshape(4, -1)).max(1) > 0
            assert busy.tolist() == [True, False, False, False], name


def assert_20_steps_of_adamw_are_those_of_one_process(exact: Found, way: Way) -> None:
    alone, found = exact(way)
    for one in (answer["adam"] for answer in found):
        for step, told in enumerate(one["told"]):
            assert told == pytest.approx(alone["adam"]["told"][step], rel=1e-6, abs=1e-6), step
        for part in ("weights", "moments", "biases"):
            assert one[part].keys() == alone["adam"][part].keys()
            for name, wanted in alone["adam"][part].items():
                np.testing.assert_allclose(one[part][name], wanted, rtol=1e-6, atol=1e-6, err_msg=f"{part} of {name}")


def assert_what_must_be_on_is_on(exact: Found, subject: str) -> None:
    """Else the equalities above would say nothing of clipping, balance losses, drops, frozen parts and the bias."""
    alone, _ = exact(next(way for way in WAYS if way.subject == subject))
    assert alone["losses"]["balance/vision/1"] > 0 and alone["losses"]["balance/text/0"] > 0
    assert max(v for name, v in alone["health"].items() if name.endswith("/dropped")) > 0
    length = np.sqrt(sum(float((g**2).sum()) for g in alone["gradients"].values()))
    clip = {"mixed": np.inf, "few": CLIP, "exact": CLIP}.get(subject, 1.0)
    assert length == pytest.approx(min(alone["norm"], clip), rel=1e-4) and alone["norm"] > CLIP
    still = {n for n in alone["before"] if np.array_equal(alone["before"][n], alone["weights"][n])}
    frozen = {"frozen experts": ".experts.", "frozen routers": ".router."}.get(subject)
    assert still == {name for name in alone["before"] if frozen is not None and frozen in name}
    if subject == "exact":
        assert all(np.abs(bias).max() > 0.1 for bias in alone["adam"]["biases"].values()) and alone["adam"]["biases"]


def test_on_every_mesh_a_run_is_that_of_one_process(tmp_path: Path) -> None:
    """All in one test, so that no two workers make the same runs."""
    exact = find(tmp_path)
    for way in WAYS:
        assert_every_process_knows_the_size_of_the_whole_model(exact, way)
        assert_weights_drawn_as_by_one_process(exact, way)
        (assert_cut_as_planned if way.shard == "full" else assert_plain)(exact, way)
        assert_one_step_is_that_of_one_process(exact, way)
    assert_experts_are_cut_along_both_dimensions(exact)
    for way in FOLLOWED:
        assert_20_steps_of_adamw_are_those_of_one_process(exact, way)
    for subject in sorted({way.subject for way in WAYS}):
        assert_what_must_be_on_is_on(exact, subject)
