"""The visual tokenizer `vqkd`: a patch's token is the nearest code of its encoded state (BEiT v2, arXiv 2208.06366).

A transformer encodes the image, a small head maps every patch to a unit vector, and the nearest code of a learned
codebook is its token. A second, shorter transformer turns the codes back into what a teacher says of the patches; only
training needs it, and drawing what a code stands for where the teacher is the pixels themselves.

Axis letters: I or B images, P or N patches, T tokens, D width, F width of a code, K codes, O features of the teacher,
C channels, H height, W width in pixels.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.data.batch import Batch
from vlmoe_core.errors import TokenizerError
from vlmoe_core.model.block import Block
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.model.encoder import Encoded, Encoder, initialise_maps, scale_outputs
from vlmoe_core.model.layout import Layout
from vlmoe_core.tokenizers.config import TeacherConfig
from vlmoe_core.tokenizers.frozen import without_parameters
from vlmoe_core.tokenizers.quantiser import Quantiser
from vlmoe_core.tokenizers.teachers.pixels import PIXELS, PixelTeacher
from vlmoe_core.tokenizers.visual import VisualTokenizer, unit_range

NO_WORDS = 1
"""Rows of the word embedding that a model for images alone does not have."""


@dataclass(frozen=True)
class VQKDShape:
    """Everything that decides on the tensors of a tokenizer."""

    model: ModelConfig
    """The encoder: `modality: vision`, dense, absolute positions."""
    codebook_size: int
    """K."""
    code_dim: int
    """F."""
    decoder_layers: int
    """Blocks of the decoder, which are as wide as the encoder's."""
    teacher: TeacherConfig
    """Whose features the decoder predicts."""

    @property
    def decoder(self) -> ModelConfig:
        """The decoder's blocks."""
        return self.model.model_copy(update={"layers": self.decoder_layers, "drop_path": 0.0})


class CodeHead(nn.Module):
    """From the encoder's patches to unit vectors, and their codes."""

    def __init__(self, shape: VQKDShape) -> None:
        super().__init__()
        self.project = _two_maps(shape.model.dim, shape.code_dim)
        self.quantiser = Quantiser(shape.codebook_size, shape.code_dim)
        initialise_maps(self, shape.model.init_std)

    def forward(self, patches_ND: Tensor) -> Tensor:
        """(N, D) -> unit vectors (N, F), in float32 whatever autocast says (float64 for a float64 model)."""
        with torch.autocast(patches_ND.device.type, enabled=False):
            features_NF: Tensor = self.project(patches_ND.to(self.quantiser.codes_KF.dtype))
            return F.normalize(features_NF, dim=-1)


