"""Experts between the encode and decode kernels of Tutel (arXiv 2206.03382), an optional package; the plan is ours.

Shapes: T tokens, D width, E experts, K choices of a token, C places of an expert, P processes that share the experts,
L = E / P experts of one; O and I are the output and input width of a linear map.

Tutel's router and its losses are not used, and so none of the environment variables that change its layer; SKIP_A2A,
which would leave the tokens where they are, is refused. Its kernels compute in float32, on a CPU also in float64.
Tokens of bfloat16 and float16 are carried as float32: encode only copies, so this is exact, and decode rounds once,
after the weighted sum. The products between have the dtype of the tokens. float64 on a GPU is refused: Tutel's own
dispatcher would round it unsaid.

The two autograd functions are called without that dispatcher, which keeps kernels and a vector of ones on its class in
the dtype of the first call: after one call in float16 those in float32 fail, or on a GPU read wrong bytes.

On a GPU Tutel compiles its kernels at the first call (it needs nvcc) and runs them on the default stream.

Where processes share the experts, all C places of an expert travel by Tutel's `all_to_all_single`, empty ones included.
Its `all_to_all` is left alone: the backward pass of that one takes the group of all processes, whatever the group.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from vlmoe_core.errors import RecipeError
from vlmoe_core.moe.experts import Linear
from vlmoe_core.moe.plan import Assignment
from vlmoe_core.moe.uncompiled import uncompiled

_COMMIT = "82af7aad"
_LARGEST_INDEX = 2**31 - 1


def run(x_TD: Tensor, plan: Assignment, up: Linear, down: Linear, dropout_CH: None = None) -> Tensor:
    """All experts at once, each over its C places, empty ones included; there is no dropout.

    x_TD (T, D) -> the weighted sum of each token's kept choices (T, D). C is the plan's capacity; a dropless plan has
    that of its busiest expert, which waits for the device and takes up to E x T x D numbers.

    Raises:
        RecipeError: Tutel is not installed, or its kernels lack the dtype, the device or the size.
    """
    return uncompiled(_alone)(x_TD, plan, up, down)


def run_in_group(x_TD: Tensor, plan: Assignment, up: Linear, down: Linear, group: dist.ProcessGroup) -> Tensor:
    """The same with the experts of all processes of a group, `up` and `down` being those of this one.

    C is that of the busiest expert of any process, with a capacity too: each layer waits once for the device and for
    the others. All processes of the group call it, with tokens or without.

    Raises:
        RecipeError: as `run`, or Tutel is told to leave out its exchange.
    """
    return uncompiled(_in_group)(x_TD, plan, up, down, group)


def _alone(x_TD: Tensor, plan: Assignment, up: Linear, down: Linear) -> Tensor:
    capacity = int(_busiest(plan)) if plan.capacity is None else plan.capacity
    return _tutel(x_TD, plan, capacity, partial(_experts, up=up, down=down))


def _in_group(x_TD: Tensor, plan: Assignment, up: Linear, down: Linear, group: dist.ProcessGroup) -> Tensor:
    capacity = int(_net().simple_all_reduce(_busiest(plan), group=group, op=dist.ReduceOp.MAX))
    return _tutel(x_TD, plan, capacity, partial(_experts_of, up=up, down=down, group=group))


def _tutel(x_TD: Tensor, plan: Assignment, capacity: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Tutel's kernels around `compute`, which takes all places (E, C, D) to their outputs."""
    package = _package("tutel.impls.fast_dispatch")
    dtype = carrier_dtype(x_TD.dtype, x_TD.device.type)
    dispatch = _dispatch_of(plan, capacity, x_TD, dtype)
    shape_ECD = (plan.num_experts, capacity, x_TD.shape[1])
    rows = package.GatingEncoder.apply(dispatch, x_TD.to(dtype).contiguous())
    out_ECD = compute(rows.view(shape_ECD).to(x_TD.dtype)).to(dtype).contiguous()
    y_TD: Tensor = package.GatingDecoder.apply(dispatch, out_ECD, *_columns(plan.weight_TK, dtype))
    return y_TD.to(x_TD.dtype)


def _experts_of(x_ECD: Tensor, up: Linear, down: Linear, group: dist.ProcessGroup) -> Tensor:
    """The outputs at all places of this process (E, C, D), computed by the processes of the group."""
    net, processes, (_, capacity, dim) = _net(), group.size(), x_ECD.shape
    rows_PLCD = net.all_to_all_single(x_ECD, group).view(processes, -1, capacity, dim)
    out_LND = _experts(rows_PLCD.transpose(0, 1).flatten(1, 2), up, down)
    out_PLCD = out_LND.view(-1, processes, capacity, dim).transpose(0, 1)
    out_ECD: Tensor = net.all_to_all_single(out_PLCD.flatten(0, 1), group)
    return out_ECD


