"""The canvas does nothing at the start, then everything learns, and clean frames stay clean."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metacanvas_jax.canvas.canvas_connector import Canvas
from metacanvas_jax.canvas.fusion import FUSIONS, CanvasBlock, DitFusion
from metacanvas_jax.flow.loss import flow_loss
from metacanvas_jax.layers.attention import linear_attention
from metacanvas_jax.layers.conv import depthwise_conv
from metacanvas_jax.types import Patches, Visual
from tests import tiny

BACKBONES = {'sana': (tiny.sana, (1, 4, 6), 12), 'video': (tiny.video, (5, 8, 12), 3)}
TIMES = jnp.array([0.3, 0.8])


@functools.cache
def _model(kind: str, row: str = 'full', zero=tiny.PROJECTIONS, **canvas):
    """Random everywhere, but for P1 and P2 where they are `zero`."""
    lora = None if row == 'baseline' else tiny.LORA
    changes = {'stride': 1, **tiny.ROWS[row], **canvas}
    return tiny.randomised(tiny.metacanvas(BACKBONES[kind][0], lora=lora, **changes), zero=zero)


def _inputs(kind: str, latents=None):
    """Noisy latents, times, and no clean frames."""
    _, grid, channels = BACKBONES[kind]
    T, h, w = latents or grid
    t_BT = jnp.repeat(TIMES[:, None], T, 1)
    return tiny.normal(2, T, h, w, channels), t_BT, Visual(clean_BT=jnp.zeros((2, T)))


@functools.partial(jax.jit, static_argnames='latents')
def plan(model, prompt, latents):
    return model.plan(prompt, latents)


@jax.jit
def fused(model, z, t_BT, plan, visual):
    """The latents and the token grid that the DiT gets."""
    z = model.canvas.fusion.before_patchify(z, plan.canvas, visual.clean_BT)
    patches = patchify(model.backbone, z, visual)
    return z, model.canvas.fusion.after_patchify(patches, plan.canvas, t_BT, visual.clean_BT)


patchify = jax.jit(lambda backbone, z, visual: backbone.patchify(z, visual))
velocity = jax.jit(
    lambda backbone, patches, t, plan: backbone.velocity(
        patches, t, plan.context_BLD, plan.context_length_B
    )
)
whole = jax.jit(lambda model, z, t, plan, visual: model.velocity(z, t, plan, visual))


# ------------------------------------------------------------ at the start

CASES = [('sana', row, {}, None) for row in tiny.ROWS]
CASES += [('sana', 'full', {'stride': 2}, (1, 7, 5)), ('sana', 'before patchify', {}, (1, 2, 9))]
CASES += [
    ('video', row, {'keyframes': K, 'stride': 2}, None)
    for row in ('full', 'no vanilla', 'before patchify')
    for K in (1, 3)
]
CASES += [('video', 'full', {'keyframes': 3, 'stride': 2}, (1, 6, 10))]


@pytest.mark.parametrize(('kind', 'row', 'canvas', 'latents'), CASES)
def test_a_new_canvas_changes_no_bit_of_the_velocity(kind, row, canvas, latents):
    model = _model(kind, row, **canvas)
    z, t_BT, visual = _inputs(kind, latents)
    made = plan(model, tiny.texts(), z.shape[1:4])
    z_fused, patches = fused(model, z, t_BT, made, visual)
    plain = patchify(model.backbone, z, visual)
    np.testing.assert_array_equal(z_fused, z)
    np.testing.assert_array_equal(patches.target_BThwD, plain.target_BThwD)
    found = velocity(model.backbone, patches, t_BT, made)
    expected = velocity(model.backbone, plain, t_BT, made)
    np.testing.assert_array_equal(found, expected)
    if kind == 'video' or row == 'full':
        assert tiny.error(whole(model, z, t_BT, made, visual), expected) <= 1e-6
    if row == 'baseline':
        return
    # With P1 and P2 random the same programs do change it.
    trained = _model(kind, row, zero=(), **canvas)
    made = plan(trained, tiny.texts(), z.shape[1:4])
    _, patches = fused(trained, z, t_BT, made, visual)
    assert tiny.error(velocity(trained.backbone, patches, t_BT, made), expected) > 1e-2


@pytest.mark.parametrize(
    ('row', 'expected'),
    [
        ('full', {'project', 'out'}),
        ('no time', {'project', 'out'}),
        ('no block', {'project'}),
        ('no vanilla', {'project'}),
        ('before patchify', {'project'}),
    ],
)
def test_only_the_projections_start_at_zero(row, expected):
    """Two of them only where the noisy latents come in between: else neither would ever learn."""
    config = tiny.canvas_config(**tiny.ROWS[row])
    backbone = tiny.randomised(tiny.sana)
    start = jax.jit(lambda key: Canvas(config, 64, backbone, rngs=nnx.Rngs(key)))(jax.random.key(0))
    values = tiny.named(start)
    zero = {name for name, value in values.items() if value.ndim > 1 and not np.any(value)}
    assert zero == {f'fusion/{name}/kernel' for name in expected}
    assert not any(np.any(values[f'fusion/{name}/bias']) for name in expected)


# ------------------------------------------------------------ who learns when

# (path, first step at which it has a gradient): spec.md section 3.7.
LEARNING = {
    'full': {
        'canvas/fusion/out/': 0,
        'backbone/': 0,
        'context/': 0,
        'canvas/fusion/project/': 1,
        'canvas/fusion/block/': 1,
        'canvas/fusion/time/': 1,
        'canvas/align/': 2,
        'canvas/tokens/': 2,
        '/lora/b': 2,
        '/lora/a': 3,
    },
    'no vanilla': {
        'canvas/fusion/project/': 0,
        'backbone/': 0,
        'context/': 0,
        'canvas/tokens/': 1,
        '/lora/b': 1,
        '/lora/a': 2,
    },
}


@pytest.mark.parametrize(('kind', 'row'), [('sana', 'full'), ('video', 'no vanilla')])
def test_gradients_arrive_one_projection_at_a_time(kind, row):
    model = _model(kind, row, zero=(*tiny.PROJECTIONS, '/lora/b'))
    z, t_BT, visual = _inputs(kind)
    target, prompt = tiny.normal(*z.shape, seed=5), tiny.texts()
    learning = LEARNING[row]

    def wanted(path, _):
        return any(part in '/'.join(map(str, path)) for part in learning)

    graphdef, trainable, frozen = nnx.split(model, wanted, ...)

    @jax.jit
    @jax.grad
    def gradients(trainable):
        model = nnx.merge(graphdef, trainable, frozen)
        made = model.plan(prompt, z.shape[1:4])
        return flow_loss(model.velocity(z, t_BT, made, visual), target, visual.clean_BT)

    tx = optax.adamw(1e-2, weight_decay=0.0)
    update = jax.jit(tx.update)
    state = tx.init(trainable)
    for step in range(4):
        grads = gradients(trainable)
        for path, gradient in nnx.to_flat_state(grads):
            name = '/'.join(map(str, path))
            first = next(first for part, first in learning.items() if part in name)
            assert bool(np.any(gradient[...])) == (step >= first), (step, name)
        updates, state = update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)


# ------------------------------------------------------------ frames and times


def _fusion(**changes):
    """A trained fusion of the video toy, its token grid and its canvas."""
    config = tiny.canvas_config(keyframes=3, **changes)
    fusion = tiny.randomised(
        lambda rngs: FUSIONS[config.fuse](config, 64, tiny.video(rngs), rngs=rngs), zero=()
    )
    patches = Patches(target_BThwD=tiny.normal(2, 5, 4, 6, 64, seed=1), extra=tiny.normal(2, 3))
    return fusion, patches, fusion.prepare(tiny.normal(2, 3, 2, 3, 64, seed=2), (5, 4, 6))


after = jax.jit(lambda fusion, *args: fusion.after_patchify(*args))
features = jax.jit(lambda fusion, *args: fusion.features(*args))


@pytest.mark.parametrize('row', ['full', 'no time', 'no block', 'before patchify'])
def test_clean_frames_are_left_alone(row):
    """Any trained canvas; and what is not a target is not even offered to it."""
    model = _model('video', row, zero=(), keyframes=3, stride=2)
    clean_BT = jnp.array([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0]], jnp.float32)
    z, t_BT, _ = _inputs('video')
    t_BT, visual = t_BT * (1 - clean_BT), Visual(clean_BT=clean_BT)
    made = plan(model, tiny.texts(), (5, 8, 12))
    z_fused, patches = fused(model, z, t_BT, made, visual)
    plain = patchify(model.backbone, z, visual)
    same_z = (np.asarray(z_fused) == z).all((2, 3, 4))
    same_x = (np.asarray(patches.target_BThwD) == plain.target_BThwD).all((2, 3, 4))
    np.testing.assert_array_equal(same_x, clean_BT)
    np.testing.assert_array_equal(same_z, clean_BT if row == 'before patchify' else np.ones((2, 5)))
    same_v = velocity(model.backbone, patches, t_BT, made) == velocity(
        model.backbone, plain, t_BT, made
    )
    np.testing.assert_array_equal(np.asarray(same_v).all((2, 3, 4)), clean_BT)


def test_what_is_not_a_target_passes_through():
    for fuse in ('dit', 'add', 'latents'):
        fusion, patches, canvas = _fusion(fuse=fuse)
        found = fusion.after_patchify(patches, canvas, jnp.full((2, 5), 0.3), jnp.zeros((2, 5)))
        np.testing.assert_array_equal(found.extra, patches.extra)


def test_a_frame_depends_on_its_own_tokens_and_canvas():
    fusion, patches, canvas = _fusion()
    t_BT = jnp.full((2, 5), 0.3)
    before = np.asarray(features(fusion, patches, canvas, t_BT))
    x = patches.target_BThwD
    for f in range(5):
        for other in (
            features(fusion, patches.replace(target_BThwD=x.at[:, f].add(1)), canvas, t_BT),
            features(fusion, patches, canvas.at[:, f].add(1), t_BT),
        ):
            changed = (np.asarray(other) != before).any((2, 3, 4))
            np.testing.assert_array_equal(changed, [np.arange(5) == f] * 2)


@pytest.mark.parametrize(('time', 'acts'), [('adaln', True), ('none', False)])
def test_time_acts_only_where_it_is_a_condition(time, acts):
    fusion, patches, canvas = _fusion(time=time)
    a, b = (features(fusion, patches, canvas, jnp.full((2, 5), t)) for t in (0.3, 0.31))
    assert bool(np.any(np.asarray(a) != b)) == acts


def test_time_of_a_sample_is_its_last_frame():
    """Frames given clean are at time 0 and come first; each sample has its own time."""
    fusion, patches, canvas = _fusion()
    scalar = np.asarray(features(fusion, patches, canvas, jnp.repeat(TIMES[:, None], 5, 1)))
    mixed = jnp.repeat(TIMES[:, None], 5, 1).at[:, :2].set(0)
    np.testing.assert_array_equal(features(fusion, patches, canvas, mixed), scalar)
    for row, t in enumerate(TIMES):
        alone = features(fusion, patches, canvas, jnp.full((2, 5), t))
        assert tiny.error(alone[row], scalar[row]) <= 1e-5
        assert tiny.error(alone[1 - row], scalar[1 - row]) > 1e-3


# ------------------------------------------------------------ the block


def _block(**changes):
    block = tiny.randomised(lambda rngs: CanvasBlock(64, rngs=rngs))
    return tiny.replaced(block, changes) if changes else block


def test_linear_attention_is_a_normalised_kernel_sum():
    q, k, v = (tiny.normal(2, 7, 3, 8, seed=seed) for seed in range(3))
    weight = jnp.einsum('bsne,blne->bnsl', jax.nn.relu(q), jax.nn.relu(k))
    weight = weight / weight.sum(-1, keepdims=True)
    expected = jnp.einsum('bnsl,blne->bsne', weight, v)
    assert tiny.error(linear_attention(q, k, v), expected) <= 1e-5


def test_linear_attention_of_a_dead_query_is_zero_with_finite_gradient():
    q = -jnp.abs(tiny.normal(1, 3, 1, 4))
    k, v = tiny.normal(1, 3, 1, 4, seed=1), tiny.normal(1, 3, 1, 4, seed=2)
    value, grads = jax.value_and_grad(lambda *qkv: linear_attention(*qkv).sum(), (0, 1, 2))(q, k, v)
    assert value == 0
    assert all(np.isfinite(g).all() for g in grads)
    zero = jnp.zeros((1, 3, 1, 4))
    assert not np.any(jax.grad(lambda q: linear_attention(q, k, v).sum())(zero))


@pytest.mark.parametrize('local', [False, True])
def test_block_knows_places_by_its_convolution_alone(local):
    kernel = np.zeros((3, 3, 320), np.float32)
    kernel[1, 1] = 1
    block = _block() if local else _block(**{'ff/conv_depth/kernel': kernel})
    x, time = tiny.normal(2, 4, 5, 64), tiny.normal(2, 6, 64, seed=1)
    order = np.random.default_rng(0).permutation(20)

    def permuted(x):
        return x.reshape(2, 20, 64)[:, order].reshape(2, 4, 5, 64)

    run = jax.jit(lambda x: block(x, time))
    difference = tiny.error(run(permuted(x)), permuted(run(x)))
    assert (difference > 1e-2) if local else (difference <= 1e-5)


def test_nothing_but_its_own_table_modulates_without_time():
    """Time 'none' is the block at e = 0 (spec.md section 3.8)."""
    fusion, patches, canvas = _fusion(time='none')
    assert isinstance(fusion, DitFusion)
    x = (patches.target_BThwD + canvas).reshape(10, 4, 6, 64)
    expected = fusion.out(fusion.block(x, jnp.zeros((10, 6, 64)))).reshape(2, 5, 4, 6, 64)
    assert tiny.error(features(fusion, patches, canvas, jnp.full((2, 5), 0.3)), expected) <= 1e-5


# ------------------------------------------------------------ the convolution


def _plain_conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
        precision='highest',
    )


@pytest.mark.parametrize(
    ('size', 'k'),
    [((4, 6), 3), ((5, 7), 3), ((1, 1), 3), ((3, 1), 3), ((2, 65), 3), ((3, 7), 5), ((1, 1), 5)],
)
@pytest.mark.parametrize('branch', ['cpu', 'default'])
def test_depthwise_convolution_and_its_gradient(size, k, branch, monkeypatch):
    """Cross-correlation with zero padding, as a CPU and as a GPU compute it; and by autodiff."""
    x, kernel = tiny.normal(2, *size, 4), tiny.normal(k, k, 4, seed=1)
    weight = tiny.normal(2, *size, 4, seed=2)
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, **ways: ways[branch](*args))

    def run(conv):
        def total(x, kernel):
            y = conv(x, kernel)
            return jnp.sum(weight * y), y

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, kernel)

    (_, y), grads = run(depthwise_conv)
    (_, expected), expected_grads = run(_plain_conv)
    for ours, theirs in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert tiny.error(ours, theirs) <= 1e-5


def test_depthwise_convolution_does_not_flip_its_kernel():
    x = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1)
    kernel = jnp.arange(9.0).reshape(3, 3, 1)
    np.testing.assert_array_equal(depthwise_conv(x, kernel)[0], kernel[::-1, ::-1])


def test_feed_forward_applies_silu_before_the_convolution_and_on_the_gate():
    ff = _block().ff
    x = tiny.normal(1, 3, 4, 64)
    y = _plain_conv(jax.nn.silu(ff.conv_inverted(x)), ff.conv_depth.kernel[...])
    a, b = jnp.split(y + ff.conv_depth.bias[...], 2, -1)
    assert a.shape[-1] == int(2.5 * 64)
    expected = (a * jax.nn.silu(b)) @ ff.conv_point.kernel[...]
    assert tiny.error(ff(x), expected) <= 1e-5


def test_rows_are_the_rows_of_the_paper():
    """Each changes what it says and nothing else."""
    configs = {row: tiny.canvas_config(**changes) for row, changes in tiny.ROWS.items()}
    full = configs.pop('full')
    for row, config in configs.items():
        assert dataclasses.replace(full, **tiny.ROWS[row]) == config != full
