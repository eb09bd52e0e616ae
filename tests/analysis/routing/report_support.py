"""A routing summary, liked patches and traced examples that were never measured: what a report is drawn from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from vlmoe_core.analysis.routing.pictures import LikedPatch, TracedExample, TracedLayer
from vlmoe_core.analysis.routing.summary import CellComparison, CellSummary, Information, LikedWord, RoutingSummary

KINDS = {"vision": ("[CLS]", "patch", "masked patch"), "text": ("[CLS]", "word", "masked word", "[SEP]", "[PAD]")}
WORDS = [
    "a",
    "dog",
    "runs",
    "on",
    "the",
    "green",
    "grass",
    "with",
    "red",
    "ball",
    "near",
    "two",
    "children",
    "and",
    "blue",
    "boat",
    "by",
    "old",
    "stone",
    "bridge",
]
MODALITIES: Mapping[str, Sequence[str]] = {"mim": ("vision",), "mlm": ("text",), "vlm": ("vision", "text")}


@dataclass(frozen=True)
class Scale:
    """How much there is of everything."""

    experts: int = 8
    top_k: int = 1
    layers: tuple[int, ...] = (1, 3, 5)
    side: int = 7
    length: int = 16
    tokens: int = 4000
    words: int = 8


def cell_of(task: str, modality: str, layer: int, scale: Scale, rng: np.random.Generator) -> CellSummary:
    """A cell whose counts agree with each other, for a router that prefers some experts in some places."""
    E, P = scale.experts, 1 + scale.side**2 if modality == "vision" else scale.length
    popular_E = rng.dirichlet(np.full(E, 1.5)) + 1e-3
    popular_E[E // 2] = 0 if E > 4 and layer == scale.layers[-1] else popular_E[E // 2]
    taste_PE = rng.dirichlet(np.full(E, 0.4), P) * popular_E + 1e-9 * (popular_E > 0)
    taste_PE /= taste_PE.sum(1, keepdims=True)
    places_PE = np.stack([rng.multinomial(scale.tokens // P, row) for row in taste_PE])
    first_E = places_PE.sum(0)
    tokens = int(first_E.sum())
    together_EE = _together(first_E, scale.top_k, rng)
    wanted_E = first_E if together_EE is None else np.diag(together_EE)
    got_E = np.minimum(wanted_E, math.ceil(1.25 * scale.top_k * tokens / E))
    dropped = 1 - got_E.sum() / wanted_E.sum()
    kinds = {kind: rng.multinomial(tokens // len(KINDS[modality]), first_E / tokens) for kind in KINDS[modality]}
    earlier = [one for one in scale.layers if one < layer]
    sorted_E = np.sort(wanted_E)
    return CellSummary(
        task=task,
        layer=layer,
        modality=modality,
        pool=modality,
        num_experts=E,
        top_k=scale.top_k,
        tokens=tokens,
        wanted=wanted_E.tolist(),
        got=got_E.tolist(),
        first=first_E.tolist(),
        gate=(first_E / tokens).tolist(),
        entropy=math.log(E) * (0.8 - 0.04 * layer + rng.uniform(-0.1, 0.1)),
        entropy_std=0.2,
        confidence=0.3 + 0.04 * layer + rng.uniform(0, 0.1),
        confidence_std=0.1,
        entropy_histogram=rng.multinomial(tokens, rng.dirichlet(np.full(20, 2.0))).tolist(),
        confidence_histogram=rng.multinomial(tokens, rng.dirichlet(np.full(20, 2.0))).tolist(),
        dead=np.flatnonzero(wanted_E == 0).tolist(),
        overloaded=np.flatnonzero(wanted_E > 2 * wanted_E.mean()).tolist(),
        gini=float((2 * np.arange(1, E + 1) - E - 1) @ sorted_E / (E * sorted_E.sum())),
        variation=float(wanted_E.std() / wanted_E.mean()),
        kinds={kind: counts.tolist() for kind, counts in kinds.items()},
        dropped_by_kind={kind: dropped * rng.uniform(0.5, 1.5) for kind in kinds},
        places=places_PE.tolist(),
        dropped_by_place=(dropped * rng.uniform(0.2, 1.8, P)).tolist(),
        dropped_share_histogram=[90, 20, 10, *([0] * 17)],
        together=None if together_EE is None else together_EE.tolist(),
        flow_from=earlier[-1] if earlier else None,
        flow=_flow(E, tokens, rng) if earlier else None,
        information=_information(modality, rng),
        words=[_words(scale.words, rng) for _ in range(E)] if modality == "text" else (),
    )


def _together(first_E: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray | None:
    if top_k == 1:
        return None
    counts_EE = rng.poisson(np.outer(first_E, first_E) / first_E.sum())
    pairs_EE = np.triu(counts_EE, 1) + np.triu(counts_EE, 1).T
    np.fill_diagonal(pairs_EE, pairs_EE.sum(1))
    return pairs_EE


def _flow(experts: int, tokens: int, rng: np.random.Generator) -> list[list[int]]:
    share_EE = rng.dirichlet(np.full(experts, 0.3), experts)
    return [rng.multinomial(tokens // experts, row).tolist() for row in share_EE]


def _information(modality: str, rng: np.random.Generator) -> dict[str, Information]:
    found = {}
    for name in ("place", "kind", *(("word", "word class") if modality == "text" else ("class",))):
        excess, control = float(rng.uniform(0, 1.4)), float(rng.uniform(0, 0.1))
        found[name] = Information(excess + control, control, excess - 0.04, excess + 0.05, 30, 3.2)
    return found


def _words(count: int, rng: np.random.Generator) -> list[LikedWord]:
    chosen = rng.choice(WORDS, count)
    return [LikedWord(str(word), int(rng.integers(5, 200)), float(rng.uniform(1, 9))) for word in chosen]


def summary_of(
    scale: Scale | None = None, tasks: Mapping[str, Sequence[str]] = MODALITIES, compared: bool = True
) -> RoutingSummary:
    """Of cells at every task, modality and layer."""
    scale, rng = scale or Scale(), np.random.default_rng(0)
    cells = [
        cell_of(task, modality, layer, scale, rng)
        for task, modalities in tasks.items()
        for modality in modalities
        for layer in scale.layers
    ]
    return RoutingSummary(
        model="runs/quickstart-pretrain/checkpoints/step-00000400",
        step=400,
        data="quickstart/pretrain, eval",
        capacity={"vision": "1.25 (training)", "text": "1.25 (training)"},
        group={"image": 32, "text": 32, "pair": 32},
        examples={"image": 2000, "text": 2000, "pair": 2000},
        cells=cells,
        other="runs/other/checkpoints/step-00000400" if compared else None,
        comparison=[_comparison(cell, rng) for cell in cells] if compared else (),
    )


def _comparison(cell: CellSummary, rng: np.random.Generator) -> CellComparison:
    counts = _flow(cell.num_experts, cell.tokens, rng)
    shared = float(rng.uniform(0.1, 0.6))
    return CellComparison(cell.task, cell.layer, cell.modality, cell.tokens, 0.2, 0.14, shared, counts)


def scene(number: int, side: int = 224) -> Image.Image:
    """A picture of three discs before a gradient."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[0:side, 0:side]
    ground, shade = rng.integers(90, 200, 3), 0.5 + 0.5 * rows / side
    picture = np.stack([ground[channel] * shade for channel in range(3)], axis=-1)
    for _ in range(3):
        row, column, radius = rng.uniform(0.2, 0.8) * side, rng.uniform(0.2, 0.8) * side, rng.uniform(0.1, 0.2) * side
        picture[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = rng.integers(0, 256, 3)
    return Image.fromarray(picture.astype(np.uint8))


def patches_of(summary: RoutingSummary, each: int = 4, names: Sequence[str] = ("scenes/{}.png",)) -> list[LikedPatch]:
    """The patches that each expert of vision likes, every one another piece of a picture."""
    pictures, found = [scene(number) for number in range(12)], []
    for cell in summary.cells:
        for expert in range(cell.num_experts if cell.modality == "vision" else 0):
            for rank in range(each):
                number = len(found)
                left, top = 7 * (number % 17), 5 * (number // 17 % 25)
                crop = pictures[number % 12].crop((left, top, left + 96, top + 96))
                name = names[number % len(names)].format(number)
                found.append(
                    LikedPatch(
                        cell.task, cell.layer, expert, 0.9 - rank / 10, name, number % 49, crop, (32, 32, 64, 64)
                    )
                )
    return found


def examples_of(
    scale: Scale, names: Sequence[str] = ("scenes/0.png", "scenes/1.png"), words: Sequence[str] = WORDS[:9]
) -> list[TracedExample]:
    """Pairs that went through every sparse layer."""
    return [
        TracedExample(
            name, "vlm", scene(number), tuple(words), tuple(_traced(layer, scale, len(words)) for layer in scale.layers)
        )
        for number, name in enumerate(names)
    ]


def _traced(layer: int, scale: Scale, words: int) -> TracedLayer:
    rng = np.random.default_rng(layer)
    blocks = rng.integers(0, scale.experts, (scale.side, scale.side))
    kept = rng.random(scale.side**2) > 0.08
    return TracedLayer(
        layer=layer,
        grid=(scale.side, scale.side),
        patch_experts=tuple(blocks.flatten().tolist()),
        patch_kept=tuple(kept.tolist()),
        word_experts=tuple(rng.integers(0, scale.experts, words).tolist()),
        word_kept=tuple((np.arange(words) != 4).tolist()),
    )


def silent(cell: CellSummary) -> CellSummary:
    """The same cell, which no token came to."""
    zeros, nan = [0] * cell.num_experts, math.nan
    return replace(
        cell,
        tokens=0,
        wanted=zeros,
        got=zeros,
        first=zeros,
        gate=[nan] * cell.num_experts,
        entropy=nan,
        entropy_std=nan,
        confidence=nan,
        confidence_std=nan,
        entropy_histogram=[0] * 20,
        confidence_histogram=[0] * 20,
        dead=list(range(cell.num_experts)),
        overloaded=[],
        gini=nan,
        variation=nan,
        kinds={kind: zeros for kind in cell.kinds},
        dropped_by_kind={kind: nan for kind in cell.kinds},
        places=[],
        dropped_by_place=[],
        dropped_share_histogram=[0] * 20,
        together=None,
        flow=None,
        flow_from=None,
        information={},
        words=(),
    )
