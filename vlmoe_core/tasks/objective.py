"""The objective of the tasks that choose a label: encoder, pooled states, head, loss.

Axis letters: X examples, A labels.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import DataError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.model.paths import freeze_unused
from vlmoe_core.objectives.balance import Balance
from vlmoe_core.objectives.loss import Loss, Part
from vlmoe_core.tasks.heads import Pool, TextPool, choose, initialise_head

LossSum = Callable[[Tensor, Tensor], Tensor]
"""(logits_XA, targets) -> the sum of the loss over the examples."""


class Choosing(nn.Module):
    """Encodes every sequence of an example, pools, and lets the head choose.

    Args:
        name: of the loss, the task's.
        stream: of the examples.
        encoder: the encoder; what the stream does not pass is frozen.
        pooling: which states speak for a sequence.
        head: from the pooled states of an example's sequences, side by side, to its labels; initialised here.
        loss: from logits and targets.
        num_images: sequences of an example.
        change: changes a training batch before it is encoded (mixup), targets included; null: none.
    """

    def __init__(
        self,
        name: str,
        stream: StreamName,
        encoder: Encoder,
        pooling: Pool | TextPool,
        head: nn.Module,
        loss: LossSum,
        num_images: int = 1,
        change: Callable[[Batch], Batch] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.stream, self.pooling = name, stream, pooling
        self.encoder = encoder
        self.head = initialise_head(head, encoder.config.init_std)
        self.loss, self.num_images, self.change = loss, num_images, change
        self.balance = Balance(encoder.config)
        freeze_unused(encoder, (stream,))

    def forward(self, batches: Mapping[StreamName, Batch]) -> Loss:
        """The loss of one micro-batch and the logits (X, A) of its examples.

        Raises DataError where an example has another number of images than the head was made for.
        """
        batch = batches[self.stream]
        if batch.num_sequences != self.num_images * batch.num_examples:
            raise DataError(
                f"{self.name}: {batch.num_examples} examples came with {batch.num_sequences} pictures, the head takes "
                f"{self.num_images} of each; set task.num_images"
            )
        if self.training and self.change is not None and batch.targets is not None:
            batch = self.change(batch)
        encoded = self.encoder(batch)
        logits_XA = choose(self.head, encoded, batch, self.pooling, self.num_images)
        parts = {self.name: self._part(logits_XA, batch)}
        if self.training:
            parts |= self.balance.parts({self.stream: batch}, {self.stream: encoded.routed})
        return Loss(parts, tuple((self.stream, one) for one in encoded.routed), logits_XA.detach())

    def counts(self, batches: Mapping[StreamName, Batch]) -> dict[str, int]:
        """The count of every part, from the batches alone."""
        return {self.name: _num_known(batches[self.stream])} | self.balance.counts(batches)

    def _part(self, logits_XA: Tensor, batch: Batch) -> Part:
        if batch.targets is None:
            return Part(logits_XA.float().sum() * 0, 0, 1.0, (self.stream,))
        logits_XA = logits_XA.to(torch.promote_types(logits_XA.dtype, torch.float32))
        return Part(self.loss(logits_XA, batch.targets), _num_known(batch), 1.0, (self.stream,))


def _num_known(batch: Batch) -> int:
    return 0 if batch.targets is None else batch.num_examples


def cross_entropy(logits_XA: Tensor, targets: Tensor) -> Tensor:
    """The sum over examples; targets are numbers of labels (X,) or probabilities (X, A)."""
    return F.cross_entropy(logits_XA, targets, reduction="sum")


def binary_cross_entropy(logits_XA: Tensor, targets_XA: Tensor) -> Tensor:
    """The sum over labels and examples: VLMo's mean over labels times their number."""
    return F.binary_cross_entropy_with_logits(logits_XA, targets_XA.to(logits_XA.dtype), reduction="sum")
