"""The model as the processes of a run share it: copies, shares of the experts, or everything cut."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from vlmoe_core.model.block import Block
from vlmoe_core.moe.exchange import Exchange
from vlmoe_core.moe.experts import Experts
from vlmoe_core.train.mesh import Mesh
from vlmoe_core.train.parallel import LOW_DTYPES


@contextmanager
def shared_out(mesh: Mesh) -> Iterator[None]:
    """Inside, all experts that are built keep this process's share as soon as they are made.

    So a process never holds more than its share and one layer, and draws the same weights as a single process.
    """
    if mesh.expert == 1 or mesh.grid is None:
        yield
        return
    exchange = Exchange(mesh.grid.get_group("expert"))

    def keep(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(child, Experts) and child.exchange is None:
            child.keep(mesh.share(child.share.total), exchange)

    handle = register_module_module_registration_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def wrap(accelerator: Accelerator, objective: nn.Module, mesh: Mesh, precision: str) -> nn.Module:
    """The objective as it is trained: on its device, in the precision of the run, its gradients shared.

    Of several processes the dense weights lie on all of them, their gradients averaged by DistributedDataParallel, and
    shares of experts are left to `Gradients`; or all weights are cut over the processes by torch's fully_shard, which
    changes the objective itself.
    """
    if mesh.world is not None and mesh.shard == "full":
        cut_weights(objective, mesh, LOW_DTYPES.get(precision))
        cut: nn.Module = accelerator.prepare_model(objective, evaluation_mode=True)  # no DistributedDataParallel
        return cut
    shares = [name for name, _ in shared_parameters(objective)]
    if shares:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, shares)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # torch 2.13 renames `broadcast_buffers`; Accelerate 1.15 does not know the new name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        model: nn.Module = accelerator.prepare(objective)
    return model


def shared_parameters(objective: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of which each process of a group holds another share, with their names."""
    for prefix, module in objective.named_modules():
        if isinstance(module, Experts) and not module.share.whole:
            yield from ((f"{prefix}.{name}", parameter) for name, parameter in module.named_parameters())


def num_parameters(objective: nn.Module) -> int:
    """Of the whole objective, on all processes together."""
    here = sum(parameter.numel() for parameter in objective.parameters())
    elsewhere = (
        parameter.numel() // experts.share.count * (experts.share.total - experts.share.count)
        for experts in objective.modules()
        if isinstance(experts, Experts)
        for parameter in experts.parameters()
    )
    return here + sum(elsewhere)


def is_cut(objective: nn.Module) -> bool:
    """Whether fully_shard has cut the parameters."""
    return isinstance(objective, FSDPModule)


def cut_weights(objective: nn.Module, mesh: Mesh, low: torch.dtype | None) -> None:
    """Cut the experts over the replicas of their share, block by block all else over all processes.

    Scalars (temperatures) can't be cut; they and their gradients are left to `Gradients`.
    """
    assert mesh.grid is not None and mesh.world is not None, "several processes"
    scalars = {parameter for parameter in objective.parameters() if parameter.ndim == 0}
    for experts in [module for module in objective.modules() if isinstance(module, Experts)]:
        _cut_experts(experts, mesh, low)
    for block in [module for module in objective.modules() if isinstance(module, Block)]:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh.world, ignored_params=scalars)
    fully_shard(objective, mesh=mesh.world, ignored_params=scalars)


def _cut_experts(experts: Experts, mesh: Mesh, low: torch.dtype | None) -> None:
    """Experts are gathered in the precision of the run, and their gradients summed in float32.

    They are divided by all ranks; by `Gradients` where there is one replica, as fully_shard then divides by nothing.
    """
    assert mesh.grid is not None, "several processes"
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
    rows = experts.share.count % mesh.data == 0
    columns = all(p.shape[1] % mesh.data == 0 for p in experts.parameters())
    place = Shard(0) if rows or not columns else Shard(1)
    cut = fully_shard(experts, mesh=mesh.grid["data"], mp_policy=policy, shard_placement_fn=lambda parameter: place)
    if mesh.data > 1:
        cut.set_gradient_divide_factor(float(mesh.size))
        cut.set_force_sum_reduction_for_comms(True)  # gloo can't divide while it sums
