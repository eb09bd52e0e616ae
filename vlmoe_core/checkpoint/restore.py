"""Puts tensors back into a module and an optimiser, by name and never by index."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vlmoe_core.checkpoint.held import Box, Held, held_tensors, hold, sharded_like, share_of
from vlmoe_core.checkpoint.stored import pieces, shape_of
from vlmoe_core.errors import CheckpointError
from vlmoe_core.moe.share import Share

SHOWN = 8
"""Names that a message lists before it only counts."""


@torch.no_grad()
def load_model_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module's parameters and persistent buffers, reading each once, and expert by expert.

    Of what is shared or sharded only this process's part is read; no process waits for another. Floating-point numbers
    that the module's type holds exactly (bfloat16 in float32) are taken over as they are.

    Raises:
        CheckpointError: names are missing or too many, a shape or type differs, or the module ties tensors that differ
            in the checkpoint. The module is then of no use: some of its tensors may be overwritten.
    """
    targets = held_tensors(module)
    _check_names(targets, tensors)
    misfits = {
        name: f"{name} is {shape}, the model wants {held.shape}"
        for name, held in targets.items()
        if (shape := shape_of(tensors, name)) != held.shape
    }
    filled: dict[tuple[object, ...], str] = {}
    for piece in pieces(tensors, {name: held.box for name, held in targets.items() if name not in misfits}):
        place, found = piece.place(targets[piece.name].local), piece.tensor
        if not _holds(place.dtype, found.dtype):
            misfits[piece.name] = f"{piece.name} is {_kind(found)}, the model wants {_kind(place)}"
            continue
        memory = (place.device, place.data_ptr(), place.shape, place.stride())
        first = filled.setdefault(memory, piece.name)
        if first != piece.name and not _same_bits(place, found.to(place.dtype)):
            raise CheckpointError(
                f"the model ties '{piece.name}' to '{first}', but their values differ in the checkpoint"
            )
        place.copy_(found)
    if misfits:
        raise CheckpointError(f"the checkpoint is of another model: {_listed(list(misfits.values()))}")


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether each number of one type is one of the other: the same type, or a shorter floating-point one."""
    shorter = narrow.is_floating_point and torch.promote_types(narrow, wide) == wide
    return narrow == wide or shorter


def named_optimizer_state(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The optimiser's state as `KIND.<parameter>`, such as `exp_avg.<parameter>`: tensors as they are, not copies.

    Learning rates and other settings are not in it: they follow from recipe and step. A parameter that never had a
    gradient has no state.

    Raises:
        CheckpointError: a parameter of the optimiser has no name, or its state is not made of tensors.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    state: dict[str, Tensor] = {}
    for parameter in _parameters(optimizer):
        if id(parameter) not in names:
            raise CheckpointError(
                f"the optimiser has a parameter {tuple(parameter.shape)} that is not one of the model's"
            )
        name = names[id(parameter)]
        for kind, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or "." in kind:
                raise CheckpointError(f"optimiser state '{kind}' of '{name}' can't be saved: {type(value).__name__}")
            state[f"{kind}.{name}"] = value
    return state


def load_named_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, Tensor],
    shares: Mapping[str, Share] | None = None,
) -> None:
    """Replace an optimiser's state by what `named_optimizer_state` gave, bit for bit, on each parameter's device.

    Of what is shared or sharded only this process's part is read, and sharded as its parameter is.

    Args:
        optimizer: of the module as it is trained.
        named_parameters: the module's.
        tensors: states by `KIND.<parameter>`.
        shares: what this process holds of the experts, from `expert_shares`; null: all.

    Raises:
        CheckpointError: a name is not one of the optimiser's parameters, a shape differs, or moments are missing.
    """
    managed = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in named_parameters if id(parameter) in managed}
    kinds_of = _kinds_by_parameter(tensors)
    _check_moments(kinds_of, parameters)
    boxes: dict[str, Box] = {}
    for name, kinds in kinds_of.items():
        boxes |= _boxes(name, kinds, hold(parameters[name], share_of(name, shares or {})), tensors)
    optimizer.state.clear()
    parts: dict[str, Tensor] = {}
    for piece in pieces(tensors, boxes):
        kind, _, name = piece.name.partition(".")
        if piece.name not in parts:
            device = _device_of(kind, parameters[name], managed[id(parameters[name])])
            shape = [len(side) for side in boxes[piece.name]]
            parts[piece.name] = torch.empty(shape, dtype=piece.tensor.dtype, device=device)
        piece.place(parts[piece.name]).copy_(piece.tensor)
    for key in boxes:  # in one order on all processes, whichever files they read
        (kind, _, name), part = key.partition("."), parts[key]
        optimizer.state[parameters[name]][kind] = sharded_like(part, parameters[name]) if part.ndim else part


def _boxes(name: str, kinds: Sequence[str], held: Held, tensors: Mapping[str, Tensor]) -> dict[str, Box]:
    """What is read of the states of one parameter. Raises CheckpointError for another shape."""
    boxes: dict[str, Box] = {}
    for kind in kinds:
        shape = shape_of(tensors, f"{kind}.{name}")
        if shape and shape != held.shape:
            raise CheckpointError(f"'{kind}.{name}' is {shape}, but its parameter is {held.shape}")
        boxes[f"{kind}.{name}"] = held.box if shape else ()
    return boxes


def _check_names(targets: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    sides = {
        "missing in the checkpoint": [name for name in targets if name not in tensors],
        "not in the model": [name for name in tensors if name not in targets],
    }
    told = [f"{side}: {_listed(names)}" for side, names in sides.items() if names]
    if told:
        raise CheckpointError(f"the checkpoint is of another model; {'; '.join(told)}")


def _kinds_by_parameter(tensors: Iterable[str]) -> dict[str, list[str]]:
    kinds_of: dict[str, list[str]] = {}
    for key in tensors:
        kind, _, name = key.partition(".")
        kinds_of.setdefault(name, []).append(kind)
    return kinds_of


def _check_moments(kinds_of: Mapping[str, Sequence[str]], parameters: Mapping[str, Tensor]) -> None:
    unknown = [name for name in kinds_of if name not in parameters]
    if unknown:
        raise CheckpointError(f"the checkpoint has optimiser state of what is not trained here: {_listed(unknown)}")
    every = {kind for kinds in kinds_of.values() for kind in kinds}
    missing = [f"{kind}.{name}" for name, kinds in kinds_of.items() for kind in sorted(every - set(kinds))]
    if missing:
        raise CheckpointError(f"the checkpoint lacks optimiser state: {_listed(missing)}")


def _device_of(kind: str, parameter: Tensor, group: Mapping[str, object]) -> torch.device:
    """AdamW keeps its step count on the CPU, unless its kernel reads it on the parameter's device."""
    on_device = kind != "step" or group.get("fused") or group.get("capturable")
    return parameter.device if on_device else torch.device("cpu")


def _same_bits(left: Tensor, right: Tensor) -> bool:
    left_bytes, right_bytes = (tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left_bytes, right_bytes)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
