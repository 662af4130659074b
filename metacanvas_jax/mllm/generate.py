"""Text generation: the MLLM answers, with base weights alone (understanding is preserved).

One compiled loop over a K/V cache of fixed size. Prompts are right-padded and of unequal length:
every row writes its n-th new token to slot L + n of the cache, and is masked and numbered by its
own length, so that no row waits for, or sees, another one's padding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.types import Prompt

Choose = Callable[[jax.Array, jax.Array], jax.Array]  # (logits_BV, keys_B) -> ids_B


def greedy(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    del keys_B
    return jnp.argmax(logits_BV, -1)


def nucleus(temperature: float, top_p: float = 1.0) -> Choose:
    """Draws from the fewest tokens that hold the share `top_p` of softmax(logits / temperature)."""

    def choose(logits_BV, keys_B):
        logits_BV = logits_BV / temperature
        order_BV = jnp.argsort(-logits_BV, -1)
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, -1)
        share_BV = jax.nn.softmax(sorted_BV, -1)
        before_BV = jnp.cumsum(share_BV, -1) - share_BV  # 0 for the likeliest: it always stays
        kept_BV = jnp.where(before_BV < top_p, sorted_BV, -jnp.inf)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
        return jnp.take_along_axis(order_BV, drawn_B[:, None], -1)[:, 0]

    return choose


def generate(
    mllm: Qwen,
    prompt: Prompt,
    keys_B: jax.Array,
    *,
    choose: Choose = greedy,
    max_new_tokens: int,
    stop: tuple[int, ...],
    pad: int,
) -> tuple[jax.Array, jax.Array]:
    """New ids (B, max_new_tokens), `pad` after the first one of `stop`, and how many count (B,).

    `keys_B` are the rows' own random keys: what else is in a batch changes no answer. For `jit`,
    everything after `keys_B` is static.
    """
    language, (B, L) = mllm.language, prompt.ids_BL.shape
    states_BLD, kv = mllm.prefix(prompt)
    last_BD = states_BLD[jnp.arange(B), prompt.length_B - 1]
    room = [(0, 0)] * 2 + [(0, max_new_tokens)] + [(0, 0)] * 2
    cache = jax.tree.map(lambda x: jnp.pad(x, room), kv)
    slots = jnp.arange(L + max_new_tokens)
    prompt_BS = slots < prompt.length_B[:, None]

    def unfinished(carry):
        n, _, _, _, done_B = carry
        return (n < max_new_tokens) & ~done_B.all()

    def step(carry):
        n, cache, last_BD, ids_BN, done_B = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, n)
        id_B = choose(language.logits(last_BD[:, None])[:, 0], keys)
        id_B = jnp.where(done_B, pad, id_B).astype(jnp.int32)
        ids_BN = ids_BN.at[:, n].set(id_B)
        done_B |= jnp.isin(id_B, jnp.array(stop, jnp.int32))

        # Slots of later tokens are masked; the token itself stands behind the cache.
        seen_BS = prompt_BS | ((slots >= L) & (slots < L + n))
        mask_B1S = jnp.pad(seen_BS, ((0, 0), (0, 1)), constant_values=True)[:, None]
        position_B31 = jnp.broadcast_to((prompt.start_B + n)[:, None, None], (B, 3, 1))
        x_B1D = language.embed(id_B[:, None])
        states_B1D, new = language.decode(x_B1D, position_B31, cache, mask_B1S)
        cache = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, L + n, 2), cache, new
        )
        return n + 1, cache, states_B1D[:, 0], ids_BN, done_B

    ids_BN, done_B = jnp.full((B, max_new_tokens), pad, jnp.int32), jnp.zeros(B, bool)
    carry = (jnp.int32(0), cache, last_BD, ids_BN, done_B)
    _, _, _, ids_BN, done_B = jax.lax.while_loop(unfinished, step, carry)
    ended_BN = jnp.isin(ids_BN, jnp.array(stop, jnp.int32))
    length_B = jnp.where(ended_BN.any(-1), jnp.argmax(ended_BN, -1) + 1, max_new_tokens)
    return ids_BN, length_B
