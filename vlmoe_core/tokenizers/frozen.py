"""Modules that never learn: they travel as files of their own, in no state dict and under no optimiser."""

from typing import Self

from torch import nn


class Frozen(nn.Module):
    """Always in evaluation mode, whatever the module that holds it is told."""

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)


def without_parameters(module: nn.Module) -> None:
    """Turn every parameter below `module` into a buffer that no state dict has."""
    for inner in module.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            delattr(inner, name)
            inner.register_buffer(name, parameter.detach(), persistent=False)
        for name, buffer in list(inner.named_buffers(recurse=False)):
            inner.register_buffer(name, buffer, persistent=False)
