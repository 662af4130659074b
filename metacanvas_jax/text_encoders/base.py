"""What MetaCanvas asks of a base system's own text encoders."""

import abc
from typing import Any

import jax
from flax import nnx

from metacanvas_jax.types import EncoderStates, Texts


class TextEncoder(nnx.Module, abc.ABC):
    @abc.abstractmethod
    def context(self, prompt: Any) -> EncoderStates:
        """What the DiT gets of a prompt."""


class PooledEncoder(nnx.Module, abc.ABC):
    """Makes one vector of a whole prompt, `width` long."""

    width: int

    @abc.abstractmethod
    def pool(self, texts: Texts) -> jax.Array:
        """(B, D)."""


class CachedStates(TextEncoder):
    """Stands where a text encoder's states were stored beforehand."""

    def __init__(self, sizes, *, dtype, rngs):
        del sizes, dtype, rngs  # it computes nothing

    def context(self, prompt: EncoderStates) -> EncoderStates:
        return prompt
