"""One training step: the objective's gradient for the trainable leaves, then the optimizer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from metacanvas_jax.train.state import TrainState


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Callable,
    tx: optax.GradientTransformation,
    *,
    accumulate: int,
    ema_decay: float,
    where: TrainState,
) -> Callable:
    """step(state, frozen, batch, key) -> state, metrics; the old state's buffers are reused.

    A step whose gradient is not finite changes nothing but the step count, and says so.
    """

    def gradient(trainable, frozen, batch, key):
        def loss_fn(trainable):
            return objective(nnx.merge(graphdef, trainable, frozen), batch, key)

        return jax.value_and_grad(loss_fn)(trainable)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(where, None))
    def train_step(state: TrainState, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)

        def add(total, part):
            microbatch, i = part
            found = gradient(state.trainable, frozen, microbatch, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, found), None

        # Every accumulate-th row, so that each device splits the rows it has.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
        )
        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.trainable))
        total, _ = jax.lax.scan(add, zero, (parts, jnp.arange(accumulate)))
        loss, grads = jax.tree.map(lambda x: x / accumulate, total)

        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = state.ema
        if ema is not None:
            # Young averages forget their random start faster: (1 + s) / (10 + s).
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, trainable)
        finite = jnp.isfinite(norm)
        trainable, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (trainable, opt_state, ema),
            (state.trainable, state.opt_state, state.ema),
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics = {'loss': loss, 'grad_norm': norm, 'skipped': skipped}
        return TrainState(
            step=state.step + 1,
            skipped=skipped,
            trainable=trainable,
            opt_state=opt_state,
            ema=ema,
        ), metrics

    return train_step
