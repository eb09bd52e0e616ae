"""How long the experts of a sparse layer take, and how much memory, against the dense layer of equal FLOPs.

Forward and backward of the whole layer, router and biases included: dropless, no noise, in training mode; the weights
are held in the dtype of the case, without autocast. The dense layer is as wide inside as a token's experts together.

Shapes: T tokens, D width.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import get_args

import torch
from torch import Tensor, nn

from vlmoe_core.config import nearest
from vlmoe_core.errors import UsageError, VlmoeError
from vlmoe_core.moe.config import Implementation, MoEConfig
from vlmoe_core.moe.dense import DenseFFN
from vlmoe_core.moe.layer import SparseFFN
from vlmoe_core.moe.peak import peak_bytes

BACKENDS: tuple[Implementation, ...] = get_args(Implementation)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DENSE = "dense"
INIT_STD = 0.02
WARMUP = 1
"""Turns that are not counted, after each layer's first run."""

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Case:
    """The sizes of one comparison.

    Raises:
        UsageError: a size below 1, more choices than experts, an unknown dtype, or a device that is not there.
    """

    dim: int
    """Width of the layer."""
    hidden: int
    """Width inside each expert."""
    num_experts: int
    tokens: int
    """Tokens of one pass."""
    top_k: int = 1
    """Experts that each token goes to."""
    dtype: str = "float32"
    """Of weights, tokens and arithmetic."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "num_experts", "tokens", "top_k"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.top_k > self.num_experts:
            raise UsageError(f"top_k ({self.top_k}) is more than experts ({self.num_experts}); lower it or add experts")
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype '{self.dtype}'; {nearest(self.dtype, list(DTYPES))}")
        _check_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Measured:
    """What one layer took for forward and backward."""

    name: str
    seconds: float
    """Median of the repeats."""
    over_dense: float
    """Median of the repeats' own ratios to the dense layer."""
    peak_bytes: int
    """Most bytes of activations and temporaries at one moment; parameters and their gradients are not counted."""
    peak_over_dense: float


@dataclass(frozen=True)
class Unserved:
    """A backend that can't compute the case."""

    name: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """The dense layer first, then every backend that serves the case; those that don't, with the reason."""

    machine: str
    measured: tuple[Measured, ...]
    unserved: tuple[Unserved, ...]


@dataclass(frozen=True)
class Side:
    """A layer ready to be measured; `side_of` makes one."""

    layer: nn.Module
    x_TD: Tensor
    """What goes in; it takes a gradient."""
    grad_TD: Tensor
    """The gradient of what comes out, dense, in its dtype."""
    autocast: torch.dtype | None = None
    """The dtype of autocast in the forward pass; None: off."""

    def forward(self) -> tuple[Tensor, object]:
        """The output (T, D), and everything that the layer returns beside it."""
        device_type = self.x_TD.device.type
        with torch.autocast(device_type, self.autocast) if self.autocast else nullcontext():
            out = self.layer(self.x_TD)
        return (out[0], out) if isinstance(out, tuple) else (out, None)

    def step(self) -> None:
        """Forward and backward; the plan lives until the end of it, as in training."""
        y_TD, _kept = self.forward()
        torch.autograd.backward(y_TD, self.grad_TD)

    def seconds(self) -> float:
        """Time one step that starts without gradients."""
        self.clear()
        self._wait()
        start = time.perf_counter()
        self.step()
        self._wait()
        taken = time.perf_counter() - start
        self.clear()
        return taken

    def peak(self) -> int:
        """Peak bytes of one step on one thread; each further one may hold one expert's temporaries more."""
        self.clear()
        with _threads(1):
            peak = peak_bytes(self.step, self._gradients, self.x_TD.device.type)
        self.clear()
        return peak

    def clear(self) -> None:
        """Forget all gradients."""
        self.layer.zero_grad(set_to_none=True)
        self.x_TD.grad = None

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.layer.parameters() if p.grad is not None]

    def _wait(self) -> None:
        if self.x_TD.is_cuda:
            torch.cuda.synchronize(self.x_TD.device)


def side_of(layer: nn.Module, x_TD: Tensor, grad_TD: Tensor, autocast: torch.dtype | None = None) -> Side:
    """A side of the comparison, after one step of it; the incoming gradient takes the dtype of the output."""
    tried = Side(layer.train(), x_TD.detach().requires_grad_(), grad_TD, autocast)
    side = Side(layer, tried.x_TD, grad_TD.to(tried.forward()[0].dtype), autocast)
    side.step()
    side.clear()
    return side


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Random tokens (T, D) and a random dense gradient (T, D), the same ones for the same case."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, case.tokens, case.dim)
    x_TD, grad_TD = torch.randn(shape, generator=generator).to(case.device, case.torch_dtype)
    return x_TD, grad_TD


