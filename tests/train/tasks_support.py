"""Tiny finetune recipes of the five tasks on scenes, and what tests of finetuned models share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from tests.train.support import fresh_process, train
from vlmoe_core.recipe.load import LoadedRecipe
from vlmoe_core.train.init import load_run_recipe
from vlmoe_core.train.reporter import Reporter
from vlmoe_core.train.scoring import Asked, Evaluated, answer_all, ask
from vlmoe_core.train.trained import Trained, load_trained

PRETRAINING = ("model.moe.vision.layers=[0]", "train.steps=2", "train.eval_examples=2")
"""Overrides of the tiny pretraining recipe: every task passes sparse layers, and its weights fit the models here."""

MODEL = """
model:
  layers: 2
  dim: 16
  heads: 2
  hidden: 32
  vl_layers: 1
  patch_size: 4
  image_size: 16
  max_text_length: 24
  drop_path: 0.1
  moe:
    vision: {num_experts: 4, layers: [0]}
    text: {num_experts: 4, layers: [0]}
tokenizers:
  text: {vocab_size: 200, fit_texts: 40}
"""

RECIPE = """
seed: 3
init: INIT
task: {TASK}
data:
  max_text: {text: 24, pair: 20}
  workers: 0
  train:
    STREAM: [{source: scenes, SOURCE, size: 40, image_size: 16}]
  eval:
    STREAM: [{source: scenes, SOURCE, size: 6, image_size: 16, split: eval}]
  test:
    STREAM: [{source: scenes, SOURCE, size: 14, image_size: 16, split: test}]
batch: {size: {STREAM: 8}, micro: {STREAM: 8}}
optim: {lr: 1.0e-2, warmup_steps: 2}
train: {steps: 4, log_every: 1, eval_every: 2, eval_examples: 9, save_every: 2}
"""

SAID: Mapping[str, tuple[str, str, str]] = {
    "vqa": ("name: vqa, pool: both, min_count: 1", "pair", "task: vqa"),
    "nlvr2": ("name: nlvr2", "pair", "task: nlvr2"),
    "retrieval": ("name: retrieval, rerank: 3", "pair", "captions_per_image: 2"),
    "classification": ("name: classification", "image", "task: classification"),
    "nli": ("name: nli", "text", "task: nli"),
}
"""What the recipe of each task says of the task, its stream, and its source."""
TASKS = tuple(SAID)


def recipe_text(task: str, init: str = "scratch") -> str:
    """The YAML of a task; from scratch with a model of its own."""
    said, stream, source = SAID[task]
    words = {"INIT": init, "TASK": said, "STREAM": stream, "SOURCE": source}
    text = RECIPE
    for word, meant in words.items():
        text = text.replace(word, meant)
    return text + (MODEL if init == "scratch" else "")


def tuned(folder: Path, task: str, *overrides: str, init: str = "scratch") -> LoadedRecipe:
    """The recipe of a task, written into a folder and read as a user's."""
    path = folder / f"{task}.yaml"
    path.write_text(recipe_text(task, init))
    return load_run_recipe(str(path), overrides)


def finetuned(folder: Path, task: str, *overrides: str, init: str = "scratch") -> Path:
    """The run folder of a task's recipe, trained to its end."""
    return train(tuned(folder, task, *overrides, init=init), folder / task).folder


class Notes(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, message: str) -> None:
        self.told.append(message)


def scored(
    model: Path | Trained, asked: Asked | None = None, micro: int | None = None, reporter: Reporter | None = None
) -> Evaluated:
    """What a model reaches on a split, by default on all of `data.test`, in micro-batches of another size if given."""
    trained = load_trained(model) if isinstance(model, Path) else model
    if micro is not None:
        counts = {stream: micro for stream, size in trained.recipe.batch.micro if size}
        batch = trained.recipe.batch.model_copy(update={"micro": trained.recipe.batch.micro.model_copy(update=counts)})
        trained = replace(trained, recipe=trained.recipe.model_copy(update={"batch": batch}))
    fresh_process()
    asked = asked or ask(trained, None, None, None, None)
    return answer_all(trained, asked, Accelerator(cpu=True), reporter or Reporter())


def percents(evaluated: Evaluated) -> dict[str, float]:
    assert evaluated.scores is not None
    return evaluated.scores.percents()


def names(evaluated: Evaluated) -> list[str]:
    return [record.name for record in evaluated.records]


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], chosen: Sequence[str]) -> list[str]:
    """Those of the names whose tensors are equal in both."""
    return [name for name in chosen if left[name].equal(right[name])]
