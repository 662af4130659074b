"""A standard pre-norm transformer block (spec.md section 3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from metacanvas_jax.layers.attention import attend, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear
from metacanvas_jax.layers.mlp import Mlp
from metacanvas_jax.layers.norm import LayerNorm


class VanillaBlock(nnx.Module):
    """All tokens see each other; no positions, those are in the MLLM's states."""

    def __init__(self, head_dim: int, width: int, *, rngs: nnx.Rngs):
        self.heads = width // head_dim
        self.norm1, self.norm2 = LayerNorm(width, 1e-6), LayerNorm(width, 1e-6)
        self.qkv = Linear(width, 3 * width, ('embed', 'heads'), rngs=rngs)
        self.out = Linear(width, width, ('heads', 'embed'), rngs=rngs)
        self.mlp = Mlp(width, 4 * width, width, rngs=rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        qkv = jnp.split(self.qkv(self.norm1(x_BSD)), 3, -1)
        x = x_BSD + self.out(merge_heads(attend(*(split_heads(a, self.heads) for a in qkv))))
        return x + self.mlp(self.norm2(x))
