"""Experts on the threads of a CPU, one thread an expert.

Torch gives every product all threads. The products of one expert are short: what the threads lose waiting for each
other, and for the next expert's weights, is a tenth of the time (docs/PERFORMANCE.md). With an expert a thread one
computes while another one reads.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

IMBALANCE = 1.15
"""How much more work than the mean the busiest thread may have; beyond, torch shares out every product."""


def for_each_expert(work: Callable[[int], None], rows_E: Sequence[int], device: torch.device) -> None:
    """Call `work` with the number of every expert; calls may run at the same time, and no two write the same memory.

    Args:
        work: computes one expert.
        rows_E: rows of each expert, by which they are dealt out.
        device: where the arithmetic happens.
    """
    threads = torch.get_num_threads()
    shares = share_out(rows_E, threads) if device.type == "cpu" and threads > 1 else None
    if shares is None:
        for expert in range(len(rows_E)):
            work(expert)
        return
    run = functools.partial(_run, work, torch.is_inference_mode_enabled())
    computing = [_pool(threads).submit(run, share) for share in shares]
    wait(computing)  # all of them, so that nobody writes any more when an error is raised
    for share in computing:
        share.result()


def share_out(rows_E: Sequence[int], threads: int) -> list[list[int]] | None:
    """The experts of each thread, the largest dealt first; None where no dealing is even enough."""
    shares: list[list[int]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for expert in sorted(range(len(rows_E)), key=lambda e: -rows_E[e]):
        idlest = loads.index(min(loads))
        shares[idlest].append(expert)
        loads[idlest] += rows_E[expert]
    return shares if max(loads) * threads <= IMBALANCE * sum(rows_E) else None


def _run(work: Callable[[int], None], inference: bool, experts: Sequence[int]) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        for expert in experts:
            work(expert)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, in each of which torch computes with one."""
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # torch reads the number when a thread first asks, and keeps it for that thread
        started.wait()

    pool = ThreadPoolExecutor(threads, "vlmoe-expert", initializer=start)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    # Torch also takes the number set last for threads that begin later: set it back.
    torch.set_num_threads(threads)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)
