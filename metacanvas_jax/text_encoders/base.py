"""What MetaCanvas asks of a base system's own text encoders."""

import abc
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metacanvas_jax.layers.linear import normal
from metacanvas_jax.types import EncoderStates, InputError, Texts


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


@dataclasses.dataclass(frozen=True)
class VectorConfig:
    width: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class StoredVector(PooledEncoder):
    """The vector of one prompt, the empty one say, whatever is asked; its encoder is not there."""

    def __init__(self, config: VectorConfig, *, dtype, rngs: nnx.Rngs):
        del dtype  # the DiT's
        self.width = config.width
        self.vector = nnx.Param(normal(1.0)(rngs.params(), (config.width,)), axes=(None,))

    def pool(self, texts: Texts) -> jax.Array:
        batch = len(jax.tree.leaves(texts)[0])
        return jnp.broadcast_to(self.vector[...], (batch, self.width))


def read_vector_config(directory: str | pathlib.Path) -> VectorConfig:
    path = pathlib.Path(directory) / 'config.json'
    try:
        return VectorConfig(**json.loads(path.read_text(encoding='utf-8')))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f'{directory} is not what python -m convert pool writes: {error!r}'
        ) from error


class CachedStates(TextEncoder):
    """Stands where a text encoder's states were stored beforehand."""

    def __init__(self, sizes, *, dtype, rngs):
        del sizes, dtype, rngs  # it computes nothing

    def context(self, prompt: EncoderStates) -> EncoderStates:
        return prompt
