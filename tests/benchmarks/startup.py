"""How long `vlmoe --help` takes against the imports that it can't do without.

Run as `python -m tests.benchmarks.startup --json`.
"""

import subprocess
import sys
from functools import partial

from tests.benchmarks.common import report, seconds

BOUND = 1.5
"""Most that `help_over_imports` may be."""

COMMANDS = {
    "imports": [sys.executable, "-c", "import typer, rich"],
    "help": [sys.executable, "-m", "vlmoe_cli", "--help"],
    "verb_help": [sys.executable, "-m", "vlmoe_cli", "recipes", "cp", "--help"],
}


def measure(repeats: int = 15) -> dict[str, float]:
    """Seconds of each command, and their ratios to the bare imports."""
    cases = {
        name: partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True)
        for name, command in COMMANDS.items()
    }
    taken = seconds(cases, repeats)
    return {
        "help_over_imports": taken["help"] / taken["imports"],
        "verb_help_over_imports": taken["verb_help"] / taken["imports"],
        **{f"{name}_s": value for name, value in taken.items()},
    }


if __name__ == "__main__":
    report({**measure(), "bound": BOUND})
