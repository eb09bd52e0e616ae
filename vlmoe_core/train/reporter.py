"""What a run tells whoever watches it. The command line shows it; a library user may ignore it."""

from collections.abc import Mapping
from pathlib import Path

from vlmoe_core.recipe.config import Recipe


class Reporter:
    """Receives the events of a run on rank 0; every method may be overridden, none must be."""

    def note(self, message: str) -> None:
        """Something worth a line: a tokenizer was fitted, a capacity was rounded."""

    def alarm(self, message: str) -> None:
        """Something that needs attention: an expert died."""

    def started(self, recipe: Recipe, folder: Path, step: int, parameters: int) -> None:
        """Training starts at `step`, of a model with so many parameters."""

    def counted(self, batches: int) -> None:
        """So many batches are to be scored; `advanced` tells how many are."""

    def stepped(self, record: Mapping[str, float | str]) -> None:
        """A line of training metrics was written."""

    def advanced(self, step: int) -> None:
        """`step` steps are done."""

    def evaluated(self, record: Mapping[str, float | str]) -> None:
        """A line of held-out metrics was written."""

    def saved(self, path: Path) -> None:
        """A checkpoint is whole on disk."""
