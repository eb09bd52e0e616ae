"""The formats of `vlmoe export`: how each is written, and how it is compared with the model."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlmoe_core.checkpoint.quantised import QuantisedTensors, dequantised
from vlmoe_core.checkpoint.shards import MAX_SHARD_BYTES
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.export.answers import answers_of
from vlmoe_core.hub.export.chance import refuse_chance
from vlmoe_core.hub.export.compare import Compared, compare
from vlmoe_core.hub.export.native import NativeOptions, in_dtype, write_native
from vlmoe_core.hub.export.native_check import differing
from vlmoe_core.hub.export.onnx_graph import check_packages, export_onnx
from vlmoe_core.hub.export.program import export_program
from vlmoe_core.hub.export.quantise import QuantisedShare, quantise
from vlmoe_core.hub.export.samples import Samples, batch_of
from vlmoe_core.hub.export.tokenizer_check import same_codes
from vlmoe_core.hub.export.transformers.compare import check_transformers, compare_transformers
from vlmoe_core.hub.export.transformers.export import export_transformers
from vlmoe_core.hub.export.transformers.settings import task_of
from vlmoe_core.tokenizers.visual import VisualTokenizer
from vlmoe_core.train.trained import Trained
from vlmoe_core.train.visual import tokenizer_in, trains_tokenizer

TOLERANCE = 1e-4
"""Largest difference of a token whose experts agree, and largest share of tokens whose experts don't."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FormatName = Literal["safetensors", "transformers", "onnx", "torch-export"]


@dataclass(frozen=True)
class WriteOptions:
    """How the weights are written."""

    dtype: str | None = None
    """fp32, bf16 or fp16; null: as they are."""
    int8: bool = False
    """Weights of linear maps as int8 with scales."""
    max_shard_bytes: int | None = None
    """A file of weights is cut before it grows beyond this; null: 1 GiB."""
    visual: bool = True
    """Take the visual tokenizer along."""

    @property
    def rounds(self) -> bool:
        """Whether the weights change."""
        return self.int8 or self.dtype is not None


@dataclass(frozen=True)
class Written:
    """What was written."""

    trained: Trained
    """The model, its weights as the files hold them: they may be rounded."""
    quantised: QuantisedShare | None = None
    """How much is int8."""


@dataclass(frozen=True)
class Check:
    """An export, read back in a fresh process, beside its model."""

    samples: int
    """Real examples that both were given."""
    identical: bool
    """All outputs are the same, bit by bit."""
    max_difference: float
    """Largest difference of an output, of tokens whose experts agree."""
    flipped_share: float = 0.0
    """Share of the tokens whose experts differ."""
    tokens: int = 0
    """Tokens that were compared by their experts."""

    @property
    def holds(self) -> bool:
        """Whether the export is what it should be."""
        return self.identical or (self.max_difference <= TOLERANCE and self.flipped_share <= TOLERANCE)


class Format(ABC):
    """A way to write a model."""

    exact = False
    """The outputs must be the same bit by bit."""

    @abstractmethod
    def refuse(self, trained: Trained, options: WriteOptions) -> None:
        """Raise UsageError for what is not built in this format, before any work is done."""

    @abstractmethod
    def write(self, trained: Trained, folder: Path, options: WriteOptions) -> Written:
        """Write the model into a new folder."""

    @abstractmethod
    def check(self, written: Trained, folder: Path, samples: Samples) -> Check:
        """Read the folder back in a fresh process and compare."""


class Safetensors(Format):
    """A model folder of this package."""

    exact = True

    def refuse(self, trained: Trained, options: WriteOptions) -> None:
        """int8 has its own type."""
        if options.int8 and options.dtype is not None:
            raise UsageError(f"--quantize int8 and --dtype {options.dtype} exclude each other; give one of them")

    def write(self, trained: Trained, folder: Path, options: WriteOptions) -> Written:
        """Safetensors with index, recipe, tokenizers."""
        state, share = _changed(trained.objective.state_dict(), options)
        own = NativeOptions(lambda _: state, options.max_shard_bytes or MAX_SHARD_BYTES, options.visual)
        write_native(trained.recipe, trained.tokenizers, trained.objective, trained.step, folder, own)
        return Written(_rounded(trained, state) if options.rounds else trained, share)

    def check(self, written: Trained, folder: Path, samples: Samples) -> Check:
        """Every state, output and expert is the same bit by bit."""
        batches = {stream: batch_of(written, stream, examples) for stream, examples in samples.items()}
        wrong = differing(written, folder, batches)
        return Check(_count(samples), not wrong, float("inf") if wrong else 0.0)


class TokenizerFolder(Format):
    """The folder of a visual tokenizer, which `tokenizers.visual.load` takes."""

    exact = True

    def refuse(self, trained: Trained, options: WriteOptions) -> None:
        """The codes hang on every bit of the weights, so these stay as they are."""
        if options != WriteOptions():
            raise UsageError(
                f"{trained.name} is a visual tokenizer, which is exported as it is: leave out --dtype, --quantize, "
                "--max-shard-size and --no-visual-tokenizer"
            )

    def write(self, trained: Trained, folder: Path, options: WriteOptions) -> Written:
        """visual_tokenizer.json and visual_tokenizer.safetensors."""
        self._tokenizer(trained).save(folder)
        return Written(trained)

    def check(self, written: Trained, folder: Path, samples: Samples) -> Check:
        """Every code is the same."""
        pixels_ICHW = batch_of(written, "image", samples["image"]).pixels_ICHW
        same = same_codes(self._tokenizer(written), folder, pixels_ICHW)
        return Check(_count(samples), same, 0.0 if same else float("inf"))

    def _tokenizer(self, trained: Trained) -> VisualTokenizer:
        return tokenizer_in(trained.recipe, trained.objective.state_dict())


