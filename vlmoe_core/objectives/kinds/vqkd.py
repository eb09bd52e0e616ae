"""Training of a visual tokenizer: what a teacher says of each patch, told from one code a patch (VQ-KD, BEiT v2,
arXiv 2208.06366, section 2.2).

Axis letters: I images, P patches, N patches of all images, D width, F width of a code, K codes, O teacher's features.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import TokenizerError
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.objectives.config import Hidden, ObjectiveConfig
from vlmoe_core.objectives.loss import Loss, Part
from vlmoe_core.tokenizers.config import TeacherConfig, TokenizersConfig
from vlmoe_core.tokenizers.teachers.open import open_teacher
from vlmoe_core.tokenizers.teachers.pixels import PixelTeacher
from vlmoe_core.tokenizers.visual import VisualTokenizer
from vlmoe_core.tokenizers.vqkd import (
    NO_WORDS,
    VQKD,
    CodeHead,
    FeatureDecoder,
    VQKDShape,
    check_shape,
    images_alone,
    patches_of,
)

SHARES = "codes.quantiser.shares_K"
PATCHES_A_CODE = 16
"""Patches from which k-means finds the first codes, for each code."""


class Config(ObjectiveConfig):
    """A visual tokenizer; `model` is its encoder (`modality: vision`), and images are all that it reads."""

    name: Literal["vqkd"] = "vqkd"
    """Vector-quantised knowledge distillation."""
    code_dim: int = Field(32, ge=1)
    """Width of a code."""
    decoder_layers: int = Field(3, ge=1)
    """Blocks between the codes and the teacher's features."""
    teacher: TeacherConfig = TeacherConfig()
    """Whose features are told."""
    commitment: float = Field(1.0, ge=0)
    """Weight of the distance between a patch and its code."""
    decay: float = Field(0.99, ge=0, lt=1)
    """Share of its old value that a code keeps in a step."""
    revive_below: float = Field(0.03, ge=0, lt=1)
    """A code is dead, and moved beside a busy one, if its patches are fewer than this share of the mean; 0: never."""
    kmeans_iterations: int = Field(10, ge=1)
    """Of the k-means that finds the first codes."""
    quantise_from: int = Field(0, ge=0)
    """Step from which patches pass as their codes, which k-means finds then; before it they pass as they are, so that
    the codes start from a network that knows something (arXiv 2005.08520). 0: from the beginning (BEiT v2)."""

    @property
    def hides(self) -> bool:
        """Nothing is hidden."""
        return False

    @property
    def starts_at(self) -> int:
        """The codes begin at `quantise_from`."""
        return self.quantise_from

    @property
    def streams(self) -> tuple[StreamName, ...]:
        """Images alone."""
        return ("image",)

    def num_head_params(self, model: ModelConfig, tokenizers: TokenizersConfig) -> int:
        """The maps to the codes, and the decoder; codes are no parameters."""
        one, more = (model.model_copy(update={"layers": n}) for n in (1, 1 + self.decoder_layers))
        blocks = more.num_params(NO_WORDS) - one.num_params(NO_WORDS)
        dim, told = model.dim, self.teacher.width(model.patch_size)
        to_codes = (dim + 1) * (dim + self.code_dim)
        around = (self.code_dim + 1) * dim + (4 + model.num_patches) * dim + (dim + 1) * (dim + told)
        return to_codes + blocks + around

    def head_flops(self, stream: StreamName, model: ModelConfig, tokenizers: TokenizersConfig, hidden: Hidden) -> int:
        """The maps to the codes and the decoder; the distances to the codes, which have no gradient, are left out."""
        one, more = (model.model_copy(update={"layers": n}) for n in (1, 1 + self.decoder_layers))
        blocks = more.flops(1 + model.num_patches, 0) - one.flops(1 + model.num_patches, 0)
        dim, told = model.dim, self.teacher.width(model.patch_size)
        return blocks + model.num_patches * 2 * dim * (dim + self.code_dim + self.code_dim + dim + told)


