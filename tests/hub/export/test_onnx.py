"""ONNX files in onnxruntime, and the work that they do."""

import importlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests.hub.export.graph_support import (
    LONGEST,
    against,
    assert_same,
    batch_for,
    dropping_all,
    finetuned,
    moe,
    pretrained,
    sparse,
    tensors,
)
from vlmoe_core.data.config import StreamName
from vlmoe_core.errors import UsageError
from vlmoe_core.hub.contents import plan_push
from vlmoe_core.hub.export import onnx_operators
from vlmoe_core.hub.export.compare import compare
from vlmoe_core.hub.export.graph import graph_of
from vlmoe_core.hub.export.onnx_graph import export_onnx, translated
from vlmoe_core.hub.export.program import program_of
from vlmoe_core.hub.export.reference import answer_natively
from vlmoe_core.hub.export.run import RECEIPT
from vlmoe_core.train.trained import Trained

LENGTHS = [5, 9, 2]
OTHER_LENGTHS = ([3], [1], [LONGEST], [LONGEST, 1, 7, 4, 4])


def assert_any_size(trained: Trained, stream: StreamName, path: Path, num_images: int = 1) -> None:
    """One example, one token, the longest text, other numbers of examples."""
    session, graph = onnxruntime.InferenceSession(path), graph_of(trained, stream)
    names = [output.name for output in session.get_outputs()]
    for lengths in OTHER_LENGTHS:
        batch = batch_for(trained, stream, lengths, num_images)
        values = session.run(names, {name: value.numpy() for name, value in tensors(graph, batch).items()})
        found = {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
        assert_same(against(trained, stream, batch, found), batch)


@pytest.mark.parametrize(
    ("stream", "values"),
    [("pair", {"eval_capacity_factor": 1.0}), ("image", {"top_k": 1, "eval_capacity_factor": 1e-9})],
)
def test_any_size(tmp_path: Path, stream: StreamName, values: dict[str, float]) -> None:
    trained = pretrained(tmp_path, *sparse(**values))
    [path] = export_onnx(trained, tmp_path / "out", [stream])
    assert path == tmp_path / "out" / f"model-{stream}.onnx"
    assert_any_size(trained, stream, path)
    batch = batch_for(trained, stream, LENGTHS)
    assert_same(compare(trained, path, stream, batch), batch)


def test_every_token_dropped(tmp_path: Path) -> None:
    trained = dropping_all(tmp_path)
    batch = batch_for(trained, "text", LENGTHS)
    [one] = answer_natively(trained, "text", batch).encoded.routed
    assert not one.plan.kept_TK.any()
    [path] = export_onnx(trained, tmp_path, ["text"])
    assert_any_size(trained, "text", path)


def test_two_pictures(tmp_path: Path) -> None:
    trained = finetuned(tmp_path, "nlvr2", *sparse(top_k=1))
    [path] = export_onnx(trained, tmp_path, ["pair"])
    assert_any_size(trained, "pair", path, 2)


def work_of(path: Path, inputs: dict[str, NDArray[np.generic]]) -> tuple[int, dict[str, NDArray[Any]]]:
    """Floating-point operations of all products of a run, two a multiply-add, and the outputs."""
    counted = []

    def count(a: NDArray[Any], b: NDArray[Any], inner: int, out: NDArray[Any]) -> tuple[NDArray[Any]]:
        counted.append(2 * out.size * inner)
        return (out,)

    class Gemm(OpRun):  # type: ignore[misc]
        def _run(self, a, b, c=None, alpha=1.0, beta=1.0, transA=0, transB=0):  # type: ignore[no-untyped-def]
            a, b = (a.T if transA else a), (b.T if transB else b)
            return count(a, b, a.shape[1], (a @ b + (0 if c is None else c)).astype(a.dtype))

    class MatMul(OpRun):  # type: ignore[misc]
        def _run(self, a, b):  # type: ignore[no-untyped-def]
            return count(a, b, a.shape[-1], a @ b)

    model = onnx.load(path)
    values = ReferenceEvaluator(model, new_ops=[Gemm, MatMul]).run(None, inputs)
    return sum(counted), dict(zip([o.name for o in model.graph.output], values, strict=True))


def compute_all(*arguments: Any) -> Any:
    """What must not be: every expert over all rows, its own picked afterwards."""
    op = onnx_operators.op
    x_TD, weight_TK, choice_N, offsets_E, up_EHD, up_EH, down_EDH, down_ED, *_ = arguments
    top_k, zero = weight_TK.shape[1], op.Constant(value_int=0)
    x_ND = op.Gather(x_TD, op.Div(choice_N, op.Constant(value_int=top_k)))
    row_N1 = op.Unsqueeze(op.Range(zero, op.Size(choice_N), op.Constant(value_int=1)), op.Constant(value_ints=[1]))
    ends_E, start, y_ND = op.Cast(offsets_E, to=7), zero, op.Mul(x_ND, op.Constant(value_float=0.0))
    for e in range(up_EHD.shape[0]):
        up, up_b, down, down_b = (op.Gather(w, op.Constant(value_int=e)) for w in (up_EHD, up_EH, down_EDH, down_ED))
        out_ND = op.Gemm(op.Gelu(op.Gemm(x_ND, up, up_b, transB=1)), down, down_b, transB=1)
        end = op.Gather(ends_E, op.Constant(value_int=e))
        own_N1 = op.And(op.GreaterOrEqual(row_N1, start), op.Less(row_N1, end))
        y_ND, start = op.Where(own_N1, out_ND, y_ND), end
    y_CD = op.Gather(y_ND, onnx_operators.argsort(choice_N))
    y_TD = op.Mul(y_CD, weight_TK)
    return y_TD, y_TD, y_TD


def routed_work(trained: Trained, lengths: list[int], choices: Fraction) -> int:
    """The operations of the whole model where a token has so many experts in a sparse layer, as the config counts."""
    config = trained.recipe.model
    assert config.moe.text is not None
    head = 2 * config.dim * trained.recipe.tokenizers.text.vocab_size * sum(lengths)
    expert = 4 * config.dim * config.hidden * len(config.sparse_layers("text")) * sum(lengths)
    # Attention is padded: every text has the places of the longest.
    padding = 4 * config.dim * config.layers * (len(lengths) * max(lengths) ** 2 - sum(n**2 for n in lengths))
    return int(sum(config.flops(0, n) for n in lengths) + head + padding + (choices - config.moe.text.top_k) * expert)


def inputs_of(trained: Trained, lengths: list[int]) -> dict[str, NDArray[Any]]:
    graph = graph_of(trained, "text")
    return {name: value.numpy() for name, value in tensors(graph, batch_for(trained, "text", lengths)).items()}


TEXTS = [LONGEST, 9, 17, 12]


def test_what_a_file_holds_and_does(tmp_path: Path) -> None:
    trained = pretrained(tmp_path, *sparse())
    [path] = export_onnx(trained, tmp_path, ["text"])
    graph = onnx.load(path).graph
    sizes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert sizes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert [o.name for o in graph.output] == ["text_states", "text_logits", "experts.0.text"]
    weights = {w.name: tuple(w.dims) for w in graph.initializer if ".experts." in w.name}
    own = {"up.weight": (48, 32), "up.bias": (48,), "down.weight": (32, 48), "down.bias": (32,)}
    before = "encoder.blocks.0.ffn.text.experts"
    assert weights == {f"{before}.{e}.{name}": shape for e in range(4) for name, shape in own.items()}
    assert {o.domain for o in onnx.load(path).opset_import} == {""}
    assert str(Path(__file__).parents[3]).encode() not in path.read_bytes(), "the path of a source file"
    assert_any_size(trained, "text", path)
    work, outputs = work_of(path, inputs_of(trained, TEXTS))
    assert (outputs["experts.0.text"] >= 0).all(), "dropless"
    assert work == routed_work(trained, TEXTS, Fraction(2))


def narrow(folder: Path, factor: float | None) -> Trained:
    """Eight wide experts a layer, one a token."""
    pool = moe(num_experts=8, layers=[0, 1], top_k=1, eval_capacity_factor=factor)
    return pretrained(folder, "model.moe.vision=null", f"model.moe.text={pool}", "model.hidden=256")


def test_the_work_is_the_routed_work(tmp_path: Path) -> None:
    trained = narrow(tmp_path, 0.5)
    [path] = export_onnx(trained, tmp_path, ["text"])
    work, outputs = work_of(path, inputs_of(trained, TEXTS))
    kept = sum(int((outputs[f"experts.{layer}.text"] >= 0).sum()) for layer in (0, 1))
    share = Fraction(kept, 2 * sum(TEXTS))
    assert 0 < share <= Fraction(1, 2) + Fraction(8, sum(TEXTS))
    assert work == routed_work(trained, TEXTS, share)
    assert work <= 1.3 * routed_work(trained, TEXTS, Fraction(1, 2))


def test_computing_all_experts_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = narrow(tmp_path, None)
    monkeypatch.setitem(onnx_operators.TRANSLATIONS, torch.ops.vlmoe.expert_ffn.default, compute_all)
    [path] = export_onnx(trained, tmp_path, ["text"])
    work, outputs = work_of(path, inputs_of(trained, TEXTS))
    found, batch = {n: torch.from_numpy(v) for n, v in outputs.items()}, batch_for(trained, "text", TEXTS)
    assert_same(against(trained, "text", batch, found), batch)
    assert work == routed_work(trained, TEXTS, Fraction(8))
    assert work > 1.3 * routed_work(trained, TEXTS, Fraction(1))


def test_weights_beside_a_large_file_are_run_and_pushed(tmp_path: Path) -> None:
    trained, out = finetuned(tmp_path, "nli"), tmp_path / "out"
    out.mkdir()
    path = out / "model-text.onnx"
    translated(program_of(trained, "text")).save(str(path), external_data=True)
    (out / RECEIPT).write_text("{}")
    files = {file.name: file.stat().st_size for file in out.iterdir()}
    weights = sum(p.nbytes for p in graph_of(trained, "text").parameters())
    assert files.keys() == {path.name, f"{path.name}.data", RECEIPT} and files[f"{path.name}.data"] > 0.9 * weights
    batch = batch_for(trained, "text", LENGTHS)
    assert_same(compare(trained, path, "text", batch), batch)
    assert str(tmp_path).encode() not in path.read_bytes(), "a path of the machine"
    assert {file.path: file.size for file in plan_push(out)} == files


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = importlib.import_module

    def refuse(name: str, *more: Any) -> Any:
        if name == missing:
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UsageError, match=rf"package {missing}: pip install -c constraints.txt -e '.\[export\]'"):
        export_onnx(pretrained(tmp_path), tmp_path / "out", ["text"])
    assert not (tmp_path / "out").exists()
