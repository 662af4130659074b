"""Softmax attention, also with Gemma-2's soft caps or T5's biases, and ReLU linear attention."""

import jax
import jax.numpy as jnp
from einops import rearrange

from metacanvas_jax.sharding import constrain_heads


def attend(q_BSNE, k_BLGE, v_BLGE, *, mask_BSL=None, length_B=None, causal=False) -> jax.Array:
    """softmax(q k^T / sqrt(E)) v, grouped when G < N; softmax in fp32.

    `length_B` are true key lengths: free in cuDNN, while a mask becomes an S x L bias there.
    """
    half = q_BSNE.dtype in (jnp.bfloat16, jnp.float16)
    cudnn = half and mask_BSL is None and jax.default_backend() == 'gpu' and q_BSNE.shape[-1] <= 256
    if cudnn:
        q_BSNE, k_BLGE, v_BLGE = constrain_heads(q_BSNE, k_BLGE, v_BLGE)
    return jax.nn.dot_product_attention(
        q_BSNE,
        k_BLGE,
        v_BLGE,
        mask=None if mask_BSL is None else mask_BSL[:, None],
        key_value_seq_lengths=length_B,
        is_causal=causal,
        implementation='cudnn' if cudnn else 'xla',
    )


def attend_capped(q_BSNE, k_BLGE, v_BLGE, *, scale: float, cap: float, mask_BSL) -> jax.Array:
    """softmax(cap tanh(scale q k^T / cap)) v, grouped when G < N; logits and softmax in fp32.

    No fused kernel caps logits, so all S x L of them are held.
    """
    q_BSGnE = rearrange(q_BSNE, 'B S (G n) E -> B S G n E', G=k_BLGE.shape[2])
    logits = jnp.einsum('BSGnE,BLGE->BGnSL', q_BSGnE, k_BLGE, preferred_element_type=jnp.float32)
    logits = cap * jnp.tanh(logits * (scale / cap))
    # Not -inf: a row that sees nothing, as padding may, would be NaN.
    logits = jnp.where(mask_BSL[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, -1).astype(q_BSNE.dtype)
    return rearrange(jnp.einsum('BGnSL,BLGE->BSGnE', weights, v_BLGE), 'B S G n E -> B S (G n) E')


def attend_biased(q_BSNE, k_BLNE, v_BLNE, *, bias_NSL, length_B) -> jax.Array:
    """softmax(q k^T + bias) v without a scale (T5); logits and softmax in fp32."""
    return jax.nn.dot_product_attention(
        q_BSNE,
        k_BLNE,
        v_BLNE,
        bias=bias_NSL[None].astype(jnp.float32),
        scale=1.0,
        key_value_seq_lengths=length_B,
        implementation='xla',  # cuDNN wants the bias in the dtype of q, and rounds it
    )


def attend_in_parts(q_BSNE, k_BLNE, v_BLNE, *, most: int = 1024) -> jax.Array:
    """`attend` with `most` queries at a time, for heads that are too wide for a fused kernel.

    The logits of a whole picture would be the largest array of an autoencoder by far.
    """
    q_SBNE = jnp.moveaxis(q_BSNE, 1, 0)
    attended = lambda q_BNE: attend(q_BNE[:, None], k_BLNE, v_BLNE)[:, 0]
    return jnp.moveaxis(jax.lax.map(attended, q_SBNE, batch_size=most), 0, 1)


def split_heads(x, heads: int):
    return rearrange(x, 'B S (N E) -> B S N E', N=heads)


def merge_heads(x):
    return rearrange(x, 'B S N E -> B S (N E)')


def linear_attention(q_BSNE, k_BSNE, v_BSNE) -> jax.Array:
    """o_m = (sum_n v_n k_n^T) q_m / (sum_n k_n . q_m), q and k through a ReLU, in fp32 (SANA).

    jax.nn.relu, not maximum: its gradient at 0 is 0, which the 1e-15 would otherwise amplify.
    """
    q, k = (jax.nn.relu(a).astype(jnp.float32) for a in (q_BSNE, k_BSNE))
    v = v_BSNE.astype(jnp.float32)
    state_BNEe = jnp.einsum('BSNE,BSNe->BNEe', k, v)
    total_BNE = k.sum(1)
    weight_BSN = jnp.einsum('BSNE,BNE->BSN', q, total_BNE)
    out = jnp.einsum('BSNE,BNEe->BSNe', q, state_BNEe) / (weight_BSN[..., None] + 1e-15)
    return out.astype(q_BSNE.dtype)
