"""What a recipe says of training: batch, optimiser, schedule, precision, evaluation, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vlmoe_core.config import Config
from vlmoe_core.data.config import STREAMS, StreamName

Share = Annotated[float, Field(ge=0, lt=1)]


class StreamCounts(Config):
    """A number of examples for each stream; 0 leaves the stream out."""

    image: int = Field(0, ge=0)
    """Images."""
    text: int = Field(0, ge=0)
    """Texts."""
    pair: int = Field(0, ge=0)
    """Image-text pairs."""

    def of(self, stream: StreamName) -> int:
        """The number for one stream."""
        return int(getattr(self, stream))


class BatchConfig(Config):
    """Examples of one optimiser step, and how they are cut into micro-batches, the groups of routing and capacity."""

    size: StreamCounts
    """Examples of each stream in one optimiser step, over all ranks."""
    micro: StreamCounts
    """Examples of each stream in one micro-batch; size / micro is the same for all streams."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        ratios: dict[StreamName, int] = {}
        for stream in STREAMS:
            size, micro = self.size.of(stream), self.micro.of(stream)
            if (size == 0) != (micro == 0):
                raise ValueError(f"size.{stream} ({size}) and micro.{stream} ({micro}): both must be 0, or neither")
            if size == 0:
                continue
            if size % micro:
                fits = [d for d in range(1, size + 1) if size % d == 0]
                raise ValueError(
                    f"size.{stream} ({size}) is not divisible by micro.{stream} ({micro}); "
                    f"these fit: {', '.join(map(str, fits))}"
                )
            ratios[stream] = size // micro
        if not ratios:
            raise ValueError("size holds no examples: give at least one stream a size and a micro above 0")
        if len(set(ratios.values())) > 1:
            shown = ", ".join(f"{s}: {self.size.of(s)}/{self.micro.of(s)} = {n}" for s, n in ratios.items())
            raise ValueError(f"size / micro must be equal for all streams ({shown}); change micro so that they agree")
        return self

    @property
    def num_micro(self) -> int:
        """M, micro-batches in one optimiser step, over all ranks."""
        return next(self.size.of(s) // self.micro.of(s) for s in STREAMS if self.size.of(s))


class ParallelConfig(Config):
    """How processes share the model. Every number that a run computes is the same whatever is said here."""

    expert: int = Field(1, ge=1)
    """Processes that hold the experts of a sparse layer together, each an equal share: expert parallelism. It divides
    the number of processes and the number of experts. 1: every process holds all."""
    shard: Literal["none", "full"] = "none"
    """none: every process holds all that is not an expert, and AdamW's moments of what it holds. full: weights,
    gradients and moments are cut over all processes, and gathered layer by layer when they are used (ZeRO-3, arXiv
    1910.02054; torch's fully_shard)."""


class OptimConfig(Config):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(2e-3, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Where the cosine ends, one step after the last."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """Decay rates of the two moments (BEiT-3: 0.9, 0.98)."""
    eps: float = Field(1e-6, gt=0)
    """Added to the root of the second moment (BEiT-3: 1e-6)."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of the weight matrices; norms, biases, positions, codes, embeddings of kinds have none."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest global norm of the gradient; null: no clipping."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Layer-wise decay: the rate of block l of L (1-based) is multiplied by this to the power L + 1 - l, that of the
    embeddings by the power L + 1 (BEiT; 1: the same rate everywhere)."""
    head_lr: float = Field(1.0, gt=0)
    """Factor on the rate of the heads (VQA of BEiT-3 and VLMo: 20)."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is more than lr ({self.lr}), from which the rate falls")
        return self


class TrainConfig(Config):
    """How long and how a run trains."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights and moments are float32. fp16 needs a GPU."""
    freeze: tuple[Literal["routers", "experts"], ...] = ()
    """Parts of the sparse layers that keep their values."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile each block with torch.compile."""
    deterministic: bool = False
    """Ask torch for deterministic kernels on a GPU as well; the CPU's are."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of metrics."""
    eval_every: int = Field(1000, ge=1)
    """Steps between two held-out evaluations; step 0 and the last are always evaluated."""
    eval_examples: int = Field(512, ge=1)
    """Held-out examples of each stream, always the same with the same masks."""
    save_every: int = Field(1000, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints that are kept, beside the best one."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go beside metrics.jsonl."""
