"""Work that a thread of its own does."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Work(Generic[T]):
    """Begun at once; what it returns, or raises, is its outcome. A process that ends does not wait for it."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._outcome: list[T | Exception] = []
        self._thread = threading.Thread(target=self._do, args=(work,), name=name, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """It has ended, well or not."""
        return not self._thread.is_alive()

    def outcome(self) -> T | Exception:
        """Wait until it has ended."""
        self._thread.join()
        return self._outcome[0]

    def _do(self, work: Callable[[], T]) -> None:
        try:
            self._outcome.append(work())
        except Exception as error:  # whatever it is, the thread that asks must learn of it
            self._outcome.append(error)
