"""Starts a function on several processes of this machine that can talk to each other."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from vlmoe_core.train.parallel import end_processes

T = TypeVar("T")


def on_processes(count: int, function: Callable[..., T], *arguments: Any) -> list[T]:
    """What the function returns on each of so many new processes, which stand as torchrun starts them.

    Each computes with one thread. The first error of any of them is raised.
    """
    port = _free_port()
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        started = [pool.submit(_run, rank, count, port, function, arguments) for rank in range(count)]
        return [one.result() for one in started]


def _run(rank: int, count: int, port: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    rest = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in (places | rest).items()})
    torch.set_num_threads(1)
    try:
        return function(*arguments)
    finally:
        end_processes()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
