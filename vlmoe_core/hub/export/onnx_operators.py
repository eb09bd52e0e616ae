"""Operators that torch.onnx has no translation for, in those of ONNX; the experts of a layer among them.

Needs onnxscript: imported where a graph is translated.

Shapes: vlmoe_core/moe/call.py.
"""

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20

import vlmoe_core.moe.operator  # noqa: F401  registers vlmoe::expert_ffn

Value = Any
"""A value of the graph that is being built."""
op: Any = opset20
MOST = 2**63 - 1


def sort_stable(self: Value, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Value:
    """Sorted values and their places; of equal ones TopK, too, takes the first one first."""
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def argsort(self: Value, dim: int = -1, descending: bool = False) -> Value:
    """The places of the sorted values."""
    return sort_stable(self, True, dim, descending)[1]


def argsort_stable(self: Value, stable: bool, dim: int = -1, descending: bool = False) -> Value:
    """The same, asked for by name."""
    return argsort(self, dim, descending)


def searchsorted(
    sorted_sequence: Value,
    self: Value,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Value | None = None,
) -> Value:
    """How many of a sorted vector lie below each value; at or below it with `right`."""
    before = op.LessOrEqual if right else op.Less
    below = before(op.Unsqueeze(sorted_sequence, _ints(0)), op.Unsqueeze(self, _ints(1)))
    number = op.Cast(below, to=ir.DataType.INT32 if out_int32 else ir.DataType.INT64)
    return op.ReduceSum(number, _ints(1), keepdims=0)


def less_or_equal(self: Value, other: Value | int) -> Value:
    """torch.export states the bounds of sizes, some of them beyond the 64 bits of ONNX."""
    return op.LessOrEqual(self, op.Constant(value_int=min(other, MOST)) if isinstance(other, int) else other)


def expert_ffn(
    x_TD: Value,
    weight_TK: Value,
    choice_N: Value,
    offsets_E: Value,
    up_EHD: Value,
    up_EH: Value,
    down_EDH: Value,
    down_ED: Value,
    dropout_CH: Value | None = None,
    save: bool = False,
) -> Value:
    """`vlmoe::expert_ffn` in evaluation: a slice of the sorted rows for each expert."""
    top_k, width = weight_TK.shape[1], x_TD.shape[1]
    x_ND = op.Gather(x_TD, op.Div(choice_N, op.Constant(value_int=top_k)), axis=0)
    ends_E = op.Cast(offsets_E, to=ir.DataType.INT64)
    start, outputs = _ints(0), []
    for e in range(up_EHD.shape[0]):
        up_HD, up_H, down_DH, down_D = (
            op.Gather(w, op.Constant(value_int=e)) for w in (up_EHD, up_EH, down_EDH, down_ED)
        )
        end = op.Gather(ends_E, _ints(e))
        hidden_MH = op.Gelu(op.Gemm(op.Slice(x_ND, start, end, _ints(0)), up_HD, up_H, transB=1))
        outputs.append(op.Gemm(hidden_MH, down_DH, down_D, transB=1))
        start = end
    # Dropped choices, which stand behind the last expert's rows, read a row of zeros.
    zero = op.Constant(value=ir.tensor(torch.zeros(1, width).numpy()))
    place_C = op.Min(argsort(choice_N), start)
    rows_CD = op.Gather(op.Concat(*outputs, zero, axis=0), place_C, axis=0)
    weighted_CD = op.Mul(rows_CD, op.Reshape(weight_TK, _ints(-1, 1)))
    y_TD = op.ReduceSum(op.Reshape(weighted_CD, _ints(-1, top_k, width)), _ints(1), keepdims=0)
    none = op.Constant(value=ir.tensor(torch.zeros(0, width).numpy()))
    return y_TD, none, none


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sort.stable: sort_stable,
    torch.ops.aten.argsort.default: argsort,
    torch.ops.aten.argsort.stable: argsort_stable,
    torch.ops.aten.searchsorted.Tensor: searchsorted,
    operator.le: less_or_equal,
    torch.ops.vlmoe.expert_ffn.default: expert_ffn,
}


def split_experts(model: ir.Model) -> None:
    """Give each expert weights of its own, `....experts.<e>.up.weight` as in a checkpoint, in place of a Gather.

    onnxruntime would gather them all when it loads the file, which takes ten times as long.
    """
    graph: Any = model.graph
    fused = {name: value for name, value in graph.initializers.items() if ".experts." in name}
    for node in [node for value in fused.values() for node, _ in value.uses() if node.op_type == "Gather"]:
        number: Any = ir.convenience.get_const_tensor(node.inputs[1])
        one = _row(node.inputs[0], int(number.numpy()))
        graph.register_initializer(one)
        ir.convenience.replace_all_uses_with(node.outputs[0], one)
        graph.remove(node, safe=True)
    for name in [name for name, value in fused.items() if not value.uses()]:
        del graph.initializers[name]


def _row(fused: Any, number: int) -> ir.Value:
    """One expert's part of a weight or bias; it shares the memory."""
    before, after = fused.name.split(".experts.")
    name = f"{before}.experts.{number}.{after}"
    tensor: Any = ir.tensor(fused.const_value.numpy()[number], name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def forget_sources(model: ir.Model) -> None:
    """Take out the notes of the exporter, which hold the paths of source files."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