def dense_layer(case: Case) -> nn.Module:
    """The dense layer of equal FLOPs, in the case's dtype."""
    return DenseFFN(case.dim, case.hidden * case.top_k).to(case.device, case.torch_dtype)


def sparse_layer(case: Case, backend: Implementation) -> SparseFFN:
    """The sparse layer, in the case's dtype; the same weights for every backend."""
    config = MoEConfig.model_validate(
        {
            "num_experts": case.num_experts,
            "top_k": case.top_k,
            "capacity_factor": None,
            "noise": 0,
            "balance": {"vloss": 0},
            "experts": backend,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = SparseFFN(case.dim, case.hidden, config, INIT_STD)
    return layer.to(case.device, case.torch_dtype)


def compare(
    case: Case, backends: Sequence[str] = (), repeats: int = 7, threads: int | None = None, say: Progress = str
) -> Comparison:
    """Measure backends (none given: all) against the dense layer; they take turns. `say` hears what goes on.

    Raises:
        UsageError: an unknown backend, one asked for that is not installed, or a dense layer that can't be computed.
    """
    chosen = _check_backends(backends)
    with _threads(threads):
        sides, unserved = _sides(case, chosen, say)
        times = take_turns(sides, repeats, say)
        peaks = {}
        for name, side in sides.items():
            say(f"memory of {name}")
            peaks[name] = side.peak()
        return Comparison(machine(case.device), tuple(_measured(name, times, peaks) for name in sides), unserved)


def _sides(
    case: Case, backends: Sequence[Implementation], say: Progress
) -> tuple[dict[str, Side], tuple[Unserved, ...]]:
    x_TD, grad_TD = inputs(case)
    say(f"first run of {DENSE}")
    try:
        sides = {DENSE: side_of(dense_layer(case), x_TD, grad_TD)}
    except RuntimeError as error:
        raise UsageError(
            f"the dense layer can't be computed in {case.dtype} on {case.device}: {_line(error)}"
        ) from error
    unserved = []
    for backend in backends:
        say(f"first run of {backend}")
        try:
            sides[backend] = side_of(sparse_layer(case, backend), x_TD, grad_TD)
        except (VlmoeError, NotImplementedError, RuntimeError, TypeError, ImportError) as error:
            unserved.append(Unserved(backend, _line(error)))
    return sides, tuple(unserved)


def take_turns(sides: Mapping[str, Side], repeats: int, say: Progress = str) -> dict[str, list[float]]:
    """Seconds of each side in each repeat. They take turns, so that a slow moment of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARMUP + repeats):
        say("warming up" if turn < WARMUP else f"repeat {turn - WARMUP + 1} of {repeats}")
        for name, side in sides.items():
            seconds = side.seconds()
            if turn >= WARMUP:
                times[name].append(seconds)
    return times


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the repeats' own ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))


def _measured(name: str, times: Mapping[str, Sequence[float]], peaks: Mapping[str, int]) -> Measured:
    return Measured(
        name=name,
        seconds=median(times[name]),
        over_dense=median_ratio(times[name], times[DENSE]),
        peak_bytes=peaks[name],
        peak_over_dense=peaks[name] / peaks[DENSE],
    )


def machine(device: str) -> str:
    """What computes, and the version of torch, in one line."""
    if torch.device(device).type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        count = torch.get_num_threads()
        what = f"{count} thread{'s' if count > 1 else ''} of {_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{what}, torch {torch.__version__}"


def _cpu_name() -> str:
    found = torch.cpu.get_capabilities()
    return str(found.get("cpu_name") or found.get("architecture") or "a CPU")


def _check_backends(names: Sequence[str]) -> list[Implementation]:
    known = {str(name): name for name in BACKENDS}
    for name in names:
        if name not in known:
            raise UsageError(f"unknown backend '{name}'; {nearest(name, list(known))}")
        if name == "tutel" and importlib.util.find_spec("tutel") is None:
            raise UsageError("backend 'tutel' needs the tutel package, which is not installed; 'vlmoe env' says how")
    return [known[name] for name in dict.fromkeys(names)] or list(BACKENDS)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{name}'; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' can't be measured; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"device '{name}' is not there: CUDA devices found: {count}; use --device cpu")


def _line(error: Exception) -> str:
    """The first line of a message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
