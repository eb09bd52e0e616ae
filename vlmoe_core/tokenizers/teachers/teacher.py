"""What a visual tokenizer learns from: something that has features for every patch of an image.

Axis letters: I images, P patches, O features, C channels, H height, W width in pixels.
"""

from typing import Protocol

from torch import Tensor


class Teacher(Protocol):
    """Features of patches; it never learns, and no state dict holds it."""

    dim: int
    """O."""

    def load(self) -> None:
        """Read its weights, if it has any and has not read them yet.

        Raises TokenizerError or HubError where they are missing, or don't fit the recipe.
        """
        ...

    def features(self, pixels_ICHW: Tensor) -> Tensor:
        """(I, P, O) float32, without gradient, of uint8 RGB images; loads the weights at the first call."""
        ...
