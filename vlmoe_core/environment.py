"""What a run ran on: versions and machine, without names or paths of the user."""

import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "vlmoe",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "tokenizers",
    "pillow",
    "numpy",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "datasets",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorboard",
    "wandb",
    "trackio",
    "sentencepiece",
    "tutel",
)


def environment() -> dict[str, Any]:
    """Versions and machine, ready for JSON; a package that is not installed is null."""
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cores": os.cpu_count() or 1,
        "torch": _torch(),
        "devices": _devices(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _torch() -> dict[str, Any]:
    import torch

    cuda = torch.version.cuda or "none"
    return {"version": str(torch.__version__), "cuda": cuda, "threads": torch.get_num_threads()}


def _devices() -> list[str]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*names, *(["mps"] if torch.backends.mps.is_available() else [])]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
