"""What a compiler can't look into."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def uncompiled(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function itself, at which a compiled graph breaks; so that its shapes may depend on numbers."""
    # Decorating would load the compiler at import.
    disable: Any = torch.compiler.disable
    found: Callable[..., Tensor] = disable(compute) if torch.compiler.is_compiling() else compute
    return found
