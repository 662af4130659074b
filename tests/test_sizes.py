"""Rows of Table 3 as they are built from configs, and the parameter counts of full-size parts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metacanvas_jax.backbones.sana import Sana, SanaConfig
from metacanvas_jax.build import build_metacanvas
from metacanvas_jax.canvas.canvas_connector import Canvas
from metacanvas_jax.canvas.config import ContextConfig
from metacanvas_jax.canvas.context_connector import ContextConnector
from metacanvas_jax.canvas.fusion import HEAD_DIM, MLP_RATIO
from metacanvas_jax.layers.linear import LoraConfig
from metacanvas_jax.mllm.config import PRESETS
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.train.objective import OBJECTIVES
from metacanvas_jax.train.optim import OptimizerConfig, make_optimizer
from metacanvas_jax.train.state import split_model, start
from metacanvas_jax.train.step import make_train_step
from metacanvas_jax.train.trainable import parameter_sizes, trainable_filter
from metacanvas_jax.types import Batch, InputError, Visual
from tests import tiny

FLOW = OBJECTIVES['flow'](tiny.config())
PARTS = {
    'tokens': 'canvas/tokens/',
    'vanilla': 'canvas/align/',
    'P1': 'canvas/fusion/project/',
    'time': 'canvas/fusion/time/',
    'block': 'canvas/fusion/block/',
    'P2': 'canvas/fusion/out/',
}


def _counts(sizes: dict[str, int]) -> dict[str, int]:
    found = {
        part: sum(size for name, size in sizes.items() if name.startswith(prefix))
        for part, prefix in PARTS.items()
    }
    canvas = sum(size for name, size in sizes.items() if name.startswith('canvas/'))
    assert sum(found.values()) == canvas  # the parts are all there is
    return {part: size for part, size in found.items() if size}


def _expected(m: int, d: int, tokens: int, row: str, pixels: int) -> dict[str, int]:
    """Formulas of spec.md section 3.9: m the MLLM's width, d the DiT's."""
    hidden = int(MLP_RATIO * d)
    block = 6 * d + 3 * d * d + d * d + d  # table, q k v, out
    block += (d + 1) * 2 * hidden + 10 * 2 * hidden + hidden * d  # Mix-FFN
    everything = {
        'tokens': tokens * m,
        'vanilla': 12 * m * m + 13 * m,
        'P1': (m + 1) * d,
        'time': 257 * d + (d + 1) * d + (d + 1) * 6 * d,
        'block': block,
        'P2': (d + 1) * d,
    }
    missing = {
        'full': (),
        'no time': ('time',),
        'no block': ('time', 'block', 'P2'),
        'no vanilla': ('time', 'block', 'P2', 'vanilla'),
        'before patchify': ('time', 'block', 'P2', 'vanilla'),
        'baseline': tuple(PARTS),
    }[row]
    if row == 'before patchify':
        everything['P1'] = (m + 1) * pixels
    return {part: size for part, size in everything.items() if part not in missing}


# ------------------------------------------------------------ Table 3, from configs

TABLE_3 = ['full', 'no time', 'no block', 'no vanilla', 'before patchify', 'baseline']


@pytest.mark.parametrize('row', TABLE_3)
def test_row_of_table_3_has_its_modules(row):
    config = tiny.config(**tiny.ROWS[row])
    model = jax.eval_shape(lambda: build_metacanvas(config, jax.random.key(0)))
    found = _counts(parameter_sizes(model))
    m, d = PRESETS['tiny'].hidden_size, 2 * config.backbone.attention_head_dim
    assert found == _expected(m, d, 4, row, pixels=config.backbone.in_channels)
    trainable_filter(config.trainable if row != 'baseline' else config.trainable[::2], model)


@pytest.mark.parametrize('row', TABLE_3)
def test_row_of_table_3_trains(row):
    """Three steps on short videos with given frames, from the zeros of a new canvas."""
    mesh, changes = tiny.one_device(), {**tiny.ROWS[row], 'keyframes': 3}
    model = tiny.randomised(tiny.metacanvas(tiny.video, **changes))
    patterns = ['backbone/.*', 'context/.*', 'canvas/.*'][: 2 if row == 'baseline' else 3]
    graphdef, trainable, frozen = split_model(
        lambda _: model,
        trainable_filter(patterns, model),
        seed=0,
        frozen_dtype=jnp.float32,
        mesh=mesh,
    )
    tx = make_optimizer(OptimizerConfig(**tiny.config().optimizer), steps=100)
    state, where = start(trainable, tx, ema=False, mesh=mesh)
    step = make_train_step(graphdef, FLOW, tx, accumulate=1, ema_decay=0, where=where)
    clean_BT = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], np.float32)
    batch = Batch(
        texts=tiny.texts(),
        visual=Visual(clean_BT=clean_BT),
        pixels_BFHWC=np.asarray(tiny.normal(2, 5, 8, 12, 3)),
    )
    before = {name: np.array(value) for name, value in tiny.named(model).items()}
    for _ in range(3):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        assert np.isfinite(metrics['loss'])
        assert metrics['skipped'] == 0
    after = tiny.named(nnx.merge(graphdef, state.trainable, frozen))
    still = {name for name, value in before.items() if not np.any(value != after[name])}
    assert still == {name for name in before if name.startswith('mllm/')}


def test_lora_without_canvas_is_refused():
    config = tiny.config(fuse='none')
    config.mllm.lora.update(rank=4, alpha=4.0)
    with pytest.raises(InputError, match='LoRA acts on canvas tokens only'):
        build_metacanvas(config, jax.random.key(0))


@pytest.mark.parametrize(
    ('section', 'key', 'words'),
    [
        ('mllm', 'size', 'config.mllm.size .* there are: 3b, 7b, tiny'),
        ('backbone', 'kind', 'config.backbone.kind .* there are: '),
        ('vae', 'kind', 'config.vae.kind .* there are: '),
    ],
)
def test_unknown_names_are_answered_with_the_known(section, key, words):
    config = tiny.config()
    config[section][key] = 'gone'
    with pytest.raises(InputError, match=words):
        jax.eval_shape(lambda: build_metacanvas(config, jax.random.key(0)))


# ------------------------------------------------------------ full size

# MLLM's width, DiT's width, tokens, grid; counts of the columns of section 3.9.
COLUMNS = {
    'sana 3b': (2048, 2240, (1, 16, 16), (153_523_712, 154_048_000)),
    'sana 7b': (3584, 2240, (1, 16, 16), (260_793_344, 261_710_848)),
    'flux': (3584, 3072, (1, 32, 32), (350_230_016, 353_900_032)),
    'wan': (3584, 3072, (3, 11, 20), (350_230_016, 352_595_456)),
}


@pytest.mark.parametrize('column', COLUMNS)
def test_full_size_connector_has_the_counts_of_the_table(column):
    m, d, (K, h, w), (connector, whole) = COLUMNS[column]
    config = tiny.canvas_config(keyframes=K, grid=(h, w), head_dim=128)
    backbone = types.SimpleNamespace(width=d, patch=2, latent_channels=16)
    canvas = jax.eval_shape(lambda: Canvas(config, m, backbone, rngs=nnx.Rngs(0)))
    found = _counts({f'canvas/{name}': size for name, size in parameter_sizes(canvas).items()})
    assert found == _expected(m, d, K * h * w, 'full', 0)
    assert sum(found.values()) == whole
    assert whole - found['tokens'] == connector
    assert canvas.align.heads == m // 128
    assert canvas.fusion.block.heads == d // HEAD_DIM


def test_full_size_connector_part_by_part():
    """The SANA (3B) column of section 3.9, as printed."""
    assert _expected(2048, 2240, 256, 'full', 0) == {
        'tokens': 524_288,
        'vanilla': 50_358_272,
        'P1': 4_589_760,
        'block': 57_841_280,
        'time': 35_714_560,
        'P2': 5_019_840,
    }


def test_full_size_sana():
    config = SanaConfig(
        in_channels=32,
        num_attention_heads=70,
        attention_head_dim=32,
        num_layers=20,
        num_cross_attention_heads=20,
        caption_channels=2304,
        mlp_ratio=2.5,
        patch_size=1,
        qk_norm=None,
    )
    model = jax.eval_shape(lambda: Sana(config, remat='full', dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(parameter_sizes(model).values()) == 1_604_462_752


@pytest.mark.parametrize(
    ('size', 'rank', 'lora'),
    [('7b', 64, 161_480_704), ('7b', 32, 80_740_352), ('3b', 32, 59_867_136)],
)
def test_full_size_lora(size, rank, lora):
    adapter = LoraConfig(rank=rank, alpha=rank, dropout=0.05)
    model = jax.eval_shape(
        lambda: Qwen(PRESETS[size], adapter, remat='full', dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    sizes = parameter_sizes(model)
    assert sum(size for name, size in sizes.items() if '/lora/' in name) == lora


@pytest.mark.parametrize(
    ('sizes', 'expected'),
    [
        ((3584, 12288, 3072), 81_804_288),
        ((3584, 14336, 3072), 95_437_824),
        ((3584, 12288, 4096), 94_388_224),
    ],
)
def test_full_size_context_connector(sizes, expected):
    d_in, hidden, d_out = sizes
    config = ContextConfig(hidden=hidden, activation='silu', dropout=0.1, skip=0)
    model = jax.eval_shape(lambda: ContextConnector(config, d_in, d_out, rngs=nnx.Rngs(0)))
    assert sum(parameter_sizes(model).values()) == expected
