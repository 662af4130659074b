"""What MetaCanvas asks of a base system's own text encoder."""

import abc
from typing import Any

from flax import nnx

from metacanvas_jax.types import EncoderStates


class TextEncoder(nnx.Module, abc.ABC):
    @abc.abstractmethod
    def context(self, prompt: Any) -> EncoderStates:
        """What the DiT gets of a prompt."""


class CachedStates(TextEncoder):
    """Stands where a text encoder's states were stored beforehand."""

    def __init__(self, sizes, *, dtype, rngs):
        del sizes, dtype, rngs  # it computes nothing

    def context(self, prompt: EncoderStates) -> EncoderStates:
        return prompt
