"""Layers as one stacked module, run by `jax.lax.scan`: compile time does not grow with depth."""

from collections.abc import Callable

import jax
from flax import nnx

# What is computed again in the backward pass: 'full' everything (least memory), 'none' nothing (no
# checkpointing: everything_saveable would add copies of its own), the others all but what they say.
POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'none': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # cuDNN attention's forward is the one thing worth its memory: performance.md section 3.
    'attention': lambda prim, *_, **__: 'dot_product_attention_fwd' in prim.name,
}


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
    """`depth` copies of `make(rngs)` as one module; every array gets a leading axis of `depth`."""
    return jax.vmap(make)(rngs.split(depth))


def scan(layers, x, step: Callable, xs=None, *, remat: str):
    """x, y_i = step(layer_i, x, xs_i) for every layer; returns the last x and the stacked y."""

    def body(x, layer_xs):
        layer, x_i = layer_xs
        return step(layer, x, x_i)

    if (policy := POLICIES[remat]) is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, x, (layers, xs))


def fold(layers, x, step: Callable, *, remat: str):
    """x = step(layer_i, x) for every layer."""
    return scan(layers, x, lambda layer, x, _: (step(layer, x), None), remat=remat)[0]