class VQKDTraining(nn.Module):
    """Encoder, codes and decoder; the loss is 1 - cosine to the teacher's features, and the commitment.

    Codes have no gradient: that of the decoder goes past them to the encoder (straight-through).
    """

    def __init__(self, config: Config, encoder: Encoder, codebook_size: int) -> None:
        super().__init__()
        self.config = config
        self.shape = shape_of(config, encoder.config, codebook_size)
        check_shape(self.shape)
        self.encoder = encoder
        self.codes = CodeHead(self.shape)
        self.decoder = FeatureDecoder(self.shape)
        assert encoder.embeddings.image is not None, "check_shape refuses it"
        encoder.embeddings.image.mask.requires_grad_(False)  # nothing is hidden
        self.teacher = open_teacher(config.teacher, encoder.config)

    def forward(self, batches: Mapping[StreamName, Batch]) -> Loss:
        """The losses of one micro-batch of images; its statistics are what the codes learn from."""
        images = batches["image"]
        batch = images_alone(images.pixels_ICHW, self.encoder.config.num_patches)
        encoded = self.encoder(batch)
        features_NF = self.codes(patches_of(encoded))
        with torch.no_grad():
            ids_N = self.codes.quantiser.nearest(features_NF.detach())
            # Until the codes are started every patch is its own code; a factor, because asking would wait for a GPU.
            step_NF = (self.codes.quantiser.codes_KF[ids_N] - features_NF) * self.codes.quantiser.shares_K.any()
        through_NF = features_NF + step_NF
        told_NO = self.decoder(through_NF, encoded.layout)
        target_IPO = self._target(images.pixels_ICHW)
        distance_N = 1 - F.cosine_similarity(told_NO, target_IPO.flatten(0, 1), dim=-1)
        commitment_N = (features_NF - (features_NF.detach() + step_NF)).square().mean(-1)
        count = images.num_images * self.encoder.config.num_patches
        parts = {
            "teacher": Part(distance_N.sum(), count, 1.0, ("image",)),
            "commitment": Part(commitment_N.sum(), count, self.config.commitment, ("image",)),
        }
        return Loss(parts, statistics=self._statistics(features_NF, ids_N, told_NO, images))

    def counts(self, batches: Mapping[StreamName, Batch]) -> dict[str, int]:
        """The count of both parts: patches."""
        patches = batches["image"].num_images * self.encoder.config.num_patches
        return {"teacher": patches, "commitment": patches}

    @property
    def target_sizes(self) -> dict[str, int]:
        """No part chooses from words or codes."""
        return {}

    def targets(self, batches: Mapping[StreamName, Batch]) -> dict[str, Tensor]:
        """No part has a word or code to predict."""
        return {}

    @property
    def starts_at(self) -> int:
        """Before which 0-based step the codes are started."""
        return self.config.starts_at

    @torch.no_grad()
    def start(self, batches: Iterable[Mapping[StreamName, Batch]]) -> None:
        """The codes are the k-means centroids of the patches of the first images; those of another model are kept.

        Raises TokenizerError if there are fewer patches than codes.
        """
        self.teacher.load()
        if self.codes.quantiser.started:
            return
        wanted, found = PATCHES_A_CODE * self.shape.codebook_size, 0
        features: list[Tensor] = []
        for one in batches:
            pixels_ICHW = one["image"].pixels_ICHW
            batch = images_alone(pixels_ICHW, self.encoder.config.num_patches)
            features.append(self.codes(patches_of(self.encoder(batch))))
            found += len(features[-1])
            if found >= wanted:
                break
        if found < self.shape.codebook_size:
            raise TokenizerError(
                f"{self.shape.codebook_size} codes can't be started from the {found} patches of the first images; "
                "lower tokenizers.visual.codebook_size or give more images"
            )
        self.codes.quantiser.start(torch.cat(features), self.config.kmeans_iterations, seed=0)

    def learn(self, sums: Mapping[str, Tensor], step: int) -> None:
        """Move the codes to their patches, once they are started."""
        if not self.codes.quantiser.started:
            return
        dtype = self.codes.quantiser.codes_KF.dtype
        features, patches = sums["features"].to(dtype), sums["patches"].to(dtype)
        self.codes.quantiser.learn(features, patches, self.config.decay, self.config.revive_below, seed=step)

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of the codes in use, perplexity of the codes; with the teacher `pixels`, error of a pixel in [0, 1].

        Nothing where there was no patch, and before the codes are started.
        """
        patches_K = sums["patches"].cpu().double()
        if not (patches_K.any() and self.codes.quantiser.started):
            return {}
        share = patches_K[patches_K > 0] / patches_K.sum()
        found = {
            "codes/used": len(share) / len(patches_K),
            "codes/perplexity": math.exp(float(-(share * share.log()).sum())),
        }
        if "error" in sums:
            found["codes/pixel_error"] = float(sums["error"][0] / sums["error"][1])
        return found

    @torch.no_grad()
    def _target(self, pixels_ICHW: Tensor) -> Tensor:
        dtype = self.codes.quantiser.codes_KF.dtype
        return self.teacher.features(pixels_ICHW).to(dtype)

    @torch.no_grad()
    def _statistics(self, features_NF: Tensor, ids_N: Tensor, told_NO: Tensor, images: Batch) -> dict[str, Tensor]:
        """Sum of the features and number of the patches of each code; squared error of the pixels."""
        codes_KF = self.codes.quantiser.codes_KF
        found = {
            "features": torch.zeros_like(codes_KF).index_add_(0, ids_N, features_NF.detach()),
            "patches": torch.zeros_like(codes_KF[:, 0], dtype=torch.int64).index_add_(0, ids_N, torch.ones_like(ids_N)),
        }
        if isinstance(self.teacher, PixelTeacher):
            grid = self.encoder.config.grid
            told_IPO = told_NO.detach().view(images.num_images, grid**2, self.teacher.dim)
            drawn = self.teacher.images(told_IPO, (grid, grid))
            error = (drawn - images.pixels_ICHW / 255).square().sum()
            found["error"] = torch.stack([error, torch.full_like(error, drawn.numel())])
        return found


def shape_of(config: Config, model: ModelConfig, codebook_size: int) -> VQKDShape:
    """The sizes of the tokenizer that a recipe trains."""
    return VQKDShape(model, codebook_size, config.code_dim, config.decoder_layers, config.teacher)


def trained_tokenizer(config: Config, model: ModelConfig, codebook_size: int, tensors: Mapping[str, Tensor]) -> VQKD:
    """The tokenizer that a run trained, from the tensors of its checkpoint.

    Raises TokenizerError if they don't fit, or the run has not started its codes yet.
    """
    if (shares_K := tensors.get(SHARES)) is not None and not shares_K.any():
        raise TokenizerError(
            f"the run has no codes yet: they start at step {config.quantise_from} (objective.quantise_from); go on "
            "with it first"
        )
    return VQKD(shape_of(config, model, codebook_size), tensors)


def build(
    config: Config, encoder: Encoder, vocab_size: int, codebook_size: int, visual: VisualTokenizer | None
) -> VQKDTraining:
    """The objective; words and a visual tokenizer have no part in it."""
    return VQKDTraining(config, encoder, codebook_size)
