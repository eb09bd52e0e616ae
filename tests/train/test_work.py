"""Work of a thread: its outcome, whatever it is, comes back to the one who asks."""

import threading

from vlmoe_core.train.work import Work


def test_the_result() -> None:
    go_on = threading.Event()
    work = Work(lambda: go_on.wait(20) and 7, "seven")
    assert not work.done
    go_on.set()
    assert work.outcome() == 7 and work.done and work.outcome() == 7


def test_an_error_is_an_outcome() -> None:
    work = Work(lambda: 1 // 0, "nothing")
    assert isinstance(work.outcome(), ZeroDivisionError) and work.done
