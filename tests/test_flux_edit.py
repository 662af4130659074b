"""configs/flux_edit.py (Table 13): its full sizes, and what a tiny run of it changes."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import flux_edit
from metacanvas_jax.build import build_model
from metacanvas_jax.data import kontext_sizes
from metacanvas_jax.data.tasks import Asked
from metacanvas_jax.loading import check_model
from metacanvas_jax.readers import READERS
from metacanvas_jax.sharding import shardings
from metacanvas_jax.text_encoders.base import read_vector_config
from metacanvas_jax.train.objective import OBJECTIVES, flow_matching
from metacanvas_jax.train.optim import OptimizerConfig, make_optimizer
from metacanvas_jax.train.state import split_model, start
from metacanvas_jax.train.step import make_train_step
from metacanvas_jax.train.trainable import parameter_sizes
from metacanvas_jax.types import Batch, InputError, Visual
from tests import tiny
from tests.test_bad_input import script
from tests.test_samples import edit, edit_lines

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
COUNTS = {  # spec.md sections 5.2, 4, 3.9 and 2.7
    r'backbone/transformer_blocks/.*': 1_793_653_504,
    r'backbone/single_transformer_blocks/.*': 2_152_388_096,
    r'context/.*': 94_388_224,
    r'canvas/.*': 353_900_032,
    r'mllm/.*': 161_480_704,
}
STEPS = 10


def matches(patterns, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def abstract(config: ConfigDict):
    return jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))


def test_full_size(tmp_path):
    """What learns, part by part; every parameter has a sharding."""
    config = flux_edit.get_config()
    for name, manifest in (('backbone', 'flux1_kontext_dev'), ('vae', 'flux_vae')):
        values = json.loads((MANIFESTS / f'{manifest}.json').read_text())['config']
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps(values))
        config.weights[name] = str(tmp_path / name)
    (tmp_path / 'pooled').mkdir()
    (tmp_path / 'pooled/config.json').write_text('{"width": 768}')
    config.weights.pooled_encoder = str(tmp_path / 'pooled')
    model = abstract(config)
    sizes = parameter_sizes(model)
    learning = {name: size for name, size in sizes.items() if matches(config.trainable, name)}
    for part, count in COUNTS.items():
        assert sum(n for name, n in learning.items() if re.fullmatch(part, name)) == count, part
    assert sum(learning.values()) == sum(COUNTS.values())
    backbone = sum(size for name, size in sizes.items() if name.startswith('backbone/'))
    assert backbone == 11_901_408_320
    # Of a vision branch there is nothing that text alone goes through.
    assert not [name for name in learning if 'add' in name or 'context_embedder' in name]
    shardings(nnx.state(model), tiny.one_device())
    (tmp_path / 'pooled/config.json').write_text('{"width": 512}')
    with pytest.raises(InputError, match=r'a vector of width 512, config.backbone takes 768'):
        abstract(config)
    (tmp_path / 'pooled/config.json').write_text('{"hidden_size": 768}')
    with pytest.raises(InputError, match=r'is not what python -m convert pool writes'):
        read_vector_config(tmp_path / 'pooled')


# ---------------------------------------------------------------- tiny


def small() -> ConfigDict:
    config, other = flux_edit.get_config(), tiny.config()
    config.update(batch_size=2, dtype='float32', steps=STEPS)
    config.weights = dict.fromkeys(config.weights, 'random')
    config.mllm.update(size='tiny', remat='full')
    config.mllm.lora.update(rank=2, alpha=2.0)
    config.prompt.update(tokenizer='tiny_qwen', buckets=(64,), max_text=16)
    config.prompt.update(windows=(2,), min_pixels=32 * 32, max_pixels=32 * 32)
    config.pooled_encoder = dict(kind='stored', width=20)
    config.context.hidden = 32
    config.canvas.update(grid=(2, 2), head_dim=32)
    config.backbone = dict(
        kind='flux',
        remat='full',
        in_channels=48,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    config.vae = dict(kind='pixel', stride=2)
    config.optimizer = dict(other.optimizer, warmup_lr=2e-3, factors=(('canvas/.*', 2.0),))
    return config


@pytest.fixture(scope='module')
def system():
    """The config, a model of which the canvas alone is new, and a batch of two edits."""
    config = small()
    model = tiny.randomised(lambda _: build_model(config, jax.random.key(0)))
    visual = Visual(np.zeros((2, 1)), context_images=(np.asarray(tiny.normal(2, 12, 20, 3)),))
    batch = Batch(
        texts=READERS['flow'](config).texts('t2i', [Asked('a red circle'), Asked('a cross')]),
        visual=visual,
        pixels_BFHWC=np.asarray(tiny.normal(2, 1, 16, 16, 3, seed=1)),
    )
    return config, model, batch


def test_a_canvas_touches_the_target_alone(system):
    """Bit by bit; and not even that before it is trained."""
    _, model, batch = system

    @jax.jit
    def inputs(model, batch):
        z = model.vae.encode(batch.pixels_BFHWC)
        plan = model.plan(batch.texts, z.shape[1:4])
        visual = model.look(batch.visual).replace(guidance_B=jnp.ones(2))
        before = model.patchify(z, plan, visual)
        t_BT = jnp.full((2, 1), 0.3)
        fusion = model.canvas.fusion
        return before, fusion.after_patchify(before, plan.canvas, t_BT, visual.clean_BT)

    before, after = inputs(model, batch)
    assert before.extra.context_BhwD[0].shape == (2, 3, 5, 32)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    other = tiny.perturbed(tiny.perturbed(model, 'canvas/fusion/project'), 'canvas/fusion/out')
    _, fused = inputs(other, batch)
    assert np.all(np.asarray(fused.target_BThwD) != np.asarray(before.target_BThwD))
    pairs = zip(jax.tree.leaves(fused.extra), jax.tree.leaves(before.extra), strict=True)
    assert all(ours.tobytes() == theirs.tobytes() for ours, theirs in pairs)


def test_tiny_run(system, tmp_path, monkeypatch):
    """All that shall learn has moved by the fifth step, and nothing else by a bit by the tenth."""
    config, model, _ = system
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(kontext_sizes, 'KONTEXT_SIZES', [(16, 24), (24, 16)])
    config = config.copy_and_resolve_references()
    config.data.path = str(edit_lines(tmp_path / 'data', [edit(0), edit(1)]))
    with script('train') as train, monkeypatch.context() as one_device:
        one_device.setattr(jax, 'device_count', lambda: 1)
        batch = train.make_loader(config).batch(0)
    assert batch.pixels_BFHWC.shape == (2, 1, 16, 24, 3)
    assert batch.visual.context_images[0].shape == (2, 16, 24, 3)
    assert batch.texts.mllm.vision
    graphdef, trainable, frozen = split_model(
        lambda _: model,
        check_model(config),
        seed=0,
        frozen_dtype=np.float32,
        mesh=tiny.one_device(),
    )
    before = {name: np.array(value) for name, value in tiny.named(model).items()}
    tx = make_optimizer(OptimizerConfig(**config.optimizer), STEPS)
    state, where = start(trainable, tx, ema=False, mesh=tiny.one_device())
    objective = OBJECTIVES['flow'](config)
    step = make_train_step(graphdef, objective, tx, accumulate=1, ema_decay=0, where=where)
    wanted = {name for name in before if matches(config.trainable, name)}
    for count in range(1, STEPS + 1):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        assert np.isfinite(float(metrics['loss']))
        if count in (STEPS // 2, STEPS):
            after = tiny.named(nnx.merge(graphdef, state.trainable, frozen))
            moved = {name for name in before if np.any(before[name] != np.asarray(after[name]))}
            assert moved == wanted


def test_what_the_loss_sees(system):
    """The context image, CLIP's vector, and the guidance, which is 1 in training."""
    config, model, batch = system
    loss = jax.jit(functools.partial(flow_matching, shift=1.0))
    key = jax.random.key(0)
    plain = loss(model, batch, key, guidance=1.0)
    darker = batch.visual.replace(context_images=(0.5 * batch.visual.context_images[0],))
    assert loss(model, batch.replace(visual=darker), key, guidance=1.0) != plain
    assert loss(tiny.perturbed(model, 'pooled_encoder/'), batch, key, guidance=1.0) != plain
    assert loss(model, batch, key, guidance=3.5) != plain
    assert OBJECTIVES['flow'](config).keywords == dict(shift=1.0, guidance=1.0)


