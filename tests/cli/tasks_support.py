"""Commands as they are typed in a folder, in this process; and a folder with a finetuned run of each task."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.train.support import RECIPE, fresh_process
from tests.train.tasks_support import PRETRAINING, TASKS, recipe_text
from vlmoe_cli.main import main


@dataclass(frozen=True)
class Typed:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        assert self.code == 0, self.err
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def message(self) -> str:
        """The one line that tells of an error; nothing is on stdout then."""
        assert self.out == "" and self.code in (1, 2), (self.code, self.out, self.err)
        last = self.err.splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in self.err and "internal error" not in self.err
        assert self.err.count("error: ") == 1
        return last


def vlmoe(folder: Path, *arguments: str) -> Typed:
    """Type `vlmoe ARGUMENTS` in a folder."""
    fresh_process()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Typed(code, out.getvalue(), err.getvalue())


def work_folder(folder: Path) -> Path:
    """A folder with recipes, a pretrained run and a run of each task under runs/."""
    (folder / "base.yaml").write_text(RECIPE)
    options = [word for override in PRETRAINING for word in ("--set", override)]
    assert vlmoe(folder, "pretrain", "base.yaml", *options).code == 0
    for task in TASKS:
        (folder / f"{task}.yaml").write_text(recipe_text(task, "runs/base"))
        done = vlmoe(folder, "finetune", f"{task}.yaml")
        assert done.code == 0, done.err
        (folder / f"{task}.out").write_text(done.out)
        (folder / f"{task}.err").write_text(done.err)
    return folder


def rows_of(shown: str) -> Iterator[list[str]]:
    """The cells of a plain table, which stand two spaces apart."""
    for line in shown.splitlines():
        yield [cell.strip() for cell in line.split("  ") if cell.strip()]
