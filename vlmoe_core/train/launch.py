"""Starts `vlmoe` in several processes of this machine, through Accelerate's launcher."""

import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vlmoe_core.errors import TrainError, UsageError

PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SECONDS = 600
"""How long the launcher waits for processes that it hands a signal on to: a step and a checkpoint may take a while."""
WATCHER = "torch.distributed.elastic.multiprocessing.api"
"""Who in torch's launcher tells of each process that ends or is sent a signal; a user has their own last words."""


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `vlmoe ARGUMENTS` in so many processes, and wait for them.

    SIGINT and SIGTERM are handed on to all of them. Each process uses an equal share of the cores, unless
    OMP_NUM_THREADS says otherwise. Where one fails, the others are asked to end, and killed half a minute later.

    Returns:
        0, or the exit code of the first process that failed; 128 + n where the launcher got signal n.

    Raises:
        UsageError: there are GPUs, but fewer than processes.
        TrainError: a signal ended a process.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < num_processes:
        raise UsageError(f"--num-processes {num_processes}, but this machine has {gpus} GPU(s); give {gpus} or less")
    os.environ.setdefault(PATIENCE, str(SECONDS))
    logging.getLogger(WATCHER).setLevel(logging.CRITICAL)
    parsed = launch_command_parser().parse_args([*_options(num_processes), "--module", "vlmoe_cli", *arguments])
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        return _exit_code(_first(error), num_processes)
    except subprocess.CalledProcessError as error:
        return _exit_code({0: error.returncode}, num_processes)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _options(num_processes: int) -> list[str]:
    """Everything that Accelerate would else ask its configuration file for, or warn about."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    options = {
        "num_processes": str(num_processes),
        "num_machines": "1",
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": "0",
        "num_cpu_threads_per_process": threads,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    # Accelerate calls torch's launcher "multi_gpu"; without GPUs the processes meet on the CPU (train/parallel.py).
    return [*words, "--multi_gpu"] if num_processes > 1 else words


def _first(error: ChildFailedError) -> dict[int, int]:
    """The exit codes of the processes that failed in the same second as the first one, by rank."""
    first = min(failure.timestamp for failure in error.failures.values())
    return {rank: failure.exitcode for rank, failure in error.failures.items() if failure.timestamp == first}


def _exit_code(codes: Mapping[int, int], num_processes: int) -> int:
    """That of a process whose own message told why it failed.

    Args:
        codes: by rank; -n where signal n ended it. SIGTERM is what the launcher sends to the rest.
        num_processes: all of them.

    Raises:
        TrainError: another signal ended one, which could not say a word.
    """
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            raise TrainError(
                f"process {rank} (of {num_processes}, counted from 0) was ended by {_name(-code)}, and the run with "
                "it; SIGKILL is mostly for lack of memory. Go on from the last checkpoint: the same command with "
                "--resume auto, on any number of processes that fits"
            )
    own = max(codes.values())
    return own if own > 0 else 128 - own


def _name(number: int) -> str:
    """SIGKILL for 9."""
    known = {one.value: one.name for one in signal.Signals}
    return known.get(number, f"signal {number}")
