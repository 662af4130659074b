"""The canvas on Wan: nothing at first, never on references or given frames (I1, I13, I15)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.backbones.wan import Wan
from metacanvas_jax.backbones.wan_config import WanConfig
from metacanvas_jax.flow.loss import flow_loss
from metacanvas_jax.flow.path import frame_times
from metacanvas_jax.types import Visual
from tests import tiny

CONFIG = WanConfig(
    in_channels=28,
    out_channels=12,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
    ffn_dim=96,
    freq_dim=32,
    text_dim=4096,
    patch_size=2,
    eps=1e-6,
    text_embedder='none',
)
T, H, W = 3, 8, 12
Z, TARGET = tiny.normal(2, T, H, W, 12), tiny.normal(2, T, H, W, 12, seed=1)
CLEAN = jnp.array([[1.0, 0, 0], [0, 0, 0]])
VISUAL = Visual(
    clean_BT=CLEAN,
    references_BRHWC=tiny.normal(2, 2, H, W, 12, seed=2),
    condition_BTHWC=tiny.normal(2, T, H, W, 12, seed=3),
    mask_BTHW4=jnp.round(jax.random.uniform(jax.random.key(0), (2, T, H, W, 4))),
)
TIMES = frame_times(jnp.array([0.3, 0.8]), CLEAN)


def _wan(rngs) -> Wan:
    return Wan(CONFIG, remat='none', dtype=jnp.float32, rngs=rngs)


@functools.cache
def _model(zero=tiny.PROJECTIONS):
    make = tiny.metacanvas(_wan, lora=tiny.LORA, keyframes=3, stride=2)
    return tiny.randomised(make, zero=zero)


plan = jax.jit(lambda model, prompt: model.plan(prompt, (T, H, W)))
patchify = jax.jit(lambda model, visual: model.backbone.patchify(Z, visual))
fuse = jax.jit(
    lambda model, patches, plan: model.canvas.fusion.after_patchify(
        patches, plan.canvas, TIMES, CLEAN
    )
)
velocity = jax.jit(
    lambda model, patches, plan: model.backbone.velocity(
        patches, TIMES, plan.context_BLD, plan.context_length_B
    )
)


def test_a_new_canvas_changes_no_bit():
    model = _model()
    made, plain = plan(model, tiny.texts()), patchify(model, VISUAL)
    fused = fuse(model, plain, made)
    np.testing.assert_array_equal(fused.target_BThwD, plain.target_BThwD)
    expected = velocity(model, plain, made)
    np.testing.assert_array_equal(velocity(model, fused, made), expected)
    whole = jax.jit(lambda model: model.velocity(Z, TIMES, made, VISUAL))(model)
    assert whole.shape == Z.shape
    assert tiny.error(whole, expected) <= 1e-6


def test_a_trained_canvas_acts_on_noisy_frames_alone():
    model = _model(zero=())
    made, plain = plan(model, tiny.texts()), patchify(model, VISUAL)
    fused = fuse(model, plain, made)
    assert plain.extra.shape == (2, 2, H // 2, W // 2, 64)
    np.testing.assert_array_equal(fused.extra, plain.extra)
    same = (np.asarray(fused.target_BThwD) == plain.target_BThwD).all((2, 3, 4))
    np.testing.assert_array_equal(same, CLEAN)
    # Through the attention it reaches all of the velocity.
    changed = np.asarray(velocity(model, fused, made) != velocity(model, plain, made))
    assert changed.any((2, 3, 4)).all()


def test_the_canvas_is_told_the_time_of_noisy_frames():
    """That of a sample's last frame; references and given frames are at 0 and come first."""
    model = _model(zero=())
    features = jax.jit(lambda t_BT: model.canvas.fusion.features(patches, canvas, t_BT))
    patches, canvas = patchify(model, VISUAL), plan(model, tiny.texts()).canvas
    mixed, scalar = features(TIMES), features(jnp.broadcast_to(TIMES[:, -1:], (2, T)))
    np.testing.assert_array_equal(mixed, scalar)
    assert tiny.error(features(TIMES + 0.01), scalar) > 1e-4


@pytest.mark.parametrize('part', ['references_BRHWC', 'condition_BTHWC', 'mask_BTHW4'])
def test_all_that_is_seen_matters(part):
    """And no reference is where another one was."""
    model = _model()
    made = plan(model, tiny.texts())
    found = []
    for change in (lambda a: a, lambda a: a.at[0].set(a[0, ::-1])):
        visual = VISUAL.replace(**{part: change(getattr(VISUAL, part))})
        found.append(np.asarray(velocity(model, patchify(model, visual), made)))
    assert tiny.error(found[1][0], found[0][0]) > 1e-4
    np.testing.assert_array_equal(found[1][1], found[0][1])


def test_every_parameter_of_the_backbone_learns():
    """From noised frames alone, with all that it can see."""
    model = _model()
    made = plan(model, tiny.texts())

    @jax.jit
    @jax.grad
    def gradients(backbone):
        patches = backbone.patchify(Z, VISUAL)
        v = backbone.velocity(patches, TIMES, made.context_BLD, made.context_length_B)
        return flow_loss(v, TARGET, CLEAN)

    for name, gradient in tiny.named(gradients(model.backbone)).items():
        assert np.any(gradient), name
