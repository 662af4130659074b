"""A video through a causal network a few frames at a time, in the memory of a few frames.

The first frame goes alone, as nothing resamples it in time. Then all chunks are alike: one scan,
which carries the last frames that every causal convolution saw.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


class Past:
    """The frames before a chunk. Each causal convolution takes its own, and leaves some, in turn.

    Like nnx.Rngs it is used up while a function is traced: one for every call.
    """

    def __init__(self, frames: Sequence[jax.Array] = ()):
        self.first = not frames  # nothing, that is zeros, was before
        self._taken = iter(frames)
        self.left: list[jax.Array] = []

    def before(self, x_BFHWC: jax.Array, frames: int) -> jax.Array:
        """x with the `frames` before it in front; the first one of a video remains alone."""
        if self.first:
            zeros = jnp.zeros_like(x_BFHWC, shape=(len(x_BFHWC), frames - 1, *x_BFHWC.shape[2:]))
            self.left.append(jnp.concatenate([zeros, x_BFHWC], 1))
            return x_BFHWC
        x = jnp.concatenate([next(self._taken), x_BFHWC], 1)
        self.left.append(x[:, -frames:])
        return x


def by_chunks(
    network: Callable[[jax.Array, Past], jax.Array], x_BFHWC: jax.Array, *, take: int, give: int
) -> jax.Array:
    """`network(x, past)` makes one frame of the first one, then `give` of each `take`."""
    past = Past()
    y = network(x_BFHWC[:, :1], past)
    chunks, rest = divmod(x_BFHWC.shape[1] - 1, take)
    assert not rest, x_BFHWC.shape
    if not chunks:
        return y
    whole = jnp.zeros_like(y, shape=(len(y), 1 + give * chunks, *y.shape[2:])).at[:, :1].set(y)

    def step(carry, i):
        frames, whole = carry
        past = Past(frames)
        x = jax.lax.dynamic_slice_in_dim(x_BFHWC, 1 + take * i, take, axis=1)
        # Written into its place: the outputs of a scan would be copied into it once more.
        whole = jax.lax.dynamic_update_slice_in_dim(whole, network(x, past), 1 + give * i, axis=1)
        return (past.left, whole), None

    (_, whole), _ = jax.lax.scan(step, (past.left, whole), jnp.arange(chunks))
    return whole
