"""A tiny recipe, real child processes, and what to compare of two runs."""

import json
import os
import pkgutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimiser imports it: children that are forked after that start in no time
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.recipe.load import LoadedRecipe, load_recipe
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.run import Outcome, run_training
from vlmoe_core.train.session import RunOptions

RECIPE = """
seed: 3
model:
  layers: 2
  dim: 16
  heads: 2
  hidden: 32
  vl_layers: 1
  patch_size: 4
  image_size: 16
  max_text_length: 24
  drop_path: 0.3
  moe:
    vision: {num_experts: 4, layers: [1]}
    text: {num_experts: 4, layers: [0]}
tokenizers:
  text: {vocab_size: 200, fit_texts: 40}
  visual: {codebook_size: 16, fit_images: 8, iterations: 3}
data:
  max_text: {text: 24, pair: 16}
  workers: 0
  augment: {image: {crop_scale: [0.3, 1.0], horizontal_flip: 0.5}}
  train:
    image: [{source: scenes, size: 50, image_size: 16}]
    text: [{source: scenes, size: 50}]
    pair: [{source: scenes, size: 50, image_size: 16}]
  eval:
    image: [{source: scenes, size: 10, image_size: 16, split: eval}]
    text: [{source: scenes, size: 10, split: eval}]
    pair: [{source: scenes, size: 10, image_size: 16, split: eval}]
objective: {name: masked}
batch:
  size: {image: 4, text: 4, pair: 4}
  micro: {image: 2, text: 2, pair: 2}
optim: {lr: 1.0e-2, warmup_steps: 2}
train: {steps: 6, log_every: 1, eval_every: 3, eval_examples: 3, save_every: 2}
"""
TIME_FIELDS = ("time", "samples_per_s")
PATIENCE = 60.0


def tiny(folder: Path, *overrides: str) -> LoadedRecipe:
    """The tiny recipe, written into a folder and read as a user's."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return load_recipe(str(path), overrides)


def train(
    loaded: LoadedRecipe, out: Path | None, *, resume: str | None = None, reporter: Reporter | None = None
) -> Outcome:
    """Run a recipe in this process, as one of its own."""
    fresh_process()
    return run_training(loaded, RunOptions(out, resume), reporter or Reporter())


class Scaled(Accelerator):
    """Scales the loss as Accelerate does in fp16, which needs a GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        for prepared in self._optimizers:
            self.scaler.unscale_(prepared.optimizer)


def fresh_process() -> None:
    """Make Accelerate forget the runs before, and compute with one thread, as every child does."""
    torch.set_num_threads(1)
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()


class Child:
    """A process that is forked from a server which has imported everything and run nothing."""

    def __init__(self, target: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.train.preloaded"])
        self._answers, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(theirs, environment or {}, target, arguments))
        self.process.start()
        theirs.close()

    def wait(self) -> int:
        """Its exit code; -9 where SIGKILL ended it. Fails if it does not end."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError("the process hangs")
        assert self.process.exitcode is not None
        return self.process.exitcode

    def answer(self) -> Any:
        """What the target returned, or the exception that it raised."""
        answer = self._answers.recv() if self._answers.poll(PATIENCE) else AssertionError("the process hangs")
        self.wait()
        return answer


def _run(
    answers: Connection, environment: dict[str, str], target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    set_start_method("fork", force=True)  # for loader processes: a server of its own would import everything again
    fresh_process()
    try:
        answers.send(target(*arguments))
    except Exception as error:
        answers.send(error)
        raise SystemExit(1) from error


def on_ranks(ranks: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns, or raises, on each of so many processes, started as torchrun starts them."""
    return [child.answer() for child in start_ranks(ranks, target, *arguments)]


def start_ranks(ranks: int, target: Callable[..., Any], *arguments: Any) -> list[Child]:
    """So many processes with a function each, started as torchrun starts them."""
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    own = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    environments = [{name: str(value) for name, value in (shared | mine).items()} for mine in own]
    return [Child(target, *arguments, environment=e | {"OMP_NUM_THREADS": "1"}) for e in environments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pretrain_child(
    loaded: LoadedRecipe, out: Path | None, resume: str | None = None, blow: "Blow | None" = None
) -> Outcome:
    """For a child: run a recipe, and be hit on the way."""
    if blow is not None:
        blow.prepare()
    return run_training(loaded, RunOptions(out, resume), Reporter())


@dataclass(frozen=True)
class Blow:
    """A signal that a process sends itself, at one call of one function."""

    owner: str
    """The module or class, as pkgutil.resolve_name takes it: `package.module:Class`."""
    function: str
    """The function in it."""
    call: int = 1
    """Which of its calls, from 1."""
    before: bool = False
    """Before the call, not after it."""
    signal: int = signal.SIGKILL

    def prepare(self) -> None:
        """Put the blow into this process, which is a child and ends with it."""
        owner = pkgutil.resolve_name(self.owner)
        function = getattr(owner, self.function)
        calls = 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if self.before and calls == self.call:
                os.kill(os.getpid(), self.signal)
            result = function(*args, **kwargs)
            if not self.before and calls == self.call:
                os.kill(os.getpid(), self.signal)
            return result

        setattr(owner, self.function, wrapped)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what tells the time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in lines]


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and moments of a checkpoint, by name."""
    checkpoint = read_checkpoint(run / "checkpoints" / f"step-{step:08d}", verify="sha256")
    model = {f"model/{name}": checkpoint.model[name] for name in checkpoint.model}
    return model | {f"optimizer/{name}": checkpoint.optimizer[name] for name in checkpoint.optimizer}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if bits(left[name]) != bits(right[name])] == []


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share that are the same bit for bit."""
    return tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()


def assert_same_run(run: Path, straight: Path, step: int) -> None:
    """Weights, moments, best score and metrics lines are those of the run that was not interrupted."""
    assert_same_bits(tensors(run, step), tensors(straight, step))
    assert metrics(run) == metrics(straight)
    states = [read_checkpoint(r / "checkpoints" / f"step-{step:08d}").state for r in (run, straight)]
    compared = [(s.step, s.positions, s.best_score, s.best_step, s.scaler) for s in states]
    assert compared[0] == compared[1]
