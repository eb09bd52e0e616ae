"""What a GPU and the wires between GPUs are taken to do, each constant with where it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlmoe_core.analysis.scaling.cost import Fabric, Link


@dataclass(frozen=True)
class Machine:
    """The devices of a run, all alike."""

    rate: float
    """Operations a second that a device really computes while it trains."""
    memory: float
    """Bytes of a device that a run may fill."""
    memory_rate: float
    """Bytes a second between a device and its memory."""
    fabric: Fabric
    """How devices are joined."""
    behind: float = 1.0
    """Share of gradient sums and gathered weights that runs behind the computation, if that lasts long enough."""


@dataclass(frozen=True)
class Constant:
    """A number of a machine."""

    name: str
    """What it says."""
    value: float
    """In its unit."""
    unit: str
    """Its unit."""
    source: str
    """Where it comes from: a publication, or an assumption said to be one."""


H100 = (
    Constant("peak", 989e12, "FLOP/s, bf16, dense", "NVIDIA H100 SXM data sheet"),
    Constant("share of the peak", 0.40, "", "assumption: usual for transformers of this width; not measured"),
    Constant("memory", 80e9, "bytes", "NVIDIA H100 SXM data sheet"),
    Constant("share of the memory", 0.90, "", "assumption: the rest is CUDA's context, fragments, buffers of NCCL"),
    Constant("memory bandwidth", 3.35e12, "bytes/s", "NVIDIA H100 SXM data sheet"),
    Constant("GPUs a node", 8, "", "NVIDIA DGX H100: 8 GPUs, one network card each"),
    Constant("inside a node", 360e9, "bytes/s", "NCCL's constant for Hopper; data sheet of NVLink: 450e9 each way"),
    Constant(
        "between nodes",
        50e9,
        "bytes/s a GPU",
        "ConnectX-7 data sheet: 400 Gb/s; DeepEP measured 39e9 to 58e9 at 32 to 256 GPUs",
    ),
    Constant("start of a collective", 8.4e-6, "s", "NCCL, src/graph/tuning.cc: ring, Simple"),
    Constant("hop inside a node", 3.4e-6, "s", "NCCL, src/graph/tuning.cc: NVLink, ring, Simple"),
    Constant("hop between nodes", 14e-6, "s", "NCCL, src/graph/tuning.cc: network, ring, Simple"),
    Constant("message inside a node", 0.6e-6, "s", "NCCL, src/graph/tuning.cc: NVLink, ring, LL"),
    Constant("message between nodes", 2.7e-6, "s", "NCCL, src/graph/tuning.cc: network, ring, LL"),
)
"""A cluster of NVIDIA H100 SXM in nodes of 8. Nothing of this was measured by us."""


def machine_of(constants: Sequence[Constant]) -> Machine:
    """The machine that such a list describes."""
    of = {constant.name: constant.value for constant in constants}
    return Machine(
        rate=of["peak"] * of["share of the peak"],
        memory=of["memory"] * of["share of the memory"],
        memory_rate=of["memory bandwidth"],
        fabric=Fabric(
            start=of["start of a collective"],
            node=round(of["GPUs a node"]),
            inside=Link(of["message inside a node"], of["hop inside a node"], of["inside a node"]),
            between=Link(of["message between nodes"], of["hop between nodes"], of["between nodes"]),
        ),
    )
