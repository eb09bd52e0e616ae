"""Runs an exported graph in a process of its own: python -P run_file.py FILE INPUTS.npz OUTPUTS.npz

Nothing of vlmoe can be imported in it, as on a machine where it is not installed.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _run_onnx(path: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _run_program(path: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    module = torch.export.load(path).module()
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
    return {name: value.numpy() for name, value in outputs.items()}


def _main(path: Path, inputs: Path, outputs: Path) -> None:
    import numpy as np

    run = _run_onnx if path.suffix == ".onnx" else _run_program
    with np.load(inputs) as given:
        np.savez(outputs, **run(path, {name: given[name] for name in given.files}))


if __name__ == "__main__":
    for _room in ("vlmoe_core", "vlmoe_cli"):
        sys.modules[_room] = None  # type: ignore[assignment]
    _main(*map(Path, sys.argv[1:]))
