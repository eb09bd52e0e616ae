"""The account of an import: every key of the source and every tensor of ours, with what became of it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from vlmoe_core.errors import CheckpointError, UsageError
from vlmoe_core.model.config import ModelConfig

MOST_LISTED = 8


class Ledger:
    """Fills tensors of ours from keys of a source and keeps the books. Names of ours stand without `encoder.`."""

    def __init__(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], heads: int | None = None) -> None:
        self._tensors, self._heads = tensors, heads
        self.settings = settings
        """config.json or hyperparameters of the source; empty where it has none."""
        self.values: dict[str, Tensor] = {}
        """Our tensors that are settled, float32."""
        self.origins: dict[str, str] = {}
        """Where each of them is from: the keys, or why it is a constant."""
        self.fresh: dict[str, str] = {}
        """Regular expressions of names of ours that stay as they were initialised, with the reason."""
        self.used: dict[str, list[str]] = {}
        """Keys that were used, and the names of ours they went to."""
        self.unused: dict[str, str] = {}
        """Keys that were not, with the reason."""
        self.notes: list[str] = []
        """What is worth knowing."""

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def tensor(self, key: str, *shape: int | None) -> Tensor:
        """The tensor of a key in float32; null in `shape` stands for any size, no `shape` at all for any shape.

        Raises CheckpointError if the source lacks it, or it is empty, not dense or of another shape.
        """
        return self._found(key, shape).detach().float()

    def shape(self, key: str, dims: int) -> tuple[int, ...]:
        """The sizes of a tensor that has so many dimensions; errors likewise."""
        return tuple(self._found(key, (None,) * dims).shape)

    def joined(self, keys: Sequence[str], *shape: int | None) -> Tensor:
        """Tensors of such a shape, one behind the other along the first axis; errors likewise."""
        return torch.cat([self.tensor(key, *shape) for key in keys])

    def _found(self, key: str, shape: Sequence[int | None]) -> Tensor:
        if key not in self._tensors:
            raise CheckpointError(f"'{key}' is missing in the source; is it another kind of model, or a part of one?")
        found = self._tensors[key]
        if found.layout is not torch.strided or not found.numel():
            raise CheckpointError(
                f"'{key}' holds no numbers or is not dense; is it the file that its authors published?"
            )
        if shape and not _is_of(found.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"'{key}' is of shape {tuple(found.shape)}, not ({wanted}); is it another kind of model?"
            )
        return found

    def fill(self, name: str, keys: str | Sequence[str], value: Tensor | None = None) -> None:
        """Our `name` is `value`, made of these keys; null: it is the tensor of the one key."""
        keys = [keys] if isinstance(keys, str) else list(keys)
        self.values[name] = self.tensor(keys[0]) if value is None else value
        self.origins[name] = " + ".join(keys)
        for key in keys:
            self.used.setdefault(key, []).append(name)

    def fill_flat(self, name: str, key: str) -> None:
        """A vector that the source keeps with leading dimensions of 1."""
        self.fill(name, key, self.tensor(key).flatten())

    def fill_patches(self, name: str, key: str) -> None:
        """A convolution over whole patches (D, 3, side, side), as the linear map (D, 3 * side * side) that it is."""
        self.fill(f"{name}.weight", f"{key}.weight", self.tensor(f"{key}.weight", None, None, None, None).flatten(1))
        self.fill(f"{name}.bias", f"{key}.bias")

    def fill_pair(self, name: str, key: str) -> None:
        """Weight and bias."""
        for part in ("weight", "bias"):
            self.fill(f"{name}.{part}", f"{key}.{part}")

    def constant(self, name: str, value: Tensor, reason: str) -> None:
        """Our `name` has a value that no key gives."""
        self.values[name], self.origins[name] = value, f"constant: {reason}"

    def leave(self, patterns: Mapping[str, str]) -> None:
        """Every key that is not used yet and matches a regular expression whole is left, for the reason given."""
        for key in self._tensors.keys() - self.used.keys() - self.unused.keys():
            reason = next((why for pattern, why in patterns.items() if re.fullmatch(pattern, key)), None)
            if reason is not None:
                self.unused[key] = reason

    def close(self, allow_unknown: bool) -> None:
        """Raises CheckpointError for keys that were neither used nor left; or leaves them as unknown."""
        unknown = sorted(self._tensors.keys() - self.used.keys() - self.unused.keys())
        if unknown and not allow_unknown:
            raise CheckpointError(
                f"{len(unknown)} keys of the source are unknown: {listed(unknown)}. Nothing is dropped in silence: "
                "check the kind of model, or leave them out with --allow-unknown"
            )
        self.unused |= dict.fromkeys(unknown, "unknown, left out as asked (--allow-unknown)")

    def settle(self, state: Mapping[str, Tensor], what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Every tensor of a state, filled from the source or as it was, and where it is from; `what` names the whole.

        Raises CheckpointError for a tensor that has neither a key nor a reason to be new, or a key of another shape.
        """
        told = {name: self._origin(name, tensor, what) for name, tensor in state.items()}
        missing = [name for name, origin in told.items() if origin is None]
        foreign = sorted(self.values.keys() - state.keys())
        if missing or foreign:
            raise CheckpointError(
                f"the source does not fill the {what}: missing {listed(missing) or 'nothing'}; without a place "
                f"{listed(foreign) or 'nothing'}. It is another kind of model, or a part of one"
            )
        filled = {name: self.values.get(name, tensor) for name, tensor in state.items()}
        return filled, {name: origin for name, origin in told.items() if origin is not None}

    def _origin(self, name: str, ours: Tensor, what: str) -> str | None:
        if name in self.values:
            if (found := self.values[name].shape) != ours.shape:
                raise CheckpointError(
                    f"'{self.origins[name]}' makes {name} of shape {tuple(found)}, but this {what}'s is "
                    f"{tuple(ours.shape)}; are the heads and the kind of model right?"
                )
            return self.origins[name]
        reason = next((why for pattern, why in self.fresh.items() if re.fullmatch(pattern, name)), None)
        return None if reason is None else f"new: {reason}"

    def heads(self, width: int, known: int | None, published: Mapping[int, int]) -> int:
        """Attention heads: what the source shows, else what the user said, else those of the published model so wide.

        Raises UsageError if they are not known, or if the user says other than the source.
        """
        if known is not None and self._heads not in (None, known):
            raise UsageError(f"--heads {self._heads}: the source has {known} heads; leave the option out")
        heads = known or self._heads or published.get(width)
        if known is None and published.get(width) not in (None, heads):
            self.notes.append(f"{heads} heads, as asked; the published model of this width has {published[width]}")
        if heads is None:
            sizes = ", ".join(f"{w} ({h})" for w, h in published.items())
            raise UsageError(
                f"the number of attention heads stands in no tensor, and no published model is {width} wide; give "
                f"--heads N (published widths and heads: {sizes})"
            )
        return heads

    def count(self, pattern: str) -> int:
        """Blocks of the source: 1 + the greatest number in the one group of a pattern that opens a key.

        Raises CheckpointError if no key matches.
        """
        numbers = [int(found[1]) for key in self._tensors if (found := re.match(pattern, key))]
        if not numbers:
            raise CheckpointError(f"no key of the source reads like {pattern}: this is another kind of model")
        return 1 + max(numbers)


def _is_of(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in zip(shape, wanted, strict=True))


def listed(names: Sequence[str]) -> str:
    """The first names."""
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def side_of(rows: int, what: str) -> int:
    """The side of a square of so many places. Raises CheckpointError if it is none."""
    side = math.isqrt(max(rows, 0))
    if side * side != rows or side == 0:
        raise CheckpointError(f"{what}: {rows} places are no square of patches; only square images can be imported")
    return side


def model_config(**values: object) -> ModelConfig:
    """The encoder's config. Raises CheckpointError where the sizes of the source make none."""
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(
            f"the source makes no model: {where}{first['msg'].removeprefix('Value error, ')}"
        ) from error
