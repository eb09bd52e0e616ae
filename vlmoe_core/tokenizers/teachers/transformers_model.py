"""A teacher that is a vision model of transformers: CLIP, DINOv2, BEiT, ViT and others, by local path or Hub name.

Axis letters: I images, C channels, H height, W width, N tokens of an image, P patches (row by row), D width.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmoe_core.errors import HubError, TokenizerError, UsageError
from vlmoe_core.hf import fetch_folder, is_hub
from vlmoe_core.model.config import ModelConfig
from vlmoe_core.tokenizers.config import TeacherConfig

FILES = ("config.json", "*processor_config.json", "model.safetensors*", "model-*.safetensors")
"""What is fetched of a repository."""
LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""A folder's own code is never run."""
RESCALE = 1 / 255
MOST_LEADING = 16
"""Tokens before the patches: [CLS], one of distillation, a few registers. YOLOS has a hundred others behind them."""


class TransformersTeacher:
    """Patch features of a frozen vision model. No file is read before the first call of `load` or `features`.

    It is no module, so that whatever holds it has neither its parameters nor an entry in a state dict.

    Args:
        config: `model` is a folder that transformers wrote, `ORG/NAME[@REVISION]` or `hf-hub:ORG/NAME[@REVISION]`;
            `dim` must be the width of its patch features.
        model: of the encoder that learns, whose grid of patches the teacher must have.
    """

    def __init__(self, config: TeacherConfig, model: ModelConfig) -> None:
        self.dim, self._name, self._grid = config.width(model.patch_size), config.model, model.grid
        self._model: PatchFeatures | None = None

    def load(self) -> None:
        """Read the weights, once.

        Raises:
            UsageError: transformers is not installed.
            HubError: the name is no folder here, and the Hub does not give it.
            TokenizerError: it is no vision model, is damaged, or has other patches or another width.
        """
        self._loaded()

    @torch.no_grad()
    def features(self, pixels_ICHW: Tensor) -> Tensor:
        """uint8 RGB images of any size -> (I, P, dim), float32, without gradient. Errors as in `load`."""
        if not len(pixels_ICHW):  # transformers fails on a batch of none
            return pixels_ICHW.new_zeros((0, self._grid**2, self.dim), dtype=torch.float32)
        model = self._loaded().to(pixels_ICHW.device)
        with torch.autocast(pixels_ICHW.device.type, enabled=False):
            states_IND: Tensor = model(pixels_ICHW)
        return states_IND[:, -(self._grid**2) :]

    def _loaded(self) -> "PatchFeatures":
        if self._model is None:
            folder = _folder(self._name)
            # What is drawn for weights that no file needs to hold must not move the draws of the run.
            with torch.random.fork_rng(devices=[]), _quiet():
                config = _read_config(self._name, folder)
                _check_grid(self._name, _sizes(self._name, config), self._grid)
                model = _read_model(self._name, folder, config)
            self._check_tokens(model)
            self._model = model
        return self._model

    @torch.no_grad()
    def _check_tokens(self, model: "PatchFeatures") -> None:
        try:
            states_IND = model(torch.zeros(1, 3, model.size, model.size, dtype=torch.uint8))
        except Exception as error:  # whatever its parts raise for an image, where they ask for something else
            raise TokenizerError(f"teacher {self._name} does not take an image ({_reason(error)})") from error
        if states_IND.ndim != 3 or not 0 <= states_IND.shape[1] - self._grid**2 <= MOST_LEADING:
            raise TokenizerError(
                f"teacher {self._name} gives states of shape {tuple(states_IND.shape)}, not one for each of "
                f"{self._grid} x {self._grid} patches; take a plain vision transformer"
            )
        if (width := states_IND.shape[2]) != self.dim:
            raise TokenizerError(f"teacher {self._name} has features {width} wide, not {self.dim}; set dim to {width}")


