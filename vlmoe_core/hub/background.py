"""Pushes checkpoints while the run trains on, in a thread of its own."""

import shlex
import threading
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path

from vlmoe_core.checkpoint.layout import step_of
from vlmoe_core.errors import VlmoeError
from vlmoe_core.hf import scrubbed
from vlmoe_core.hub.contents import Contents
from vlmoe_core.hub.push import PushRequest, push

Say = Callable[[str], None]
QUIET = 2.0
"""Seconds of waiting of which nobody is told."""


class BackgroundPush:
    """Pushes the newest checkpoint, one at a time; where saves come faster than pushes, those between are left out.

    Nothing that goes wrong reaches the run: it becomes one line through `warn`, and the next save is the next attempt.
    Only rank 0 calls `on_saved`; no thread is started before.
    """

    def __init__(self, request: PushRequest, note: Say, warn: Say, contents: Contents = Contents()) -> None:
        """Set up; nothing is sent yet.

        Args:
            request: where to. The message of each commit gets the step added, but for a pull request, which is one.
            note: is told at the end what is on the Hub. Both are called from the thread too.
            warn: is told of every push that failed, in one line.
            contents: what is taken along.
        """
        self.request, self.contents, self.note, self.warn = request, contents, note, warn
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._pushing: Path | None = None
        self._failed: Path | None = None
        self._done: Path | None = None
        self._url = ""
        self._closed = False
        self._thread: threading.Thread | None = None

    def on_saved(self, path: Path) -> None:
        """A checkpoint is whole on disk: push it next, in place of one that still waits."""
        with self._changed:
            if self._closed:
                return
            self._waiting = path
            self._changed.notify_all()
            if self._thread is None:
                # A daemon: a connection that hangs must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
                self._thread.start()

    def held(self) -> Set[Path]:
        """Checkpoints that wait or are on their way, which must not be removed; for `prune`."""
        with self._changed:
            return {path for path in (self._waiting, self._pushing) if path is not None}

    def close(self, timeout: float) -> bool:
        """Wait for the last push, at most so many seconds, and say what became of it.

        Returns:
            The newest checkpoint is on the Hub, or there was none. If False, `vlmoe push` goes on where this ended.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is None:
            return True
        self._thread.join(min(timeout, QUIET))
        if timeout > QUIET and self._thread.is_alive():
            self.note(f"waiting up to {timeout:.0f} s until the last push is through")
            self._thread.join(timeout - QUIET)
        with self._changed:
            left = self._pushing or self._waiting or self._failed
            if left is None:
                self.note(f"{_name(self._done)} is on the Hub: {self._url}")
                return True
        running = self._thread.is_alive()
        why = f"is not on the Hub yet after {timeout:.0f} s" if running else "is not on the Hub"
        self.warn(f"{_name(left)} {why}; to send what is missing: {self._command(left)}")
        return False

    def _work(self) -> None:
        while (path := self._next()) is not None:
            problem = self._push(path)
            with self._changed:
                self._pushing = None
                self._failed = path if problem else None
                again = "" if self._closed else "; the run goes on, and the next checkpoint is the next attempt"
            if problem:
                self.warn(f"{_name(path)} was not pushed: {problem}{again}")

    def _next(self) -> Path | None:
        """Wait for a checkpoint; None: no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            self._waiting, self._pushing = None, self._waiting
            return self._pushing

    def _push(self, path: Path) -> str | None:
        """What went wrong, in one line; None: it was pushed."""
        try:
            pushed = push(path, self._request(path), self.contents)
        except VlmoeError as error:
            return str(error)
        except Exception as error:  # the run must not learn of it, whatever it is
            return scrubbed(f"{type(error).__name__}: {error}").replace("\n", " ")
        self._done, self._url = path, pushed.url
        return None

    def _request(self, path: Path) -> PushRequest:
        if self.request.create_pr:
            return self.request
        return replace(self.request, message=f"{self.request.message}, {_name(path)}")

    def _command(self, path: Path) -> str:
        further = ["--with-optimizer"] if self.contents.with_optimizer else []
        return shlex.join(["vlmoe", "push", str(path.parent.parent), *self.request.words, *further])


def _name(path: Path | None) -> str:
    step = step_of(path) if path is not None else None
    return f"step {step}" if step is not None else str(path)
