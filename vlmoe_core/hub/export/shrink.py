"""A model without what one task does not need: without a modality's path, or without experts that it hardly uses.

Routers keep the rows of all experts, so gates are those of the whole model; vlmoe_core/moe/config.py says where the
tokens of a removed expert go.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from vlmoe_core.analysis.routing.request import Asked, make_request
from vlmoe_core.analysis.routing.run import Process, route
from vlmoe_core.config import nearest
from vlmoe_core.data.config import SPLITS, STREAMS, StreamName
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.export.used import Kept, used_experts
from vlmoe_core.moe.config import Removed
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.tasks.task import open_task
from vlmoe_core.train.build import build_objective
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.trained import Trained

Modality = Literal["vision", "text"]
STREAM_OF: Mapping[Modality, StreamName] = {"vision": "image", "text": "text"}
"""The inputs that each path takes alone."""
USED = "used:"


@dataclass(frozen=True)
class Cut:
    """What of a model is asked for."""

    modality: Modality | None = None
    """The one path that stays; null: both."""
    share: float | None = None
    """Experts stay that carry this share of the routing; null: all."""
    removed: Removed = "next"
    """Where the tokens of the others go."""

    @property
    def asked(self) -> bool:
        """Whether anything is to be left out."""
        return self.modality is not None or self.share is not None

    @classmethod
    def parse(cls, modality: str | None, experts: str | None, removed: str) -> "Cut":
        """From the words of the command line. Raises UsageError for a word that is none."""
        if modality is not None:
            _known("--modality", modality, get_args(Modality))
        _known("--removed", removed, get_args(Removed))
        share = None if experts is None else parse_share(experts)
        if share is None and removed != cls.removed:
            raise UsageError(f"--removed {removed} says where tokens of removed experts go: give --experts with it")
        return cls(cast(Modality | None, modality), share, cast(Removed, removed))


@dataclass(frozen=True)
class Remainder:
    """What of a model stays."""

    modality: Modality | None = None
    """The one path; null: both."""
    kept: Kept | None = None
    """Experts by pool and block; null, and what is not named: all."""
    removed: Removed = "next"
    """Where the tokens of the others go."""


def parse_share(experts: str) -> float:
    """The share of `used:SHARE`. Raises UsageError for other words, and for a share that is not in (0, 1]."""
    told = f"--experts {experts}: give used:SHARE, such as used:0.99 for the experts that carry 99 % of the routing"
    if not experts.startswith(USED):
        raise UsageError(told)
    try:
        share = float(experts.removeprefix(USED))
    except ValueError as error:
        raise UsageError(told) from error
    if not 0 < share <= 1:
        raise UsageError(f"--experts {experts}: the share must be above 0 and at most 1, such as used:0.99")
    return share


def cut_of(trained: Trained, cut: Cut, data: str | None) -> Remainder:
    """What of a model stays: for `cut.share` the task's data is routed and its experts are counted.

    As many examples as the model's recipe evaluates on are read, those of the training split: a held-out metric stays
    one. Of a model that keeps one path they are the inputs of that path alone.

    Args:
        trained: the model.
        cut: what is asked for.
        data: a recipe or run folder whose data is routed; null: the model's own.

    Raises:
        UsageError: the model can't do without what is to be left out, or was cut before; the data use no expert.
        DataError: the data can't be read.
    """
    _check(trained, cut.modality, cut.share is not None)
    kept = None if cut.share is None else _used(trained, data, cut.share, cut.modality)
    return Remainder(cut.modality, kept, cut.removed)


def shrink(trained: Trained, remainder: Remainder) -> Trained:
    """The same model without what does not stay: recipe and objective are new, the weights copies.

    Raises:
        UsageError: as `cut_of`.
    """
    _check(trained, remainder.modality, remainder.kept is not None)
    recipe = _recipe_of(trained, remainder)
    objective = build_objective(recipe, trained.tokenizers.visual, trained.tokenizers.labels)
    objective.load_state_dict(_weights(trained.objective.state_dict(), objective.state_dict(), remainder))
    return replace(trained, recipe=recipe, objective=objective.eval())


def _known(option: str, word: str, known: Iterable[str]) -> None:
    words = list(known)
    if word not in words:
        raise UsageError(f"{option} {word}: {nearest(word, words)}")


def _check(trained: Trained, modality: Modality | None, experts: bool) -> None:
    """Raises UsageError for what can't be left out of this model."""
    model = trained.recipe.model
    if modality is not None and model.modality not in ("both", modality):
        raise UsageError(f"--modality {modality}: {trained.path} has the path for {model.modality} tokens alone")
    if modality is not None:
        _check_inputs(trained, modality)
    pools = [pool for pool in model.pools if modality is None or pool in (modality, "shared")]
    if experts and not pools:
        raise UsageError(f"--experts: {trained.path} has no experts{'' if modality is None else f' for {modality}'}")
    if experts and any(moe.kept_experts is not None for moe in model.pools.values()):
        raise UsageError(f"--experts: {trained.path} lost experts before; take the whole model that it comes from")


