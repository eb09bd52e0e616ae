"""The visual tokenizer: what turns the patches of an image into the discrete targets of masked image modelling.

Axis letters: B images, C channels, H height, W width, N patches of an image (row by row), D values of a patch.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlmoe_core.config import nearest, plugin_module
from vlmoe_core.errors import TokenizerError
from vlmoe_core.hf import fetch_folder, first_file, is_hub
from vlmoe_core.tensor_file import write_tensor_file
from vlmoe_core.tokenizers.frozen import Frozen

KINDS = ("codebook", "vqkd")
FORMAT = 1
CONFIG_FILE = "visual_tokenizer.json"
TENSOR_FILE = "visual_tokenizer.safetensors"
AGAIN = "fit, train or import it anew"
INSIDE = "tokenizers/visual"
"""Where it lies in a model folder."""


class VisualTokenizer(Frozen, ABC):
    """A module without trainable parameters and without an entry in any state dict: it travels as its own files.

    A new kind is a file of its name in this package with `load(tensors, config) -> VisualTokenizer`, which makes one of
    its buffers and the facts that it was saved with, and an entry in `KINDS`.
    """

    kind: ClassVar[str]
    """Its name in a recipe, one of `KINDS`."""
    patch_size: int
    """Pixels along a patch's side."""
    codebook_size: int
    """Number of codes; ids are 0 to codebook_size - 1."""
    fingerprint: str
    """Changes whenever any image would be encoded differently."""

    @abstractmethod
    def misfit(self, image_size: int, patch_size: int) -> str | None:
        """Why it gives no token to each patch of a model with images and patches of such sizes; null: it does."""

    @property
    def draws(self) -> bool:
        """Whether `decode` shows what a code stands for."""
        return True

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Ids (B, N), int64, of RGB images: uint8, or float in [0, 1].

        Raises TokenizerError if the patch size does not divide the image's sides.
        """

    @abstractmethod
    def decode(self, ids_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images (B, 3, H, W), float in [0, 1], that show each code; `grid` is (rows, columns), square when None."""

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What `load` needs to know beside the buffers and the sizes above, and what a reader may want to."""

    def save(self, folder: Path) -> None:
        """Write `visual_tokenizer.json` and `.safetensors` into the folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: buffer.cpu().contiguous() for name, buffer in self.named_buffers()}
        write_tensor_file(folder / TENSOR_FILE, tensors)
        config = {
            "format": FORMAT,
            "kind": self.kind,
            "patch_size": self.patch_size,
            "codebook_size": self.codebook_size,
            "fingerprint": self.fingerprint,
            **self.facts(),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def visual_folder(spec: str) -> Path | None:
    """The folder of the visual tokenizer that `spec` names: itself, one inside a model folder, or on the Hub.

    Null where there is none.

    Raises HubError if the Hub does not give it.
    """
    if not is_hub(spec):
        return next((folder for folder in (Path(spec) / INSIDE, Path(spec)) if (folder / CONFIG_FILE).is_file()), None)
    found = first_file(spec, [CONFIG_FILE, f"{INSIDE}/{CONFIG_FILE}"])
    if found is None:
        return None
    beside = f"{INSIDE}/" if found.parent.name == Path(INSIDE).name else ""
    fetch_folder(spec, [f"{beside}visual_tokenizer.*"])
    return found.parent


def load_visual_tokenizer(folder: Path) -> VisualTokenizer:
    """The tokenizer that `save` wrote; TokenizerError if a file is missing, altered, newer, or of an unknown kind."""
    config, tensors = _read_config(Path(folder) / CONFIG_FILE), Path(folder) / TENSOR_FILE
    kind = config["kind"]
    try:
        tokenizer: VisualTokenizer = plugin_module("vlmoe_core.tokenizers", kind).load(load_file(tensors), config)
    except FileNotFoundError as error:
        raise TokenizerError(f"{tensors} is not there; copy it beside {CONFIG_FILE}, or {AGAIN}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{folder} does not hold a {kind} ({error}); {AGAIN}") from error
    if tokenizer.fingerprint != config.get("fingerprint"):
        raise TokenizerError(f"{tensors} is not the one that {CONFIG_FILE} describes: its fingerprint differs")
    return tokenizer


def _read_config(path: Path) -> dict[str, Any]:
    """What `save` wrote of a tokenizer of a kind that there is. Raises TokenizerError."""
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TokenizerError(f"{path} is not there; give a folder that holds a fitted visual tokenizer") from error
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} can't be read ({error}); {AGAIN}") from error
    if not isinstance(config, dict) or not isinstance(config.get("kind"), str):
        raise TokenizerError(f"{path} names no kind of visual tokenizer; {AGAIN}")
    if config["kind"] not in KINDS:
        hint = nearest(config["kind"], list(KINDS))
        raise TokenizerError(f"{path}: unknown visual tokenizer '{config['kind']}'; {hint}")
    if config.get("format") != FORMAT:
        raise TokenizerError(f"{path} has format {config.get('format')}, not {FORMAT}; use a newer vlmoe")
    return config


def to_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches (B, N, D), rows first, each patch as channel, row, column; the type stays as it is."""
    b, c, h, w = images_BCHW.shape
    if h % patch_size or w % patch_size or not h or not w:
        raise TokenizerError(f"images of {w} x {h} pixels can't be cut into patches of {patch_size}; resize them")
    rows, columns = h // patch_size, w // patch_size
    cut = images_BCHW.reshape(b, c, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * patch_size**2)


def from_patches(patches_BND: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put RGB patches back together: the inverse of `to_patches`; `grid` is (rows, columns)."""
    rows, columns = grid
    cut = patches_BND.reshape(len(patches_BND), rows, columns, 3, patch_size, patch_size)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(patches_BND), 3, rows * patch_size, columns * patch_size)


def unit_range(pixels: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1], from uint8 or from floats that already are."""
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise TokenizerError(f"pixels are {pixels.dtype}; give uint8, or floats in [0, 1]")
    return pixels.float()
