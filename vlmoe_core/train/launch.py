"""Starts `vlmoe` in several processes of this machine, through Accelerate's launcher."""

import os
import subprocess
from collections.abc import Sequence

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vlmoe_core.errors import UsageError

PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SECONDS = 600
"""How long the launcher waits for processes that were asked to end: a step and a checkpoint may take a while."""


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `vlmoe ARGUMENTS` in so many processes, and wait for them.

    SIGINT and SIGTERM are handed on to all of them. Each process uses an equal share of the cores, unless
    OMP_NUM_THREADS says otherwise.

    Returns:
        0, or the exit code of the first process that failed; 128 + n where signal n ended the processes.

    Raises:
        UsageError: there are GPUs, but fewer than processes.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < num_processes:
        raise UsageError(f"--num-processes {num_processes}, but this machine has {gpus} GPU(s); give {gpus} or less")
    os.environ.setdefault(PATIENCE, str(SECONDS))
    parsed = launch_command_parser().parse_args([*_options(num_processes), "--module", "vlmoe_cli", *arguments])
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
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


def _exit_code(code: int) -> int:
    """A process that signal n ended has the code -n; a shell calls that 128 + n."""
    return code if code >= 0 else 128 - code