def _check_inputs(trained: Trained, modality: Modality) -> None:
    recipe, stream = trained.recipe, STREAM_OF[modality]
    if recipe.task is not None:
        aim, inputs = f"finetuned on {recipe.task.name}, with", open_task(recipe.task).inputs
        fits = set(inputs) == {stream}
    else:
        aim, inputs = "pretrained on", tuple(one for one in STREAMS if recipe.batch.size.of(one))
        fits = stream in inputs
    if not fits:
        kinds = " and ".join(inputs)
        raise UsageError(
            f"--modality {modality}: {trained.path} was {aim} inputs of the kind {kinds}: it needs more paths"
        )


def _used(trained: Trained, data: str | None, share: float, modality: Modality | None) -> Kept:
    """The experts to keep. Raises UsageError where no token of the data comes to one."""
    request = make_request(trained, Asked(data=data, split="train", capacity="eval"))
    streams = STREAMS if modality is None else (STREAM_OF[modality],)
    request = replace(request, tasks={stream: task for stream, task in request.tasks.items() if stream in streams})
    found = route(request, None, Process(torch.device("cpu")), Reporter())
    assert found is not None, "the only process has the counts"
    if kept := used_experts(found.summary, share):
        return kept
    raise UsageError(f"--experts: no input of {request.data} comes to an expert that could stay; give other --data")


def _recipe_of(trained: Trained, remainder: Remainder) -> Recipe:
    """The recipe of what stays, validated anew."""
    values = trained.recipe.model_dump()
    if remainder.modality is not None:
        _leave_path_out(values, remainder.modality)
    for pool, layers in (remainder.kept or {}).items():
        if (moe := values["model"]["moe"][pool]) is not None:
            less = {layer: experts for layer, experts in layers.items() if len(experts) < moe["num_experts"]}
            moe |= {"kept_experts": less or None, "removed": remainder.removed}
    return Recipe.model_validate(values)


def _leave_path_out(values: dict[str, Any], modality: Modality) -> None:
    model, stream = values["model"], STREAM_OF[modality]
    model |= {"modality": modality, "vl_layers": 0}
    model["moe"]["text" if modality == "vision" else "vision"] = None
    for other in (one for one in STREAMS if one != stream):
        values["batch"]["size"][other] = values["batch"]["micro"][other] = 0
        for split in SPLITS:
            values["data"][split][other] = ()


def _weights(whole: Mapping[str, Tensor], names: Iterable[str], remainder: Remainder) -> dict[str, Tensor]:
    """The tensors of these names, their experts those that stay."""
    kept = {
        f"encoder.blocks.{layer}.ffn.{pool}.experts.": list(experts)
        for pool, layers in (remainder.kept or {}).items()
        for layer, experts in layers.items()
    }
    found = {}
    for name in names:
        experts = next((experts for prefix, experts in kept.items() if name.startswith(prefix)), None)
        found[name] = whole[name] if experts is None else whole[name][experts]
    return found
