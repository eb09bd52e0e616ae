"""What a run works with: processes, folder, tokenizers, objective, optimiser, data."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import ProjectConfiguration
from torch import nn

from vlmoe_core.checkpoint.layout import discard_after, latest_checkpoint
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.checkpoint.metrics import check_metrics, cut_metrics
from vlmoe_core.checkpoint.read import Checkpoint, Part, read_checkpoint, read_newest
from vlmoe_core.checkpoint.restore import load_model_state, load_named_optimizer_state
from vlmoe_core.checkpoint.state import RunState
from vlmoe_core.data.loader import MicroBatch, MicroBatches, load_all
from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.moe.experts import expert_shares
from vlmoe_core.recipe.config import Recipe
from vlmoe_core.recipe.load import LoadedRecipe, dump_recipe
from vlmoe_core.train.build import BASELINE_EXAMPLES, build_dataset, build_objective, compile_blocks
from vlmoe_core.train.codes import reads_codes, with_codes
from vlmoe_core.train.fitting import Given, Tokenizers, obtain_tokenizers, take_tokenizers
from vlmoe_core.train.folder import RunFolder, check_same_recipe, default_folder, start_folder, write_environment
from vlmoe_core.train.init import open_start, start_from
from vlmoe_core.train.mesh import Mesh, check_processes, open_mesh
from vlmoe_core.train.optim import build_optimizer
from vlmoe_core.train.parallel import (
    build_accelerator,
    everywhere,
    from_main,
    gather_objects,
    hold_expert_copies,
    of_all,
    on_main,
    started_processes,
)
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.wrapping import is_cut, shared_out, wrap


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe. Raises UsageError where it contradicts itself."""

    out: Path | None = None
    """Run folder; beats the recipe's `out`."""
    resume: str | None = None
    """auto: go on in the run folder, or start if it holds no run; else the run, checkpoint or model folder, or the name
    on the Hub, to go on from."""
    overwrite: bool = False
    """Replace the run that the folder holds."""

    def __post_init__(self) -> None:
        if self.resume is not None and self.overwrite:
            raise UsageError("--resume goes on with a run and --overwrite replaces it; give one of them")


