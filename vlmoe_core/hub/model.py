"""A model as it is published: `VLMoE.from_pretrained`, of a folder or of the Hub."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin
from PIL.Image import Image
from torch import nn

from vlmoe_core.checkpoint.layout import RECIPE
from vlmoe_core.checkpoint.locate import resolve
from vlmoe_core.checkpoint.read import read_checkpoint
from vlmoe_core.checkpoint.restore import load_model_state
from vlmoe_core.data.batch import Batch
from vlmoe_core.data.collate import collate
from vlmoe_core.data.config import DataConfig, StreamName
from vlmoe_core.data.example import Example
from vlmoe_core.data.prepare import NothingHidden, build_preparer
from vlmoe_core.errors import UsageError
from vlmoe_core.hf import HUB_PREFIX, Address, is_hub
from vlmoe_core.hub.card.build import write_card
from vlmoe_core.hub.export.native import NativeOptions, write_native
from vlmoe_core.hub.opened import build_model
from vlmoe_core.hub.push import MESSAGE, PushRequest, push
from vlmoe_core.model.encoder import Encoded, Encoder
from vlmoe_core.recipe.config import ModelRecipe, Recipe
from vlmoe_core.recipe.load import load_model_recipe
from vlmoe_core.train.fitting import Tokenizers, read_tokenizers


@dataclass(frozen=True)
class Origin:
    """Where a model comes from."""

    path: Path
    """Its folder."""
    step: int
    """Optimiser steps that it was trained for; 0: imported."""


class VLMoE(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vlmoe",
    paper_url="https://arxiv.org/abs/2303.07226",
    tags=["vision-language", "mixture-of-experts"],
):
    """Encoder, heads, tokenizers and recipe of a model.

    `from_pretrained(FOLDER_OR_REPO, revision=...)` opens a run, a checkpoint, a model folder or a repository of the
    Hub, safetensors alone, a tensor at a time; `save_pretrained(FOLDER)` writes a model folder.

    Args:
        recipe: of its training; of an imported encoder model and tokenizers alone.
        tokenizers: text and visual tokenizer, labels.
        objective: encoder and heads.
        origin: where it comes from.
    """

    def __init__(self, recipe: ModelRecipe, tokenizers: Tokenizers, objective: nn.Module, origin: Origin) -> None:
        super().__init__()
        self.recipe, self.tokenizers, self.origin = recipe, tokenizers, origin
        self.objective = objective

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        encoder: Encoder = self.objective.encoder  # type: ignore[assignment]
        return encoder

    def forward(self, images: Sequence[Image] | None = None, texts: Sequence[str] | None = None) -> Encoded:
        """Final states of pictures alone, of texts alone, or of pairs: the n-th picture with the n-th text."""
        encoded: Encoded = self.encoder(self.prepare(images, texts).to(next(self.parameters()).device))
        return encoded

    def prepare(self, images: Sequence[Image] | None = None, texts: Sequence[str] | None = None) -> Batch:
        """Pictures, texts or pairs as a batch of the encoder, on the CPU.

        Raises:
            UsageError: there is neither, or not as many texts as pictures.
            DataError: a text is empty.
        """
        stream = _stream_of(images, texts)
        count = len(images or texts or ())
        examples = [
            Example(f"{stream} {n}", images[n] if images else None, texts[n] if texts else None) for n in range(count)
        ]
        model, data = self.recipe.model, self._data
        preparer = build_preparer(
            data, model.image_size, self.tokenizers.text, NothingHidden(model.num_patches), training=False
        )
        samples = [preparer(stream, n, example, random.Random(0)) for n, example in enumerate(examples)]
        return collate(stream, samples, model.image_size, model.num_patches)

    @property
    def _data(self) -> DataConfig:
        """How texts are cut: as in training; those of an imported encoder where its positions end."""
        if isinstance(self.recipe, Recipe):
            return self.recipe.data
        longest = self.recipe.model.max_text_length
        return DataConfig.model_validate({"train": {}, "max_text": {"text": longest, "pair": longest}})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        **settings: Any,
    ) -> str:
        """Push the model as `vlmoe push` does: a new repository is private unless `private=False`, the card is its own.

        Returns:
            The page of what was pushed.

        Raises:
            UsageError: other settings are given, or the repository is public and `private` is not False.
            HubError: the Hub refuses or can't be reached.
        """
        _refuse_settings("push_to_hub", settings)
        request = PushRequest(repo_id, private is not False, branch, bool(create_pr), commit_message or MESSAGE)
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model")
            return push(Path(folder) / "model", request).url

    def _save_pretrained(self, save_directory: Path) -> None:
        write_native(self.recipe, self.tokenizers, self.objective, self.origin.step, save_directory, NativeOptions())
        write_card(save_directory, repo=None)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **settings: Any
    ) -> Self:
        """Open a folder or a repository of the Hub, `ORG/NAME` or `hf-hub:ORG/NAME@REVISION`, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a run, a checkpoint, a model folder, or the repository.
            revision: branch, tag or commit of the repository.
            settings: `map_location`, the device.

        Raises:
            UsageError: it is not there, or settings are given that environment variables say (token, cache).
            HubError: the Hub does not give it.
            CheckpointError, TokenizerError: it is damaged, or does not fit together.
        """
        named = str(pretrained_model_name_or_path)
        if is_hub(named):
            address = Address.parse(named)
            named, revision = address.repo, revision or address.revision
        model: Self = super().from_pretrained(named, revision=revision, **settings)
        return model

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        map_location: str = "cpu",
        **settings: Any,
    ) -> Self:
        """Called by `from_pretrained`. Raises UsageError for what its environment variables say (token, cache)."""
        _refuse_settings("from_pretrained", settings)
        return cls.open(_named(model_id, revision)).to(map_location).eval()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a run, a checkpoint, a model folder or `hf-hub:ORG/NAME[@REVISION]`.

        Raises:
            UsageError, HubError: it is not there.
            CheckpointError, TokenizerError: it is damaged, or does not fit together.
        """
        checkpoint = read_checkpoint(resolve(path))
        recipe = load_model_recipe(checkpoint.path / RECIPE)
        tokenizers = read_tokenizers(recipe, checkpoint.tokenizers)
        objective = build_model(recipe, tokenizers)
        load_model_state(objective, checkpoint.model)
        return cls(recipe, tokenizers, objective, Origin(checkpoint.path, checkpoint.state.step))


def _refuse_settings(function: str, settings: Mapping[str, Any]) -> None:
    """Raises UsageError for settings of huggingface_hub that environment variables say here."""
    if given := ", ".join(name for name, value in settings.items() if value):
        raise UsageError(f"{function} takes no {given} here: set HF_TOKEN, HF_HOME or HF_HUB_OFFLINE instead")


def _named(model: str, revision: str | None) -> Path:
    """A folder that is there, else a repository of the Hub."""
    if Path(model).is_dir() or is_hub(model):
        return Path(model)
    return Path(f"{HUB_PREFIX}{model}" + (f"@{revision}" if revision else ""))


def _stream_of(images: Sequence[Image] | None, texts: Sequence[str] | None) -> StreamName:
    if images is None and texts is None:
        raise UsageError("give images, texts, or both")
    if images is not None and texts is not None and len(images) != len(texts):
        raise UsageError(f"{len(images)} images and {len(texts)} texts: a pair is an image with its text")
    if images is None:
        return "text"
    return "image" if texts is None else "pair"
