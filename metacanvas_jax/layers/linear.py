"""x W + b, with an optional LoRA beside the kernel; computes in the dtype of its input."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metacanvas_jax.layers.dropout import dropout

# PixArt's and SANA's habit for a DiT from scratch; pretrained weights overwrite it.
xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros


def normal(std: float):
    return nnx.initializers.normal(std)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel as XLA's CPU backend likes it: two to three times faster gradients, equal values.

    It wants two axes, and an input that is there: left to itself it computes a SiLU or a norm anew
    in each matmul of the backward pass. On GPU the input of a matmul is materialised anyway.
    """
    rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
    return (rows @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """y = x W + b + drop(x) A B alpha / rank (Tables 13 and 16; rank 0 builds none)."""

    rank: int
    alpha: float
    dropout: float


class LoraParam(nnx.Param):
    """A low-rank weight; its own type, so that a filter can name it."""


class Lora(nnx.Module):
    def __init__(self, d_in, d_out, axes, config: LoraConfig, *, rngs: nnx.Rngs):
        bound = d_in**-0.5  # torch's kaiming_uniform(a=sqrt(5))
        a = jax.random.uniform(rngs.params(), (d_in, config.rank), jnp.float32, -bound, bound)
        self.a = LoraParam(a, axes=(axes[0], 'rank'))
        self.b = LoraParam(jnp.zeros((config.rank, d_out)), axes=('rank', axes[1]))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        x = dropout(x, self.dropout, key)
        x = matmul(x, self.a[...].astype(x.dtype))
        return matmul(x, self.b[...].astype(x.dtype)) * self.scale


class Linear(nnx.Module):
    """`axes` are the logical axes (in, out) of the kernel, see `sharding.RULES`.

    The LoRA stands beside the kernel, so paths are the same with and without one.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = True,
        init=xavier,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out)), axes=axes)
        self.bias = nnx.Param(jnp.zeros(d_out), axes=axes[1:]) if bias else None
        self.lora = Lora(d_in, d_out, axes, lora, rngs=rngs) if lora else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def adapted(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """With the LoRA on, where there is one; `key` turns its dropout on."""
        return self(x) if self.lora is None else self(x) + self.lora(x, key)
