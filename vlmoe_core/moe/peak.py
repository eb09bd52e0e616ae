"""Peak memory of a piece of work: the most bytes that its tensors take at one moment, gradients set apart."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], gradients: Callable[[], Iterable[Tensor]], device_type: str = "cpu") -> int:
    """The most bytes alive at one moment of `work`, of what it allocates on a kind of device; its `gradients` left out.

    `gradients` is asked after the work. A gradient counts for nothing from the moment its memory is allocated; one that
    was made elsewhere and copied leaves that other memory in the sum. What was alive before the work counts for nothing
    either, and neither does memory that other threads allocate or that does not come from torch's allocators, such as
    the scratch of oneDNN and MKL.

    The profiler's record of all allocations is added up, as the CPU's allocator keeps no peak. CUDA's keeps one, but it
    can't tell which gradients were there already at the peak.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device_type == "cuda" else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        work()
    set_apart = Counter[int]()
    for gradient in gradients():
        set_apart[gradient.untyped_storage().data_ptr()] += gradient.nbytes
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    return _peak(list(_changes(tree, device_type)), set_apart)


def _changes(tree: Iterable[Any], device_type: str) -> Iterator[tuple[int, int]]:
    """(address, bytes) of each allocation and, negative, each release, in the order of time."""
    waiting, found = list(tree), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == device_type:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    for _, address, size in sorted(found, key=lambda one: one[0]):
        yield address, size


def _peak(changes: list[tuple[int, int]], set_apart: Counter[int]) -> int:
    """The largest running sum; `set_apart` bytes of what stands at an address in the end are left out."""
    last = {address: moment for moment, (address, size) in enumerate(changes) if size > 0}
    alive: dict[int, int] = {}
    now = peak = 0
    for moment, (address, size) in enumerate(changes):
        if size > 0:
            # An address is used again and again; only its last use can be the gradient's.
            alive[address] = size - (set_apart[address] if last[address] == moment else 0)
            now += alive[address]
            peak = max(peak, now)
        else:
            now -= alive.pop(address, 0)
    return peak