@dataclass
class Session:
    """Everything that the loop uses; only `state` changes."""

    recipe: Recipe
    name: str
    folder: RunFolder
    tokenizers: Tokenizers
    accelerator: Accelerator
    objective: nn.Module
    """The objective as it was built: with the experts of this process alone, where they are shared."""
    model: nn.Module
    """The objective as it is trained: wrapped where there are several ranks."""
    mesh: Mesh
    """How the processes share it."""
    optimizer: AcceleratedOptimizer
    train_data: MicroBatches
    eval_data: MicroBatches
    state: RunState

    def train_micros(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches from the present step to the last."""
        num_micro = self.recipe.batch.num_micro
        first, last = self.state.step * num_micro, self.recipe.train.steps * num_micro
        return self._load(self.train_data, first, last)

    def eval_micros(self) -> Iterator[MicroBatch]:
        """This rank's share of the held-out examples: as many micro-batches on every rank; the last may be empty.

        Ranks that share weights must compute at the same time.
        """
        ranks = self.accelerator.num_processes
        return self._load(self.eval_data, 0, max(1, -(-self.eval_data.num_micros // ranks)) * ranks)

    def baseline_micros(self) -> Iterator[MicroBatch]:
        """This rank's share of the training examples from which word and code frequencies are counted."""
        return self._load(
            self.train_data, 0, max(BASELINE_EXAMPLES * self.eval_data.num_micros, self.accelerator.num_processes)
        )

    def _load(self, data: MicroBatches, first: int, last: int) -> Iterator[MicroBatch]:
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        here = started_processes("LOCAL_WORLD_SIZE")
        return load_all(data, range(first + rank, last, ranks), self.recipe.data, here)


def open_session(loaded: LoadedRecipe, options: RunOptions, reporter: Reporter) -> Session:
    """Prepare a run: a new one, or one that goes on from a checkpoint.

    Raises:
        UsageError, RecipeError: the folder or the recipe does not allow it.
        DataError, TokenizerError, CheckpointError: a source, tokenizer or checkpoint is missing or broken.
    """
    recipe = loaded.recipe
    accelerator = build_accelerator(recipe.train)
    everywhere(lambda: check_processes(recipe, accelerator.num_processes))
    mesh = open_mesh(recipe.parallel, accelerator.device.type)
    path, checkpoint = _where(loaded, options, Part(accelerator.process_index, accelerator.num_processes))
    accelerator.project_configuration = ProjectConfiguration(project_dir=str(path), logging_dir=str(path))
    on_main(lambda: _prepare_folder(path, recipe, options, checkpoint))
    folder = RunFolder(path)
    start = everywhere(lambda: open_start(recipe.init)) if checkpoint is None else None
    if start is not None:
        _refuse_differing(start.checkpoint)
    given = everywhere(lambda: start.tokenizers(recipe)) if start is not None else Given()
    tokenizers = obtain_tokenizers(recipe, folder.tokenizers, reporter, given)
    train_data, eval_data = everywhere(lambda: _open_data(recipe, tokenizers))
    with shared_out(mesh):
        objective = build_objective(recipe, None if reads_codes(recipe) else tokenizers.visual, tokenizers.labels)
    if start is not None and recipe.init_weights:
        for note in everywhere(lambda: start_from(objective, start, recipe, tokenizers.labels)):
            reporter.note(note)
    if recipe.train.compile:
        compile_blocks(objective)
    model = wrap(accelerator, objective, mesh, recipe.train.precision)
    optimizer = build_optimizer(objective, recipe.optim, recipe.model.layers)
    if checkpoint is not None:
        everywhere(lambda: _restore(objective, optimizer, checkpoint))
    prepared: AcceleratedOptimizer = accelerator.prepare(optimizer)
    if not is_cut(objective):  # fully_shard gathers them in the precision of the run
        hold_expert_copies(objective, recipe.train)
    fresh = RunState(step=0, positions={}, recipe=loaded.name, tracker_run=secrets.token_hex(4))
    state = checkpoint.state if checkpoint else fresh
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(dict(state.scaler))
    return Session(
        recipe,
        loaded.name,
        folder,
        tokenizers,
        accelerator,
        objective,
        model,
        mesh,
        prepared,
        train_data,
        eval_data,
        state,
    )


def _restore(objective: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Put back what this process holds of the weights and moments."""
    assert checkpoint.optimizer is not None, "_where refuses it"
    load_model_state(objective, checkpoint.model)
    load_named_optimizer_state(optimizer, objective.named_parameters(), checkpoint.optimizer, expert_shares(objective))


def _open_data(recipe: Recipe, tokenizers: Tokenizers) -> tuple[MicroBatches, MicroBatches]:
    """The training and the held-out data, with the stored codes that the recipe names."""
    train_data = build_dataset(recipe, recipe.data.train, tokenizers, training=True)
    eval_data = build_dataset(recipe, recipe.data.eval, tokenizers, training=False)
    if reads_codes(recipe):
        return with_codes(recipe, tokenizers.visual, train_data, eval_data)
    return train_data, eval_data


def _where(loaded: LoadedRecipe, options: RunOptions, part: Part) -> tuple[Path, Checkpoint | None]:
    """The run folder, and the checkpoint from which the run goes on; each process checks a part of its bytes."""
    chosen = options.out or (Path(loaded.recipe.out) if loaded.recipe.out else None)
    default = default_folder(loaded.name)
    if options.resume is None:
        return chosen or default, None
    if options.resume == "auto":
        newest = from_main(latest_checkpoint(chosen or default))
        return chosen or default, None if newest is None else everywhere(lambda: read_newest(newest, part))
    resume = Path(options.resume)
    step = everywhere(lambda: resolve(resume))
    run, checkpoint = _run_of(step), everywhere(lambda: _read_whole(step, part, options.resume))
    _refuse_differing(checkpoint)
    return from_main(on_main(lambda: _folder_of(run, chosen or default, options))), checkpoint


def _read_whole(step: Path, part: Part, resume: str | None) -> Checkpoint:
    """A checkpoint with all that a run needs to go on. Raises CheckpointError, or UsageError if it is a model alone."""
    checkpoint = read_checkpoint(step, "sha256", part)
    if checkpoint.optimizer is None:
        raise UsageError(
            f"{resume} holds a model without its optimiser, so no run can go on from it; start a new one from its "
            f"weights with --model {resume}"
        )
    return checkpoint


def _refuse_differing(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError, on all processes, where one of them found another checkpoint than the rest."""
    found = set(gather_objects((checkpoint.state.step, checkpoint.manifest.created)))
    if len(found) > 1:
        steps = ", ".join(str(step) for step, _ in sorted(found))
        raise of_all(
            CheckpointError(
                f"the processes found different checkpoints, of steps {steps}: one is just being written, or a disk "
                "shows old files; name one of them (.../step-00000100), not the run"
            )
        )


def _check_unfinished(checkpoint: Checkpoint, recipe: Recipe, resume: str) -> None:
    """Raises UsageError where no step is left that a new run folder could hold."""
    if checkpoint.state.step >= recipe.train.steps:
        raise UsageError(
            f"{resume} stands at step {checkpoint.state.step} of {recipe.train.steps}, so nothing is left to train; "
            f"start a new run from its weights with --model {resume}"
        )


def _folder_of(run: Path, fresh: Path, options: RunOptions) -> Path:
    """The run folder of a checkpoint; a fresh one where that came without.

    Raises UsageError if the fresh one holds another run, or `--out` names another one than the run's.
    """
    if RunFolder(run).holds_run:
        if options.out is not None and options.out.resolve() != run.resolve():
            resume, out = options.resume, options.out
            raise UsageError(f"--resume {resume} goes on in {run}, not in --out {out}; leave --out away")
        return run
    if RunFolder(fresh).holds_run:
        raise UsageError(
            f"{fresh} already holds a run; go on with it by --resume auto, or give {options.resume} another folder "
            "with --out"
        )
    return fresh


def _run_of(step: Path) -> Path:
    """The run folder of a checkpoint folder, relative where that was."""
    return step.parent.parent if len(step.parts) > 2 else step.resolve().parent.parent


def _prepare_folder(path: Path, recipe: Recipe, options: RunOptions, checkpoint: Checkpoint | None) -> None:
    """Make the folder of a new run, or take it back to where the checkpoint was written."""
    folder = RunFolder(path)
    if options.resume is None or not folder.holds_run:
        if checkpoint is not None:
            check_same_recipe(checkpoint.path, recipe)
            _check_unfinished(checkpoint, recipe, str(options.resume))
        start_folder(path, dump_recipe(recipe), options.overwrite)
        if checkpoint is not None:
            take_tokenizers(checkpoint.tokenizers, folder.tokenizers)
    else:
        check_same_recipe(path, recipe)
        step, offset = (checkpoint.state.step, checkpoint.state.metrics_offset) if checkpoint else (0, 0)
        check_metrics(folder.metrics, offset)
        discard_after(path, step)
        cut_metrics(folder.metrics, offset)  # last: a later checkpoint that is left needs the lines up to it
    write_environment(folder)