class Transformers(Format):
    """A repository that `transformers` loads with remote code."""

    exact = True

    def refuse(self, trained: Trained, options: WriteOptions) -> None:
        """Weights stay as they are: `from_pretrained(dtype=...)` takes them in any type."""
        _refuse_changes("transformers", options)
        check_transformers()
        refuse_chance(trained.recipe.model)
        task_of(trained.recipe)

    def write(self, trained: Trained, folder: Path, options: WriteOptions) -> Written:
        """Code, weights, tokenizer, processor."""
        export_transformers(trained, folder, options.max_shard_bytes or MAX_SHARD_BYTES)
        return Written(trained)

    def check(self, written: Trained, folder: Path, samples: Samples) -> Check:
        """Its processor and model on the examples as pictures and words."""
        found = compare_transformers(written, folder, samples)
        return Check(found["samples"], found["identical"], found["max_difference"])


class Graphs(Format):
    """A file for each kind of input that the model was trained on."""

    suffix: str

    def refuse(self, trained: Trained, options: WriteOptions) -> None:
        """Weights stay float32, in one file; chance can't be repeated."""
        name = self.suffix.removeprefix(".")
        _refuse_changes(name, options)
        if options.max_shard_bytes is not None:
            raise UsageError(f"--max-shard-size is for safetensors and transformers; {name} writes a file a graph")
        refuse_chance(trained.recipe.model)

    def check(self, written: Trained, folder: Path, samples: Samples) -> Check:
        """Each graph on the examples; a retrieval model's graphs of images and of texts get their part of the pairs."""
        found = []
        for stream in answers_of(written):
            source: StreamName = stream if stream in samples else "pair"
            batch = batch_of(written, source, samples[source])
            found.append(compare(written, folder / f"model-{stream}{self.suffix}", stream, batch))
        return _together(found, _count(samples))


class Onnx(Graphs):
    """ONNX, for onnxruntime and others."""

    suffix = ".onnx"

    def refuse(self, trained: Trained, options: WriteOptions) -> None:
        """Likewise; packages may be missing."""
        check_packages()
        super().refuse(trained, options)

    def write(self, trained: Trained, folder: Path, options: WriteOptions) -> Written:
        """One model-<stream>.onnx a stream."""
        export_onnx(trained, folder, list(answers_of(trained)))
        return Written(trained)


class TorchExport(Graphs):
    """torch.export's .pt2, which runs where this package is not installed."""

    suffix = ".pt2"

    def write(self, trained: Trained, folder: Path, options: WriteOptions) -> Written:
        """One model-<stream>.pt2 a stream."""
        export_program(trained, folder, list(answers_of(trained)))
        return Written(trained)


FORMATS: Mapping[FormatName, Format] = {
    "safetensors": Safetensors(),
    "transformers": Transformers(),
    "onnx": Onnx(),
    "torch-export": TorchExport(),
}


def format_of(trained: Trained, name: FormatName, cut: bool) -> Format:
    """How a model is written in a format. Raises UsageError for what is not built for a visual tokenizer.

    Args:
        trained: the model.
        name: of the format.
        cut: parts of it are to be left out.
    """
    if not trains_tokenizer(trained.recipe):
        return FORMATS[name]
    if name != "safetensors" or cut:
        raise UsageError(
            f"{trained.name} is a visual tokenizer, which is exported whole as safetensors: give --format safetensors, "
            "and neither --modality nor --experts"
        )
    return TokenizerFolder()


def _changed(state: Mapping[str, Tensor], options: WriteOptions) -> tuple[Mapping[str, Tensor], QuantisedShare | None]:
    """The tensors that are written, and how much of them is int8."""
    if options.int8:
        return quantise(state)
    return (state if options.dtype is None else in_dtype(DTYPES[options.dtype])(state)), None


def _rounded(trained: Trained, written: Mapping[str, Tensor]) -> Trained:
    """The model with the weights that are written, not read back: the files are compared with it."""
    objective = copy.deepcopy(trained.objective).cpu()
    objective.load_state_dict(dequantised(written) if isinstance(written, QuantisedTensors) else written)
    return replace(trained, objective=objective)


def _refuse_changes(name: str, options: WriteOptions) -> None:
    if options.int8:
        raise UsageError(f"--quantize int8 is built for --format safetensors, not for {name}")
    if options.dtype is not None:
        raise UsageError(f"--dtype {options.dtype} is built for --format safetensors; {name} keeps the weights' type")
    if not options.visual:
        raise UsageError(f"--no-visual-tokenizer is for --format safetensors; {name} never holds one")


def _together(found: list[Compared], samples: int) -> Check:
    tokens = sum(one.tokens for one in found)
    flipped = sum(one.flipped_share * one.tokens for one in found) / max(1, tokens)
    difference = max(one.max_difference for one in found)
    return Check(samples, difference == 0 and flipped == 0, difference, flipped, tokens)


def _count(samples: Samples) -> int:
    return sum(map(len, samples.values()))
