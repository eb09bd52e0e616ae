"""Samples with special tokens, and what each of their tokens is and where it went, counted by plain loops."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.model.support import VOCAB, config_of, randomise
from vlmoe_core.analysis.routing.tables import Tables
from vlmoe_core.analysis.routing.tokens import SpecialIds
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.collate import collate
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Sample
from vlmoe_core.model.block import Block
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.moe.plan import RoutingPlan

PAD, CLS, SEP, MASK, FIRST_WORD = 0, 1, 2, 3, 4
SPECIAL = SpecialIds(sep=SEP, pad=PAD)
CLASSES = 3
BINS = 20
KINDS = {
    "vision": ["[CLS]", "patch", "masked patch"],
    "text": ["[CLS]", "word", "masked word", "[SEP]", "[PAD]"],
}


class Token(NamedTuple):
    """One token, as its sample tells."""

    modality: str
    kind: str
    place: int
    sequence: int
    word: int
    label: int


def make_samples(
    stream: StreamName, lengths: Sequence[int], config: ModelConfig, seed: int = 0, pictures: int = 1
) -> list[Sample]:
    """Random examples with masks, special tokens and classes, one for each text length."""
    rng = np.random.default_rng(seed)
    return [_sample(stream, number, length, config, rng, pictures) for number, length in enumerate(lengths)]


def _sample(
    stream: StreamName, number: int, length: int, config: ModelConfig, rng: np.random.Generator, pictures: int
) -> Sample:
    pixels, mask, ids, targets = [], None, None, None
    if stream != "text":
        shape = (3, config.image_size, config.image_size)
        pixels = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(pictures)]
        mask = rng.random(config.num_patches) < 0.4
    if stream != "image":
        ids, targets = _text(length, rng)
    label = np.array(number % CLASSES)
    return Sample(
        f"{stream}:{number}",
        number,
        number,
        pixels[0] if pixels else None,
        mask,
        ids,
        targets,
        more_pixels=tuple(pixels[1:]),
        target=label,
    )


def _text(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[CLS], words, [SEP] and one [PAD]; some words are to be predicted, most of these under [MASK]."""
    words = rng.integers(FIRST_WORD, VOCAB, length - 3)
    hidden, seen = rng.random(length - 3) < 0.3, rng.random(length - 3) < 0.2
    ids = np.array([CLS, *np.where(hidden & ~seen, MASK, words), SEP, PAD])
    return ids, np.array([-1, *np.where(hidden, words, -1), -1, -1])


def batch_of(stream: StreamName, samples: Sequence[Sample], config: ModelConfig) -> Batch:
    """The batch of samples."""
    return collate(stream, samples, config.image_size, config.num_patches)


def tokens_of(samples: Sequence[Sample]) -> list[Token]:
    """The tokens of a batch in the encoder's order: all images, then all texts."""
    images: list[Token] = []
    texts: list[Token] = []
    sequence = 0
    for sample in samples:
        label = -1 if sample.target is None else int(sample.target)
        for _ in range(1 + len(sample.more_pixels)):
            images += _image_tokens(sample, sequence, label)
            texts += _text_tokens(sample, sequence, label)
            sequence += 1
    return images + texts


def _image_tokens(sample: Sample, sequence: int, label: int) -> Iterator[Token]:
    if sample.patch_mask is not None:
        yield Token("vision", "[CLS]", 0, sequence, -1, label)
        for place, hidden in enumerate(sample.patch_mask.tolist(), start=1):
            yield Token("vision", "masked patch" if hidden else "patch", place, sequence, -1, label)


def _text_tokens(sample: Sample, sequence: int, label: int) -> Iterator[Token]:
    if sample.text_ids is None or sample.text_targets is None:
        return
    names = {PAD: "[PAD]", CLS: "[CLS]", SEP: "[SEP]"}
    for place, (word, target) in enumerate(zip(sample.text_ids.tolist(), sample.text_targets.tolist(), strict=True)):
        kind = "masked word" if target >= 0 else names.get(word, "word")
        yield Token("text", kind, place, sequence, word if kind == "word" else -1, label)


class Heard(NamedTuple):
    """A plan that left a router."""

    layer: int
    pool: str
    plan: RoutingPlan


@contextmanager
def routers_heard(model: nn.Module) -> Iterator[list[Heard]]:
    """The plans of all routers, in the order of their calls, by hooks on the routers themselves."""
    heard: list[Heard] = []
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".router"):
            layer, pool = int(name.split("blocks.")[1].split(".")[0]), name.split(".")[-2]
            handles.append(module.register_forward_hook(_hook(heard, layer, pool)))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _hook(heard: list[Heard], layer: int, pool: str) -> Any:
    def hook(_: nn.Module, __: Any, plan: RoutingPlan) -> None:
        heard.append(Heard(layer, pool, plan))

    return hook


