"""An exported graph beside the model that it was made of, on real samples.

Axis letters: S sequences, T tokens of a batch (those of images first), X examples, L places of a text, K choices, N
tokens of an image.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import HubError
from vlmoe_core.hub.export.answers import answer_of
from vlmoe_core.hub.export.graph import experts_of, name_of
from vlmoe_core.hub.export.reference import Reference, answer_natively, tokens_of
from vlmoe_core.objectives.contrastive import alone
from vlmoe_core.train.trained import Trained

Arrays = Mapping[str, NDArray[np.generic]]
ERROR = re.compile(r"[\w.]*(Error|Exception|Fail|InvalidGraph|NotImplemented)\b")
RUN_FILE = Path(__file__).with_name("run_file.py")


@dataclass(frozen=True)
class Compared:
    """How far an exported graph is from the model."""

    max_difference: float
    """Largest difference of an output: of tokens whose experts agree in all layers, or of examples of such tokens.
    Infinite where an output is not a number."""
    flipped_share: float
    """Share of the tokens of sparse layers whose experts, or dropped choices, differ."""
    tokens: int
    """Tokens that passed."""
    samples: int
    """Examples."""


def compare(trained: Trained, path: Path, stream: StreamName, batch: Batch) -> Compared:
    """Run an exported graph in a fresh process, without this package, and the model here.

    Args:
        trained: the model that was exported.
        path: `model-<stream>.onnx` or `.pt2`.
        stream: what the graph is for.
        batch: of the stream, or of pairs, of which a graph of images or of texts gets its part; from the loader.

    Raises:
        UsageError: the model was not trained for the stream.
        HubError: the file does not run, or answers in other shapes.
    """
    answer = answer_of(trained, stream)
    batch = visible(batch, stream)
    inputs = plain_inputs(batch, answer.num_images, answer.keeps_sentences_apart)
    found = {name: torch.from_numpy(value) for name, value in run_fresh(path, inputs).items()}
    return measure(answer_natively(trained, stream, batch), found, batch)


def measure(wanted: Reference, found: Mapping[str, Tensor], batch: Batch) -> Compared:
    """Compare the outputs of a graph with the model's own. Raises HubError where one is missing or of another shape."""
    flipped_T, flipped, passed = _flips(wanted, found)
    differences = [
        (value - _like(name, value, found, batch))[~_flipped(name, flipped_T, wanted, batch)].abs().flatten()
        for name, value in wanted.outputs.items()
    ]
    every = torch.cat([torch.zeros(1), *differences]).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return Compared(float(every.max()), flipped / max(1, passed), flipped_T.shape[0], batch.num_examples)


def _flips(wanted: Reference, found: Mapping[str, Tensor]) -> tuple[Tensor, int, int]:
    """(T,) whether a token's experts differ in any layer; how often they do; and how many tokens passed the layers."""
    flipped_T = torch.zeros(wanted.encoded.layout.place_T.shape[0], dtype=torch.bool)
    flipped = passed = 0
    for one in wanted.encoded.routed:
        experts_TK = experts_of(one)
        differs_T = (experts_TK != _like(name_of(one), experts_TK, found, None)).any(1)
        flipped_T[tokens_of(one, wanted.encoded)] |= differs_T
        flipped, passed = flipped + int(differs_T.sum()), passed + differs_T.shape[0]
    return flipped_T, flipped, passed


def _like(name: str, wanted: Tensor, found: Mapping[str, Tensor], batch: Batch | None) -> Tensor:
    """An output of the graph as the model itself gives it, without padding. Raises HubError for another shape."""
    value = found.get(name)
    if value is not None and batch is not None and name in ("text_states", "text_logits"):
        value = value[batch.sequence_of_text, batch.text_positions_T]
    if value is None or value.shape != wanted.shape:
        got = "nothing" if value is None else tuple(value.shape)
        raise HubError(f"the exported graph answers {got} as {name}, the model {tuple(wanted.shape)}")
    return value


def _flipped(name: str, flipped_T: Tensor, wanted: Reference, batch: Batch) -> Tensor:
    """Which rows of an output belong to a token whose experts differ, or to an example that has one."""
    layout = wanted.encoded.layout
    image_IN = flipped_T[: layout.num_image_tokens].view(-1, layout.image_length)
    tokens = {
        "image_states": image_IN,
        "image_logits": image_IN[:, 1:],
        "text_states": flipped_T[layout.num_image_tokens :],
        "text_logits": flipped_T[layout.num_image_tokens :],
    }
    if name in tokens:
        return tokens[name]
    example_T = batch.example_of_sequence[layout.sequence_T]
    return torch.zeros(batch.num_examples, dtype=torch.bool).index_put((example_T[flipped_T],), torch.tensor(True))


def visible(batch: Batch, stream: StreamName) -> Batch:
    """The stream's part of a batch, no patch hidden."""
    if stream != "pair" and batch.fused:
        batch = alone(batch)[stream]
    return replace(batch, patch_mask_IP=torch.zeros_like(batch.patch_mask_IP))


def plain_inputs(batch: Batch, num_images: int = 1, sentences: bool = False) -> dict[str, NDArray[np.generic]]:
    """The inputs of a graph, texts padded to the longest."""
    inputs: dict[str, Tensor] = {}
    if batch.num_images:
        pixels = batch.pixels_ICHW
        inputs["pixel_values"] = pixels if num_images == 1 else pixels.unflatten(0, (-1, num_images))  # type: ignore[no-untyped-call]
    if batch.longest_text:
        words = {"input_ids": batch.text_ids_T, "attention_mask": torch.ones_like(batch.text_ids_T)}
        if sentences:
            second_T = batch.second_text_T
            words["token_type_ids"] = torch.zeros_like(batch.text_ids_T) if second_T is None else second_T.long()
        inputs |= {name: _padded(values, batch)[::num_images] for name, values in words.items()}
    return {name: value.contiguous().numpy() for name, value in inputs.items()}


def _padded(values_T: Tensor, batch: Batch) -> Tensor:
    """(T,) of the text tokens -> (S, L), 0 at padding."""
    rows_SL = values_T.new_zeros(batch.num_sequences, batch.longest_text)
    rows_SL[batch.sequence_of_text, batch.text_positions_T] = values_T
    return rows_SL


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    """The error that a process began with: torch wraps it in others that say less."""
    lines = done.stderr.strip().splitlines()
    last = lines[-1] if lines else f"it ended with {done.returncode}"
    return next((line for line in lines if ERROR.match(line)), last)


def run_fresh(path: Path, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
    """The outputs of an exported graph, run by itself. Raises HubError, with its last words, where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, taken = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(given, **inputs)  # type: ignore[arg-type]
        command = [sys.executable, "-P", str(RUN_FILE), str(path), str(given), str(taken)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise HubError(f"{path} was written, but does not run in a process of its own: {_first_error(done)}")
        with np.load(taken) as outputs:
            return {name: outputs[name] for name in outputs.files}
