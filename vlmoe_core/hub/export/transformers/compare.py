"""Checks an exported repository: loaded in a process without this package, it must answer as the model does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor

from vlmoe_core.data.batch import Batch
from vlmoe_core.data.config import StreamName
from vlmoe_core.data.example import Example
from vlmoe_core.errors import HubError, UsageError
from vlmoe_core.hub.export.samples import Samples, batch_of, in_words, one_thread
from vlmoe_core.hub.export.transformers import reload
from vlmoe_core.hub.export.transformers.settings import ARCHITECTURES, task_of
from vlmoe_core.objectives.contrastive import alone
from vlmoe_core.train.trained import Trained


def compare_transformers(trained: Trained, folder: Path, samples: Samples) -> dict[str, Any]:
    """Reload a repository in a fresh process and compare what it makes of real examples, read by its own processor.

    Both compute on one thread, as the number of threads changes the last bits of a product. Nothing is hidden.

    Args:
        trained: the model that was exported.
        folder: the repository.
        samples: examples.

    Returns:
        `max_difference` of all numbers, `identical` (bit by bit) and `samples`, how many examples there were.

    Raises:
        UsageError: transformers is not installed.
        HubError: the repository can't be loaded, or answers in other shapes.
    """
    check_transformers()
    asked = [Asked(trained, folder, stream, in_words(trained, own)) for stream, own in samples.items()]
    differences = [
        _difference(expected, got)
        for one, found in zip(asked, ask_fresh(asked), strict=True)
        for expected, got in _pairs(native_answers(one), found)
    ]
    largest = max(differences)
    return {"max_difference": largest, "identical": largest == 0, "samples": sum(map(len, samples.values()))}


def check_transformers() -> None:
    """Raises UsageError where transformers is not installed."""
    if find_spec("transformers") is None:
        raise UsageError(
            "--format transformers is checked with the package transformers: pip install -c constraints.txt -e "
            "'.[export]'"
        )


@dataclass(frozen=True)
class Asked:
    """A model, its repository, and examples of one stream."""

    trained: Trained
    folder: Path
    stream: StreamName
    examples: Sequence[Example]


def native_answers(asked: Asked) -> dict[str, Tensor]:
    """What the model itself makes of the examples, as the package prepares and computes."""
    trained, stream = asked.trained, asked.stream
    batch = batch_of(trained, stream, asked.examples)
    found = {"pixel_values": batch.pixels_ICHW} if stream != "text" else {}
    found |= {"input_ids": _ids_of_examples(batch)} if stream != "image" else {}
    with torch.no_grad(), one_thread():
        return found | _outputs(trained.objective, task_of(trained.recipe), stream, batch)


def _outputs(objective: Any, task: str, stream: StreamName, batch: Batch) -> dict[str, Tensor]:
    if task == "masked":
        words_TV, patches_IPC = objective.predict(batch)
        found = {"logits": words_TV, "patch_logits": patches_IPC}
        found = {name: logits for name, logits in found.items() if logits.numel()}
        if objective.contrast is None or stream != "pair":
            return found
        encode, head, views = objective.encoder, objective.contrast, alone(batch)
        vectors = head(encode(views["image"]).image_cls_ID, encode(views["text"]).text_cls_SD)
        return found | dict(zip(("image_embeds", "text_embeds"), vectors, strict=True))
    if task != "retrieval":
        return {"logits": objective({stream: batch}).outputs}
    views = alone(batch)
    found = {
        "image_embeds": objective.embed_images(views["image"]),
        "text_embeds": objective.embed_texts(views["text"]),
    }
    return found | ({"match_logits": objective.match_logits(batch)} if objective.config.itm_weight else {})


def _ids_of_examples(batch: Batch) -> Tensor:
    """The token ids of each example once, though it may have several sequences."""
    per_example = batch.num_sequences // batch.num_examples
    return batch.text_ids_T[batch.sequence_of_text % per_example == 0]


def ask_fresh(asked: Sequence[Asked]) -> list[dict[str, Tensor]]:
    """What the repositories make of the examples, all in one fresh process. Raises HubError if it fails."""
    with TemporaryDirectory() as name:
        place = Path(name)
        cases = [_case(one, place / str(number)) for number, one in enumerate(asked)]
        (place / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
        files = [str(place / "cases.json"), str(place / "out.safetensors")]
        done = subprocess.run(
            [sys.executable, "-P", reload.__file__, *files],
            env={**os.environ, "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise HubError(f"transformers can't load the exported repository: {said}")
        found = load_file(files[1])
    return [
        {name.split(".", 1)[1]: tensor for name, tensor in found.items() if name.startswith(f"{number}.")}
        for number in range(len(asked))
    ]


def _case(asked: Asked, place: Path) -> dict[str, Any]:
    """What reload.py reads; the pictures are written as files."""
    place.mkdir()
    examples = asked.examples
    files = [
        [_picture_file(picture, place / f"{n}-{i}") for i, picture in enumerate((e.image, *e.more_images))]
        for n, e in enumerate(examples)
        if asked.stream != "text"
    ]
    seconds = [e.second_text for e in examples]
    auto = ARCHITECTURES[task_of(asked.trained.recipe)].autos[0]
    return {
        "folder": str(asked.folder.absolute()),
        "auto": auto,
        "stream": asked.stream,
        "images": None if asked.stream == "text" else _flat(files),
        "texts": None if asked.stream == "image" else [e.text for e in examples],
        "seconds": seconds if any(second is not None for second in seconds) else None,
    }


def _flat(files: list[list[str]]) -> list[list[str]] | list[str]:
    """One file an example where each has one."""
    return [own[0] for own in files] if all(len(own) == 1 for own in files) else files


def _picture_file(picture: bytes | Image | None, path: Path) -> str:
    """A file of a picture, without loss."""
    if isinstance(picture, bytes):
        path.write_bytes(picture)
    elif picture is not None:
        picture.save(path, format="PNG")
    return str(path)


def _pairs(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each expected tensor with the one of its name."""
    for name, tensor in expected.items():
        if name not in found or tensor.numel() != found[name].numel():
            shape = tuple(found[name].shape) if name in found else "nothing"
            raise HubError(f"the exported repository answers {shape} as {name}, the model {tuple(tensor.shape)}")
        yield tensor, found[name].view(tensor.shape)


def _difference(expected: Tensor, found: Tensor) -> float:
    """The largest absolute difference; infinite where only one is a number."""
    if torch.equal(expected, found):
        return 0.0
    largest = float((expected.double() - found.double()).abs().max())
    return largest if largest > 0 else float("inf")
