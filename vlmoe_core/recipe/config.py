"""The whole of a run."""

from itertools import product
from typing import Self

from pydantic import Field, model_validator

from vlmoe_core.config import Config
from vlmoe_core.data.config import SPLITS, STREAMS, DataConfig, StreamName
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.objectives.config import MaskConfig, Objective
from vlmoe_core.tasks.config import Task
from vlmoe_core.tokenizers.config import TokenizersConfig
from vlmoe_core.train.config import BatchConfig, OptimConfig, ParallelConfig, TrainConfig


class ModelRecipe(Config):
    """What a model folder says where no run of ours trained the model: an encoder that was imported."""

    model: ModelConfig
    """The encoder."""
    tokenizers: TokenizersConfig = TokenizersConfig()
    """Text and visual tokenizer."""


class Recipe(ModelRecipe):
    """A run: model, data, batch, optimiser, training; and an objective to pretrain, or a task to finetune."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds initialisation, data order, masks and all noise."""
    out: str | None = None
    """Run folder; null: runs/<name of the recipe>."""
    data: DataConfig
    """Sources and their preparation."""
    mask: MaskConfig = MaskConfig()
    """What is hidden."""
    objective: Objective | None = None
    """What pretraining minimises."""
    task: Task | None = None
    """What is finetuned."""
    init: str | None = None
    """What the run starts from: `scratch`, or a model: a run, checkpoint or model folder, or hf-hub:ORG/NAME[@rev]. Its
    `model` and `tokenizers` are then the base that this recipe's `model` goes over. Finetuning must say it; pretraining
    starts from random weights where it is null."""
    init_weights: bool = True
    """False: of `init` only sizes and tokenizers are taken, not the weights; the control of a comparison."""
    batch: BatchConfig
    """Examples of a step."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    train: TrainConfig
    """Length, precision, evaluation, checkpoints."""
    parallel: ParallelConfig = ParallelConfig()
    """How processes share the model."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        self._check_aim()
        for stream in STREAMS:
            has_sources, size = bool(getattr(self.data.train, stream)), self.batch.size.of(stream)
            if has_sources and not size:
                raise ValueError(
                    f"data.train.{stream} has sources, but batch.size.{stream} is 0;"
                    " give it a size or remove the sources"
                )
            if size and not has_sources:
                raise ValueError(
                    f"batch.size.{stream} is {size}, but data.train.{stream} has no source;"
                    " add one or set the size to 0"
                )
        for stream in ("text", "pair"):
            longest = getattr(self.data.max_text, stream)
            if self.task is not None and not getattr(self.data.train, stream):
                continue
            if longest > self.model.max_text_length:
                raise ValueError(
                    f"data.max_text.{stream} ({longest}) is more than model.max_text_length"
                    f" ({self.model.max_text_length})"
                )
        if (self.data.pad_text_to or 0) > self.model.max_text_length:
            raise ValueError(
                f"data.pad_text_to ({self.data.pad_text_to}) is more than model.max_text_length"
                f" ({self.model.max_text_length})"
            )
        if self.mask.image_count is not None and self.mask.image_count >= self.model.num_patches:
            raise ValueError(
                f"mask.image_count ({self.mask.image_count}) must be below the number of patches"
                f" ({self.model.num_patches})"
            )
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is more than train.steps ({self.train.steps})"
            )
        if self.parallel.expert > 1 and self.train.compile and self.train.activation_checkpointing:
            raise ValueError(
                "train.compile, train.activation_checkpointing and parallel.expert above 1 don't go together: torch "
                "would recompute other graphs than those of the forward pass; leave one of them out"
            )
        return self

    def _check_aim(self) -> None:
        """A recipe pretrains or finetunes, with what belongs to it."""
        if (self.objective is None) == (self.task is None):
            raise ValueError("give either 'objective' (pretraining) or 'task' (finetuning)")
        streams = [stream for stream in STREAMS if self.batch.size.of(stream)]
        if self.objective is not None and not any(self.objective.passes(stream) for stream in streams):
            raise ValueError(
                f"objective.weights: every loss of what is read ({', '.join(streams)}) has weight 0, and contrast "
                "(itc) compares pairs; give one a weight, or add pairs"
            )
        if self.task is None and self.init is None and not self.init_weights:
            raise ValueError("init_weights: false takes sizes and tokenizers of init; say which model that is")
        if self.task is not None and "mask" in self.model_fields_set and self.mask != MaskConfig():
            raise ValueError("mask belongs to pretraining: a task hides nothing; take it out")
        if self.objective is not None:
            self._check_objective(self.objective)
        if self.task is not None and self.init is None:
            raise ValueError("init: say what finetuning starts from: scratch, or a run, checkpoint or model folder")

    def _check_objective(self, objective: Objective) -> None:
        """It reads all sources that there are, and uses what the recipe says of masks and visual tokenizers."""
        read = " and ".join(objective.streams)
        for split, stream in product(SPLITS, STREAMS):
            if getattr(getattr(self.data, split), stream) and stream not in objective.streams:
                raise ValueError(
                    f"data.{split}.{stream} has sources, but objective {objective.name} reads the {read} stream alone;"
                    f" list them under {read} where they have what it needs, or take them out"
                )
        if objective.starts_at >= self.train.steps:
            raise ValueError(
                f"objective.quantise_from ({objective.starts_at}) must be below train.steps ({self.train.steps}): codes"
                " that start at the end learn nothing"
            )
        if objective.hides:
            return
        if self.parallel.shard == "full":
            raise ValueError(
                f"parallel.shard is full, but objective {objective.name} learns codes beside gradients, which weights "
                "that are cut over processes don't serve; set it to none"
            )
        if self.mask != MaskConfig():
            raise ValueError(f"mask: objective {objective.name} hides nothing; take it out")
        if self.tokenizers.visual.load is not None:
            raise ValueError(
                f"tokenizers.visual.load: objective {objective.name} trains a tokenizer of its own; leave it null. To"
                " train on from another one: --model"
            )

    @property
    def hides(self) -> bool:
        """Whether patches and words are hidden, so that a visual tokenizer is asked for."""
        return self.objective is not None and self.objective.hides

    def num_params(self) -> int:
        """Parameters of the encoder and, in pretraining, the heads; those of all experts counted."""
        return self.model.num_params(self.tokenizers.text.vocab_size) + self.num_head_params

    def num_active_params(self) -> int:
        """Parameters, heads included, that a token of each modality uses; see `ModelConfig.num_active_params`."""
        return self.model.num_active_params(self.tokenizers.text.vocab_size) + self.num_head_params

    @property
    def num_head_params(self) -> int:
        """Parameters of what stands on the encoder in pretraining; 0 in a task, whose labels come from its data."""
        return 0 if self.objective is None else self.objective.num_head_params(self.model, self.tokenizers)

    def flops(self, stream: StreamName) -> int:
        """Operations of the encoder's forward pass over one example of a stream, its text of the greatest length."""
        return self.model.flops(*self.tokens(stream))

    def tokens(self, stream: StreamName) -> tuple[int, int]:
        """Image tokens and text tokens of one example of a stream, its text of the greatest length."""
        image_tokens = 0 if stream == "text" else 1 + self.model.num_patches
        longest = {"image": 0, "text": self.data.max_text.text, "pair": self.data.max_text.pair}[stream]
        padded = 0 if stream == "image" else self.data.pad_text_to or 0
        return image_tokens, max(longest, padded)
