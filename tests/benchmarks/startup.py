"""How long `vlmoe --help` takes against the imports that it can't do without.

`python -m tests.benchmarks.startup --json` prints one JSON object: `help_over_imports`, `verb_help_over_imports`, and
the median seconds behind them.
"""

import subprocess
import sys
from functools import partial

from tests.benchmarks.common import Figures, median_ratio, medians, run, timings

BOUNDS = {"help_over_imports": 1.5}

COMMANDS = {
    "imports": [sys.executable, "-c", "import typer, rich"],
    "help": [sys.executable, "-m", "vlmoe_cli", "--help"],
    "verb_help": [sys.executable, "-m", "vlmoe_cli", "recipes", "cp", "--help"],
}


def measure(quick: bool = False) -> Figures:
    """The figures of the module's docstring."""
    cases = {
        name: partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True)
        for name, command in COMMANDS.items()
    }
    times = timings(cases, repeats=1 if quick else 15, warmup=0 if quick else 1)
    ratios = {f"{name}_over_imports": median_ratio(times[name], times["imports"]) for name in ("help", "verb_help")}
    return {**ratios, **medians(times), "bounds": BOUNDS}


if __name__ == "__main__":
    run(__doc__, measure)
