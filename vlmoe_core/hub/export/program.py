"""Graphs of a model as torch.export programs, and as .pt2 files that run where this package is not installed.

Every size of a batch and of its texts is free. The weights stay in float32.
"""

import logging
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

import vlmoe_core.moe.operator  # noqa: F401  registers vlmoe::expert_ffn
from vlmoe_core.data.config import StreamName
from vlmoe_core.hub.export.graph import graph_of
from vlmoe_core.hub.export.plain_experts import plain_expert_ffn
from vlmoe_core.train.trained import Trained


def export_program(trained: Trained, folder: Path, inputs: Collection[StreamName]) -> list[Path]:
    """Write `model-<stream>.pt2` for each stream: `torch.export.load(path).module()(...)` gives the outputs by name.

    Raises:
        UsageError: the model was not trained for a stream, or decides by chance.
    """
    programs = {stream: program_of(trained, stream) for stream in inputs}
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stream, program in programs.items():
        paths.append(folder / f"model-{stream}.pt2")
        with quiet():
            torch.export.save(_plain(program), paths[-1])
    return paths


def program_of(trained: Trained, stream: StreamName) -> ExportedProgram:
    """The graph of a stream; the experts of a layer are one node, `vlmoe::expert_ffn`. Raises UsageError likewise."""
    graph = graph_of(trained, stream)
    samples = graph.samples
    dims = {"batch": Dim("batch", min=1), "length": Dim("length", min=1, max=graph.config.max_text_length)}
    sizes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in free_axes(samples))
    with torch.no_grad(), quiet():
        return torch.export.export(graph, tuple(samples.values()), dynamic_shapes=sizes)


def free_axes(inputs: Iterable[str]) -> tuple[dict[int, str], ...]:
    """The axes of each input that may have any size, by name: examples, and places of a text up to the longest."""
    return tuple({0: "batch"} if name == "pixel_values" else {0: "batch", 1: "length"} for name in inputs)


def _plain(program: ExportedProgram) -> ExportedProgram:
    """The program in torch's own operators alone, without the paths of the source files it was traced from."""
    with torch.no_grad():
        plain: ExportedProgram = program.run_decompositions({torch.ops.vlmoe.expert_ffn.default: plain_expert_ffn})
    for node in plain.graph.nodes:
        node.meta.pop("stack_trace", None)
    return plain


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings, which tell of their own insides and of packages that are not needed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
