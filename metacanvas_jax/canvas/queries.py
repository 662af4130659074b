"""MetaQuery, the baseline of Figure 4: learnable queries in the place of, or beside, the text.

They read the prompt through the MLLM as canvas tokens do, but stand in one line (positions s + n)
and reach the DiT through its text interface (arXiv 2504.06256; spec.md section 4).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metacanvas_jax.canvas.tokens import ATTENTION
from metacanvas_jax.canvas.vanilla_block import VanillaBlock
from metacanvas_jax.layers.mlp import Mlp
from metacanvas_jax.layers.norm import RmsNorm
from metacanvas_jax.mllm.positions import text_positions
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.types import Readings


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    count: int  # 256 in the paper
    attention: str  # causal | bidirectional, among queries
    head_dim: int  # of the vanilla block
    scale: float  # of the connector's last norm at the start: that of the text's states


class MetaQueries(nnx.Module):
    """Vanilla block, MLP and norm: released MetaQuery's tail behind a light block."""

    def __init__(self, config: QueryConfig, width: int, d_out: int, *, rngs: nnx.Rngs):
        self.attention = config.attention
        table = 0.02 * jax.random.normal(rngs.params(), (config.count, width))
        self.table = nnx.Param(table, axes=('canvas', 'embed'))
        self.align = VanillaBlock(config.head_dim, width, rngs=rngs)
        self.mlp = Mlp(width, d_out, d_out, rngs=rngs)
        self.norm = RmsNorm(d_out, 1e-5)
        self.norm.scale[...] = jnp.full(d_out, config.scale)

    def prepend(self, text_BLD, length_B, mllm: Qwen | None, readings: Readings, key):
        """[queries | text] and its true lengths; the LoRA, where there is one, is on."""
        prompt = readings.prompt
        assert mllm is not None
        assert prompt is not None
        (M, D), B = self.table.shape, len(prompt.length_B)
        states_BMD = mllm.language.canvas(
            jnp.broadcast_to(self.table[...], (B, M, D)),
            text_positions(prompt.start_B, np.zeros(1), 1, M),
            readings.kv,
            prompt.length_B,
            jnp.asarray(ATTENTION[self.attention](M)),
            key,
        )
        queries_BMD = self.norm(self.mlp(self.align(states_BMD)))
        return jnp.concatenate([queries_BMD, text_BLD.astype(queries_BMD.dtype)], 1), length_B + M


class NoQueries(nnx.Module):
    def prepend(self, text_BLD, length_B, mllm, readings, key):
        del mllm, readings, key
        return text_BLD, length_B
