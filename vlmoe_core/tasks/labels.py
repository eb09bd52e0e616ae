"""The labels that a head chooses from, in the order of its outputs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vlmoe_core.config import nearest
from vlmoe_core.errors import DataError

FILE = "labels.json"


@dataclass(frozen=True)
class Labels:
    """A list of distinct names; a task without classes has none."""

    names: tuple[str, ...] = ()
    """Label number n is the n-th name."""

    @cached_property
    def index(self) -> dict[str, int]:
        """Name -> number."""
        return {name: number for number, name in enumerate(self.names)}

    def number(self, name: str) -> int:
        """The number of a label. Raises DataError, without a place, for one that is not in the list."""
        if name not in self.index:
            raise DataError(
                f"the label '{name}' is not one of the model's {len(self.names)}; {nearest(name, list(self.names))}"
            )
        return self.index[name]

    def save(self, folder: Path) -> None:
        """Write them into a new folder."""
        folder.mkdir()
        (folder / FILE).write_text(json.dumps(self.names, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


NO_LABELS = Labels()
"""Of pretraining, and of a task without classes."""


def load_labels(folder: Path) -> Labels:
    """The labels that were saved in a folder; none where there is no such folder."""
    if not folder.exists():
        return NO_LABELS
    return Labels(tuple(json.loads((folder / FILE).read_text(encoding="utf-8"))))


def sorted_labels(names: Iterable[str]) -> Labels:
    """The distinct names in alphabetical order (ImageNet: sorted synsets)."""
    return Labels(tuple(sorted(set(names))))
