"""Files of torch.export, run without this package."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.hub.export.graph_support import (
    LONGEST,
    against,
    assert_same,
    batch_for,
    dropping_all,
    pretrained,
    sparse,
    tensors,
)
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import HubError
from vlmoe_core.hub.export.compare import compare, run_fresh
from vlmoe_core.hub.export.graph import graph_of
from vlmoe_core.hub.export.program import export_program, program_of
from vlmoe_core.hub.export.reference import answer_natively
from vlmoe_core.train.trained import Trained

LENGTHS = [5, 9, 2]
OTHER_LENGTHS = ([3], [1], [LONGEST], [LONGEST, 1, 7, 4, 4])


def assert_any_size(trained: Trained, stream: StreamName, path: Path) -> None:
    """One example, one token, the longest text, other numbers of examples."""
    run, graph = torch.export.load(path).module(), graph_of(trained, stream)
    for lengths in OTHER_LENGTHS:
        batch = batch_for(trained, stream, lengths)
        assert_same(against(trained, stream, batch, run(*tensors(graph, batch).values())), batch)


@pytest.mark.parametrize(
    ("stream", "values"),
    [("pair", {"eval_capacity_factor": 1.0}), ("image", {"top_k": 1, "eval_capacity_factor": 1e-9})],
)
def test_any_size(tmp_path: Path, stream: StreamName, values: dict[str, float]) -> None:
    trained = pretrained(tmp_path, *sparse(**values))
    [path] = export_program(trained, tmp_path / "out", [stream])
    assert path == tmp_path / "out" / f"model-{stream}.pt2"
    assert_any_size(trained, stream, path)


def test_every_token_dropped(tmp_path: Path) -> None:
    trained = dropping_all(tmp_path)
    batch = batch_for(trained, "text", LENGTHS)
    [one] = answer_natively(trained, "text", batch).encoded.routed
    assert not one.plan.kept_TK.any()
    [path] = export_program(trained, tmp_path, ["text"])
    assert_any_size(trained, "text", path)


def test_the_file_holds_operators_of_torch_alone(tmp_path: Path) -> None:
    trained = pretrained(tmp_path, *sparse())
    [path] = export_program(trained, tmp_path, ["text"])
    nodes = torch.export.load(path).graph.nodes
    operators = [node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten"}
    with zipfile.ZipFile(path) as archive:
        told = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    assert b"input_ids" in told
    assert str(Path(__file__).parents[3]).encode() not in told, "the path of a source file"
    assert_any_size(trained, "text", path)
    batch = batch_for(trained, "text", LENGTHS)
    assert_same(compare(trained, path, "text", batch), batch)


def test_a_program_that_needs_the_package_is_caught(tmp_path: Path) -> None:
    trained = pretrained(tmp_path, *sparse())
    program = program_of(trained, "text")
    assert [node.target for node in program.graph.nodes].count(torch.ops.vlmoe.expert_ffn.default) == 1
    torch.export.save(program, tmp_path / "own.pt2")
    graph = graph_of(trained, "text")
    inputs = {name: value.numpy() for name, value in tensors(graph, batch_for(trained, "text", LENGTHS)).items()}
    with pytest.raises(HubError, match=r"own.pt2 was written, but does not run in a process of its own: RuntimeError"):
        run_fresh(tmp_path / "own.pt2", inputs)


def test_the_package_is_not_importable_where_files_are_run(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    code = (Path(sys.modules[run_fresh.__module__].__file__).with_name("run_file.py")).read_text()  # type: ignore[arg-type]
    probe.write_text(code.replace("_main(*map(Path, sys.argv[1:]))", "import vlmoe_core"))
    done = subprocess.run([sys.executable, "-P", str(probe)], capture_output=True, text=True)
    assert "import of vlmoe_core halted" in done.stderr
