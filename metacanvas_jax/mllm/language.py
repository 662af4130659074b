"""Qwen2.5-VL's language model, run in passes (Sec. 3.2; spec.md section 2.7).

The prefix pass reads the prompt with the base weights and returns its states and K/V; the decode
pass goes on from there, token by token (mllm/generate.py); the canvas pass runs the canvas tokens
over that K/V with the LoRA on. All are exact parts of one causal forward, so the prefix cannot
depend on the canvas, nor on the LoRA.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from metacanvas_jax.layers.attention import attend, merge_heads, split_heads
from metacanvas_jax.layers.linear import Linear, LoraConfig, normal
from metacanvas_jax.layers.mlp import SwiGlu
from metacanvas_jax.layers.norm import RmsNorm
from metacanvas_jax.layers.rope import rotate_half
from metacanvas_jax.layers.stack import scan, stack
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.positions import mrope_angles
from metacanvas_jax.sharding import BATCH_AXES, constrain


class Attention(nnx.Module):
    """Grouped-query attention with q, k, v biases."""

    def __init__(self, config: QwenConfig, lora: LoraConfig | None, *, rngs: nnx.Rngs):
        width, E = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        init = normal(config.initializer_range)
        linear = functools.partial(Linear, lora=lora, init=init, rngs=rngs)
        self.q_proj = linear(width, self.heads * E, ('embed', 'heads'))
        self.k_proj = linear(width, self.kv_heads * E, ('embed', 'kv'))
        self.v_proj = linear(width, self.kv_heads * E, ('embed', 'kv'))
        self.o_proj = linear(self.heads * E, width, ('heads', 'embed'), bias=False)

    def _heads(self, q, k, v, angles):
        q, k = split_heads(q, self.heads), split_heads(k, self.kv_heads)
        return rotate_half(q, angles), rotate_half(k, angles), split_heads(v, self.kv_heads)

    def prefix(self, x, angles, length_B):
        q, k, v = self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), angles)
        out = attend(q, k, v, length_B=length_B, causal=True)
        return self.o_proj(merge_heads(out)), (k, v)

    def decode(self, x, angles, kv, mask):
        q, *new = self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), angles)
        k, v = (jnp.concatenate(pair, 1) for pair in zip(kv, new, strict=True))
        return self.o_proj(merge_heads(attend(q, k, v, mask_BSL=mask))), tuple(new)

    def canvas(self, x, angles, kv, mask, keys):
        q, k, v = (
            linear.adapted(x, key)
            for linear, key in zip((self.q_proj, self.k_proj, self.v_proj), keys, strict=False)
        )
        q, k, v = self._heads(q, k, v, angles)
        k, v = (jnp.concatenate(pair, 1) for pair in zip(kv, (k, v), strict=True))
        return self.o_proj.adapted(merge_heads(attend(q, k, v, mask_BSL=mask)), keys[3])


class Layer(nnx.Module):
    def __init__(self, config: QwenConfig, lora: LoraConfig | None, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RmsNorm(width, eps)
        self.self_attn = Attention(config, lora, rngs=rngs)
        self.post_attention_layernorm = RmsNorm(width, eps)
        init = normal(config.initializer_range)
        self.mlp = SwiGlu(width, config.intermediate_size, lora=lora, init=init, rngs=rngs)

    def prefix(self, x, angles, length_B):
        """Base weights; returns the new states and this layer's K/V."""
        x = constrain(x, BATCH_AXES, None, None)
        out, kv = self.self_attn.prefix(self.input_layernorm(x), angles, length_B)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), kv

    def decode(self, x, angles, kv, mask):
        """Base weights, over the K/V of earlier tokens; returns the new states and K/V."""
        out, new = self.self_attn.decode(self.input_layernorm(x), angles, kv, mask)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), new

    def canvas(self, x, angles, kv, mask, key):
        """LoRA on, over the prefix K/V of this layer; `key` turns its dropout on."""
        x = constrain(x, BATCH_AXES, None, None)
        keys = [None] * 7 if key is None else list(jax.random.split(key, 7))
        x = x + self.self_attn.canvas(self.input_layernorm(x), angles, kv, mask, keys[:4])
        return x + self.mlp.adapted(self.post_attention_layernorm(x), keys[4:])


class LanguageModel(nnx.Module):
    """States are read after the last layer and the final norm (transformers' last_hidden_state)."""

    def __init__(
        self, config: QwenConfig, lora: LoraConfig | None, *, remat: str, dtype, rngs: nnx.Rngs
    ):
        self.config, self.remat, self.dtype = config, remat, dtype
        init = normal(config.initializer_range)
        table = init(rngs.params(), (config.vocab_size, config.hidden_size))
        self.embed_tokens = nnx.Param(table, axes=('vocab', 'embed'))
        self.layers = stack(
            lambda rngs: Layer(config, lora, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        head = (config.hidden_size, config.vocab_size)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else Linear(*head, ('embed', 'vocab'), bias=False, init=init, rngs=rngs)
        )

    def embed(self, ids_BL) -> jax.Array:
        return self.embed_tokens[...][ids_BL].astype(self.dtype)

    def prefix(self, x_BLD, positions_B3L, length_B):
        """Final states (B, L, D) and K/V, each (depth, B, L, G, E). Padding is on the right."""
        angles = mrope_angles(positions_B3L, self.config)
        x, kv = scan(
            self.layers,
            x_BLD,
            lambda layer, x, _: layer.prefix(x, angles, length_B),
            remat=self.remat,
        )
        return self.norm(x), kv

    def decode(self, x_BLD, positions_B3L, kv, mask_BLS):
        """Final states (B, L, D) and new K/V (depth, B, L, G, E) of tokens that follow a prefix.

        mask_BLS says which of the S earlier tokens and of these L each one sees.
        """
        angles = mrope_angles(positions_B3L, self.config)
        x, new = scan(
            self.layers,
            x_BLD,
            lambda layer, x, kv: layer.decode(x, angles, kv, mask_BLS),
            kv,
            remat=self.remat,
        )
        return self.norm(x), new

    def canvas(self, x_BMD, positions_B3M, kv, length_B, mask_MM, key=None):
        """Final states (B, M, D) of tokens appended after the prompt's last token.

        mask_MM says which canvas token sees which; all see the prompt, the prompt sees none.
        """
        angles = mrope_angles(positions_B3M, self.config)
        (B, M), L = x_BMD.shape[:2], kv[0].shape[2]
        valid_BL = jnp.arange(L) < length_B[:, None]
        mask_BSL = jnp.concatenate(
            [
                jnp.broadcast_to(valid_BL[:, None], (B, M, L)),
                jnp.broadcast_to(mask_MM, (B, M, M)),
            ],
            -1,
        )
        keys = None if key is None else jax.random.split(key, self.config.num_hidden_layers)

        def step(layer, x, xs):
            kv, key = xs
            return layer.canvas(x, angles, kv, mask_BSL, key), None

        x, _ = scan(self.layers, x_BMD.astype(self.dtype), step, (kv, keys), remat=self.remat)
        return self.norm(x)

    def logits(self, x_BLD) -> jax.Array:
        """Next-token logits in fp32."""
        if self.lm_head is None:
            y = x_BLD @ self.embed_tokens[...].astype(x_BLD.dtype).T
        else:
            y = self.lm_head(x_BLD)
        return y.astype(jnp.float32)
