"""What is minimised. An objective is loss(model, batch, key); the loop around it is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from metacanvas_jax.flow.loss import flow_loss
from metacanvas_jax.flow.path import frame_times, noised
from metacanvas_jax.flow.times import draw_times
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.types import Batch, TextBatch


def flow_matching(
    model: MetaCanvas, batch: Batch, key: jax.Array, *, shift: float, guidance: float | None
) -> jax.Array:
    """|| v(z_t, t, plan) - (eps - z) ||^2 over noised frames (App. A.2).

    `guidance` is what a DiT is told into which it was distilled.
    """
    time_key, noise_key, dropout_key = jax.random.split(key, 3)
    clean_BT = batch.visual.clean_BT
    z_BTHWC = batch.latents_BTHWC
    if z_BTHWC is None:
        z_BTHWC = model.encode(batch.pixels_BFHWC)
    t_BT = frame_times(draw_times(time_key, len(z_BTHWC), shift), clean_BT)
    eps = jax.random.normal(noise_key, z_BTHWC.shape)
    z_t, u = noised(z_BTHWC, eps, t_BT)
    _, T, H, W, _ = z_BTHWC.shape
    visual = model.look(batch.visual)
    if guidance is not None:
        visual = dataclasses.replace(visual, guidance_B=jnp.full(len(z_BTHWC), guidance))
    plan = model.plan(batch.texts, (T, H, W), dropout_key)
    return flow_loss(model.velocity(z_t, t_BT, plan, visual), u, clean_BT)


def next_token(model: Qwen, batch: TextBatch, key: jax.Array) -> jax.Array:
    """Cross-entropy of the next token where the batch weighs it."""
    del key
    states_BLD, _ = model.prefix(batch.prompt)
    logits = model.language.logits(states_BLD[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.prompt.ids_BL[:, 1:])
    weight = batch.weight_BL[:, 1:]
    return jnp.sum(weight * loss) / jnp.sum(weight)


# config.objective -> config -> loss(model, batch, key)
OBJECTIVES = {
    'flow': lambda config: functools.partial(
        flow_matching,
        shift=config.flow.train_shift,
        guidance=config.flow.get('embedded_guidance'),
    ),
    'next_token': lambda config: next_token,
}
