"""Which words and patches are hidden."""

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import TextEncoder
from vlmoe_core.objectives.config import MaskConfig

ATTEMPTS = 10


def num_masked(length: int, rate: float) -> int:
    """Tokens to hide of `length` ordinary ones: round(rate x length), at least one, and not all where there are two."""
    return 0 if length == 0 else max(1, min(round(length * rate), length - 1))


def block_mask(grid: int, count: int, min_block: int, min_aspect: float, rng: random.Random) -> NDArray[np.bool_]:
    """A mask of exactly `count` patches made of rectangles (BEiT, arXiv 2106.08254, algorithm 1, and its code).

    Args:
        grid: patches along an image's side.
        count: patches to hide.
        min_block: lower bound of the area from which a rectangle is drawn, in patches.
        min_aspect: flattest rectangle, height over width.
        rng: where it draws from.

    Returns:
        (grid * grid,) bool, True where hidden.
    """
    mask = np.zeros((grid, grid), dtype=np.bool_)
    while (missing := count - int(mask.sum())) > 0:
        if not _add_block(mask, missing, min_block, min_aspect, rng):
            break
    flat = mask.reshape(-1)
    _hide_singles(flat, count, rng)
    return flat


def _add_block(mask: NDArray[np.bool_], missing: int, min_block: int, min_aspect: float, rng: random.Random) -> bool:
    """Hide one more rectangle with at least one new patch and at most `missing`; False if ten draws give none."""
    grid = len(mask)
    for _ in range(ATTEMPTS):
        area = rng.uniform(min_block, missing)
        aspect = math.exp(rng.uniform(math.log(min_aspect), -math.log(min_aspect)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = rng.randint(0, grid - height), rng.randint(0, grid - width)
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - int(block.sum()) <= missing:
            block[:] = True
            return True
    return False


def _hide_singles(flat: NDArray[np.bool_], count: int, rng: random.Random) -> None:
    """Hide single patches until the count is exact."""
    free = np.flatnonzero(~flat).tolist()
    flat[rng.sample(free, count - int(flat.sum()))] = True


@dataclass(frozen=True)
class Masking:
    """Hides words and patches at the rates of masked data modelling (BEiT-3, arXiv 2208.10442, section 2.2)."""

    config: MaskConfig
    """Rates and shapes."""
    grid: int
    """Patches along an image's side."""
    vocab_size: int
    """Ids from which random words are drawn: the tokenizer's, not the embedding's rows."""
    mask_id: int
    """Id of [MASK]."""
    special_ids: frozenset[int]
    """Ids that are never hidden and never drawn."""

    @classmethod
    def of(cls, config: MaskConfig, grid: int, encoder: TextEncoder) -> "Masking":
        """For a tokenizer."""
        special = {encoder.pad_id, encoder.unk_id, encoder.cls_id, encoder.sep_id, encoder.mask_id}
        return cls(config, grid, encoder.vocab_size, encoder.mask_id, frozenset(special))

    def text(self, ids: list[int], stream: StreamName, rng: random.Random) -> tuple[list[int], list[int]]:
        """Hide words: most become [MASK], some a random word, some stay (BERT, arXiv 1810.04805, section 3.1).

        Returns:
            (corrupted ids, targets): the targets hold the original id where it must be predicted, -1 elsewhere.
        """
        rate = self.config.pair_text if stream == "pair" else self.config.text
        ordinary = [i for i, token in enumerate(ids) if token not in self.special_ids]
        chosen = rng.sample(ordinary, num_masked(len(ordinary), rate))
        corrupted, targets = list(ids), [-1] * len(ids)
        for i in chosen:
            targets[i] = ids[i]
            corrupted[i] = self._replacement(ids[i], rng)
        return corrupted, targets

    def _replacement(self, token: int, rng: random.Random) -> int:
        draw = rng.random()
        if draw < self.config.mask_token:
            return self.mask_id
        if draw >= self.config.mask_token + self.config.random_token:
            return token
        while (word := rng.randrange(self.vocab_size)) in self.special_ids:
            pass
        return word

    def image(self, stream: StreamName, rng: random.Random) -> NDArray[np.bool_]:
        """Hide patches block-wise. Returns (grid * grid,) bool."""
        patches = self.grid**2
        rate = self.config.pair_image if stream == "pair" else self.config.image
        count = self.config.image_count or round(rate * patches)
        min_block = self.config.min_block or max(1, round(16 * patches / 196))
        return block_mask(self.grid, count, min_block, self.config.min_aspect, rng)
