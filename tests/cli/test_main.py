"""The program as a whole: help, exit codes, one message for each mistake."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmoe_cli.errors import PATIENCE, guarded
from vlmoe_cli.main import app, main
from vlmoe_core.errors import DataError, RecipeError

HELP_OF_EVERYTHING = """
import sys
from vlmoe_cli.main import app, main

def paths(group, above=()):
    for command in group.registered_commands:
        yield (*above, command.name or command.callback.__name__.replace("_", "-"))
    for inner in group.registered_groups:
        yield (*above, inner.name)
        yield from paths(inner.typer_instance, (*above, inner.name))

for path in [(), *paths(app)]:
    try:
        main([*path, "--help"])
    except SystemExit as end:
        assert end.code == 0, (path, end.code)
loaded = {"torch", "pydantic", "numpy", "yaml", "rich", "transformers"} & set(sys.modules)
assert not loaded, f"help imports {loaded}"
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m vlmoe_cli` in a process of its own."""
    command = [sys.executable, "-m", "vlmoe_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def ends(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `vlmoe`, in this process."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    code = end.value.code
    return code if isinstance(code, int) else 0, out, err


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both, so that what a test leaves in the environment is undone.
    monkeypatch.setenv("VLMOE_DEBUG", "0")
    monkeypatch.delenv("VLMOE_DEBUG")


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP_OF_EVERYTHING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: vlmoe recipes cp" in done.stdout


def test_module_and_program_are_the_same() -> None:
    program = Path(sys.executable).with_name("vlmoe")
    assert program.exists(), "the package is not installed"
    by_program = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    by_module = run("--help")
    assert by_module.stdout == by_program.stdout and by_module.stdout.startswith("Usage: vlmoe [OPTIONS]")
    assert by_module.returncode == by_program.returncode == 0


def test_every_verb_has_a_help_line() -> None:
    for command in app.registered_commands:
        assert command.help or (command.callback and command.callback.__doc__)


def test_short_help_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Examples:" in ends(capsys, "-h")[1]
    code, out, err = ends(capsys)
    assert code == 2 and "recipes" in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recpes"], "No such command 'recpes'. Did you mean 'recipes'?"),
        (["recipes", "lss"], "No such command 'lss'. Did you mean 'ls'?"),
        (["recipes", "cp", "a"], "Missing argument 'FILE'"),
        (["env", "--jsn"], "No such option: --jsn"),
        (["--jsn"], "No such option: --jsn"),
        (["recipes", "show", "quickstart/pretrian"], "error: no recipe 'quickstart/pretrian'"),
    ],
)
def test_what_is_typed_wrong_ends_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = ends(capsys, *arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["--debug", "recipes", "show", "no-such"], ["recipes", "show", "no-such", "--debug"]]
)
def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, _, err = ends(capsys, *arguments)
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: no recipe 'no-such'")


def test_debug_by_variable_and_not_after_two_dashes() -> None:
    assert "Traceback" in run("recipes", "show", "no-such", VLMOE_DEBUG="1").stderr
    assert "no recipe '--debug'" in run("recipes", "show", "--", "--debug", VLMOE_DEBUG="0").stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RecipeError("a.yaml:1: wrong\na.yaml:2: wrong too"), 2, "error: a.yaml:1: wrong\na.yaml:2: wrong too\n"),
        (DataError("a.tar is cut"), 1, "error: a.tar is cut\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (ZeroDivisionError("oh"), 1, "error: internal error: ZeroDivisionError: oh; run it again with --debug"),
    ],
)
def test_exceptions_become_one_message(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        guarded(command)
    out, err = capsys.readouterr()
    assert end.value.code == code and out == "" and err.startswith(message) and "Traceback" not in err


@pytest.mark.parametrize(("rank", "of_all", "told"), [("0", True, True), ("1", True, False), ("1", False, True)])
def test_an_error_of_all_processes_is_told_by_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str, of_all: bool, told: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)

    def command() -> None:
        error = RecipeError("wrong")
        error.of_all = of_all
        raise error

    with pytest.raises(SystemExit) as end:
        guarded(command)
    assert end.value.code == 2 and capsys.readouterr().err == ("error: wrong\n" if told else "")
    assert waits == ([] if told else [PATIENCE]), "the first one is not ended by a launcher before it has told it"


def test_one_of_several_processes_ends_at_once_with_its_loaders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the end of Python, in which threads of torch may abort it."""
    loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    loader.start()

    def end(code: int) -> None:
        raise SystemExit(f"at once with {code}")

    def command() -> None:
        raise DataError("a.tar is cut")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", end)
    with pytest.raises(SystemExit, match="at once with 1"):
        guarded(command)
    assert capsys.readouterr().err == "error: a.tar is cut\n"
    loader.join(30)
    assert loader.exitcode == -signal.SIGKILL


def test_an_interrupt_inside_a_verb_ends_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmoe_core.recipe.catalogue.shipped", interrupted)
    code, out, err = ends(capsys, "recipes", "ls")
    assert code == 130 and out == "" and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "vlmoe_cli", "recipes", "show", "quickstart/pretrain"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    message = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1 and message == b""
