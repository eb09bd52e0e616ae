"""From an exception to one message and an exit code: 2 for what was typed, 1 for a failed run, 130 after Ctrl-C."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from vlmoe_core.errors import VlmoeError

DEBUG_VARIABLE = "VLMOE_DEBUG"
PATIENCE = 10.0
"""Seconds that a process waits for its launcher to end it, when the first process has told an error and ended."""


def show_tracebacks() -> None:
    """Show tracebacks from now on, in the processes that this one starts as well."""
    os.environ[DEBUG_VARIABLE] = "1"


def guarded(command: Callable[[], object]) -> None:
    """Run a command; an exception becomes one message on stderr and an exit code."""
    try:
        command()
    except VlmoeError as error:
        if error.of_all and int(os.environ.get("RANK", "0")) > 0:
            _leave_it_to_the_first(error.exit_code)
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        _close_quietly()
    except Exception as error:
        hint = (
            ""
            if _debugging()
            else "; run it again with --debug and report what it prints, with the output of 'vlmoe env'"
        )
        _fail(f"internal error: {type(error).__name__}: {error}{hint}", 1)


def _debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE) == "1"


def _fail(message: str, exit_code: int) -> NoReturn:
    if _debugging():
        traceback.print_exc()
    typer.secho("error: ", err=True, nl=False, fg=typer.colors.RED, bold=True)
    typer.echo(message, err=True)
    _leave(exit_code)


def _leave_it_to_the_first(exit_code: int) -> NoReturn:
    """An error of all processes is told once. Whoever leaves first makes launchers end the rest, so that one waits."""
    time.sleep(PATIENCE)
    _leave(exit_code)


def _leave(exit_code: int) -> NoReturn:
    """End this process: at once where it is one of several, with those that load data for it.

    Torch's threads that talk to the others would abort it while Python ends, and hide the exit code (torch 2.13, gloo).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(exit_code)
    import multiprocessing

    for loader in multiprocessing.active_children():
        loader.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _close_quietly() -> NoReturn:
    """The reader of stdout has gone: Python must not complain when it flushes what is left at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