def test_factors_of_the_learning_rate():
    params = nnx.state(nnx.Dict(a=nnx.Param(jnp.ones(3)), b=nnx.Dict(c=nnx.Param(jnp.ones(2)))))
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    values = dict(tiny.config().optimizer, warmup_lr=0.5, weight_decay=0.1)

    def updates(**changes):
        tx = make_optimizer(OptimizerConfig(**values | changes), STEPS)
        found, _ = tx.update(grads, tx.init(params), params)
        return {path[-1]: np.asarray(value[...]) for path, value in nnx.to_flat_state(found)}

    plain = updates()
    ours = updates(factors=[('b/.*', 10.0), ('b/c', 3.0)])
    np.testing.assert_allclose(ours['c'], 10 * plain['c'])
    np.testing.assert_array_equal(ours['a'], plain['a'])
    with pytest.raises(InputError, match=r"pattern 'b' matches none of the 2 parameters that lea"):
        updates(factors=[('b', 10.0)])


def test_every_variant_is_a_run():
    for variant in flux_edit.VARIANTS:
        config = flux_edit.get_config(variant)
        shrunk = small()
        shrunk.update(trainable=config.trainable)
        shrunk.canvas.fuse = config.canvas.fuse
        shrunk.mllm.lora.update(rank=min(2, config.mllm.lora.rank))
        check_model(shrunk)
