"""Pictures and texts made ready for an exported model, as the package prepares held-out data. Needs Pillow only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ImageProcessingMixin, ProcessorMixin

from vlmoe_core.data.decoding import whole_picture
from vlmoe_core.data.joining import joined

Picture = Image.Image | NDArray[np.uint8] | bytes | str | Path
"""A picture, its pixels (H, W, 3) or (H, W), an encoded picture, or the path of a file that holds one."""
Pictures = Picture | Sequence[Picture] | Sequence[Sequence[Picture]]


class VLMoEImageProcessor(ImageProcessingMixin):
    """The whole of a picture, upright, in RGB, its sides made equal.

    Args:
        size: pixels along a side.
        max_pixels: a file that declares more is refused.
        **kwargs: what every image processor of transformers has.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, size: int = 224, max_pixels: int = 178_956_970, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.max_pixels = size, max_pixels

    def __call__(self, images: Pictures, **kwargs: Any) -> BatchFeature:
        """`pixel_values`: uint8 (I, 3, size, size), or (X, n, 3, size, size) for n pictures of each example."""
        return BatchFeature({"pixel_values": self._pixels(images if isinstance(images, list | tuple) else [images])})

    def _pixels(self, pictures: Sequence[Any]) -> Tensor:
        """(I, 3, size, size), or so of each list in a list."""
        if isinstance(pictures[0], list | tuple):
            return torch.stack([self._pixels(own) for own in pictures])
        return torch.from_numpy(np.stack([self._one(picture) for picture in pictures]))

    def _one(self, picture: Picture) -> NDArray[np.uint8]:
        if isinstance(picture, str | Path):
            picture = Path(picture).read_bytes()
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        return whole_picture(picture, self.size, self.max_pixels)


class VLMoEProcessor(ProcessorMixin):
    """Pictures, texts and pairs of texts.

    Args:
        image_processor: for pictures.
        tokenizer: for texts.
        max_text: tokens of a text alone (`text`) and of a text with a picture (`pair`), [CLS] and [SEP] included; what
            is longer is cut.
        pad_text_to: length up to which [PAD] tokens are appended that count as tokens; null: none.
        **kwargs: what every processor of transformers has.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_text: dict[str, int] | None = None,
        pad_text_to: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        self.max_text = max_text or {"text": 128, "pair": 64}
        self.pad_text_to = pad_text_to

    def __call__(
        self,
        images: Pictures | None = None,
        text: str | Sequence[str] | None = None,
        text_pair: str | Sequence[str] | None = None,
        masked: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """`pixel_values` of pictures; `input_ids`, `attention_mask` and `token_type_ids` of texts, as tensors.

        Args:
            images: pictures, or a list of them for each text; null: none.
            text: one text or several; null: none.
            text_pair: the second sentence of each text; null: none.
            masked: whether "[MASK]" in a text is the mask token; else it is a word like others.
            **kwargs: not used; other processors have more.
        """
        features: dict[str, Tensor] = {}
        if text is not None:
            firsts = [text] if isinstance(text, str) else list(text)
            seconds: list[Any] = [text_pair] if isinstance(text_pair, str) else list(text_pair or ())
            seconds = seconds or [None] * len(firsts)
            room = self.max_text["text" if images is None else "pair"] - 2
            features |= self._padded([self._ids(a, b, room, masked) for a, b in zip(firsts, seconds, strict=True)])
        if images is not None:
            features |= self.image_processor(images)
        return BatchFeature(features)

    @property
    def model_input_names(self) -> list[str]:
        """What a model reads."""
        return ["input_ids", "attention_mask", "token_type_ids", "pixel_values"]

    def _ids(self, first: str, second: str | None, room: int, masked: bool) -> tuple[list[int], int]:
        """Token ids with [CLS] and [SEP], and where the second text begins; the length where there is none."""
        tokenizer = self.tokenizer
        words, second_at = self._words(first, masked)[:room], None
        if second is not None:
            whole = self._words(first, masked), self._words(second, masked)
            words, second_at = joined(*whole, room, tokenizer.sep_token_id)
        ids = [tokenizer.cls_token_id, *words, tokenizer.sep_token_id]
        ids += [tokenizer.pad_token_id] * ((self.pad_text_to or 0) - len(ids))
        return ids, len(ids) if second_at is None else second_at

    def _words(self, text: str, masked: bool) -> list[int]:
        """Token ids without special tokens."""
        first, *others = text.split("[MASK]") if masked else [text]
        ids = self._encode(first)
        for part in others:
            ids = [*ids, self.tokenizer.mask_token_id, *self._encode(part)]
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, truncation=False, verbose=False
        )["input_ids"]
        return ids

    def _padded(self, texts: list[tuple[list[int], int]]) -> dict[str, Tensor]:
        """(S, L), filled up behind each text."""
        longest = max(len(ids) for ids, _ in texts)
        place_L = torch.arange(longest)
        pad = self.tokenizer.pad_token_id
        ids_SL = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids, _ in texts])
        mask_SL = torch.stack([place_L < len(ids) for ids, _ in texts])
        second_SL = torch.stack([place_L >= at for _, at in texts]) & mask_SL
        return {"input_ids": ids_SL, "attention_mask": mask_SL.long(), "token_type_ids": second_SL.long()}
