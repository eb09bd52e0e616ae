"""A process of a run is gone: those that wait for it say so in one message."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from vlmoe_core.errors import TrainError

TALKS = re.compile(r"gloo|nccl|c10d|ProcessGroup|TCPStore|socket", re.IGNORECASE)
"""Who speaks: the libraries through which processes talk. Their errors are a plain RuntimeError or a DistError."""
GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|no route to host|timed out|timeout|remote (worker|process)"
    r"|ncclRemoteError|communicator was aborted|watchdog",
    re.IGNORECASE,
)
"""What they say when the other side does not answer."""


@contextmanager
def lost_processes_told() -> Iterator[None]:
    """Around whatever processes do together.

    Raises:
        TrainError: another process ended, or does not answer, in the midst of it.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_lost_process(error):
            raise
        raise TrainError(
            f"{_this_one()} can't go on: another one ended or does not answer ({_reason(error)}). What that one said "
            "last tells why; one that was killed, as for lack of memory, says nothing. Go on from the last checkpoint: "
            "the same command with --resume auto, on any number of processes that fits"
        ) from error


def is_of_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone."""
    message = str(error)
    talks = isinstance(error, dist.DistError) or TALKS.search(message) is not None
    return isinstance(error, RuntimeError) and talks and GONE.search(message) is not None


def _this_one() -> str:
    """Which process this is, as long as it knows."""
    if not dist.is_available() or not dist.is_initialized():
        return "this process"
    return f"process {dist.get_rank()} (of {dist.get_world_size()}, counted from 0)"


def _reason(error: BaseException) -> str:
    """The library's own words in brief: without the place in its source, and what it advises."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()).splitlines()[0]
    return text.split(". ")[0].rstrip(".")
