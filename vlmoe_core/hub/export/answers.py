"""What a graph answers: the outputs of a task's head, or states and predictions of a pretrained model.

Axis letters: B examples, I images, N tokens of an image, P patches, L places of a text, T text tokens, D width, F
features, A labels, C codes, V words.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import UsageError
from vlmoe_core.model.encoder import Encoded
from vlmoe_core.objectives.heads import pool_cls
from vlmoe_core.objectives.kinds.masked import MaskedModelling
from vlmoe_core.tasks.heads import Pool, TextPool, choose
from vlmoe_core.tasks.kinds.retrieval import Matching
from vlmoe_core.tasks.objective import Choosing
from vlmoe_core.train.trained import Trained


class Answer(nn.Module):
    """The head for one stream."""

    num_images = 1
    """Images of an example."""
    keeps_sentences_apart = False
    """The two sentences of a text must be told."""

    def forward(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """The outputs by name."""
        raise NotImplementedError


class Chosen(Answer):
    """`logits` (B, A) of a head over the pooled states of an example's sequences."""

    def __init__(self, head: nn.Module, pooling: Pool | TextPool, num_images: int = 1) -> None:
        super().__init__()
        self.head, self.pooling, self.num_images = head, pooling, num_images
        self.keeps_sentences_apart = pooling == "sentences"

    def forward(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """-> logits."""
        return {"logits": choose(self.head, encoded, batch, self.pooling, self.num_images)}


class Vectors(Answer):
    """`image_vectors` or `text_vectors` (B, D) of length 1, whose products are cosines."""

    def __init__(self, head: nn.Module, stream: StreamName) -> None:
        super().__init__()
        self.head, self.name = head, f"{stream}_vectors"

    def forward(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """-> vectors."""
        return {self.name: F.normalize(self.head(pool_cls(encoded)), dim=-1)}


class States(Answer):
    """Final states and what the heads of masked modelling make of them.

    `image_states` (B, N, D) and `image_logits` (B, P, C) over the visual codes of the patches; `text_states` (B, L, D)
    and `text_logits` (B, L, V), zero at padding.
    """

    def __init__(self, image: nn.Module | None, text: nn.Module | None) -> None:
        super().__init__()
        self.image, self.text = image, text

    def forward(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """-> states and logits of each modality that there is."""
        found: dict[str, Tensor] = {}
        if self.image is not None:
            states_IND = encoded.image_states_IND
            found |= {"image_states": states_IND, "image_logits": self.image(states_IND[:, 1:])}
        if self.text is not None:
            states_TD = encoded.text_states_TD
            found |= {"text_states": _padded(states_TD, batch), "text_logits": _padded(self.text(states_TD), batch)}
        return found


def _padded(states_TD: Tensor, batch: Batch) -> Tensor:
    """(T, D) -> (B, L, D)."""
    places = batch.num_sequences * batch.longest_text
    place_T = batch.sequence_of_text * batch.longest_text + batch.text_positions_T
    rows = states_TD.new_zeros(places, states_TD.shape[1]).index_copy(0, place_T, states_TD)
    return rows.view(batch.num_sequences, batch.longest_text, states_TD.shape[1])


class Several(Answer):
    """The outputs of several answers."""

    def __init__(self, *answers: Answer) -> None:
        super().__init__()
        self.answers = nn.ModuleList(answers)

    def forward(self, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """-> all of them."""
        return {name: value for answer in self.answers for name, value in answer(encoded, batch).items()}


def answers_of(trained: Trained) -> dict[StreamName, Answer]:
    """The answer for each stream that the model was trained for."""
    objective = trained.objective
    if isinstance(objective, Choosing):
        return {objective.stream: Chosen(objective.head, objective.pooling, objective.num_images)}
    if isinstance(objective, Matching):
        return _of_matching(objective)
    assert isinstance(objective, MaskedModelling), f"no graph is known for {type(objective).__name__}"
    return _of_masked(objective, trained)


def answer_of(trained: Trained, stream: StreamName) -> Answer:
    """The answer for a stream. Raises UsageError where the model was not trained for it."""
    known = answers_of(trained)
    if stream not in known:
        raise UsageError(
            f"{trained.path} was not trained on inputs of the kind '{stream}'; it has graphs for: {', '.join(known)}"
        )
    return known[stream]


def _of_matching(objective: Matching) -> dict[StreamName, Answer]:
    contrast = objective.contrast
    found: dict[StreamName, Answer] = {
        "image": Vectors(contrast.image, "image"),
        "text": Vectors(contrast.text, "text"),
    }
    if objective.config.itm_weight:
        found["pair"] = Chosen(objective.match, objective.config.pool)
    return found


def _of_masked(objective: MaskedModelling, trained: Trained) -> dict[StreamName, Answer]:
    heads, sizes = objective.heads, trained.recipe.batch.size
    states: dict[StreamName, Answer] = {
        "image": States(heads.image, None),
        "text": States(None, heads.text),
        "pair": States(heads.image, heads.text),
    }
    found = {stream: states[stream] for stream in objective.masked if sizes.of(stream)}
    if objective.contrast is not None:
        heads_of: dict[str, tuple[StreamName, nn.Module]] = {
            "vision": ("image", objective.contrast.image),
            "text": ("text", objective.contrast.text),
        }
        for stream, head in (heads_of[modality] for modality in trained.recipe.model.modalities):
            vectors = Vectors(head, stream)
            found[stream] = Several(found[stream], vectors) if stream in found else vectors
    return found