class PatchFeatures(nn.Module):
    """The part of a model of transformers that makes states of an image's tokens, in evaluation mode and frozen.

    A model with a projection of its image states, as CLIP has, gets its last norm and that projection applied to every
    token (BEiT v2, arXiv 2208.06366, whose targets are those of CLIP); any other gives its last states.
    """

    mean_C11: Tensor
    deviation_C11: Tensor

    def __init__(self, model: nn.Module, size: int, mean: Sequence[float], deviation: Sequence[float]) -> None:
        """`size` pixels along a side; `mean` and `deviation` of the channels, of pixels from 0 to 1."""
        super().__init__()
        self.tower: Any = getattr(model, "vision_model", model)
        norm, projection = getattr(self.tower, "post_layernorm", None), getattr(model, "visual_projection", None)
        self.head = nn.Identity() if norm is None or projection is None else nn.Sequential(norm, projection)
        self.size = size
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None])
        self.register_buffer("deviation_C11", torch.tensor(deviation)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """uint8 images of any size -> (I, N, D), all tokens."""
        pixels_ICHW = pixels_ICHW.float()
        if pixels_ICHW.shape[2:] != (self.size, self.size):
            sides = (self.size, self.size)
            pixels_ICHW = F.interpolate(pixels_ICHW, sides, mode="bicubic", antialias=True).clamp(0, 255)
        normalised_ICHW = (pixels_ICHW * RESCALE - self.mean_C11) / self.deviation_C11
        states_IND: Tensor = self.head(self.tower(pixel_values=normalised_ICHW).last_hidden_state)
        return states_IND


def _folder(name: str) -> Path:
    """The folder that the name stands for, fetched if it is one of the Hub."""
    if find_spec("transformers") is None:
        raise UsageError(f"teacher {name} needs the package transformers: pip install 'vlmoe[teachers]'")
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if not is_hub(name) and (name[:1] in ("/", ".", "~", "") or name.partition("@")[0].count("/") != 1):
        raise TokenizerError(f"teacher {name} is no folder; give one that transformers wrote, or a Hub name ORG/NAME")
    try:
        return fetch_folder(name, FILES)
    except (HubError, UsageError) as error:
        raise HubError(f"teacher {name} is no folder here, and {error}; or give the path of a copy") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TokenizerError(f"teacher: {path} can't be read ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"teacher: {path} does not hold settings; fetch it again")
    return found


def _read_config(name: str, folder: Path) -> Any:
    """What transformers makes of config.json: a folder leaves out what is as usual for its kind of model."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise TokenizerError(f"teacher {name} has no config.json: it is no model of transformers")
    try:
        return AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # whatever transformers raises for settings that are damaged or unknown
        raise TokenizerError(f"teacher {name} has no config.json that can be used ({_reason(error)})") from error


def _sizes(name: str, config: Any) -> tuple[int, int]:
    """Pixels along the side of an image and of a patch."""
    vision = getattr(config, "vision_config", config)
    sizes = [getattr(vision, size, None) for size in ("image_size", "patch_size")]
    image, patch = (side[0] if isinstance(side, list | tuple) and len(set(side)) == 1 else side for side in sizes)
    if not isinstance(image, int) or not isinstance(patch, int) or patch < 1:
        raise TokenizerError(
            f"teacher {name} ({config.model_type}) is no vision model of square patches: image_size {image}, "
            f"patch_size {patch}"
        )
    return image, patch


def _check_grid(name: str, sizes: tuple[int, int], grid: int) -> None:
    image, patch = sizes
    if (theirs := image // patch) != grid:
        raise TokenizerError(
            f"teacher {name} has {theirs} x {theirs} patches (image {image}, patch {patch}), the model {grid} x "
            f"{grid}; set the model's image_size to {theirs} times the model's patch_size, or take another teacher"
        )


def _read_model(name: str, folder: Path, config: Any) -> PatchFeatures:
    mean, deviation = _statistics(folder)
    if not any(folder.glob("model*.safetensors")):
        raise TokenizerError(
            f"teacher {name} holds no model.safetensors, the only weights that are read; convert it where you trust "
            "it: AutoModel.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True, **LOCAL}
    try:
        model, info = _class(config).from_pretrained(folder, config=config, **options)
    except Exception as error:  # transformers raises whatever its parts do for files that are damaged or do not fit
        raise TokenizerError(f"teacher {name} can't be loaded ({_reason(error)}); fetch it again") from error
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
        raise TokenizerError(f"teacher {name} lacks {len(missing)} of its weights, {missing[0]} first; fetch it again")
    features = PatchFeatures(model, _sizes(name, config)[0], mean, deviation)
    if features.tower.main_input_name != "pixel_values":
        raise TokenizerError(f"teacher {name} ({config.model_type}) is no vision model: it reads no images alone")
    return features


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _class(config: Any) -> Any:
    """The model's class: transformers' choice, or one with a projection that the folder names itself."""
    import transformers

    named = next(iter(config.architectures or ()), "")
    return getattr(transformers, named) if named.endswith("VisionModelWithProjection") else transformers.AutoModel


def _statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation of the pixels, from 0 to 1, that the model's image processor asks for."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = _read_json(path)
    else:
        path = folder / "processor_config.json"
        settings = _read_json(path).get("image_processor", {}) if path.is_file() else {}
    mean: Any = settings.get("image_mean")
    deviation: Any = settings.get("image_std")
    scale = settings.get("rescale_factor", RESCALE)
    plain = settings.get("do_normalize", True) and settings.get("do_rescale", True) and abs(scale - RESCALE) < 1e-6
    if not (plain and _is_of_channels(mean) and _is_of_channels(deviation) and min(deviation) > 0):
        raise TokenizerError(
            f"teacher {folder}: no preprocessor_config.json says image_mean and image_std, three numbers each, of "
            "pixels from 0 to 1; copy the model's own beside its weights"
        )
    return mean, deviation


def _is_of_channels(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) for value in values)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars: what matters of a load is checked."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
