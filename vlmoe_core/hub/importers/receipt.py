"""import.json: what became of every key of the source, and where every tensor of ours is from."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmoe_core.hub.importers.ledger import Ledger
from vlmoe_core.hub.importers.torch_files import Source

FILE_NAME = "import.json"
FORMAT = 1


@dataclass(frozen=True)
class Receipt:
    """The account of one import."""

    family: str
    """beit3, vlmo, beit, bert or vqkd."""
    source: str
    """Name of the file, folder or Hub model."""
    sha256: Mapping[str, str]
    """Of each file of weights."""
    keys: Mapping[str, str]
    """Each key of the source: our tensors that it went to, or `unused: ` and the reason."""
    tensors: Mapping[str, str]
    """Each of our tensors: the keys that it is from, `constant: ` or `new: ` and the reason."""
    notes: tuple[str, ...]
    """What was converted, and what is worth knowing."""

    def write(self, folder: Path) -> None:
        """Write import.json beside the model."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @property
    def unused(self) -> dict[str, int]:
        """How many keys were left out for each reason."""
        return _reasons(self.keys, "unused: ")

    @property
    def new(self) -> dict[str, int]:
        """How many of our tensors stay as they were initialised, for each reason."""
        return _reasons(self.tensors, "new: ")


def fates(source: Source, ledger: Ledger, prefix: str = "") -> dict[str, str]:
    """What became of every key, as it stands in the file; `prefix` stands before all our names."""
    used = {key: ", ".join(f"{prefix}{name}" for name in names) for key, names in ledger.used.items()}
    unused = {key: f"unused: {reason}" for key, reason in ledger.unused.items()}
    found = {f"{source.prefix}{key}": (used | unused)[key] for key in source.tensors}
    return found | {key: f"unused: {reason}" for key, reason in source.aside.items()}


def _reasons(account: Mapping[str, str], word: str) -> dict[str, int]:
    return dict(Counter(said.removeprefix(word) for said in account.values() if said.startswith(word)))
