"""What an upcycled model shall be, and the recipe that says it."""

from dataclasses import dataclass
from typing import NoReturn

from pydantic import ValidationError

from vlmoe_core.errors import UsageError
from vlmoe_core.hub.upcycling.weights import Ways
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.moe.config import Weights
from vlmoe_core.recipe.config import ModelRecipe

MODALITIES = ("vision", "text")
Layers = dict[str, int] | tuple[int, ...]
"""0-based blocks, or {every: n}, as in a recipe."""


@dataclass(frozen=True)
class Asked:
    """What the sparse model shall be."""

    ways: Ways
    """How its experts are made."""
    layers: Layers
    """Which blocks become sparse."""
    modalities: tuple[str, ...] = MODALITIES
    """Which of vision and text get experts."""
    top_k: int = 1
    """k, experts of each token."""
    capacity_factor: float | None = 1.25
    """Of training; null: dropless. In evaluation nothing is dropped."""
    weights: Weights | None = None
    """How a token's experts are combined; null: `keeping_weights`."""

    @property
    def keeping_weights(self) -> Weights:
        """The combine weights that sum to 1 and give the router a gradient, so that copies compute what one did."""
        return "unit" if self.top_k == 1 else "renormalised"


def parse_layers(text: str) -> Layers:
    """`every:2`, or 0-based blocks by comma: `1,3,5`. Raises UsageError for anything else."""
    word, _, number = text.partition(":")
    try:
        if number:
            return {word: int(number)} if word == "every" else _refuse_layers(text)
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        _refuse_layers(text)


def parse_modalities(text: str) -> tuple[str, ...]:
    """`vision`, `text` or both by comma. Raises UsageError for anything else."""
    names = tuple(name.strip() for name in text.split(","))
    if not set(names) <= set(MODALITIES) or len(set(names)) < len(names):
        raise UsageError(f"--modality {text}: give vision, text, or vision,text")
    return names


def parse_capacity(text: str) -> float | None:
    """A factor above 0, or `none` for dropless. Raises UsageError for anything else."""
    if text == "none":
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise UsageError(
            f"--capacity-factor {text}: give a factor above 0, such as 1.25, or none for dropless training"
        )
    return factor


def parse_weights(text: str | None) -> Weights | None:
    """One of the three ways to combine; null stays null. Raises UsageError for anything else."""
    known: dict[str, Weights] = {"unit": "unit", "renormalised": "renormalised", "gate": "gate"}
    if text is not None and text not in known:
        raise UsageError(f"--weights {text}: give unit, renormalised or gate, or leave it out")
    return known[text] if text is not None else None


def sparse_recipe(recipe: ModelRecipe, asked: Asked) -> ModelRecipe:
    """The dense model's recipe with `moe.vision` and `moe.text` as they are asked for.

    Where it has sub-norms, the experts are `loop`, which alone has them.

    Raises:
        UsageError: the model is sparse there already, or does not take what is asked for.
    """
    if not 0 < asked.ways.router_std < float("inf"):
        raise UsageError(
            f"--router-std {asked.ways.router_std:g}: give more than 0: zeros send every token to one expert"
        )
    for pool in asked.modalities:
        _refuse_sparse(recipe.model, pool)
    moe = {
        "num_experts": asked.ways.experts,
        "layers": asked.layers,
        "top_k": asked.top_k,
        "weights": asked.weights or asked.keeping_weights,
        "capacity_factor": asked.capacity_factor,
        **({"experts": "loop"} if recipe.model.sub_norm else {}),
    }
    said = recipe.model_dump(mode="json")
    said["model"]["moe"] |= dict.fromkeys(asked.modalities, moe)
    try:
        return type(recipe).model_validate(said)
    except ValidationError as error:
        raise UsageError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def notes_on(asked: Asked, model: ModelConfig) -> tuple[str, ...]:
    """What a reader should know of the sparse model, as why it will not compute what the dense one did."""
    notes = (
        ["experts: loop, one after the other: the model's sub-norms are built into no other"] if model.sub_norm else []
    )
    ways, weights = asked.ways, asked.weights or asked.keeping_weights
    if weights == "gate" and ways.experts > 1:
        notes.append(
            f"weights gate: outputs are multiplied by gates, which sum to about {asked.top_k}/{ways.experts} with a "
            f"fresh router, so the function changes; {asked.keeping_weights} keeps it"
        )
    if weights == "unit" and asked.top_k > 1:
        notes.append(
            f"weights unit: the outputs of {asked.top_k} experts are added up, so the function changes; "
            f"{asked.keeping_weights} keeps it"
        )
    notes += [f"noise {ways.noise:g} on the copies: the function changes"] if ways.noise else []
    notes += [f"{ways.drop:.0%} of each expert's hidden units drawn anew: the function changes"] if ways.drop else []
    return tuple(notes)


def _refuse_sparse(model: ModelConfig, pool: str) -> None:
    there = pool if model.sparse_layers(pool) else "shared"
    if layers := model.sparse_layers(there):
        whose = "vision and text share" if there == "shared" else f"{pool} has"
        raise UsageError(
            f"the model is sparse already: {whose} {model.pools[there].num_experts} experts in blocks "
            f"{', '.join(map(str, layers))}; upcycling starts from dense layers, and all sparse layers of a modality "
            "are alike"
        )


def _refuse_layers(text: str) -> NoReturn:
    raise UsageError(f"--layers {text}: give every:N, such as every:2, or 0-based blocks by comma, such as 1,3,5")
