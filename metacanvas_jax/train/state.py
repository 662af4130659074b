"""A run's state: what learns, and what the optimizer remembers of it; the frozen rest beside it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from metacanvas_jax.sharding import shardings


@struct.dataclass
class TrainState:
    """Checkpointed whole. Trainable leaves are fp32; frozen ones are not in here."""

    step: jax.Array
    skipped: jax.Array  # steps in a row without a finite gradient
    trainable: nnx.State
    opt_state: Any
    ema: nnx.State | None


def split_model(
    make: Callable[[jax.Array], nnx.Module],
    wanted: nnx.filterlib.Filter,
    *,
    seed: int,
    frozen_dtype,
    mesh: Mesh,
    given: nnx.filterlib.Filter = False,
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, trainable and frozen initial values, each array where it belongs on the mesh.

    Parameters that `given` names come from elsewhere: they take no memory here, and stand in the
    states as shapes, types and places.
    """

    def parts(model):
        _, trainable, frozen = nnx.split(model, wanted, ...)
        frozen = jax.tree.map(
            lambda a: a.astype(frozen_dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, frozen
        )
        return trainable, frozen

    def to_draw(states):
        return tuple(nnx.split_state(state, given, ...)[1] for state in states)

    def draw(key):
        return to_draw(parts(make(key)))

    key = jax.random.key(seed)
    model = jax.eval_shape(make, key)
    shapes = jax.eval_shape(parts, model)
    where = shardings(shapes, mesh)
    absent = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, where
    )
    drawn = jax.jit(draw, out_shardings=to_draw(where))(key)
    trainable, frozen = (
        nnx.merge_state(nnx.split_state(whole, given, ...)[0], part)
        for whole, part in zip(absent, drawn, strict=True)
    )
    graphdef = nnx.graphdef(model)
    return graphdef, trainable, frozen


def start(
    trainable: nnx.State, tx: optax.GradientTransformation, *, ema: bool, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """The state of step 0, and its shardings."""

    def init(trainable):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            trainable=trainable,
            opt_state=tx.init(trainable),
            ema=jax.tree.map(jnp.copy, trainable) if ema else None,
        )

    where = shardings(jax.eval_shape(init, trainable), mesh)
    return jax.jit(init, out_shardings=where)(trainable), where


def abstract(tree):
    """What a checkpoint of `tree` is restored into: shapes, types and places."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
