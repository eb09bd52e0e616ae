"""Opens a model folder in a process of its own, and says what the model in it makes of given inputs.

python -m vlmoe_core.hub.export.native_check FOLDER GIVEN.npz TAKEN.safetensors
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import HubError
from vlmoe_core.hub.export.compare import plain_inputs
from vlmoe_core.hub.export.graph import experts_of, name_of
from vlmoe_core.hub.export.plain_batch import batch_of_images, batch_of_pairs, batch_of_texts
from vlmoe_core.hub.export.reference import answer_natively
from vlmoe_core.hub.export.samples import one_thread
from vlmoe_core.train.trained import Trained, load_trained


def differing(trained: Trained, folder: Path, batches: Mapping[StreamName, Batch]) -> list[str]:
    """The outputs, `<stream>/<name>`, that the model in a folder, read by a fresh process, does not give bit by bit.

    Raises HubError where the folder can't be opened.
    """
    several = getattr(trained.objective, "num_images", 1)
    given = {
        f"{stream}/{name}": value
        for stream, batch in batches.items()
        for name, value in plain_inputs(batch, several, batch.second_text_T is not None).items()
    }
    with tempfile.TemporaryDirectory() as place:
        inputs, outputs = Path(place) / "given.npz", Path(place) / "taken.safetensors"
        np.savez(inputs, **given)  # type: ignore[arg-type]
        module = "vlmoe_core.hub.export.native_check"
        command = [sys.executable, "-P", "-m", module, str(folder.resolve()), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, env=same_package())
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise HubError(f"{folder} was written, but does not open in a process of its own: {said}")
        found, expected = load_file(outputs), answers(trained, inputs)
    return sorted(n for n in expected.keys() | found.keys() if not _same(expected.get(n), found.get(n)))


def same_package() -> dict[str, str]:
    """The environment of a process in which Python finds the package that is running, wherever it lies."""
    home = str(Path(__file__).parents[3])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and torch.equal(left, right)


def answers(trained: Trained, given: Path) -> dict[str, Tensor]:
    """Outputs, states and experts for each stream of the given inputs."""
    found: dict[str, Tensor] = {}
    for stream, inputs in _read(given).items():
        with one_thread(), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # the router `random` draws
            reference = answer_natively(trained, stream, _batch(trained, stream, inputs))
        routed = {name_of(one): experts_of(one) for one in reference.encoded.routed}
        own = {"states": reference.encoded.states_TD, **reference.outputs, **routed}
        found |= {f"{stream}/{name}": value.contiguous() for name, value in own.items()}
    return found


def _read(given: Path) -> dict[StreamName, dict[str, Tensor]]:
    found: dict[StreamName, dict[str, Tensor]] = {}
    with np.load(given) as file:
        for key in file.files:
            stream, name = key.split("/")
            found.setdefault(stream, {})[name] = torch.from_numpy(file[key])
    return found


def _batch(trained: Trained, stream: StreamName, inputs: Mapping[str, Tensor]) -> Batch:
    model = trained.recipe.model
    if stream == "image":
        return batch_of_images(inputs["pixel_values"], model.num_patches)
    words = inputs["input_ids"], inputs["attention_mask"]
    if stream == "text":
        return batch_of_texts(*words, inputs.get("token_type_ids"), model)
    return batch_of_pairs(inputs["pixel_values"], *words, model.num_patches)


def _main(folder: Path, given: Path, taken: Path) -> None:
    save_file({name: value.clone() for name, value in answers(load_trained(folder), given).items()}, taken)


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
