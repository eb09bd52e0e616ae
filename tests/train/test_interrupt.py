"""Signals are noted, not obeyed at once; a second Ctrl-C is."""

import os
import signal
import time

import pytest

from vlmoe_core.train.interrupt import Interrupt


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_handlers_come_back(number: int) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with Interrupt() as interrupt:
        assert interrupt.received is None
        send(number)
        assert interrupt.received == number
    assert {s: signal.getsignal(s) for s in before} == before


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not() -> None:
    with Interrupt() as interrupt:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