def _experts(x_ECI: Tensor, up: Linear, down: Linear) -> Tensor:
    return _linear(F.gelu(_linear(x_ECI, up)), down)


def _linear(x_ECI: Tensor, weights: Linear) -> Tensor:
    weight_EOI, bias_EO = weights
    return torch.baddbmm(bias_EO.unsqueeze(1), x_ECI, weight_EOI.transpose(1, 2))


def carrier_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which the kernels carry tokens of `dtype` without loss.

    Raises:
        RecipeError: there is none, or no kernel for that kind of device.
    """
    if device_type not in ("cpu", "cuda"):
        raise RecipeError(f"experts: tutel has kernels for cpu and cuda, not for {device_type}: use 'experts: grouped'")
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch.float32
    if dtype == torch.float64 and device_type == "cpu":
        return torch.float64
    name = str(dtype).removeprefix("torch.")
    raise RecipeError(
        f"experts: tutel has no kernel for {name} on {device_type}: use 'experts: grouped', or float32 or bfloat16"
    )


@dataclass(frozen=True)
class _Dispatch:
    """Our plan under the names by which Tutel's autograd functions read it."""

    num_global_experts: int
    capacity: int
    sample_size: int
    model_dim: int
    aligned_dim: int
    """The width in units of the kernel's type."""
    indices_: list[Tensor]
    """The expert of each token (int32), a vector a choice."""
    locations_: list[Tensor]
    """Its place there (int32); the capacity where the choice is dropped, which the kernels then skip."""
    ones_helper: Tensor
    """The weights of encode: none."""
    func_fwd: Callable[..., None]
    func_bwd_data: Callable[..., None]
    func_bwd_gate: Callable[..., None]


def _dispatch_of(plan: Assignment, capacity: int, x_TD: Tensor, dtype: torch.dtype) -> _Dispatch:
    tokens, dim = x_TD.shape
    _refuse_large(plan.num_experts * capacity, tokens, dim)
    forward, backward_data, backward_gate = _kernels(dtype, x_TD.is_cuda)
    return _Dispatch(
        num_global_experts=plan.num_experts,
        capacity=capacity,
        sample_size=tokens,
        model_dim=dim,
        aligned_dim=dim,
        indices_=_columns(plan.expert_TK, torch.int32),
        locations_=_columns(plan.slot_TK.masked_fill(~plan.kept_TK, capacity), torch.int32),
        ones_helper=torch.ones(tokens, dtype=dtype, device=x_TD.device),
        func_fwd=forward,
        func_bwd_data=backward_data,
        func_bwd_gate=backward_gate,
    )


def _busiest(plan: Assignment) -> Tensor:
    """() places that hold every kept choice, at least 1."""
    taken_N = (plan.slot_TK + 1).masked_fill(~plan.kept_TK, 0).reshape(-1)
    return torch.cat([taken_N, taken_N.new_ones(1)]).amax()


def _columns(values_TK: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """One vector (T,) a choice; the kernels read contiguous ones only."""
    return [column_T.contiguous() for column_T in values_TK.to(dtype).unbind(1)]


def _refuse_large(places: int, tokens: int, dim: int) -> None:
    """The kernels count numbers in 32 bits and would write elsewhere beyond them."""
    if max(places, tokens) * dim > _LARGEST_INDEX:
        raise RecipeError(
            f"experts: tutel counts at most 2^31 - 1 numbers, fewer than {places} places of all experts or {tokens} "
            f"tokens at width {dim} have: use 'experts: grouped', a smaller micro-batch or a smaller capacity_factor"
        )


def _net() -> Any:
    """Tutel's module of communication, which asks SKIP_A2A once, when it is imported."""
    net = _package("tutel.net")
    if _package("tutel.impls.communicate").TUTEL_SKIP_A2A:
        raise RecipeError(
            "experts: tutel would leave the tokens where they are, as the environment has SKIP_A2A: unset it, or use "
            "'experts: grouped'"
        )
    return net


def _package(name: str) -> Any:
    """A module of Tutel."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            f"experts: tutel needs the package tutel, which can't be imported ({error}): use 'experts: grouped', or "
            f"install tutel at commit {_COMMIT} as the section 'Tutel' of README.md says"
        ) from error


@cache
def _kernels(dtype: torch.dtype, is_cuda: bool) -> tuple[Callable[..., None], ...]:
    """Encode, decode and the gradient of the weights; compiled once on a GPU."""
    if is_cuda and not hasattr(importlib.import_module("tutel_custom_kernel"), "inject_source"):
        raise RecipeError(
            "experts: tutel is installed without its GPU kernels: use 'experts: grouped', or install tutel anew where "
            "torch finds CUDA"
        )
    sparse = importlib.import_module("tutel.jit_kernels.sparse")
    return (
        sparse.create_forward(dtype, is_cuda),
        sparse.create_backward_data(dtype, is_cuda),
        sparse.create_backward_gate(dtype, is_cuda),
    )
