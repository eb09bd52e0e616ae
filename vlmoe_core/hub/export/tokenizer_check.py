"""Opens the folder of a visual tokenizer in a process of its own, and says which codes it gives to given images.

python -m vlmoe_core.hub.export.tokenizer_check FOLDER GIVEN.safetensors TAKEN.safetensors
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmoe_core.errors import HubError
from vlmoe_core.hub.export.native_check import same_package
from vlmoe_core.hub.export.samples import one_thread
from vlmoe_core.tokenizers.visual import VisualTokenizer, load_visual_tokenizer


def same_codes(tokenizer: VisualTokenizer, folder: Path, pixels_ICHW: Tensor) -> bool:
    """Whether the tokenizer in a folder, read by a fresh process, gives the same codes to uint8 images.

    Raises HubError where the folder can't be opened.
    """
    with tempfile.TemporaryDirectory() as place:
        given, taken = Path(place) / "given.safetensors", Path(place) / "taken.safetensors"
        save_file({"images": pixels_ICHW.contiguous()}, given)
        module = "vlmoe_core.hub.export.tokenizer_check"
        command = [sys.executable, "-P", "-m", module, str(folder.resolve()), str(given), str(taken)]
        done = subprocess.run(command, capture_output=True, text=True, env=same_package())
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise HubError(f"{folder} was written, but does not open in a process of its own: {said}")
        return torch.equal(load_file(taken)["codes"], _codes(tokenizer, pixels_ICHW))


def _codes(tokenizer: VisualTokenizer, pixels_ICHW: Tensor) -> Tensor:
    with one_thread():
        return tokenizer.encode(pixels_ICHW)


def _main(folder: Path, given: Path, taken: Path) -> None:
    save_file({"codes": _codes(load_visual_tokenizer(folder), load_file(given)["images"])}, taken)


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
