"""From the tensors of a dense model to those of a sparse one: each feed-forward network copied into E experts.

Sparse upcycling (arXiv 2212.05055). Axis letters: E experts, D width, H hidden units of one expert.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmoe_core.model.config import ModelConfig

UP, BIAS, DOWN = "up.weight", "up.bias", "down.weight"
ROUTER = "router.weight"


@dataclass(frozen=True)
class Site:
    """A feed-forward network that becomes a layer of experts."""

    layer: int
    """0-based block."""
    pool: str
    """vision or text."""

    @property
    def name(self) -> str:
        """What the names of its tensors start with."""
        return f"encoder.blocks.{self.layer}.ffn.{self.pool}"

    @property
    def router(self) -> str:
        """The name of its router's weight."""
        return f"{self.name}.{ROUTER}"

    def expert(self, part: str) -> str:
        """The experts' name of a tensor that the dense network calls `part`: up.weight, down.bias, ..."""
        return f"{self.name}.experts.{part}"


@dataclass(frozen=True)
class Ways:
    """How the experts are made of one network."""

    experts: int
    """E."""
    router_std: float = 0.005
    """Standard deviation of the routers' weights."""
    noise: float = 0.0
    """Standard deviation of the noise on the copied weights, relative to that of each weight matrix."""
    drop: float = 0.0
    """Share of its hidden units that each expert draws anew (drop-upcycling, arXiv 2502.19261)."""
    seed: int = 0
    """Of all that is drawn."""


def sites_of(model: ModelConfig, pools: Sequence[str]) -> tuple[Site, ...]:
    """The sparse layers of some pools of a model."""
    return tuple(Site(layer, pool) for pool in pools for layer in model.sparse_layers(pool))


@torch.no_grad()
def upcycled_tensors(dense: Mapping[str, Tensor], sites: Sequence[Site], ways: Ways) -> dict[str, Tensor]:
    """The tensors of the sparse model by name.

    Args:
        dense: those of the dense model.
        sites: what becomes sparse; each must be dense in `dense`.
        ways: how.

    Returns:
        At the sites (E, ...) a copy for each expert, and a small random router; all else as it was.
    """
    made = {new: _copied(dense[old], site, ways) for old, new, site in _renamed(dense, sites)}
    generator = torch.Generator().manual_seed(ways.seed)
    for site in sites:
        parts = {part: made[site.expert(part)] for part in (UP, BIAS, DOWN)}
        if ways.noise:
            _add_noise((parts[UP], parts[DOWN]), ways.noise, generator)
        if ways.drop:
            original = {part: dense[f"{site.name}.{part}"] for part in parts}
            _draw_units_anew(parts, original, ways.drop, generator)
        router_ED = dense[f"{site.name}.{UP}"].new_empty(ways.experts, parts[UP].shape[2])
        made[site.router] = nn.init.trunc_normal_(router_ED, std=ways.router_std, generator=generator)
    return made


def upcycled_moments(
    dense: Mapping[str, Tensor], sites: Sequence[Site], tensors: Mapping[str, Tensor], ways: Ways
) -> dict[str, Tensor]:
    """The optimiser's state of the sparse model: experts go on with that of their network, routers begin.

    Args:
        dense: that of the dense model, `exp_avg.<parameter>` and so on.
        sites: what becomes sparse.
        tensors: those of the sparse model, which the routers' moments are shaped like.
        ways: how many experts there are.
    """
    made: dict[str, Tensor] = {}
    for key in dense:
        kind, _, name = key.partition(".")
        ((_, new, site),) = _renamed([name], sites)
        made[f"{kind}.{new}"] = _copied(dense[key], site, ways)
        if site is not None and name.endswith(DOWN):
            like = tensors[site.router] if dense[key].ndim else dense[key]
            made[f"{kind}.{site.router}"] = torch.zeros_like(like, dtype=dense[key].dtype)
    return made


def _renamed(
    names: Mapping[str, Tensor] | Sequence[str], sites: Sequence[Site]
) -> Iterator[tuple[str, str, Site | None]]:
    """Each name in the dense model, that in the sparse one, and the site that it belongs to."""
    known = {site.name: site for site in sites}
    for name in names:
        site = known.get(".".join(name.split(".")[:5]))
        yield name, name if site is None else site.expert(name.removeprefix(f"{site.name}.")), site


def _copied(tensor: Tensor, site: Site | None, ways: Ways) -> Tensor:
    """(E, ...) at a site; a step count, which has no dimension, belongs to all experts."""
    return tensor if site is None or tensor.ndim == 0 else torch.stack([tensor] * ways.experts)


def _add_noise(weights: Sequence[Tensor], relative: float, generator: torch.Generator) -> None:
    """Add normal noise to the copies; all experts are the same before."""
    for weight_E in weights:
        std = relative * float(weight_E[0].std())
        weight_E += std * torch.randn(weight_E.shape, generator=generator, dtype=weight_E.dtype)


def _draw_units_anew(
    parts: Mapping[str, Tensor], original: Mapping[str, Tensor], rate: float, generator: torch.Generator
) -> None:
    """Give a random share of each expert's hidden units new weights, as the original's are spread (2502.19261, 3.1)."""
    hidden = parts[UP].shape[1]
    spread = {part: (float(tensor.mean()), float(tensor.std())) for part, tensor in original.items()}
    for expert in range(parts[UP].shape[0]):
        units = torch.randperm(hidden, generator=generator)[: round(rate * hidden)]
        for part, tensor in parts.items():
            units_first = tensor[expert].mT if part == DOWN else tensor[expert]
            mean, std = spread[part]
            shape = (len(units), *units_first.shape[1:])
            units_first[units] = mean + std * torch.randn(shape, generator=generator, dtype=tensor.dtype)
