"""Memory for the weight gradients of all experts of a layer, kept for the next step when a gradient is let go.

Such a gradient is large, and the C allocator gives what is large back to the system and takes it anew every time: each
step Linux would zero and map hundreds of megabytes, page by page, while the products write them. That cost more than
the experts' own overhead (docs/PERFORMANCE.md). A GPU has torch's caching allocator for this; here is one for the CPU.
"""

import contextlib
import ctypes
import functools
import mmap
import weakref

import torch
from torch import Tensor, nn

LARGE = 32 * 2**20
"""Bytes from which on glibc never keeps freed memory for later."""


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of that shape and device, its values not set.

    Args:
        tensor: gives shape and device.
        dtype: of the new tensor; None: that of `tensor`.
    """
    dtype = dtype or tensor.dtype
    size = tensor.numel() * dtype.itemsize
    plain = type(tensor) in (Tensor, nn.Parameter)  # others, such as fake ones, have no memory
    if not tensor.is_cpu or size < LARGE or not plain:
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    free = _free(size)
    pages = free.pop() if free else _map(size)
    # The tensor's storage holds the lease, whatever holds the storage; when it goes, the pages are free again.
    lease = (ctypes.c_char * size).from_buffer(pages)
    weakref.finalize(lease, free.append, pages).atexit = False
    fresh = torch.frombuffer(lease, dtype=dtype).view(tensor.shape)
    # As torch.empty does, so that tests find reads of what was never written.
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return fresh.fill_(torch.nan) if torch.are_deterministic_algorithms_enabled() and filled else fresh


@functools.cache
def _free(size: int) -> list[mmap.mmap]:
    """The memory of a size that no tensor uses."""
    return []


def _map(size: int) -> mmap.mmap:
    """Fresh memory, in huge pages where the system has them."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