class FeatureDecoder(nn.Module):
    """From codes to the teacher's features of the patches."""

    def __init__(self, shape: VQKDShape) -> None:
        super().__init__()
        config = shape.decoder
        self.embed = nn.Linear(shape.code_dim, config.dim)
        self.cls = nn.Parameter(torch.zeros(config.dim))
        self.position = nn.Parameter(torch.zeros(1 + config.num_patches, config.dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.project = _two_maps(config.dim, shape.teacher.width(config.patch_size))
        initialise_maps(self, config.init_std)
        for parameter in (self.cls, self.position):
            nn.init.trunc_normal_(parameter, std=config.init_std)
        scale_outputs(self.blocks, config.sub_norm)

    def forward(self, codes_NF: Tensor, layout: Layout) -> Tensor:
        """(I x P, F) codes of all patches -> (I x P, O); `layout` is that of the images."""
        codes_IPD = self.embed(codes_NF).view(-1, layout.image_length - 1, self.position.shape[1])
        cls_I1D = self.cls.to(codes_IPD.dtype).expand(codes_IPD.shape[0], 1, -1)
        x_TD = (torch.cat([cls_I1D, codes_IPD], dim=1) + self.position).flatten(0, 1)
        for block in self.blocks:
            x_TD, _ = block(x_TD, layout)
        patches_ND = self.norm(x_TD).view(-1, layout.image_length, x_TD.shape[1])[:, 1:].flatten(0, 1)
        with torch.autocast(patches_ND.device.type, enabled=False):
            features_NO: Tensor = self.project(patches_ND.to(self.position.dtype))
        return features_NO


def _two_maps(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, inputs), nn.Tanh(), nn.Linear(inputs, outputs))


def patches_of(encoded: Encoded) -> Tensor:
    """(I x P, D) final states of the patches, without [CLS]."""
    return encoded.image_states_IND[:, 1:].flatten(0, 1)


class VQKD(VisualTokenizer):
    """A trained tokenizer; frozen.

    Args:
        shape: sizes.
        tensors: by the names `encoder.*`, `codes.*`, `decoder.*`; others are not looked at.

    Raises TokenizerError if a tensor is missing or of another shape.
    """

    kind = "vqkd"

    def __init__(self, shape: VQKDShape, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_shape(shape)
        self.shape, self.patch_size, self.codebook_size = shape, shape.model.patch_size, shape.codebook_size
        with torch.device("meta"):  # what is loaded needs no initialisation
            self.encoder = Encoder(shape.model, NO_WORDS)
            self.codes = CodeHead(shape)
            self.decoder = FeatureDecoder(shape)
        state = self.state_dict()
        _check_tensors(state, tensors)
        self.load_state_dict({name: tensors[name].detach().clone() for name in state}, assign=True)
        self.fingerprint = _fingerprint(shape, self.state_dict())
        without_parameters(self)
        self.train(False)

    def misfit(self, image_size: int, patch_size: int) -> str | None:
        """Why it gives no token to each patch of such images; null: it does.

        Images of another size are resized, so that only the number of patches counts.
        """
        own, grid = self.shape.model.grid, image_size // patch_size
        if own == grid:
            return None
        return (
            f"the visual tokenizer has a grid of {own} x {own} patches, the model one of {grid} x {grid}; set "
            f"model.image_size to {own * patch_size}, or take a tokenizer that was trained with that grid"
        )

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Ids (B, N), int64, of RGB images: uint8, or float in [0, 1].

        Images of another size are resized (bicubic). Computes in the precision that autocast says.
        Raises TokenizerError for pixels of another type.
        """
        features_NF = self.codes(patches_of(self.encoder(self._batch(images_BCHW))))
        return self.codes.quantiser.nearest(features_NF).view(-1, self.shape.model.num_patches)

    @torch.no_grad()
    def features(self, ids_BN: Tensor) -> Tensor:
        """(B, N, O) what the decoder makes of codes: the teacher's features, up to their length."""
        self._check_ids(ids_BN)
        batch = self._batch(torch.zeros(len(ids_BN), 3, *2 * (self.shape.model.image_size,), device=ids_BN.device))
        layout = self.encoder.layout(batch)
        codes_NF = self.codes.quantiser.codes_KF[ids_BN.flatten()]
        features_NO: Tensor = self.decoder(codes_NF, layout)
        return features_NO.view(*ids_BN.shape, -1)

    @property
    def draws(self) -> bool:
        """Whether its codes stand for pixels: only where the teacher is the pixels."""
        return self.shape.teacher.model == PIXELS

    def decode(self, ids_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images (B, 3, H, W), float in [0, 1], that show the codes, each in sight of the others.

        Raises TokenizerError for ids outside the codebook, another grid, and where the teacher is a model, whose
        features are no picture.
        """
        own = self.shape.model.grid
        if not self.draws:
            raise TokenizerError(
                f"the codes of this visual tokenizer stand for features of {self.shape.teacher.model}, which are no "
                "picture; only a tokenizer with the teacher 'pixels' can draw"
            )
        if (grid or (own, own)) != (own, own):
            raise TokenizerError(f"this visual tokenizer knows a grid of {own} x {own} patches, not {grid}")
        return PixelTeacher(self.patch_size).images(self.features(ids_BN), (own, own))

    def facts(self) -> dict[str, Any]:
        """Its shape."""
        return {
            "code_dim": self.shape.code_dim,
            "decoder_layers": self.shape.decoder_layers,
            "teacher": self.shape.teacher.model_dump(),
            "model": self.shape.model.model_dump(mode="json"),
        }

    def _batch(self, images_BCHW: Tensor) -> Batch:
        size = self.shape.model.image_size
        if images_BCHW.dtype != torch.uint8:
            images_BCHW = unit_range(images_BCHW) * 255
        if images_BCHW.shape[2:] != (size, size):
            resized = F.interpolate(images_BCHW.float(), size=(size, size), mode="bicubic", antialias=True)
            images_BCHW = resized.clamp(0, 255)
        return images_alone(images_BCHW, self.shape.model.num_patches)

    def _check_ids(self, ids_BN: Tensor) -> None:
        low, high = (int(ids_BN.min()), int(ids_BN.max())) if ids_BN.numel() else (0, 0)
        if low < 0 or high >= self.codebook_size:
            raise TokenizerError(f"ids {low} to {high} are not all codes; these are 0 to {self.codebook_size - 1}")
        if ids_BN.shape[1] != self.shape.model.num_patches:
            raise TokenizerError(
                f"{ids_BN.shape[1]} patches don't fill this visual tokenizer's grid of {self.shape.model.num_patches}"
            )


def load(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> VQKD:
    """The tokenizer that was saved. Raises KeyError, TypeError or ValueError where the two do not fit."""
    shape = VQKDShape(
        model=ModelConfig.model_validate(config["model"]),
        codebook_size=int(config["codebook_size"]),
        code_dim=int(config["code_dim"]),
        decoder_layers=int(config["decoder_layers"]),
        teacher=TeacherConfig.model_validate(config["teacher"]),
    )
    return VQKD(shape, tensors)


def check_shape(shape: VQKDShape) -> None:
    """Raises TokenizerError for an encoder that is not one of images alone, dense, with absolute positions."""
    model = shape.model
    wanted = {"modality": ("vision", model.modality), "positions": ("absolute", model.positions)}
    for name, (want, found) in wanted.items():
        if found != want:
            raise TokenizerError(f"a vqkd tokenizer needs model.{name}: {want}, not {found}")
    if model.pools:
        raise TokenizerError(f"a vqkd tokenizer has no experts; leave out model.moe.{next(iter(model.pools))}")


def images_alone(pixels_ICHW: Tensor, num_patches: int) -> Batch:
    """A batch of images of which nothing is hidden; pixels from 0 to 255."""
    images, device = len(pixels_ICHW), pixels_ICHW.device
    number_I, none = torch.arange(images, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return Batch(
        fused=False,
        pixels_ICHW=pixels_ICHW,
        patch_mask_IP=torch.zeros(images, num_patches, dtype=torch.bool, device=device),
        image_ids=number_I,
        sequence_of_image=number_I,
        text_ids_T=none,
        text_targets_T=none,
        text_positions_T=none,
        sequence_of_text=none,
        example_of_sequence=number_I,
        positions=number_I,
        longest_text=0,
        num_masked_patches=0,
        num_masked_words=0,
    )


def _check_tensors(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise TokenizerError(f"tensors of the visual tokenizer are missing: {len(missing)}, the first: {missing[0]}")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise TokenizerError(
                f"{name} of the visual tokenizer is {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
            )


def _fingerprint(shape: VQKDShape, tensors: Mapping[str, Tensor]) -> str:
    said = shape.model.model_dump(mode="json", exclude_defaults=True)  # fields that are added later change nothing
    model = {name: value for name, value in said.items() if name != "drop_path"}
    digest = hashlib.sha256(f"vqkd {json.dumps(model, sort_keys=True)}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
