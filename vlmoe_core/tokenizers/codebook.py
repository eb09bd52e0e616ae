"""The visual tokenizer `codebook`: a patch's token is its nearest of K centroids, found by k-means on the run's images.

A patch is normalised by the statistics of the training patches: their mean is subtracted, it is projected on their
leading principal components, and divided by their standard deviation. Statistics of its own (standardising each patch)
lose its colour and contrast, and whitening makes noise count as much as shape. Measured with 512 codes on photographs
(Flickr8k, 128 px, patch 16), reconstruction in dB PSNR and what a small network knows of a code from the eight
patches around it, in nats below the unigram entropy: this one 18.5 and 3.23, each patch standardised 13.2 and 2.45,
whitened 15.1 and 2.33, colour means beside contrast-normalised texture 18.0 and 2.89. On the built-in scenes (64 px,
patch 8) 22.9 and 4.24, 18.9 and 3.88, 19.4 and 3.91, 22.3 and 4.12.

Axis letters: B images, C channels, H height, W width, N patches, D values of a patch, F features, K codes.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmoe_core.errors import TokenizerError
from vlmoe_core.tokenizers.kmeans import kmeans, nearest_centroid
from vlmoe_core.tokenizers.visual import VisualTokenizer, from_patches, to_patches, unit_range

MOST_FEATURES = 32
MOST_PATCHES = 100_000


@dataclass(frozen=True)
class CodeUse:
    """How the patches that the codebook was fitted on use its codes."""

    patches: int
    """Patches that were read."""
    used: int
    """Codes with at least one patch."""
    unused: int
    """Codes without any: fewer distinct patches than codes, mostly."""
    perplexity: float
    """exp of the entropy of the codes: the number of equally frequent codes that would be as uncertain."""


class Codebook(VisualTokenizer):
    """Nearest-centroid tokens of patches. Codes are numbered by how often the fitted patches use them, descending."""

    kind = "codebook"
    mean_D: Tensor
    basis_DF: Tensor
    codes_KF: Tensor
    counts_K: Tensor

    def __init__(self, patch_size: int, mean_D: Tensor, basis_DF: Tensor, codes_KF: Tensor, counts_K: Tensor) -> None:
        """`mean_D` in [0, 1] pixels; `basis_DF` orthogonal columns of one length; `counts_K` patches a code."""
        super().__init__()
        self.patch_size = patch_size
        self.codebook_size = len(codes_KF)
        tensors = {"mean_D": mean_D, "basis_DF": basis_DF, "codes_KF": codes_KF, "counts_K": counts_K}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.fingerprint = _fingerprint(patch_size, tensors)

    def misfit(self, image_size: int, patch_size: int) -> str | None:
        """Why it gives no token to each patch of such images; null: it does. Images of any size do."""
        if patch_size == self.patch_size:
            return None
        return (
            f"the visual tokenizer was made for patches of {self.patch_size} pixels, the model's have {patch_size}; "
            "fit one for this model or change model.patch_size"
        )

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Ids (B, N), int64, of RGB images: uint8, or float in [0, 1].

        Raises TokenizerError if the patch size does not divide the image's sides.
        """
        with torch.autocast(images_BCHW.device.type, enabled=False):
            patches_BND = unit_range(to_patches(images_BCHW, self.patch_size))
            features = (patches_BND.flatten(0, 1) - self.mean_D) @ self.basis_DF
            return nearest_centroid(features, self.codes_KF)[0].view(patches_BND.shape[:2])

    @torch.no_grad()
    def decode(self, ids_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images (B, 3, H, W), float in [0, 1], that show each code; `grid` is (rows, columns), square when None.

        A code's patch is its centroid projected back, close to the mean of the patches that it stands for.
        Raises TokenizerError for ids outside the codebook or a grid that does not hold N patches.
        """
        rows, columns = grid or (math.isqrt(ids_BN.shape[1]),) * 2
        if rows * columns != ids_BN.shape[1]:
            raise TokenizerError(
                f"{ids_BN.shape[1]} patches don't fill a grid of {rows} x {columns}; give another grid"
            )
        low, high = (int(ids_BN.min()), int(ids_BN.max())) if ids_BN.numel() else (0, 0)
        if low < 0 or high >= self.codebook_size:
            raise TokenizerError(f"ids {low} to {high} are not all codes; these are 0 to {self.codebook_size - 1}")
        back_FD = self.basis_DF.T / self.basis_DF[:, 0].square().sum()
        patches_KD = (self.codes_KF @ back_FD + self.mean_D).clamp(0, 1)
        return from_patches(patches_KD[ids_BN], self.patch_size, (rows, columns))

    def use(self) -> CodeUse:
        """Code use on the patches of the fit, for the log."""
        counts_K = self.counts_K.double()
        share = counts_K[counts_K > 0] / counts_K.sum()
        perplexity = math.exp(float(-(share * share.log()).sum()))
        return CodeUse(int(counts_K.sum()), len(share), self.codebook_size - len(share), perplexity)

    def facts(self) -> dict[str, Any]:
        """How the patches of the fit used the codes."""
        return {"use": asdict(self.use())}


def load(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Codebook:
    """The codebook that was saved. Raises KeyError, TypeError or ValueError where the two do not fit."""
    return Codebook(int(config["patch_size"]), **tensors)


def fit_codebook(
    images: Iterable[NDArray[np.uint8] | Tensor], patch_size: int, codebook_size: int, iterations: int, seed: int
) -> Codebook:
    """Fit a codebook on RGB images, each uint8 (3, H, W) with sides that `patch_size` divides.

    At most 100,000 patches are used, drawn evenly from all images. The same images in the same order, seed and number
    of threads give the same bits. Raises TokenizerError if the images hold fewer patches than there are codes.
    """
    generator = torch.Generator().manual_seed(seed)
    pool_ND = _sample_patches(images, patch_size, generator)
    if len(pool_ND) < codebook_size:
        raise TokenizerError(
            f"{codebook_size} codes can't be fitted on {len(pool_ND)} patches of {patch_size} x {patch_size} pixels; "
            f"lower codebook_size or give more images"
        )
    patches_ND = unit_range(pool_ND)
    mean_D, basis_DF = _principal_components(patches_ND)
    features_NF = (patches_ND - mean_D) @ basis_DF
    codes_KF = kmeans(features_NF, codebook_size, iterations, generator)
    counts_K = torch.bincount(nearest_centroid(features_NF, codes_KF)[0], minlength=codebook_size)
    order = counts_K.argsort(descending=True, stable=True)
    return Codebook(patch_size, mean_D, basis_DF, codes_KF[order], counts_K[order])


def _sample_patches(
    images: Iterable[NDArray[np.uint8] | Tensor], patch_size: int, generator: torch.Generator
) -> Tensor:
    """At most MOST_PATCHES patches (N, D), uint8, every patch of the images with the same chance, in random order."""
    pool = torch.empty(0, 3 * patch_size**2, dtype=torch.uint8)
    keys = torch.empty(0, dtype=torch.float64)
    waiting: list[Tensor] = []
    for image in images:
        waiting.append(to_patches(torch.as_tensor(image)[None], patch_size)[0])
        if sum(map(len, waiting)) >= MOST_PATCHES:
            pool, keys = _keep_smallest(pool, keys, waiting, generator)
            waiting = []
    return _keep_smallest(pool, keys, waiting, generator)[0]


def _keep_smallest(
    pool_ND: Tensor, keys_N: Tensor, waiting: list[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Give each new patch a random key and keep those with the smallest keys: a uniform sample of a stream."""
    patches = torch.cat([pool_ND, *waiting])
    keys = torch.cat([keys_N, torch.rand(len(patches) - len(keys_N), dtype=torch.float64, generator=generator)])
    kept = keys.argsort(stable=True)[:MOST_PATCHES]
    return patches[kept], keys[kept]


def _principal_components(patches_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the leading principal components (D, F), divided by the root of the total variance."""
    mean_D = patches_ND.mean(0)
    centred_ND = patches_ND - mean_D
    covariance_DD = (centred_ND.T @ centred_ND).double() / len(patches_ND)
    scale = covariance_DD.trace().sqrt().clamp_min(1e-6)
    vectors_DD = torch.linalg.eigh(covariance_DD).eigenvectors.flip(1)
    return mean_D, cast(Tensor, vectors_DD[:, :MOST_FEATURES] / scale).float()


def _fingerprint(patch_size: int, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"codebook {patch_size}".encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
