"""What a trace found, as plain values: the content of the JSON file and of the report.

The file's `schema` grows by one whenever a reader of the old form would be misled. docs/ROUTING.md describes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Information:
    """How much an expert tells of what a token is: mutual information of first choice and label, in bits."""

    bits: float
    """As counted."""
    control: float
    """Mean over tables with the same margins in which labels were shuffled: what chance alone gives."""
    low: float
    """`bits` less the control, lower end of its 95 % interval over the shuffles."""
    high: float
    """Upper end."""
    labels: int
    """Labels that occurred."""
    label_bits: float
    """Entropy of the labels: the most that an expert could tell."""

    @property
    def excess(self) -> float:
        """Bits less the control."""
        return self.bits - self.control


@dataclass(frozen=True)
class LikedWord:
    """A word that an expert gets more often than others do."""

    word: str
    """The piece of the tokenizer."""
    count: int
    """Tokens of it that the expert got as first choice."""
    lift: float
    """Its share of the expert's words over its share of all words."""


@dataclass(frozen=True)
class CellSummary:
    """One sparse layer, modality and task."""

    task: str
    layer: int
    modality: str
    pool: str
    num_experts: int
    top_k: int
    tokens: int
    wanted: Sequence[int]
    """Choices of each expert, of any rank (E)."""
    got: Sequence[int]
    """Those that it had a place for (E)."""
    first: Sequence[int]
    """First choices (E)."""
    gate: Sequence[float]
    """Mean gate (E)."""
    entropy: float
    """Mean entropy of the gates, nats."""
    entropy_std: float
    confidence: float
    """Mean largest gate."""
    confidence_std: float
    entropy_histogram: Sequence[int]
    """Tokens in twenty equal bins from 0 to log E."""
    confidence_histogram: Sequence[int]
    """Tokens in twenty equal bins from 0 to 1."""
    dead: Sequence[int]
    """Experts that no token chose."""
    overloaded: Sequence[int]
    """Experts that were chosen more than twice as often as the mean."""
    gini: float
    """Of the wanted load, 0 (even) to 1."""
    variation: float
    """Coefficient of variation of the wanted load."""
    kinds: Mapping[str, Sequence[int]]
    """First choices by kind of token: name -> (E)."""
    dropped_by_kind: Mapping[str, float]
    """Share of the choices of each kind that was dropped."""
    places: Sequence[Sequence[int]]
    """First choices by place (P, E); trailing places that no token had are left out."""
    dropped_by_place: Sequence[float | None]
    """Share of the choices at each place that was dropped (P); null: no token there."""
    dropped_share_histogram: Sequence[int]
    """Sequences in twenty equal bins of the share of their choices that was dropped."""
    together: Sequence[Sequence[int]] | None
    """(E, E) tokens that chose both; null where k is 1."""
    flow_from: int | None
    """The sparse layer of the same modality before this one; null: this is the first."""
    flow: Sequence[Sequence[int]] | None
    """(F, E) tokens by first choice there and here."""
    information: Mapping[str, Information]
    """By what is told: word, word class, place, kind, class."""
    words: Sequence[Sequence[LikedWord]] = ()
    """The words that each expert likes most (E lists), by lift; for text."""

    @property
    def dropped(self) -> float:
        """Share of the choices that found no place."""
        return 1 - sum(self.got) / sum(self.wanted) if sum(self.wanted) else 0.0


@dataclass(frozen=True)
class CellComparison:
    """The same tokens in two models."""

    task: str
    layer: int
    modality: str
    tokens: int
    same: float
    """Share of the tokens whose first choice has the same number in both."""
    chance: float
    """What that share would be if the two chose independently, each with its own load."""
    shared_information: float
    """Mutual information of the two first choices over the mean of their entropies, 0 to 1: blind to renumbering."""
    counts: Sequence[Sequence[int]]
    """(E, E') tokens by first choice in this model and in the other."""


@dataclass(frozen=True)
class RoutingSummary:
    """All of a trace."""

    model: str
    """The checkpoint, or how the traced model is called."""
    step: int | None
    data: str
    """The recipe and split that were read."""
    capacity: Mapping[str, str]
    """Of each pool, in words: `1.25 (training)`, `dropless`."""
    group: Mapping[str, int]
    """Examples of each stream in a routing group; capacity is shared within it."""
    examples: Mapping[str, int]
    """Examples of each stream that were read."""
    cells: Sequence[CellSummary]
    other: str | None = None
    """The model that was compared."""
    comparison: Sequence[CellComparison] = ()
    schema: int = field(default=SCHEMA)

    def as_json(self) -> dict[str, Any]:
        """Plain values, `schema` first."""
        found = asdict(self)
        return {"schema": found.pop("schema"), **found}
