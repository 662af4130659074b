"""Stage 3 starts as the published model: its widened input and its canvas change nothing yet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import wan_stage3
from metacanvas_jax.backbones.wan import Wan
from metacanvas_jax.backbones.wan_config import WanConfig
from metacanvas_jax.build import build_part
from metacanvas_jax.checkpoint import save_weights
from metacanvas_jax.flow.path import frame_times
from metacanvas_jax.loading import starting_model
from metacanvas_jax.types import InputError, Visual
from metacanvas_jax.weights import match_weights
from tests import tiny, tiny_wan

PUBLISHED = WanConfig(
    in_channels=12,
    out_channels=12,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=1,
    ffn_dim=48,
    freq_dim=32,
    text_dim=8,
    patch_size=2,
    eps=1e-6,
    text_embedder='mlp',
)
NEW = 'condition_embedding/linear/kernel'
T, H, W = 3, 4, 6


def backbone(config: WanConfig):
    return lambda rngs: Wan(config, remat='full', dtype=jnp.float32, rngs=rngs)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A folder of weights, every one of them random."""
    folder = tmp_path_factory.mktemp('wan')
    model = tiny.randomised(backbone(PUBLISHED), zero=())
    arrays = {name: np.asarray(value) for name, value in tiny.named(model).items()}
    save_weights(folder, arrays, PUBLISHED.to_json())
    return folder, arrays


def config_of(folder, **changes):
    config = tiny_wan.shrink(wan_stage3.get_config())
    config.mllm.size = 'tiny_text'
    config.weights.backbone = str(folder)
    changes = dict(text_embedder='none', **changes)
    config.backbone = dict(kind='wan', size=None, changes=changes, remat='full')
    return config


def test_widened_input_and_new_canvas_change_nothing(published):
    folder, arrays = published
    config = config_of(folder, in_channels=28)
    model = nnx.merge(*starting_model(config, tiny.one_device()))
    found = {name: np.asarray(value) for name, value in tiny.named(model.backbone).items()}
    kept = {name: a for name, a in arrays.items() if not name.startswith('text_embedder/')}
    assert len(kept) < len(arrays)
    assert found.keys() == kept.keys() | {NEW}
    assert not np.any(found[NEW])
    for name, array in kept.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)

    narrow = build_part(config_of(folder), 'backbone', jax.random.key(0), remat='full')
    narrow = tiny.fill(narrow, kept)
    clean_BT = jnp.array([[1.0, 0, 0], [0, 0, 0]])
    z, t_BT = tiny.normal(2, T, H, W, 12), frame_times(jnp.array([0.3, 0.8]), clean_BT)
    visual = Visual(
        clean_BT=clean_BT,
        condition_BTHWC=100 * tiny.normal(2, T, H, W, 12, seed=1),
        mask_BTHW4=tiny.normal(2, T, H, W, 4, seed=2),
    )
    plan = jax.jit(lambda model, texts: model.plan(texts, (T, H, W)))(model, tiny.texts())

    @jax.jit
    def wide(model, visual):
        patches = model.backbone.patchify(z, visual)
        fused = model.canvas.fusion.after_patchify(patches, plan.canvas, t_BT, clean_BT)
        return fused.target_BThwD

    @jax.jit
    def plain(narrow):
        patches = narrow.patchify(z, Visual(clean_BT=clean_BT))
        context = plan.context_BLD, plan.context_length_B
        return patches.target_BThwD, narrow.velocity(patches, t_BT, *context)

    tokens, velocity = plain(narrow)
    # The same bits go into the same blocks.
    np.testing.assert_array_equal(wide(model, visual), tokens)
    whole = jax.jit(lambda model: model.velocity(z, t_BT, plan, visual))(model)
    assert tiny.error(whole, velocity) <= 1e-6
    learned = tiny.perturbed(model, 'condition_embedding')
    assert tiny.error(wide(learned, visual), tokens) > 1e-2


def test_weights_may_lack_what_is_new_and_nothing_else(published, tmp_path):
    folder, arrays = published
    wide = jax.eval_shape(
        lambda: build_part(
            config_of(folder, in_channels=28), 'backbone', jax.random.key(0), remat='full'
        )
    )
    differ = dict(new=('condition_embedding/',), unused=('text_embedder/',))
    state = nnx.state(wide)
    assert NEW not in match_weights(state, folder, '', **differ)
    # Those that a run of stage 3 would export hold it.
    kept = {name: a for name, a in arrays.items() if not name.startswith('text_embedder/')}
    whole = kept | {NEW: np.zeros((2 * 2 * 16, 32), np.float32)}
    save_weights(tmp_path / 'whole', whole, {})
    assert NEW in match_weights(state, tmp_path / 'whole', '', **differ)
    for name, changed, message in (
        ('less', {k: a for k, a in kept.items() if k != 'proj_out/bias'}, 'is missing there'),
        ('more', kept | {'proj_out/gate': np.zeros(3, np.float32)}, 'is unknown here'),
        ('other', whole | {NEW: np.zeros((4, 32), np.float32)}, r'\(4, 32\) there, \(64, 32\)'),
    ):
        save_weights(tmp_path / name, changed, {})
        with pytest.raises(InputError, match=message):
            match_weights(state, tmp_path / name, '', **differ)