@dataclass
class Expected:
    """The tables of one cell as nested lists, counted token by token."""

    wanted_KE: list[list[int]]
    got_KE: list[list[int]]
    gate_E: list[float]
    entropy_B: list[int]
    confidence_B: list[int]
    moments: list[float]
    place_PE: list[list[int]]
    dropped_P: list[int]
    kind_JE: list[list[int]]
    dropped_J: list[int]
    dropped_share_B: list[int]
    together_EE: list[list[int]]
    word_VE: list[list[int]]
    class_CE: list[list[int]]

    @classmethod
    def like(cls, tables: Tables) -> "Expected":
        """All zero, of the same shapes."""
        return cls(**{f.name: torch.zeros_like(getattr(tables, f.name)).tolist() for f in fields(cls)})

    def add(self, tokens: Sequence[Token], rows: Sequence[int], plan: RoutingPlan) -> None:
        """The tokens of one modality and forward pass, with their rows of the plan."""
        choices, kept, gates = (t.tolist() for t in (plan.expert_TK, plan.kept_TK, plan.probs_TE))
        sequences: dict[int, list[bool]] = {}
        for token, row in zip(tokens, rows, strict=True):
            self._add_choices(token, choices[row], kept[row])
            self._add_gates(gates[row])
            sequences.setdefault(token.sequence, []).extend(not k for k in kept[row])
        for drops in sequences.values():
            self.dropped_share_B[min(BINS - 1, BINS * sum(drops) // len(drops))] += 1

    def _add_choices(self, token: Token, experts: list[int], kept: list[bool]) -> None:
        kind = KINDS[token.modality].index(token.kind)
        for rank, (expert, stays) in enumerate(zip(experts, kept, strict=True)):
            self.wanted_KE[rank][expert] += 1
            self.got_KE[rank][expert] += stays
            self.dropped_P[token.place] += not stays
            self.dropped_J[kind] += not stays
            for other in experts:
                self.together_EE[expert][other] += 1
        self.place_PE[token.place][experts[0]] += 1
        self.kind_JE[kind][experts[0]] += 1
        if token.word >= 0:
            self.word_VE[token.word][experts[0]] += 1
        if token.label >= 0 and self.class_CE:
            self.class_CE[token.label][experts[0]] += 1

    def _add_gates(self, gates: list[float]) -> None:
        entropy, best = -sum(g * math.log(g) for g in gates if g > 0), max(gates)
        share = entropy / math.log(len(gates)) if len(gates) > 1 else 0.0
        self.gate_E = [s + g for s, g in zip(self.gate_E, gates, strict=True)]
        self.entropy_B[min(BINS - 1, int(share * BINS))] += 1
        self.confidence_B[min(BINS - 1, int(best * BINS))] += 1
        self.moments = [s + v for s, v in zip(self.moments, (entropy, entropy**2, best, best**2), strict=True)]


def assert_same(tables: Tables, expected: Expected) -> None:
    """Counts are equal; sums of float64 are, but for the order in which they were added."""
    for field in fields(expected):
        found, wanted = getattr(tables, field.name), getattr(expected, field.name)
        if field.name in ("gate_E", "moments"):
            torch.testing.assert_close(
                found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-11, atol=1e-11, msg=field.name
            )
        else:
            assert found.tolist() == wanted, field.name


def sparse_encoder(
    dtype: torch.dtype = torch.float64, recompute: bool = False, vocab: int = VOCAB, **values: Any
) -> Encoder:
    """A small encoder in evaluation mode, all of its parameters random."""
    torch.manual_seed(0)
    encoder = Encoder(config_of(**values), vocab, recompute)
    randomise(encoder)
    return encoder.to(dtype).eval()


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """Memory of tensors."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


def planted(what: str, experts: int = 3) -> Encoder:
    """One block, attention silent: the first channels of a token name its expert, and they hold its word, its place or
    its colour."""
    moe = {"num_experts": experts, "layers": [0]}
    encoder = sparse_encoder(layers=1, vl_layers=0, moe={"vision": moe, "text": moe})
    image, text, block = encoder.embeddings.image, encoder.embeddings.text, cast(Block, encoder.blocks[0])
    with torch.no_grad():
        for parameter in (*encoder.embeddings.parameters(), *block.attention.parameters()):
            parameter.zero_()
        block.norm2.load_state_dict({"weight": torch.ones(encoder.config.dim), "bias": torch.zeros(encoder.config.dim)})
        for name in ("vision", "text"):
            nn.init.eye_(block.get_parameter(f"ffn.{name}.router.weight")).mul_(50)
        if what == "word":
            text.word.weight.copy_(_one_hot(text.word.weight, experts))
        if what == "place":
            for position in (image.position, text.position):
                position.copy_(_one_hot(position, experts))
        if what == "colour":
            image.patch.proj.weight.view(-1, 3, encoder.config.patch_size**2)[:3] = torch.eye(3)[:, :, None]
    return encoder


def _one_hot(rows: torch.Tensor, experts: int) -> torch.Tensor:
    """Row r is one in channel r mod E."""
    return F.one_hot(torch.arange(rows.shape[0]) % experts, rows.shape[1]).to(rows.dtype)


def plain_patches(colour_XP: np.ndarray, config: ModelConfig) -> list[Sample]:
    """Pictures of plain patches, red, green or blue; the class is the colour of the last patch; nothing is hidden."""
    samples = []
    for number, colour_P in enumerate(colour_XP):
        grid_GGC = 255 * np.eye(3, dtype=np.uint8)[colour_P.reshape(config.grid, config.grid)]
        pixels = grid_GGC.transpose(2, 0, 1).repeat(config.patch_size, 1).repeat(config.patch_size, 2)
        mask = np.zeros(config.num_patches, np.bool_)
        samples.append(Sample(f"plain:{number}", number, number, pixels, mask, target=colour_P[-1]))
    return samples
