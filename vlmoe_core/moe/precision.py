"""In which dtype the experts compute, and arithmetic that autocast must leave alone."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on that kind of device; None: autocast is off there, or there is none."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a matmul with `weight`: autocast's where it is on, save for float64, else the weight's own."""
    dtype = autocast_dtype(weight.device.type)
    return weight.dtype if dtype is None or weight.dtype == torch.float64 else dtype


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off; an empty one where it is off already, so that exported graphs hold none."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
